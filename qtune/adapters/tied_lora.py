"""Tied-LoRA: y = base(x) + s v * B (u * A x), s = alpha/rank; A and B are trained and shared, u and v are a site's own.

Renduchintala et al. 2023 (arXiv 2311.09578): their vB uA with all four trained. u [rank] and v [out] begin as ones.
The layers of one size have one A [rank, in], Kaiming-uniform, and one B [out, rank], zero; the paper adapts one layer
a block, the fused q/k/v, so that all of its sites have one size. An integer hash of (seed, position) gives A.
PEFT reads it as a LoRA of u * A and v * B. Left out: the paper's configurations that freeze some of the four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import PeftNames, QuantLinear, Source, trainable
from .factored import Factored
from .vera import hashed_uniform


class Pair(nn.Module):
    """A [rank, in] and B [out, rank] of all layers like `base`. first: the place of A's first number in the hash."""

    def __init__(self, base: QuantLinear, rank: int, seed: int, first: int) -> None:
        super().__init__()
        # fp32: they sum the gradients of all sites
        self.A = trainable((rank, base.in_features), base, torch.float32)
        self.B = trainable((base.out_features, rank), base, torch.float32)
        with torch.no_grad():
            values = hashed_uniform(self.A.shape, seed, base.device, first)
            self.A.copy_(values / base.in_features**0.5)  # Kaiming's bound with a = sqrt(5), as LoRA's
            self.B.zero_()


class TiedLoRA(Factored):
    """One pair of factors for all layers of a size, scaled in each."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA", {}, {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    )

    def __init__(
        self,
        base: QuantLinear,
        *,
        shared: nn.ModuleDict,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        pair = shared[_size(base)]
        assert isinstance(pair, Pair)
        self.tied, self.scale = pair, alpha / rank
        self.u = trainable((rank,), base)
        self.v = trainable((base.out_features,), base)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def shared(cls, bases: Sequence[QuantLinear], **options: Any) -> nn.Module | None:
        rank, seed = (options.get(name, cls.options()[name].default) for name in ("rank", "seed"))
        pairs, drawn = nn.ModuleDict(), 0
        for base in {base.shape: base for base in bases}.values():
            pairs[_size(base)] = Pair(base, rank, seed, drawn)
            drawn += rank * base.in_features
        return pairs

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.ones_(self.u)
        nn.init.ones_(self.v)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = self.tied.A.to(dtype), self.tied.B.to(dtype)
        return A * self.u.to(dtype).unsqueeze(1), B * self.v.to(dtype).unsqueeze(1)


def _size(base: QuantLinear) -> str:
    return f"{base.out_features}x{base.in_features}"
