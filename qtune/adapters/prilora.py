"""PRILoRA: y = base(x) + s B A x; the rank rises from layer to layer, and A is pruned from time to time.

Benedek & Wolf 2024 (arXiv 2401.11316). Layer l = 0 ... L - 1 has the rank r (1 + spread (2 l / (L - 1) - 1)), rounded
and at least 1: with `rank` 8 and `spread` 0.5 from 4 to 12, at the parameters of LoRA with rank 8. The layer is the
first number in a site's name; where a site has none, its place among all sites counts. s = alpha / `rank` everywhere.
Behind every `period` (steps, or below 1 a share of the run) the share `prune` of each row of A becomes zero: where
|A_ij| n_j is least, n_j the norm of the site's j-th input over a step, averaged over steps (n keeps `decay` of what it
was). They go on to learn, and others may be zero the next time. Not behind the last step: nothing could recover.
Start: A Kaiming-uniform, B zero. A [rank of the layer, in], B [out, rank of the layer], n [in].
The comparison within rows (as Wanda's, 2306.11695) and the defaults of `prune`, `period` and `decay` are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import carried
from .base import Adapter, Change, Changes, PeftNames, QuantLinear, Source
from .lora import LoRA, patterns
from .sora import NAMES

ROWS = 256  # of inputs, looked at at a time


class PRILoRA(LoRA):
    """LoRA of a rank that rises with depth, and of an A that is pruned."""

    peft: ClassVar[PeftNames | None] = NAMES
    seen: Tensor
    now: Tensor

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 8,
        alpha: float = 32.0,
        dropout: float = 0.0,
        spread: float = 0.5,
        prune: float = 0.5,
        period: float = 0.1,
        decay: float = 0.9,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout)
        self.prune, self.period, self.decay = prune, period, decay
        sums = torch.zeros(base.in_features, dtype=torch.float32, device=base.device)
        self.register_buffer("seen", sums)  # n
        self.register_buffer("now", sums.clone(), persistent=False)  # n^2 of the step at hand

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        super().reset(base, source)
        self.seen.zero_()

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        if self.prune and self.training and torch.is_grad_enabled():  # where layers are recomputed: once
            self.look(x)
        return super().forward(x, base)

    @torch.no_grad()
    def look(self, x: Tensor) -> None:
        """Add the squares of these inputs [..., in], some rows at a time: no copy of them in fp32 is there."""
        for rows in x.reshape(-1, x.shape[-1]).split(ROWS):
            self.now += rows.to(torch.promote_types(x.dtype, torch.float32)).square().sum(0)

    @classmethod
    def varied(cls, sites: Sequence[str], options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        numbers = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in sites]
        layers = [place if number is None else int(number[1]) for place, number in enumerate(numbers)]
        first, last = min(layers, default=0), max(layers, default=0)
        found = {}
        for name, layer in zip(sites, layers, strict=True) if last > first else ():
            rank = options["rank"] * (1 + options["spread"] * (2 * (layer - first) / (last - first) - 1))
            rank = max(1, int(rank + 0.5))
            found[name] = {"rank": rank, "alpha": options["alpha"] * rank / options["rank"]}
        return found

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return patterns(adapters)

    # ---- in time

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        for one in adapters.values():
            assert isinstance(one, PRILoRA)
            one.now.zero_()  # of a step that was skipped, too
        return {}

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        changes: dict[nn.Parameter, Change] = {}
        for one in adapters.values():
            assert isinstance(one, PRILoRA)
            one.seen.lerp_(one.now.sqrt(), 1 - one.decay)
            if one.prune and carried.begins(step + 1, carried.in_steps(one.period, steps)) and step < steps:
                changes[one.A] = Change(Pruned(one.seen, one.prune), lambda moment: moment)
        return changes

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if not 0 <= options["spread"] < 1:
            faults.append(f"adapter.spread must be at least 0 and below 1, not {options['spread']}")
        for name in ("prune", "decay"):
            if not 0 <= options[name] < 1:
                faults.append(f"adapter.{name} must be at least 0 and below 1, not {options[name]}")
        return faults + carried.cycle_faults(options, None)


class Pruned:
    """A [rank, in] -> the same with the share `prune` of each row, of least |A_ij| n_j, at zero; n [in]."""

    def __init__(self, norms: Tensor, prune: float) -> None:
        self.norms, self.prune = norms, prune

    def __call__(self, A: Tensor) -> Tensor:
        importance = A.abs() * self.norms.to(A.device)
        least = importance.topk(int(self.prune * A.shape[1]), dim=1, largest=False).indices
        return A.scatter(1, least, 0.0)
