"""AdaLoRA: y = base(x) + s P (sigma * Q x); the rank of the sites follows a budget and goes where it is needed.

Zhang et al. 2023 (arXiv 2303.10512). A triplet is a column of P [out, rank], its sigma [rank] and a row of Q [rank,
in]. Added to the loss: `penalty` times the mean of ||P^T P - 1|| and ||Q Q^T - 1||. Start: sigma zero, P and Q normal,
their triplets of length 1 on average (the authors' deviation of 0.02 is that of a width of 2,500); s = alpha / rank.
All ranks sum to b(t) = target + (start - target) (1 - (t - t_init) / (end - t_init))^3, from sites * `rank` to sites *
`target` (below 1: a share of `rank`); end is `t_final` before the last step. Every `interval` steps between the two the
least important triplets go, for good: tensors and the optimizer's states shrink. t_init, t_final and interval are
steps, or below 1 shares of the run. Each site keeps a triplet, by which it can be seen to need more.
Ours is the growth: the share `grow` of a budget is free for new triplets (sigma zero: the loss does not jump; random
directions), which go to the sites that lost none, up to rank `most` or the layer's smaller side (`allocate`). At `end`
nothing grows, and with `balance` what is left becomes P' = U sqrt(S), sigma' = 1, Q' = sqrt(S) V^T of its singular
value decomposition, without a penalty from then on.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import (
    Adapter,
    Change,
    Changes,
    FromPeft,
    PeftNames,
    QtuneError,
    QuantLinear,
    Source,
    draw,
    replace_values,
    trainable,
)
from .peft_names import padded
from .starts import check_rank, halves

MEAN, DOUBT, SEEN, GRACE = slice(0, 3), slice(3, 6), 6, 7  # rows of `history`; the slices: of sigma, P and Q
ROWS = 8
SETTLED = -1.0  # of GRACE: the last allocation is over


class AdaLoRA(Adapter):
    """Singular triplets that are pruned and added in training."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        peft_type="ADALORA",
        tensors={"P": "lora_B", "sigma": "lora_E", "Q": "lora_A"},
        options={"dropout": "lora_dropout", "penalty": "orth_reg_weight"},
        native=True,
        reads=("init_r", "target_r", "lora_alpha", "rank_pattern", "r", "total_step", "tinit", "tfinal", "deltaT"),
    )
    grows: ClassVar[Mapping[str, tuple[int, str]]] = MappingProxyType(
        {"P": (1, "rank"), "sigma": (0, "rank"), "Q": (0, "rank"), "history": (1, "rank")}
    )
    history: Tensor

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 12,
        alpha: float = 32.0,
        dropout: float = 0.0,
        target: float = 0.67,
        t_init: float = 0.1,
        t_final: float = 0.4,
        interval: float = 0.01,
        beta1: float = 0.85,
        beta2: float = 0.85,
        penalty: float = 0.1,
        grow: float = 0.1,
        most: int = 128,
        balance: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        check_rank(base, rank)
        self.P = trainable((base.out_features, rank), base)
        self.sigma = trainable((rank,), base)
        self.Q = trainable((rank, base.in_features), base)
        self.register_buffer("history", torch.zeros(ROWS, rank, dtype=torch.float32, device=base.device))
        self.rank, self.scale, self.weight = rank, alpha / rank, penalty
        self.target = max(1.0, target * rank if target < 1 else target)
        self.t_init, self.t_final, self.interval = t_init, t_final, interval
        self.betas, self.grow, self.most = (beta1, beta2), grow, min(most, *base.shape)
        self.balance, self.seed = balance, seed
        self.dropout = nn.Dropout(dropout)
        self.sites, self.settled = 1, False  # as the step at hand has them

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.P, nn.init.normal_, 0.0, base.out_features**-0.5)
        draw(self.Q, nn.init.normal_, 0.0, base.in_features**-0.5)
        nn.init.zeros_(self.sigma)
        self.history.zero_()

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        P, right = self.P.to(x.dtype), (self.sigma[:, None] * self.Q).to(x.dtype)
        if not (self.dropout.p and self.training):
            return base.shift(base.product_plus(x, right, P, self.scale))
        return base(x) + F.linear(F.linear(self.dropout(x), right) * self.scale, P)

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        return self.sigma[:, None].float() * self.Q.float(), self.P, self.scale

    def penalty(self) -> Tensor | None:
        if self.weight == 0 or (self.balance and self.settled):
            return None
        one = torch.eye(len(self.sigma), device=self.sigma.device)
        skew = [(gram.float() - one).norm() for gram in (self.P.T @ self.P, self.Q @ self.Q.T)]
        return torch.stack(skew).sum() * (self.weight / (2 * self.sites))

    # ---- for PEFT, which divides alpha by the rank that all sites start with, plus 1e-5

    def peft_state(self) -> dict[str, Tensor]:
        return super().peft_state() | {"lora_E": self.sigma[:, None]}

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        ranks = {name: one.sizes()["rank"] for name, one in adapters.items()}
        first, most = next(iter(adapters.values())), max(ranks.values())
        assert isinstance(first, AdaLoRA)
        config = {"init_r": most, "target_r": round(first.target), "lora_alpha": first.scale * (most + 1e-5)}
        config["total_step"] = 1  # PEFT asks for one; what is exported is trained
        if min(ranks.values()) == most:
            return config
        pattern = {f"{name}.lora_E": [i < rank for i in range(most)] for name, rank in ranks.items()}
        return config | {"rank_pattern": pattern}

    @classmethod
    def from_peft(cls, given: FromPeft) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        options, sites = super().from_peft(given)
        first, target = given.value("init_r", 1), given.value("target_r", 1)
        options |= {"rank": first, "target": float(target), "alpha": given.value("lora_alpha", 1.0)}
        options["alpha"] *= first / (first + 1e-5)
        kept = given.config.get("rank_pattern") or {}
        rows = kept.values() if isinstance(kept, dict) else ["no mapping"]
        if not all(isinstance(row, list) and all(type(one) is bool for one in row) for row in rows):
            raise QtuneError("Q417", f"adapter_config.json: rank_pattern is {kept!r}; legal: lists of true and false")
        for site, found in sites.items():
            rank, sigma = sum(kept.get(f"{site}.lora_E", [True] * first)), found["sigma"]
            for name, dim in (("P", 1), ("Q", 0)):
                padded(found[name], dim, rank, rank, site)  # nothing to add: is it the rank of the config?
            found["sigma"] = sigma[:, 0] if sigma.dim() == 2 and sigma.shape[1] == 1 else sigma
            found["history"] = torch.zeros(ROWS, rank)
        return options, sites

    # ---- in time

    def times(self, steps: int) -> tuple[int, int, int]:
        """Steps after which allocations begin, at which they end, and between them. QtuneError where none is left."""
        warm, settle = (int(t * steps) if t < 1 else int(t) for t in (self.t_init, self.t_final))
        if warm >= steps - settle:
            raise QtuneError(
                "Q107",
                f"adapter.t_init {self.t_init} and adapter.t_final {self.t_final} leave none of {steps} steps to "
                "allocate ranks in; together they must be less than the run",
            )
        return warm, steps - settle, max(1, round(self.interval * steps) if self.interval < 1 else int(self.interval))

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        settled = None
        for one in adapters.values():
            assert isinstance(one, AdaLoRA)
            if settled is None:
                late = step > one.times(steps)[1] and not one.history.is_meta
                settled = late and bool(one.history[GRACE, 0] == SETTLED)
            one.sites, one.settled = len(adapters), settled
        return {}

    @classmethod
    @torch.no_grad()
    def see_gradients(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        for one in adapters.values():
            assert isinstance(one, AdaLoRA)
            if step <= one.times(steps)[1]:
                one.look()

    def look(self) -> None:
        """Take this step's sensitivities |w dw| into the averages over time.

        The authors average every entry of P and Q, in twice their memory, and then the column; here the column's mean
        is averaged, so that a triplet takes eight numbers.
        """
        found = []
        for w, dim in ((self.sigma, None), (self.P, 0), (self.Q, 1)):
            assert w.grad is not None
            size = (w * w.grad).abs_()
            found.append(size if dim is None else size.mean(dim, dtype=torch.float32))
        now = torch.stack([one.to(self.history) for one in found])
        mean, doubt = self.history[MEAN], self.history[DOUBT]
        mean.lerp_(now, 1 - self.betas[0])
        doubt.lerp_((now - mean).abs_(), 1 - self.betas[1])
        self.history[SEEN] += 1

    def scores(self) -> list[float]:
        """The importance of each triplet: the average (`beta1`) of its sensitivities times that of their distance from
        it (`beta2`), of sigma plus P plus Q. Averages that began later are made up for that."""
        seen = self.history[SEEN].clamp(min=1)
        mean, doubt = (
            self.history[rows] / (1 - beta**seen) for rows, beta in zip((MEAN, DOUBT), self.betas, strict=True)
        )
        return (mean * doubt).sum(0).tolist()

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        sites: dict[str, AdaLoRA] = {n: one for n, one in adapters.items() if isinstance(one, AdaLoRA)}
        first = next(iter(sites.values()))
        begin, end, interval = first.times(steps)
        due = step > begin and (step - begin) % interval == 0 if step < end else not first.settled
        if not due or first.P.is_meta:
            return {}
        ranks = {name: one.sizes()["rank"] for name, one in sites.items()}
        start, target = first.rank * len(sites), max(len(sites), round(first.target * len(sites)))
        total = min(sum(ranks.values()), budget(step, begin, end, start, target))
        free = int(first.grow * total) if step < end else 0
        found = {name: list(zip(one.history[GRACE].tolist(), one.scores(), strict=True)) for name, one in sites.items()}
        room = {name: one.most for name, one in sites.items()}
        changes: dict[nn.Parameter, Change] = {}
        for name, (kept, new) in allocate(found, room, total, free).items():
            changes |= sites[name].take(kept, new, f"{first.seed}.{step}.{name}", last=step >= end)
        return changes

    def take(self, kept: Sequence[int], new: int, seed: str, last: bool) -> dict[nn.Parameter, Change]:
        """Keep these triplets, and append as many new ones."""
        same = len(kept) == len(self.sigma) and not new
        where = torch.tensor(kept, device=self.history.device)
        fresh = self.history.new_zeros(ROWS, new)
        fresh[GRACE] = 1
        old = self.history[:, where]
        old[GRACE] = SETTLED if last else (old[GRACE] - 1).clamp(min=0)
        replace_values(self.history, torch.cat((old, fresh), 1))
        if last and self.balance and self.sigma[where].any():
            return self.balanced(where)
        if same:
            return {}
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        added = {
            self.P: torch.randn(len(self.P), new, generator=generator) / len(self.P) ** 0.5,
            self.sigma: torch.zeros(new),
            self.Q: torch.randn(new, self.Q.shape[1], generator=generator) / self.Q.shape[1] ** 0.5,
        }
        changes = {}
        for w, values in added.items():
            dim = 1 if w is self.P else 0
            changes[w] = Change(Taken(where, dim, values), Taken(where, dim, torch.zeros_like(values)))
        return changes

    def balanced(self, where: Tensor) -> dict[nn.Parameter, Change]:
        """The same product in factors P sqrt(S) and sqrt(S) Q of its singular vectors, sigma 1."""
        left, r = torch.linalg.qr((self.P * self.sigma)[:, where].float())
        right, q = torch.linalg.qr(self.Q[where].T.float())
        u, s, vh = torch.linalg.svd(r @ q.T)
        P, Q = halves(left @ u, s.clamp(min=float(s[0]) * 1e-6), vh @ right.T)  # at zero both sides would stay there
        return {self.P: Change(P.to), self.Q: Change(Q.to), self.sigma: Change(torch.ones(len(where)).to)}

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        """The start's total at the sites where a triplet takes the most bytes, alike in all sites of a shape."""
        first = next(iter(adapters.values()))
        assert isinstance(first, AdaLoRA)
        if steps is not None:
            first.times(steps)
        shapes: dict[tuple[int, int], list[AdaLoRA]] = {}
        for one in adapters.values():
            assert isinstance(one, AdaLoRA)
            shapes.setdefault((len(one.P), one.Q.shape[1]), []).append(one)
        left = first.rank * len(adapters)
        for shape in sorted(shapes, key=sum, reverse=True):
            alike = shapes[shape]
            rank = min(alike[0].most, -(-left // len(alike))) if first.grow else first.rank
            left = max(0, left - rank * len(alike))
            for one in alike:
                one.resize({"rank": max(1, rank)})

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        for name in ("dropout", "beta1", "beta2", "grow"):
            if not 0 <= options[name] < 1:
                faults.append(f"adapter.{name} must be at least 0 and below 1, not {options[name]}")
        for name in ("alpha", "target", "interval"):
            if options[name] <= 0:
                faults.append(f"adapter.{name} must be above 0, not {options[name]}")
        for name in ("t_init", "t_final", "penalty", "seed"):
            if options[name] < 0:
                faults.append(f"adapter.{name} must be at least 0, not {options[name]}")
        if options["target"] > options["rank"]:
            faults.append(f"adapter.target {options['target']} is beyond the rank of the start, {options['rank']}")
        if options["most"] < options["rank"]:
            faults.append(f"adapter.most {options['most']} is below the rank of the start, {options['rank']}")
        return faults


class Taken:
    """tensor -> the places `where` of its dimension `dim`, and `values` behind them."""

    def __init__(self, where: Tensor, dim: int, values: Tensor) -> None:
        self.where, self.dim, self.values = where, dim, values

    def __call__(self, tensor: Tensor) -> Tensor:
        kept = tensor.index_select(self.dim, self.where.to(tensor.device))
        return torch.cat((kept, self.values.to(tensor)), self.dim)


def budget(step: int, begin: int, end: int, start: int, target: int) -> int:
    """The sum of all ranks at a step (the paper's equation 12)."""
    if step <= begin:
        return start
    left = 1 - (min(step, end) - begin) / (end - begin)
    return math.floor(target + (start - target) * left**3)


def allocate(
    found: Mapping[str, Sequence[tuple[float, float]]], room: Mapping[str, int], total: int, free: int
) -> dict[str, tuple[list[int], int]]:
    """Which triplets each site keeps, and how many new ones it gets: `total` in all, of which new at most `free`.

    found: for each triplet of a site (is it safe, above 0; its importance). room: the largest rank of a site. New ones
    go to the sites that lost none, the largest least importance first, at most half as many as there are. A new one is
    safe at the next allocation.
    """
    order: list[tuple[int, float, str, int]] = []
    for name, triplets in found.items():
        best = max(range(len(triplets)), key=lambda i: triplets[i][1])
        order += [(-2 if i == best else -(safe > 0), -s, name, i) for i, (safe, s) in enumerate(triplets)]
    order.sort()
    free = max(0, min(free, total - len(found)))
    kept: dict[str, list[int]] = {name: [] for name in found}
    for _, _, name, i in order[: total - free]:
        kept[name].append(i)
    new = dict.fromkeys(found, 0)
    claims = []
    for name, triplets in found.items():
        most = min(room[name] - len(triplets), -(-len(triplets) // 2))
        judged = [s for safe, s in triplets if safe <= 0]
        if len(kept[name]) == len(triplets) and most > 0 and judged:
            claims.append((-min(judged), name, most))
    heapq.heapify(claims)
    while claims and sum(new.values()) < free:
        claim, name, most = heapq.heappop(claims)
        new[name] += 1
        if new[name] < most:
            heapq.heappush(claims, (claim * new[name] / (new[name] + 1), name, most))
    spare = order[total - free : total - sum(new.values())]  # nobody claims these places: the next best stay
    for _, _, name, i in spare:
        kept[name].append(i)
    return {name: (sorted(places), new[name]) for name, places in kept.items()}
