"""LoRA-XS: y = base(x) + s U S R V^T x, s = alpha/rank; U, S, V are the top singular triplets of W, only R is trained.

Balazy et al. 2024 (arXiv 2405.17604; code MohammadrezaBanaei/LoRA-XS). R [rank, rank]: rank^2 values a layer, whatever
its size. A = V^T [rank, in] and B = U S [out, rank] come from W before packing and are saved with the adapter: another
machine's SVD would give others. A is frozen, so that x A^T is kept for the backward and x is not. Start: R zero, the
identity (the authors draw it from N(0, 1e-5)). `svd` and `niter`: the fast SVD and its iterations, or the full one
(starts.py). alpha and rank are equal by default, as in the paper. PEFT reads it as a LoRA of A and B R.
Left out: the bottom triplets and random ones, the paper's ablations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import starts
from .base import PeftNames, QuantLinear, Source, trainable
from .factored import Factored


class LoRAXS(Factored):
    """A small matrix between frozen singular vectors."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA", {}, {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    )
    A: Tensor
    B: Tensor

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 32,
        alpha: float = 32.0,
        dropout: float = 0.0,
        svd: str = "fast",
        niter: int = 10,
    ) -> None:
        super().__init__(base)
        starts.check_rank(base, rank)
        self.scale, self.svd = alpha / rank, (svd, niter)
        self.R = trainable((rank, rank), base)
        for name, shape in (("A", (rank, base.in_features)), ("B", (base.out_features, rank))):
            self.register_buffer(name, torch.empty(shape, dtype=base.dtype, device=base.device))
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight"})

    @torch.no_grad()
    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        u, s, vh = starts.top(starts.weight_of(source).to(base.device), len(self.R), *self.svd)
        self.A.copy_(vh)
        self.B.copy_(u * s)
        nn.init.zeros_(self.R)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.A.to(dtype), self.B.to(dtype) @ self.R.to(dtype)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return super().check(options) + starts.faults(options)
