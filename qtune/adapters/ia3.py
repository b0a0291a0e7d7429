"""(IA)3: y = s * base(x), or y = base(s * x) at feed-forward sites; s is a learned vector of ones at the start.

Liu et al. 2022 (arXiv 2205.05638): keys and values are scaled at the output, the feed-forward block at the input of its
last layer, which is where its activations are. As in PEFT the output's scale covers the bias. s stays fp32: bf16 cannot
hold 1.003.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import Adapter, PeftNames, QuantLinear, Source, matches, trainable

FEEDFORWARD = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "w2")


class IA3(Adapter):
    """One scale a channel."""

    targets: ClassVar[tuple[str, ...]] = ("k_proj", "v_proj", "down_proj")
    peft: ClassVar[PeftNames | None] = PeftNames(
        peft_type="IA3", tensors={"scale": "ia3_l"}, options={}, constants={"feedforward_modules": []}
    )

    def __init__(self, base: QuantLinear, *, feedforward: tuple[str, ...] = FEEDFORWARD) -> None:
        super().__init__(base)
        self.on_inputs = any(matches(base.name, pattern) for pattern in feedforward)
        self.scale = trainable((base.in_features if self.on_inputs else base.out_features,), base, torch.float32)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        # x + (s - 1) x: in bf16 a scale below 1.004 would round to 1
        change = (self.scale - 1).to(x.dtype)
        if self.on_inputs:
            return base(torch.addcmul(x, x, change))
        y = base(x)
        return torch.addcmul(y, y, change)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight, scale = base.dequantize(torch.float32), self.scale.float()
        bias = None if base.bias is None else base.bias.float()
        if self.on_inputs:
            return weight.mul_(scale), bias
        return weight.mul_(scale.unsqueeze(1)), None if bias is None else bias * scale

    def peft_state(self) -> dict[str, Tensor]:
        return {"ia3_l": self.scale.unsqueeze(0 if self.on_inputs else 1)}

    def peft_lists(self) -> tuple[str, ...]:
        return ("feedforward_modules",) if self.on_inputs else ()
