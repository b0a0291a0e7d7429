"""VeRA: y = base(x) + b * B (d * A x); A, B are random, frozen and one for all sites; d [rank] and b [out] learn.

Kopiczko et al. 2023 (arXiv 2310.11454). A [rank, largest in] and B [largest out, rank] are cut to each site's shape. An
integer hash of (seed, position) gives their values, so that they come out bit for bit the same on any machine and need
not be saved. Start: d 0.1, b zero. `stored` saves them all the same: an adapter of PEFT's brings others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, FromPeft, PeftNames, QuantLinear, Source, trainable


class Projections(nn.Module):
    """The two frozen matrices that all sites share; in the state dict only where they are `stored`."""

    A: Tensor
    B: Tensor

    def __init__(self, bases: Sequence[QuantLinear], rank: int, seed: int, stored: bool) -> None:
        super().__init__()
        inputs, outputs = max(b.in_features for b in bases), max(b.out_features for b in bases)
        for stream, (name, shape) in enumerate((("A", (rank, inputs)), ("B", (outputs, rank)))):
            values = hashed_uniform(shape, 2 * seed + stream, bases[0].device)
            values = values.mul_(math.sqrt(6 / shape[1])).to(bases[0].dtype)  # Kaiming's bound for ReLU
            self.register_buffer(name, values, persistent=stored)


class VeRA(Adapter):
    """Two learned vectors around shared random projections."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        peft_type="VERA",
        tensors={"b": "vera_lambda_b", "d": "vera_lambda_d"},
        options={"rank": "r", "d_initial": "d_initial", "dropout": "vera_dropout"},
        constants={"save_projection": True},
        shared={"A": "vera_A", "B": "vera_B"},
        native=True,
    )

    def __init__(
        self,
        base: QuantLinear,
        *,
        shared: Projections,
        rank: int = 256,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        seed: int = 0,
        stored: bool = False,
    ) -> None:
        super().__init__(base)
        self.shared_state, self.d_initial = shared, d_initial
        self.b = trainable((base.out_features,), base)
        self.d = trainable((rank,), base)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def shared(cls, bases: Sequence[QuantLinear], **options: Any) -> nn.Module | None:
        chosen = {name: options.get(name, cls.options()[name].default) for name in ("rank", "seed", "stored")}
        return Projections(bases, **chosen)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.zeros_(self.b)
        nn.init.constant_(self.d, self.d_initial)

    def projections(self, base: QuantLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of this site."""
        A, B = self.shared_state.A[:, : base.in_features], self.shared_state.B[: base.out_features]
        return A.to(dtype), B.to(dtype)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        A, B = self.projections(base, x.dtype)
        inner = F.linear(self.dropout(x), A) * self.d.to(x.dtype)
        return base(x) + F.linear(inner, B) * self.b.to(x.dtype)

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        A, B = self.projections(base, torch.float32)
        return A, self.b.float().unsqueeze(1) * B * self.d.float(), 1.0

    @classmethod
    def from_peft(cls, given: FromPeft) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        options, sites = super().from_peft(given)
        return options | {"stored": True}, sites

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if not 0 <= options["dropout"] < 1:
            faults.append(f"adapter.dropout must be at least 0 and below 1, not {options['dropout']}")
        if options["seed"] < 0:
            faults.append(f"adapter.seed must be at least 0, not {options['seed']}")
        return faults


def hashed_uniform(shape: Sequence[int], seed: int, device: torch.device, first: int = 0) -> Tensor:
    """fp32 of `shape`, uniform in [-1, 1) in steps of 2^-23, from the first-th number of the seed on."""
    z = hashed(math.prod(shape), seed, device, first)
    return ((_right(z, 40) - 2**23).float() * 2.0**-23).view(*shape)


def hashed(count: int, seed: int, device: torch.device, first: int = 0) -> Tensor:
    """int64 [count] of random bits: splitmix64 of a counter (Steele et al. 2014) that begins at first + 1."""
    z = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
    z = (z + _int64((seed << 40) % (1 << 64))) * _int64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _right(z, shift)) * _int64(factor)
    return z ^ _right(z, 31)


def _right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _int64(value: int) -> int:
    """The signed number with the same 64 bits; integer products wrap around."""
    return value - (1 << 64) if value >> 63 else value
