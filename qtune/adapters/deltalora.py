"""Delta-LoRA: y = W x + s B A x, and after each step W += ratio s (B A - B' A'), with B' A' of the step before.

Zi et al. 2023 (arXiv 2309.02411; `ratio` is its lambda). The changes of W add up to one product, so nothing has to be
written into the packed base:
    y = base(x) + s B A x + ratio s (B A - B_K A_K) x
with B_K, A_K the factors behind the first `begin` steps (or below 1 that share of the run), from which on W changes
(the paper's K is begin - 1); without `begin` B_K A_K is zero. W counts as constant: A and B get LoRA's gradient, not
that of their whole effect, and x gets that of both. A [rank, in], B [out, rank]; the rank of the update is at most
2 rank.
As in the paper there is no dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import carried
from .base import Adapter, Changes, PeftNames, QuantLinear, replace_values
from .lora import LoRA


class DeltaLoRA(LoRA):
    """LoRA whose changes are added to the weight too."""

    exact_gradient: ClassVar[bool] = False
    peft: ClassVar[PeftNames | None] = None
    grows: ClassVar[Mapping[str, tuple[int, str]]] = MappingProxyType(
        {"begun_A": (0, "begun"), "begun_B": (1, "begun")}
    )
    begun_A: Tensor
    begun_B: Tensor

    def __init__(
        self, base: QuantLinear, *, rank: int = 16, alpha: float = 32.0, ratio: float = 2.0, begin: float = 0.0
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha)
        self.ratio, self.begin = ratio, begin
        like: dict[str, Any] = {"dtype": base.dtype, "device": base.device}
        self.register_buffer("begun_A", torch.empty(0, base.in_features, **like))
        self.register_buffer("begun_B", torch.empty(base.out_features, 0, **like))

    @property
    def whole(self) -> float:
        """What stands before B A now."""
        return self.scale * (1 + self.ratio if self.begin == 0 or len(self.begun_A) else 1)

    def changed(self, x: Tensor, base: QuantLinear) -> Tensor:
        part = self.scale / self.whole
        y = base.product_plus(x, _LessGradient.apply(self.A, part), _LessGradient.apply(self.B, part), self.whole)
        return carried.beside(y, x, self.begun_A, self.begun_B, -self.ratio * self.scale)

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        B = self.B.float() * self.whole, self.begun_B.float() * (-self.ratio * self.scale)
        return torch.cat((self.A, self.begun_A)), torch.cat(B, 1), 1.0

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        for one in adapters.values():
            assert isinstance(one, DeltaLoRA)
            due = one.begin > 0 and step > carried.in_steps(one.begin, steps)
            if due and not len(one.begun_A) and not one.A.is_meta:
                replace_values(one.begun_A, one.A.data.clone())
                replace_values(one.begun_B, one.B.data.clone())
        return {}

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        for one in adapters.values():
            assert isinstance(one, DeltaLoRA)
            if one.begin > 0 and (steps is None or steps > carried.in_steps(one.begin, steps)):
                one.resize({"begun": len(one.A)})

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check({**options, "dropout": 0.0})
        if options["ratio"] <= 0:
            faults.append(f"adapter.ratio must be above 0, not {options['ratio']}: with 0 it is lora")
        begin = options["begin"]
        if not (0 <= begin < 1 or begin == int(begin) > 0):
            faults.append(f"adapter.begin must be a share of the run below 1, or whole steps, not {begin}")
        return faults


class _LessGradient(torch.autograd.Function):
    """A parameter as it is, whose gradient counts only in part."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, part: float) -> Tensor:
        ctx.part = part
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.part, None
