"""MELoRA: y = base(x) + s diag(B_1 A_1 ... B_n A_n) x, s = alpha/rank; n mini LoRAs, each on its part of x and of y.

Ren et al. 2024 (arXiv 2402.17263; code ChasonShi/MELoRA). The blocks of A [rank, in] and B [out, rank], columns and
rows in turn, are the A_i [rank, in/n] and B_i [out/n, rank] of `minis` = n: the values of one LoRA of this rank, and
an update of rank n * rank, which no size of the layer may be below. Where n does not divide a size, the first blocks
are one wider than the others. Start: A_i Kaiming-uniform for their own width, B zero.

A step makes the block-diagonal [n * rank, in] and [out, n * rank] for the moment, once more in the backward, and costs
about what LoRA costs at that rank. Left out: minis of unequal rank. PEFT has no form of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import QuantLinear, Source, draw, recompute, trainable
from .factored import Factored, check_most


class MELoRA(Factored):
    """Small LoRAs along the diagonal."""

    def __init__(
        self, base: QuantLinear, *, rank: int = 8, minis: int = 4, alpha: float = 16.0, dropout: float = 0.0
    ) -> None:
        super().__init__(base)
        check_most(base, "minis", minis, min(base.shape) // rank)
        self.A = trainable((rank, base.in_features), base)
        self.B = trainable((base.out_features, rank), base)
        self.minis, self.scale = minis, alpha / rank
        self.dropout = nn.Dropout(dropout)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        bound = (base.in_features / self.minis) ** -0.5  # Kaiming's with a = sqrt(5), as LoRA's
        draw(self.A, nn.init.uniform_, -bound, bound)
        nn.init.zeros_(self.B)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        below, above = self.A.to(dtype).tensor_split(self.minis, 1), self.B.to(dtype).tensor_split(self.minis)
        return torch.block_diag(*below), torch.block_diag(*above)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        def branch(x: Tensor) -> Tensor:
            A, B = self.factors(x.dtype)  # as wide as n LoRAs: not kept
            return F.linear(F.linear(x, A) * self.scale, B)

        return base.shift(base.product(x) + recompute(branch, self.dropout(x)))

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["minis"] < 1:
            faults.append(f"adapter.minis must be at least 1, not {options['minis']}")
        return faults
