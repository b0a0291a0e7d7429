"""ReLoRA: y = base(x) + s (sum of B_k A_k of finished cycles + B A) x; with each `period` A and B begin anew.

Lialin et al. 2023 (arXiv 2307.05695). The paper adds s B A to W; here the base is packed and the sum is carried in
factors beside it (carried.py: `carry` is the rank they may have, and what happens beyond it). At a restart A is drawn
anew (Kaiming-uniform), B is zero, the rank of what was learned can rise by `rank`, and the learning rate rises to its
schedule again over `rewarm` (steps, or below 1 a share of the cycle; the authors: 100 of 5,000).
Of the optimizer's states the share `prune` becomes zero, by magnitude or at random (`prune_by`; the authors' largest
run: 0.9 by magnitude, others up to 0.999), both moments at the same places. With 1 they begin anew, their count of
steps too, as states that do not have the parameter's shape always do (adamw8, Adafactor).
A [rank, in], B [out, rank]; the rank of the update is at most rank times the number of cycles.
Left out: the paper's warm start with full training; export for PEFT, whose LoRA has one rank for all sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import carried
from .base import Adapter, Change, Changes, QuantLinear

PRUNE_BY = ("magnitude", "random")


class ReLoRA(carried.CarryingLoRA):
    """LoRA that begins anew from time to time."""

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        period: float = 0.25,
        rewarm: float = 0.1,
        prune: float = 0.9,
        prune_by: str = "magnitude",
        carry: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, carry=carry, seed=seed)
        self.period, self.rewarm, self.prune, self.prune_by = period, rewarm, prune, prune_by

    # ---- in time

    @classmethod
    def warmth(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> float:
        one = next(iter(adapters.values()))
        assert isinstance(one, ReLoRA)
        length = carried.in_steps(one.period, steps)
        if step <= length:
            return 1.0
        rise = one.rewarm * length if one.rewarm < 1 else one.rewarm
        return min(1.0, ((step - 1) % length + 1) / max(1.0, rise))

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        changes: dict[nn.Parameter, Change] = {}
        full: list[str] = []
        for name, one in adapters.items():
            assert isinstance(one, ReLoRA)
            if not carried.begins(step, carried.in_steps(one.period, steps)) or one.A.is_meta:
                return {}
            if not one.B.any():
                continue  # nothing to carry, and A is as good as new
            if carried.carry_on(one.carried_A, one.carried_B, one.A.data, one.B.data, one.carry):
                changes |= one.anew(name, step)
            else:
                full.append(f"{name} ({one.carry})")
        carried.tell_full(cls.method, full)
        return changes

    def anew(self, site: str, step: int) -> dict[nn.Parameter, Change]:
        """A drawn anew, B zero, the optimizer's states pruned."""
        drawn = carried.kaiming(self.A.shape, self.seed, step, site)
        return {
            self.A: Change(drawn.to, self.pruned(site, step, "A")),
            self.B: Change(torch.zeros_like, self.pruned(site, step, "B")),
        }

    def pruned(self, site: str, step: int, name: str) -> Callable[[Tensor], Tensor] | None:
        """What becomes of each of a parameter's states; None: they begin anew."""
        if self.prune >= 1:
            return None
        if self.prune_by == "magnitude":
            return Pruning(self.prune)
        chance = torch.rand(getattr(self, name).shape, generator=carried.generator(self.seed, step, site, name))
        return Pruning(self.prune, chance)

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        for one in adapters.values():
            assert isinstance(one, ReLoRA)
            most = min(one.carry, one.A.shape[1], one.B.shape[0])
            restarts = carried.most_restarts(one.period, steps)
            one.resize({"carried": most if restarts is None else min(most, restarts * len(one.A))})

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options) + carried.cycle_faults(options)
        if options.get("rewarm", 0) < 0:
            faults.append(f"adapter.rewarm must be at least 0, not {options['rewarm']}")
        if not 0 <= options.get("prune", 0) <= 1:
            faults.append(f"adapter.prune must be 0 to 1, not {options['prune']}")
        if options.get("prune_by", PRUNE_BY[0]) not in PRUNE_BY:
            faults.append(f"adapter.prune_by must be {' or '.join(PRUNE_BY)}, not {options['prune_by']!r}")
        return faults


class Pruning:
    """Zeros in a parameter's states, in all of them where the first one's (AdamW: the mean's) magnitudes are least, or
    where `chance` is.

    The authors prune each state for itself. Where the mean of squares were zero and the mean were not, a step would
    have no bound: behind a restart A's gradient is zero.
    """

    def __init__(self, share: float, size: Tensor | None = None) -> None:
        self.share, self.size = share, size

    def __call__(self, state: Tensor) -> Tensor:
        if self.size is None:
            self.size = state.abs()
        size = self.size.to(state.device)
        zeros = round(self.share * size.numel())
        return state * (size > size.flatten().kthvalue(zeros).values) if zeros else state
