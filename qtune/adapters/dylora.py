"""DyLoRA: y = base(x) + (alpha / b) B[:, :b] A[:b] x; each step trains one rank b, and any of them serves at use.

Valipour et al. 2023 (arXiv 2210.07558). Each step draws b uniformly from `least` to `rank`, by (seed, step), one for
all sites and micro-batches. With `frozen` (the paper's FROZEN) the first b - 1 rows of A and columns of B count as
constant in that step, else all b learn. The authors multiply alpha / rank by sqrt(rank / b) for each of the two that is
cut, which is alpha / b. A row without a gradient in a step still moves by the optimizer's momentum, as theirs do.
`at` is the rank at use: of evaluation, merge and export; 0 is `rank`. It changes nothing that is trained, so that
another value in adapter.json ("adapter": {"at": 4}) makes of the same adapter one of that rank.
Start: A Kaiming-uniform, B zero. A [rank, in], B [out, rank]. Left out: other distributions of b.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Adapter, Changes, PeftNames, QuantLinear
from .lora import LoRA
from .sora import NAMES


class DyLoRA(LoRA):
    """LoRA whose first b ranks are a LoRA too, for each b."""

    peft: ClassVar[PeftNames | None] = NAMES

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        least: int = 1,
        frozen: bool = False,
        at: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout)
        self.alpha, self.rank, self.least, self.seed = alpha, rank, least, seed
        self.frozen, self.at = frozen, at or rank
        self.now = rank  # of the step at hand

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [b, in], B [out, b] and their scale, as the step at hand or the use takes them."""
        b = self.now if self.training else self.at
        A, B = self.A[:b], self.B[:, :b]
        if self.frozen and self.training and b > 1:
            A = torch.cat((A[:-1].detach(), A[-1:]))
            B = torch.cat((B[:, :-1].detach(), B[:, -1:]), 1)
        return A, B, self.alpha / b

    def changed(self, x: Tensor, base: QuantLinear) -> Tensor:
        A, B, scale = self.factors()
        if not (self.dropout.p and self.training):
            return base.product_plus(x, A, B, scale)
        inner = F.linear(self.dropout(x), A.to(x.dtype)) * scale
        return base.product(x) + F.linear(inner, B.to(x.dtype))

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        return self.factors()

    def peft_state(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.A[: self.at], "lora_B.weight": self.B[:, : self.at]}

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        one = next(iter(adapters.values()))
        assert isinstance(one, DyLoRA)
        return {"r": one.at, "lora_alpha": one.alpha}

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        for one in adapters.values():
            assert isinstance(one, DyLoRA)
            one.now = random.Random(f"{one.seed}.{step}").randint(one.least, one.rank)
        return {}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        for name, least in (("least", 1), ("at", 0)):
            if not least <= options[name] <= options["rank"]:
                faults.append(f"adapter.{name} must be {least} to adapter.rank, {options['rank']}, not {options[name]}")
        if options["seed"] < 0:
            faults.append(f"adapter.seed must be at least 0, not {options['seed']}")
        return faults
