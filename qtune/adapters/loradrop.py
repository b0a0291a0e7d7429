"""LoRA-drop: y = base(x) + s B A x; behind a trial, layers whose output s B A x is small share one pair of factors.

Zhou et al. 2024 (arXiv 2402.07721). In the first `trial` of the run (steps, or below 1 a share) all sites train their
own A [rank, in] and B [out, rank], and of each the outputs' squares ||s B A x||^2 are summed over all inputs x. Then,
among the sites of one kind (all `q_proj` of a size), the largest sums that make `share` of the whole keep their factors
and go on with them. The others let go of theirs, with the optimizer's states, and share one pair, which begins anew (B
zero). Where it would be one site alone it keeps its own. s = alpha / `rank`. Start: A Kaiming-uniform, B zero.
A plan counts the trial, in which every site has factors. PEFT reads each site as a LoRA.
Left out: the authors' trial is a run of its own on a part of the data, behind which all begins anew; here it is the
run's beginning, and what the important layers learned in it stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import carried
from .base import Adapter, Change, Changes, PeftNames, QuantLinear, Source, draw, replace_values, trainable
from .factored import Factored

TRIED, CHOSEN, LEAD = 2, 1, 0  # in the trial; behind it; behind it, and others use its factors


class Leads(nn.Module):
    """Of each kind of site the one whose factors the others use; no parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, LoRADrop] = {}


class LoRADrop(Factored):
    """LoRA that layers come to share."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA", {}, {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    )
    # rank: 0 where the kind's lead is used; role: what the site is, by its length
    grows: ClassVar[Mapping[str, tuple[int, str]]] = MappingProxyType(
        {"A": (0, "rank"), "B": (1, "rank"), "role": (0, "role")}
    )
    seen: Tensor
    now: Tensor
    role: Tensor

    def __init__(
        self,
        base: QuantLinear,
        *,
        shared: Leads,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        trial: float = 0.1,
        share: float = 0.9,
    ) -> None:
        super().__init__(base)
        self.A = trainable((rank, base.in_features), base)
        self.B = trainable((base.out_features, rank), base)
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)
        self.leads, self.kind = shared, f"{base.name.rpartition('.')[2]} {base.out_features} x {base.in_features}"
        self.rank, self.trial, self.share = rank, trial, share
        like: dict[str, Any] = {"dtype": torch.float32, "device": base.device}
        self.register_buffer("seen", torch.zeros((), **like))
        self.register_buffer("role", torch.zeros(TRIED, **like))
        self.looks = True  # in the step at hand; a plan is of the trial's
        self.register_buffer("now", torch.zeros((), **like), persistent=False)  # what its forward passes saw

    @classmethod
    def shared(cls, bases: Sequence[QuantLinear], **options: Any) -> nn.Module | None:
        return Leads()

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.A, nn.init.kaiming_uniform_, math.sqrt(5))
        nn.init.zeros_(self.B)
        self.seen.zero_()

    def prepare(self, base: QuantLinear) -> None:
        if len(self.role) == LEAD:
            self.leads.of[self.kind] = self

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        one = self if len(self.A) else self.leads.of[self.kind]
        return one.A.to(dtype), one.B.to(dtype)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        if self.looks and self.training and torch.is_grad_enabled():  # where layers are recomputed: once
            self.look(x)
        return super().forward(x, base)

    @torch.no_grad()
    def look(self, x: Tensor) -> None:
        """Add ||s B A x||^2 of these inputs, without a tensor of the outputs' size."""
        inner, B = F.linear(x.reshape(-1, x.shape[-1]), self.A.to(x.dtype)).float(), self.B.float()
        self.now += ((inner.T @ inner) * (B.T @ B)).sum() * self.scale**2

    # ---- in time

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        for one in adapters.values():
            assert isinstance(one, LoRADrop)
            one.looks = step <= carried.in_steps(one.trial, steps)
            if one.looks:
                one.now.zero_()  # of a step that was skipped
        return {}

    @classmethod
    @torch.no_grad()
    def see_gradients(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        """Only steps that are made count."""
        for one in adapters.values():
            assert isinstance(one, LoRADrop)
            if one.looks:
                one.seen += one.now

    @classmethod
    def after_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        """The choice, at the trial's end or behind the first step after it that is made."""
        kinds: dict[str, list[LoRADrop]] = {}
        for one in adapters.values():
            assert isinstance(one, LoRADrop)
            if step < carried.in_steps(one.trial, steps) or len(one.role) != TRIED or one.A.is_meta:
                return {}
            kinds.setdefault(one.kind, []).append(one)
        changes: dict[nn.Parameter, Change] = {}
        for alike in kinds.values():
            dropped = least([float(one.seen) for one in alike], alike[0].share)
            for place, one in enumerate(alike):
                one.take(CHOSEN if place not in dropped else LEAD if place == dropped[0] else None, changes)
        return changes

    def take(self, role: int | None, changes: dict[nn.Parameter, Change]) -> None:
        """What the site is from now on; None: it uses its kind's lead."""
        replace_values(self.role, self.role.new_zeros(CHOSEN if role is None else role))
        if role is None:
            changes |= {self.A: Change(lambda a: a[:0].clone()), self.B: Change(lambda b: b[:, :0].clone())}
        elif role == LEAD:
            self.leads.of[self.kind] = self
            changes |= {
                self.A: Change(lambda a: a),
                self.B: Change(torch.zeros_like),
            }  # without moments: they begin anew

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        """Every site has factors of its own, as in the trial."""
        for one in adapters.values():
            assert isinstance(one, LoRADrop)
            one.resize({"rank": one.rank, "role": TRIED})

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults, trial = super().check(options), options["trial"]
        if not (0 < trial < 1 or (trial >= 3 and trial == int(trial))):  # B is zero in the first
            faults.append(
                f"adapter.trial must be a share of the run above 0 and below 1, or 3 steps or more, not {trial}"
            )
        if not 0 < options["share"] <= 1:
            faults.append(f"adapter.share must be above 0 and at most 1, not {options['share']}")
        return faults


def least(sums: Sequence[float], share: float) -> list[int]:
    """The places of what is beyond the largest that make `share` of the total, in order; at least two, or none."""
    order = sorted(range(len(sums)), key=lambda place: -sums[place])
    left, total = share * sum(sums), sum(sums)
    kept = 0
    while kept < len(order) and left > 1e-12 * total:
        left -= sums[order[kept]]
        kept += 1
    dropped = sorted(order[kept:])
    return dropped if len(dropped) > 1 and total > 0 else []
