"""DoRA: W' = m (W + s B A) / ||W + s B A||, a norm a row; m [out] learns the magnitude, LoRA the direction.

Liu et al. 2024 (arXiv 2402.09353). The norm counts as constant in the backward (section 4.3). The bias is not scaled.
The norm needs no dense W in a step: with P = W A^T, one frozen product on A's rank rows,
    ||w_i + s b_i A||^2 = ||w_i||^2 + 2 s b_i . p_i + s^2 b_i (A A^T) b_i^T
and ||w_i||^2, of the weight as it is packed, is computed once. Start: m is the norm of the rows; it stays fp32, since
bf16 would swallow its updates. Dropout acts on the low-rank branch only
(in training PEFT also drops part of the base's).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import Adapter, PeftNames, QuantLinear, Source, trainable
from .lora import NAMES, LoRA

TINY = 1e-30  # below any squared norm that matters: a row of zeros gets the factor 0, not NaN


class DoRA(LoRA):
    """LoRA with a learned magnitude of each row."""

    exact_gradient: ClassVar[bool] = False  # the norm
    peft: ClassVar[PeftNames | None] = replace(
        NAMES, tensors={**NAMES.tensors, "magnitude": "lora_magnitude_vector"}, constants={"use_dora": True}
    )
    squares: Tensor

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        plus: float = 1.0,
        freeze_a: bool = False,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, plus=plus, freeze_a=freeze_a)
        self.magnitude = trainable((base.out_features,), base, torch.float32)
        self.register_buffer("squares", torch.empty_like(self.magnitude, requires_grad=False), persistent=False)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        super().reset(base, source)
        self.prepare(base)
        self.magnitude.data.copy_(self.squares.clamp(min=TINY).sqrt())

    def prepare(self, base: QuantLinear) -> None:
        self.squares.copy_(base.dequantize(torch.float32).square_().sum(dim=1))

    @torch.no_grad()
    def norm(self, base: QuantLinear, dtype: torch.dtype) -> Tensor:
        """||W + s B A|| of each row, fp32 [out] (or wider, if the parameters are)."""
        wide = torch.promote_types(torch.float32, dtype)
        A, B = self.A.to(dtype), self.B.to(dtype).to(wide)
        P = base.product(A).T.to(wide)
        quadratic = torch.linalg.multi_dot((B, A.to(wide), A.to(wide).T))
        squares = self.squares + self.scale * (B * (2 * P + self.scale * quadratic)).sum(dim=1)
        return squares.clamp(min=TINY).sqrt()

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        # y + (factor - 1) y: in bf16 a factor below 1.004 would round to 1
        y = self.changed(x, base)
        change = (self.magnitude / self.norm(base, x.dtype) - 1).to(x.dtype)
        return base.shift(torch.addcmul(y, y, change))

    low_rank = Adapter.low_rank  # the magnitude scales the base, too

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight = base.dequantize(torch.float32).addmm_(self.B.float(), self.A.float(), alpha=self.scale)
        factor = self.magnitude.float() / torch.linalg.vector_norm(weight, dim=1).clamp(min=TINY**0.5)
        return weight.mul_(factor.unsqueeze(1)), None if base.bias is None else base.bias.float()
