"""LoSiA: y = base(x), plus S x[cols] at the outputs `rows`: a subnet W[rows, cols] is trained, chosen anew in turn.

Wang, Qi & Xu 2025 (arXiv 2507.04487). `share` (1/8) of a layer's rows and of its columns, at random at first. The
decoder layers (sites, where none are numbered) take turns of `period` (steps, or below 1 a share of the run; the paper:
50-150 steps), the last one first. In its turn a layer's importance q = |w g - (w g)^2 / 2| is seen at each step, with
averages (decay `beta`) of q and of its distance from that, their product the score; then the rows and columns of the
largest scores become the subnet, S is zero, and the states of the optimizer begin anew.
What the subnet before had learned is kept as a block (rows, cols, S), up to `carry` of them; then a layer stays with
its subnet. S [share out, share in]; the rank of the update is up to its smaller side, in each block.
The authors average q for every weight, in two dense matrices of one layer. Here q is summed by rows and by columns at
once, and the sums are averaged; with several micro-batches they are sums of |q| of each. The dense gradient is there
for a moment in the backward of one layer, in its turn, and planned.
Left out: the lower learning rate of a layer behind its turn, and the subnet of the head's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import carried
from .base import Adapter, Change, Changes, QuantLinear, Source, draw, replace_values, trainable


class LoSiA(Adapter):
    """A dense block of the weight, at other places from time to time."""

    grows: ClassVar[Mapping[str, tuple[int, str]]] = MappingProxyType(
        {"done_rows": (0, "done"), "done_cols": (0, "done"), "done_S": (0, "done")}
    )
    rows: Tensor
    cols: Tensor
    done_rows: Tensor
    done_cols: Tensor
    done_S: Tensor
    row_now: Tensor
    col_now: Tensor
    row_mean: Tensor

    def __init__(
        self,
        base: QuantLinear,
        *,
        share: float = 0.125,
        period: float = 0.02,
        beta: float = 0.85,
        carry: int = 2,
    ) -> None:
        super().__init__(base)
        many, wide = (max(1, int(share * size)) for size in base.shape)
        self.S = trainable((many, wide), base)
        for name, shape in {"rows": (many,), "cols": (wide,), "done_rows": (0, many), "done_cols": (0, wide)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device=base.device))
        self.register_buffer("done_S", self.S.new_empty(0, many, wide))
        for kind, size in zip(("row", "col"), base.shape, strict=True):
            for what in ("now", "mean", "doubt"):  # sums of this step's q, and their averages
                zeros = torch.zeros(size, dtype=torch.float32, device=base.device)
                self.register_buffer(f"{kind}_{what}", zeros, persistent=what != "now")
        self.period, self.beta, self.carry = period, beta, carry
        self.watched = False  # is it the layer's turn?

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        for places, size in ((self.rows, base.out_features), (self.cols, base.in_features)):
            draw(places, lambda drawn, size=size: drawn.copy_(torch.randperm(size)[: len(drawn)].sort().values))
        nn.init.zeros_(self.S)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """rows, cols and S of each block and of what is trained."""
        yield from zip(self.done_rows, self.done_cols, self.done_S, strict=True)
        yield self.rows, self.cols, self.S

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        y = base.product(x)
        for rows, cols, S in self.blocks():
            y = y.index_add_(-1, rows, F.linear(x.index_select(-1, cols), S.to(x.dtype)).to(y.dtype))
        if self.watched and torch.is_grad_enabled():
            y = _Watched.apply(y, x.detach(), self, base)
        return base.shift(y)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        return self.whole(base), None if base.bias is None else base.bias.float()

    def whole(self, base: QuantLinear) -> Tensor:
        """W with all blocks, fresh: [out, in] fp32."""
        weight = base.dequantize(torch.float32)
        for rows, cols, S in self.blocks():
            weight.index_put_((rows[:, None], cols), S.detach().float(), accumulate=True)
        return weight

    # ---- in time

    def look(self, x: Tensor, dy: Tensor, base: QuantLinear) -> None:
        """Add this micro-batch's q, by rows and by columns. x [..., in], dy [..., out]."""
        q = torch.mm(dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1])).float().mul_(self.whole(base))
        q = q.addcmul_(q, q, value=-0.5).abs_()
        self.row_now += q.sum(1)
        self.col_now += q.sum(0)

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        changes: dict[nn.Parameter, Change] = {}
        layers = _layers(adapters)
        for name, one in adapters.items():
            assert isinstance(one, LoSiA)
            if one.S.is_meta:
                continue  # what is planned is watched by `worst`
            length, full = carried.in_steps(one.period, steps), len(one.done_S) >= one.carry
            if carried.begins(step, length) and not full and one.turn(name, layers, step - 1, length):
                changes |= one.choose()
                full = len(one.done_S) >= one.carry
            one.watched = not full and one.turn(name, layers, step, length)
            one.row_now.zero_()
            one.col_now.zero_()
        return changes

    @staticmethod
    def turn(site: str, layers: list[str], step: int, length: int) -> bool:
        """Is it this site's turn at a step?"""
        return layers[(step - 1) // length % len(layers)] == carried.layer_of(site)

    @classmethod
    def after_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        for one in adapters.values():
            assert isinstance(one, LoSiA)
            for kind in ("row", "col") if one.watched else ():
                now, mean, doubt = (getattr(one, f"{kind}_{what}") for what in ("now", "mean", "doubt"))
                mean.lerp_(now, 1 - one.beta)
                doubt.lerp_((now - mean).abs_(), 1 - one.beta)
        return {}

    @torch.no_grad()
    def choose(self) -> dict[nn.Parameter, Change]:
        """Keep the subnet as a block and take the rows and columns of the largest scores; no step was seen: stay."""
        if not self.row_mean.any():
            return {}
        for name in ("rows", "cols", "S"):
            done, now = getattr(self, f"done_{name}"), getattr(self, name).data
            replace_values(done, torch.cat((done, now[None])))
        for kind in ("row", "col"):
            mean, doubt, places = (getattr(self, f"{kind}{what}") for what in ("_mean", "_doubt", "s"))
            places.copy_((mean * doubt).topk(len(places)).indices.sort().values)
            mean.zero_()
            doubt.zero_()
        return {self.S: Change(torch.zeros_like)}

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        first = _layers(adapters)[0]
        for name, one in adapters.items():
            assert isinstance(one, LoSiA)
            restarts = carried.most_restarts(one.period, steps)
            one.resize({"done": one.carry if restarts is None else min(one.carry, restarts)})
            one.watched = carried.layer_of(name) == first

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options) + carried.cycle_faults(options, None)
        if not 0 < options["share"] <= 1:
            faults.append(f"adapter.share must be above 0 and at most 1, not {options['share']}")
        if not 0 <= options["beta"] < 1:
            faults.append(f"adapter.beta must be at least 0 and below 1, not {options['beta']}")
        return faults


def _layers(adapters: Mapping[str, Adapter]) -> list[str]:
    """The decoder layers, the last one first: its gradient comes when all activations are there."""
    return list(dict.fromkeys(carried.layer_of(name) for name in reversed(list(adapters))))


class _Watched(torch.autograd.Function):
    """y as it is; in the backward the adapter looks at the gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, adapter: LoSiA, base: QuantLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.adapter, ctx.base = adapter, base
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.adapter.look(x, dy, ctx.base)
        return dy, None, None, None
