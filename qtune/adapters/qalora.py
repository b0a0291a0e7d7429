"""QA-LoRA: y = base(x) + s B A pool(x), pool the mean of each group of inputs: it merges into the groups' zero points.

Xu et al. 2023, ICLR 2024 (arXiv 2309.14717; code yuhuixu1993/qa-lora). Groups are those of the packed weight, so that
the update is one number for each group of a row, and w = scale (code - zero) takes it up without another code:
zero - s (B A) / (g scale), g the inputs of the group. What is written is as large as the base was, and off by no more
than the rounding of zero points to fp16, 1/256 of a scale at most in int4: less than that of W to bf16. A [rank,
groups] Xavier-uniform, B [out, rank] zero; s = alpha / rank, 16 / 64 as published. A row's last group may be shorter:
its mean is over the inputs that it has. Trained: rank (groups + out) a layer; the update has at most the rank of B A,
so no more than there are groups. For the backward only the means are kept, not x. Left out: sums in place of means,
which is another s; PEFT's form, which is for layers of GPTQ alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, QuantLinear, Scheme, Source, draw, trainable


class QALoRA(Adapter):
    """Low-rank update of the mean of each group."""

    def __init__(
        self, base: QuantLinear, *, rank: int = 64, alpha: float = 16.0, group: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__(base)
        self.group, self.groups = group, -(base.in_features // -group)
        self.A = trainable((rank, self.groups), base)
        self.B = trainable((base.out_features, rank), base)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def refuses(cls, scheme: Scheme, options: Mapping[str, Any]) -> str:
        if "zero" not in scheme.layout((1, 1)):
            return f"qalora merges into zero points, and {scheme.name} has none; legal: int2, int3, int4"
        own = scheme.to_dict()["group"]
        return "" if options["group"] == own else f"adapter.group must be {own}, the group of {scheme}"

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.A, nn.init.xavier_uniform_)
        nn.init.zeros_(self.B)

    def inputs(self, base: QuantLinear, like: Tensor) -> Tensor:
        """[groups]: how many inputs each group has."""
        ends = torch.arange(1, self.groups + 1, device=like.device) * self.group
        return (ends.clamp(max=base.in_features) - (ends - self.group)).to(like)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        missing = -base.in_features % self.group
        sums = F.pad(self.dropout(x), (0, missing)).unflatten(-1, (self.groups, self.group)).sum(-1)
        inner = F.linear(sums / self.inputs(base, x), self.A.to(x.dtype)) * self.scale
        return base(x) + F.linear(inner, self.B.to(x.dtype))

    def change(self, base: QuantLinear) -> Tensor:
        """What every weight of a group gains: [out, groups] in fp64."""
        return self.scale * (self.B.double() @ self.A.double()) / self.inputs(base, self.A.double())

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight, change = base.dequantize(torch.float32), self.change(base).float()
        for columns, gain in zip(weight.split(self.group, 1), change.unbind(1), strict=True):
            columns += gain.unsqueeze(1)
        return weight, None if base.bias is None else base.bias.float()

    @torch.no_grad()
    def merge_into(self, base: QuantLinear) -> bool:
        parts, change = dict(base.parts), self.change(base)
        scale, zero = parts["scale"].double(), parts["zero"].double()
        empty = scale == 0  # a group of zeros, all its codes 0: it takes the change as its scale
        scale = torch.where(empty, change.abs().bfloat16().double(), scale)
        parts["zero"] = (zero - torch.where(scale > 0, change / scale, 0.0)).half()
        parts["scale"] = scale.bfloat16()
        base.set_parts(parts)
        return True

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if not 0 <= options["dropout"] < 1:
            faults.append(f"adapter.dropout must be at least 0 and below 1, not {options['dropout']}")
        if options["alpha"] <= 0:
            faults.append(f"adapter.alpha must be above 0, not {options['alpha']}")
        if options["group"] < 1:
            faults.append(f"adapter.group must be at least 1, not {options['group']}")
        return faults
