"""HiRA: y = base(x) + (W o (B A)) x; the elementwise product with W makes a low-rank B A an update of high rank.

Huang et al., ICLR 2025 (OpenReview TwJrTz9cRS). A [rank, in] Kaiming-uniform, B [out, rank] zero. Each step needs a
dense W: it is dequantized inside `recompute`, so nothing of its size is kept for the backward. The update stays a
branch of its own, since 1 + (B A) would lose a small B A in bf16. Left out: dropout.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, PeftNames, QuantLinear, Source, draw, recompute, trainable


class HiRA(Adapter):
    """Hadamard product of W and a low-rank matrix."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        peft_type="HIRA",
        tensors={"A": "hira_A", "B": "hira_B"},
        options={"rank": "r"},
        native=True,
        reads=("hira_dropout",),
    )

    def __init__(self, base: QuantLinear, *, rank: int = 32) -> None:
        super().__init__(base)
        self.A = trainable((rank, base.in_features), base)
        self.B = trainable((base.out_features, rank), base)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.A, nn.init.kaiming_uniform_, math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        def branch(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return F.linear(x, base.dequantize(x.dtype) * (B.to(x.dtype) @ A.to(x.dtype)))

        return base(x) + recompute(branch, x, self.A, self.B)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight = base.dequantize(torch.float32)
        factor = torch.addmm(weight.new_ones(()), self.B.float(), self.A.float())
        return weight.mul_(factor), None if base.bias is None else base.bias.float()
