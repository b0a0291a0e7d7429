"""AM-LoRA, tasks one after another: y = base(x) + s sum_k g_k B_k A_k x; attention decides for each token how much of
each task's LoRA is used.

Liu et al. 2024 (arXiv 2409.19611). h_k = s B_k A_k x, g = softmax over k of tanh(w_k . h_k + c_k), and h_0 = 0 is an
empty LoRA, so that none may be used. A task is a run; the next one begins with `qtune train RECIPE --from RUN`: the
LoRAs of earlier tasks stay, frozen, a new one begins (A Kaiming-uniform, B zero), and w [tasks, out] and c [1 + tasks],
zero at first, learn on with it. A [rank, in], B [out, rank]; earlier tasks lie in carried_A [tasks x rank, in] and
carried_B [out, tasks x rank]; a task beyond `carry` is refused. h_k is never made: w_k . h_k = s (B_k^T w_k) . (A_k x).
How a token is answered hangs on the token, so that no weight does the same: such a run is used, and not merged.
Added to the loss for sparse attention, of each micro-batch: `sparse` times the sum over sites of the mean over tokens
of g_1 + g_2 + ..., which teaches w and c alone. (The paper has an L1 norm of g; of a softmax over all, it would be 1.)
With tanh no g is above e^2 / (e^2 + number of tasks), and a new task takes from the others' g before it has learned.
After the paper's abstract and a summary, which leave open what is decided here: a dense layer of one output a task,
tanh, one g for each site and token, the number for `sparse`, and that w and c all learn on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import carried
from .base import Adapter, QuantLinear, Source, draw, replace_values, trainable


class AttentionalLoRA(Adapter):
    """LoRAs of tasks, mixed for each token."""

    mergeable: ClassVar[bool] = False
    exact_gradient: ClassVar[bool] = False  # w and c are taught to be sparse, which is no part of y
    grows: ClassVar[Mapping[str, tuple[int, str]]] = MappingProxyType(
        {**carried.GROWS, "w": (0, "tasks"), "c": (0, "choices")}
    )
    carried_A: Tensor
    carried_B: Tensor

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        sparse: float = 1e-3,
        carry: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        self.A = trainable((rank, base.in_features), base)
        self.B = trainable((base.out_features, rank), base)
        self.w = trainable((1, base.out_features), base)
        self.c = trainable((2,), base)
        carried.make_room(self, base)
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)
        self.sparse, self.carry, self.seed = sparse, carry, seed

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.A, nn.init.kaiming_uniform_, math.sqrt(5))
        for zero in (self.B, self.w, self.c):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        A, B = (torch.cat(pair, dim).to(x.dtype) for dim, pair in enumerate(self._pairs()))
        inner = F.linear(self.dropout(x), A).unflatten(-1, (len(self.w), -1)) * self.scale
        used = self.attention(inner, B)
        y = base.product(x) + F.linear((inner * used[..., 1:, None].to(x.dtype)).flatten(-2), B)
        if self.training and self.sparse and torch.is_grad_enabled():
            alone = self.attention(inner.detach(), B.detach())[..., 1:].sum(-1).mean()
            y = _Beside.apply(y, self.sparse * alone)
        return base.shift(y)

    def attention(self, inner: Tensor, B: Tensor) -> Tensor:
        """g [..., 1 + tasks] in fp32 at least, of the empty LoRA first. inner: s A_k x [..., tasks, rank] and B [out,
        tasks x rank], of the earliest task first."""
        queries = torch.einsum("ko,okr->kr", self.w.to(B.dtype), B.unflatten(1, (len(self.w), -1)))
        wide = torch.promote_types(inner.dtype, torch.float32)
        scores = (inner * queries).sum(-1, dtype=wide)
        return (F.pad(scores, (1, 0)) + self.c.to(wide)).tanh().softmax(-1)

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (self.carried_A, self.A), (self.carried_B, self.B)

    # ---- tasks

    @classmethod
    def taken_over(cls, adapters: Mapping[str, Adapter]) -> None:
        sites = {name: one for name, one in adapters.items() if isinstance(one, AttentionalLoRA)}
        carried.refuse_full([
            f"{name} ({one.carry})" for name, one in sites.items() if len(one.carried_A) + len(one.A) > one.carry
        ])  # fmt: skip
        for name, one in sites.items():
            for tensor, pair, dim in zip((one.carried_A, one.carried_B), one._pairs(), (0, 1), strict=True):
                replace_values(tensor, torch.cat(pair, dim).detach())
            one.A.data.copy_(carried.kaiming(one.A.shape, one.seed, len(one.carried_A), name))
            one.B.data.zero_()
            replace_values(one.w, F.pad(one.w.data, (0, 0, 0, 1)))
            replace_values(one.c, F.pad(one.c.data, (0, 1)))

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        """As many earlier tasks as there is room for."""
        for one in adapters.values():
            assert isinstance(one, AttentionalLoRA)
            before = one.carry // len(one.A)
            one.resize({"carried": before * len(one.A), "tasks": before + 1, "choices": before + 2})

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options) + carried.cycle_faults(options)
        if not 0 <= options["dropout"] < 1:
            faults.append(f"adapter.dropout must be at least 0 and below 1, not {options['dropout']}")
        if options["alpha"] <= 0:
            faults.append(f"adapter.alpha must be above 0, not {options['alpha']}")
        if options["sparse"] < 0:
            faults.append(f"adapter.sparse must be at least 0, not {options['sparse']}")
        return faults


class _Beside(torch.autograd.Function):
    """y as it is; in its backward `term`, a scalar, is differentiated as if it were added to the loss."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, term: Tensor) -> Tensor:
        ctx.like = term.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return dy, torch.ones((), dtype=ctx.like, device=dy.device)
