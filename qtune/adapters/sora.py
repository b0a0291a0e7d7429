"""SoRA: y = base(x) + s B (g * A x); gates g that a proximal step draws to zero, where they are gone at the end.

Ding et al. 2023 (arXiv 2311.11696). Behind each step of the optimizer g becomes sign(g) max(|g| - threshold, 0), the
proximal step of threshold * ||g||_1. The authors take off `threshold` (their sparse_lambda, 1e-4 to 1e-3) at each step,
whatever the learning rate is; so do we. Start: g normal, A Kaiming-uniform, B zero; s = alpha / `rank`.
Gates at exactly zero compute nothing. Where the last `settle` of the run (steps, or below 1 a share) begins, they are
dropped with their rows of A, columns of B and the optimizer's states, and no more is taken off: what is saved is a
smaller adapter. One gate stays in each site. g [rank], A [rank, in], B [out, rank].
Left out: the rising thresholds of their figures, each of which is a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, Change, Changes, PeftNames, QuantLinear, Source, draw, trainable
from .lora import LoRA, patterns

NAMES = PeftNames(
    peft_type="LORA",
    tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
    options={"dropout": "lora_dropout"},
)  # of a LoRA whose rank differs from site to site


class SoRA(LoRA):
    """LoRA with a gate for each of its ranks."""

    peft: ClassVar[PeftNames | None] = NAMES
    grows: ClassVar[Mapping[str, tuple[int, str]]] = MappingProxyType(
        {"A": (0, "rank"), "g": (0, "rank"), "B": (1, "rank")}
    )

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        threshold: float = 1e-3,
        settle: float = 0.1,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout)
        self.g = trainable((rank,), base)
        self.rank, self.threshold, self.settle = rank, threshold, settle

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        super().reset(base, source)
        draw(self.g, nn.init.normal_)

    def changed(self, x: Tensor, base: QuantLinear) -> Tensor:
        A, B = (self.g[:, None] * self.A).to(x.dtype), self.B.to(x.dtype)
        if not (self.dropout.p and self.training):
            return base.product_plus(x, A, B, self.scale)
        return base.product(x) + F.linear(F.linear(self.dropout(x), A) * self.scale, B)

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        return self.g[:, None].float() * self.A.float(), self.B, self.scale

    def peft_state(self) -> dict[str, Tensor]:
        return super().peft_state() | {"lora_A.weight": self.g[:, None] * self.A}

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return patterns(adapters)

    # ---- in time

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        changes: dict[nn.Parameter, Change] = {}
        for one in adapters.values():
            assert isinstance(one, SoRA)
            if step != one.last(steps) + 1 or one.g.is_meta:
                continue
            kept = one.g.nonzero()[:, 0] if one.g.any() else torch.zeros(1, dtype=torch.int64, device=one.g.device)
            if len(kept) == len(one.g):
                continue
            for w, dim in ((one.g, 0), (one.A, 0), (one.B, 1)):
                take = Kept(kept, dim)
                changes[w] = Change(take, take)
        return changes

    def last(self, steps: int) -> int:
        """The last step at which gates are drawn to zero."""
        return steps - (round(self.settle * steps) if self.settle < 1 else int(self.settle))

    @classmethod
    def after_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        return {
            one.g: Change(Shrink(one.threshold), lambda moment: moment)
            for one in adapters.values()
            if isinstance(one, SoRA) and step <= one.last(steps)
        }

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        for one in adapters.values():
            assert isinstance(one, SoRA)
            one.resize({"rank": one.rank})

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        return faults + [
            f"adapter.{name} must be at least 0, not {options[name]}"
            for name in ("threshold", "settle")
            if options[name] < 0
        ]


class Kept:
    """tensor -> its places `where` of the dimension `dim`."""

    def __init__(self, where: Tensor, dim: int) -> None:
        self.where, self.dim = where, dim

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.dim, self.where.to(tensor.device))


class Shrink:
    """tensor -> the proximal step of threshold times its 1-norm."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, tensor: Tensor) -> Tensor:
        return F.softshrink(tensor, self.threshold)
