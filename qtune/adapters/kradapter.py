"""KRAdapter: y = base(x) + alpha (U * V) x, * Khatri-Rao's product of rows: row i of dW is v_i u_i^T.

Albert et al., ICCV 2025 (arXiv 2508.00230; code PaulAlbert31/KRAdapter). With m the smaller side of W and M the larger,
U [m, k1] is zero and V [m, k2] Kaiming-uniform with a = 5 (the code's, not its square root), k1 = floor(sqrt(m)), k2
the least with k1 k2 >= M; rows are cropped to M, and dW is transposed where W has more rows than columns. There is no
rank to choose: dW has rank min(in, out) for almost all U and V, from m (k1 + k2) parameters, as LoRA of rank 64 at
4096 x 4096.
There is no way around the full product with dW: it is made inside `recompute`, so only x, U and V are kept, but a step
multiplies 2.5 times as much as LoRA's (in the backward also the dense gradient of dW, for the moment).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, QuantLinear, Source, draw, recompute, trainable


class KRAdapter(Adapter):
    """Full-rank update of rows that are outer products."""

    def __init__(self, base: QuantLinear, *, alpha: float = 2.0) -> None:
        super().__init__(base)
        rows, columns = sorted(base.shape)
        k1 = math.isqrt(rows)
        self.U = trainable((rows, k1), base)
        self.V = trainable((rows, -(-columns // k1)), base)
        self.scale = alpha

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.V, nn.init.kaiming_uniform_, 5)
        nn.init.zeros_(self.U)

    def delta(self, U: Tensor, V: Tensor, base: QuantLinear) -> Tensor:
        """alpha (U * V) [out, in]."""
        outer = V.unsqueeze(2) @ (self.scale * U).unsqueeze(1)  # a product, whose backward makes nothing of W's size
        cropped = outer.flatten(1)[:, : max(base.shape)]
        return cropped.T if base.out_features > base.in_features else cropped

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        def branch(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
            return F.linear(x, self.delta(U.to(x.dtype), V.to(x.dtype), base))

        return base(x) + recompute(branch, x, self.U, self.V)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight = base.dequantize(torch.float32).add_(self.delta(self.U.float(), self.V.float(), base))
        return weight, None if base.bias is None else base.bias.float()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["alpha"] <= 0:
            faults.append(f"adapter.alpha must be above 0, not {options['alpha']}")
        return faults
