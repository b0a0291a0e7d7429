"""TeRA: y = base(x) + dW x, dW = (E1 diag(e1) x E2 diag(e2)) G (diag(d1) D1 x diag(d2) D2), x Kronecker's; d, e learn.

Gu et al., ACL 2026 (arXiv 2509.03234). dW unfolds a Tucker network whose core G and factors D, E are random, frozen and
one for all sites; diagonals beside them are all that is trained. That much is the abstract's; the text and the authors'
code (guyuxuan9/TeRA) could not be read. So ours are: two modes a side, of near-equal length, a site taking its part of
the largest site's factors; one rank R for all modes; uniform values from a hash, each tensor scaled to keep the mean
square of what it takes; the start: e1 zero, e2, d1 and d2 one.
G [R^2, R^2], D [R, mode], E [mode, R]: dW has rank up to min(R^2, in, out) from 4 R parameters. Only vectors of R^2 are
kept for the backward; a token costs about R^4 + (in + out) R multiplications: at R = 32 8 % of a 4096 x 4096 base's,
but as many as a 1024 x 1024 base's, where a step takes twice LoRA's time and rank 16 is of use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, QuantLinear, Source, trainable
from .vera import hashed_uniform


def modes(size: int) -> tuple[int, int]:
    """The lengths of the two modes that a side of `size` is folded into; their product is `size` or more."""
    first = math.isqrt(size - 1) + 1
    return first, -(-size // first)


class Network(nn.Module):
    """The frozen core and factors that all sites share; in no state dict."""

    G: Tensor
    D1: Tensor
    D2: Tensor
    E1: Tensor
    E2: Tensor

    def __init__(self, bases: Sequence[QuantLinear], rank: int, seed: int) -> None:
        super().__init__()
        inputs = [max(sides) for sides in zip(*(modes(b.in_features) for b in bases), strict=True)]
        outputs = [max(sides) for sides in zip(*(modes(b.out_features) for b in bases), strict=True)]
        shapes = {"G": (rank * rank, rank * rank)}
        shapes |= {f"D{n}": (rank, size) for n, size in enumerate(inputs, 1)}
        shapes |= {f"E{n}": (size, rank) for n, size in enumerate(outputs, 1)}
        for stream, (name, shape) in enumerate(shapes.items()):
            values = hashed_uniform(shape, len(shapes) * seed + stream, bases[0].device)
            self.register_buffer(name, values.mul_(math.sqrt(3 / shape[1])).to(bases[0].dtype), persistent=False)


class TeRA(Adapter):
    """Learned diagonals in a frozen random tensor network."""

    def __init__(self, base: QuantLinear, *, shared: Network, rank: int = 32, seed: int = 0) -> None:
        super().__init__(base)
        self.shared_state = shared
        self.d = trainable((2, rank), base)
        self.e = trainable((2, rank), base)

    @classmethod
    def shared(cls, bases: Sequence[QuantLinear], **options: Any) -> nn.Module | None:
        chosen = {name: options.get(name, cls.options()[name].default) for name in ("rank", "seed")}
        return Network(bases, **chosen)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.ones_(self.d)
        nn.init.ones_(self.e)
        nn.init.zeros_(self.e.data[0])

    def network(self, base: QuantLinear, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """G, D1, D2, E1, E2 of this site in `dtype`."""
        net, inputs, outputs = self.shared_state, modes(base.in_features), modes(base.out_features)
        cut = (net.G, net.D1[:, : inputs[0]], net.D2[:, : inputs[1]], net.E1[: outputs[0]], net.E2[: outputs[1]])
        return tuple(tensor.to(dtype) for tensor in cut)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        G, D1, D2, E1, E2 = self.network(base, x.dtype)
        d, e = (torch.outer(*pair.to(x.dtype)).flatten() for pair in (self.d.flip(0), self.e))
        folded = F.pad(x, (0, D1.shape[1] * D2.shape[1] - base.in_features)).unflatten(-1, (D1.shape[1], -1))
        # modes change places at each product, so that every one is a plain product of matrices
        inner = F.linear(F.linear(folded, D2).transpose(-1, -2), D1).flatten(-2) * d
        inner = (F.linear(inner, G) * e).unflatten(-1, (len(self.e[0]), -1))
        y = F.linear(F.linear(inner, E2).transpose(-1, -2), E1)
        return base(x) + y.transpose(-1, -2).flatten(-2)[..., : base.out_features]

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        G, D1, D2, E1, E2 = self.network(base, torch.float32)
        (d1, d2), (e1, e2) = self.d.float(), self.e.float()
        D1, D2, E1, E2 = d1.unsqueeze(1) * D1, d2.unsqueeze(1) * D2, E1 * e1, E2 * e2
        inputs = torch.einsum("ai,bj->baij", D1, D2).flatten(2).flatten(0, 1)[:, : base.in_features]
        outputs = torch.kron(E1, E2)[: base.out_features]
        weight = base.dequantize(torch.float32).addmm_(outputs, G @ inputs)
        return weight, None if base.bias is None else base.bias.float()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["seed"] < 0:
            faults.append(f"adapter.seed must be at least 0, not {options['seed']}")
        return faults
