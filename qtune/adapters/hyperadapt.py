"""HyperAdapt: y = a * (W (b * x)), so W' = diag(a) W diag(b); a [out] and b [in] are learned, from ones.

Gurung & Campbell 2025 (arXiv 2509.18629). The update has rank up to min(2 rank(W), in, out) from in + out parameters:
diag(a) W diag(b) - W = (diag(a) - I) W diag(b) + W (diag(b) - I). No dequantized W is needed. a and b stay fp32: bf16
cannot hold 1.003. The text was not read beyond its beginning, and no code of the authors' was found. Ours: the bias is
not scaled, since the equation is of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Adapter, QuantLinear, Source, trainable


class HyperAdapt(Adapter):
    """One scale a row and one a column."""

    def __init__(self, base: QuantLinear) -> None:
        super().__init__(base)
        self.a = trainable((base.out_features,), base, torch.float32)
        self.b = trainable((base.in_features,), base, torch.float32)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.ones_(self.a)
        nn.init.ones_(self.b)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        # x + (b - 1) x: in bf16 a scale below 1.004 would round to 1
        y = base.product(torch.addcmul(x, x, (self.b - 1).to(x.dtype)))
        return base.shift(torch.addcmul(y, y, (self.a - 1).to(y.dtype)))

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight = base.dequantize(torch.float32).mul_(self.a.float().unsqueeze(1)).mul_(self.b.float())
        return weight, None if base.bias is None else base.bias.float()
