"""ABBA: y = base(x) + s ((B1 A1) o (B2 A2)) x; two products of rank r/2 each, elementwise: rank up to r^2/4.

Singhal et al. 2025 (arXiv 2505.14238; code CERT-Lab/abba). Computed as a LoRA of inner rank r^2/4, by the identity
    (B1 A1) o (B2 A2) = B A,  row (k, l) of A = A1[k] * A2[l],  column (k, l) of B = B1[:, k] * B2[:, l]
so nothing of W's size is made. B and A are built inside `recompute`: kept are x and the four factors alone. The branch
costs (in + out) r^2/4 multiplications a token; at 4096 x 4096 and rank 32 that is 12.5 % of the base's.
Start: B1 A1 is the truncated SVD of the weight before packing, each with the root of the singular values; A2 is
Kaiming-uniform (for ReLU, as in the code), B2 zero. A1, A2 [rank/2, in], B1, B2 [out, rank/2]. alpha is s, the code's
sqrt(alpha1 alpha2). Left out: two unequal ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import starts
from .base import Adapter, QuantLinear, Source, draw, recompute, trainable


class ABBA(Adapter):
    """Elementwise product of two low-rank products."""

    def __init__(
        self, base: QuantLinear, *, rank: int = 32, alpha: float = 16.0, svd: str = "fast", niter: int = 10
    ) -> None:
        super().__init__(base)
        starts.check_rank(base, rank // 2)
        self.A1, self.A2 = (trainable((rank // 2, base.in_features), base) for _ in range(2))
        self.B1, self.B2 = (trainable((base.out_features, rank // 2), base) for _ in range(2))
        self.scale, self.svd, self.niter = alpha, svd, niter

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight"})

    @torch.no_grad()
    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        w = starts.weight_of(source).to(base.device)
        B, A = starts.halves(*starts.top(w, self.A1.shape[0], self.svd, self.niter))
        self.B1.copy_(B)
        self.A1.copy_(A)
        draw(self.A2, nn.init.kaiming_uniform_)
        nn.init.zeros_(self.B2)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        def branch(x: Tensor, *factors: Tensor) -> Tensor:
            A1, A2, B1, B2 = (factor.to(x.dtype) for factor in factors)
            A = (A1.unsqueeze(1) * A2).flatten(0, 1)
            B = (B1.unsqueeze(2) * B2.unsqueeze(1)).flatten(1)
            return F.linear(F.linear(x, A) * self.scale, B)

        return base(x) + recompute(branch, x, self.A1, self.A2, self.B1, self.B2)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        one, two = self.B1.float() @ self.A1.float(), self.B2.float() @ self.A2.float()
        weight = base.dequantize(torch.float32).addcmul_(one, two, value=self.scale)
        return weight, None if base.bias is None else base.bias.float()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options) + starts.faults(options)
        if options["rank"] % 2:
            faults.append(f"adapter.rank of abba must be even (2, 4, 6, ...: two halves), not {options['rank']}")
        if options["alpha"] <= 0:
            faults.append(f"adapter.alpha must be above 0, not {options['alpha']}")
        return faults
