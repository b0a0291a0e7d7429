"""HD-PiSSA: y = base(x) + (b A_0 + B_0 a) x; B_0 A_0 are the top `slices` x rank triplets of W and stay, a and b learn.

Wang et al. 2025 (arXiv 2505.18777). There worker i of K holds slice i of the SVD, steps A_i and B_i by Adam, and all
add W -= sum over i of (dB_i A_i + B_i dA_i - dB_i dA_i), while A_i and B_i stay as they began (in the authors' code
too). So the changes add up to b A_0 + B_0 a with b = - sum dB and a = - sum dA, of rank up to 2 K rank, and their
gradients are those of W through A_0 and B_0: this form, in one process, on any base. `rank`: of a slice (there 16),
`slices`: K.
Start: a and b zero; A_0 = S^1/2 V^T [K rank, in], B_0 = U S^1/2 [out, K rank], of W before packing.
Left out: the sum of dB dA, of second order in the learning rate (2e-5 there), whose rank grows with each step; and
workers over torch.distributed, where the gradient of a slice comes from that worker's examples alone.
The authors' alpha is divided out by Adam. `svd` and `niter`: the fast SVD and its iterations, or the full one
(starts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import starts
from .base import Adapter, QuantLinear, Source, trainable


class HDPiSSA(Adapter):
    """Both tangents of the principal part of the weight."""

    A: Tensor
    B: Tensor

    def __init__(self, base: QuantLinear, *, rank: int = 4, slices: int = 8, svd: str = "fast", niter: int = 4) -> None:
        super().__init__(base)
        starts.check_rank(base, rank, slices)
        whole = rank * slices
        self.a = trainable((whole, base.in_features), base)
        self.b = trainable((base.out_features, whole), base)
        self.register_buffer("A", torch.empty_like(self.a.data))
        self.register_buffer("B", torch.empty_like(self.b.data))
        self.svd = (svd, niter)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight"})

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        B, A = starts.halves(*starts.top(starts.weight_of(source), len(self.A), *self.svd))
        self.A.copy_(A)
        self.B.copy_(B)
        nn.init.zeros_(self.a)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        y = base.product_plus(x, self.A, self.b, 1.0)
        return base.shift(y + F.linear(F.linear(x, self.a.to(x.dtype)), self.B.to(x.dtype)))

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        return torch.cat((self.A, self.a)), torch.cat((self.b, self.B), 1), 1.0

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return super().check(options) + starts.faults(options, slices=1)
