"""Gated MLPs a tile of tokens at a time: their wide hidden tensors exist for one tile only.

    forward   y[tile] = mlp(x[tile]), without a graph; x is kept
    backward  each tile again with a graph (and the random numbers of the first time), which is differentiated at once;
              gradients of parameters are summed in fp32
An MLP sees each token by itself, so this is exact (ALST, 2506.13996, tiles likewise). The cost is one more forward pass
of the MLPs. A layer that ends in `x + mlp(...)` is spared it: when it is recomputed nobody reads what its MLP gives, so
from the second time on nothing is computed there (`unread`, `blank`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .random import random_states, replayed

_blank: ContextVar[bool] = ContextVar("blank", default=False)

PARTS = ("gate_proj", "up_proj", "down_proj")  # what the gated MLPs of transformers call their products


def tile_mlps(model: nn.Module, tokens: int) -> int:
    """Run every gated MLP of a model on at most `tokens` tokens at a time; returns how many there are."""
    found = [m for m in model.modules() if all(isinstance(getattr(m, name, None), nn.Module) for name in PARTS)]
    for mlp in found:
        mlp.forward = partial(_tiled, mlp, mlp.forward, tokens)  # type: ignore[method-assign, assignment]
    return len(found)


def whole_mlps(model: nn.Module) -> None:
    """Undo `tile_mlps`."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "func", None) is _tiled:
            del module.forward


def _tiled(mlp: nn.Module, own: Any, tokens: int, x: Tensor) -> Tensor:
    """x [..., seq, hidden] -> [..., seq, hidden]."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= tokens:
        return own(x)  # type: ignore[no-any-return]
    trained = [p for p in mlp.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (x.requires_grad or trained):
        y: Tensor = _Tiled.apply(rows, own, tokens, *trained)
    else:
        y = _forward(rows, own, tokens)
    return y.view(x.shape)


def _forward(rows: Tensor, own: Any, tokens: int) -> Tensor:
    y = torch.empty_like(rows)
    for at in range(0, len(rows), tokens):
        y[at : at + tokens] = own(rows[at : at + tokens].unsqueeze(0))[0]
    return y


@contextmanager
def blank(on: bool) -> Iterator[None]:
    """In here, with `on`, what a tiled MLP gives is of no interest, only its graph."""
    token = _blank.set(on)
    try:
        yield
    finally:
        _blank.reset(token)


def unread(out: Tensor) -> bool:
    """Is this a sum of which one term is a tiled MLP's output, and no other MLP below it? Then neither this value nor
    that is needed to differentiate it."""
    if out.grad_fn is None or not out.grad_fn.name().startswith("AddBackward"):
        return False
    terms = [node for node, _ in out.grad_fn.next_functions if node is not None]
    last = [node for node in terms if node.name().startswith(("ViewBackward", "UnsafeViewBackward"))]
    ends = [below for node in last for below, _ in node.next_functions if below is not None]
    return sum(node.name() == f"{_Tiled.__name__}Backward" for node in ends) == 1


class _Tiled(torch.autograd.Function):
    """rows [tokens, hidden] -> [tokens, hidden]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, own: Any, tokens: int, *trained: nn.Parameter) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.own, ctx.tokens, ctx.trained = own, tokens, trained
        ctx.state = random_states(rows.device)
        return rows.new_zeros(1).expand(rows.shape) if _blank.get() else _forward(rows, own, tokens)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        dx = torch.empty_like(rows) if needed else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in ctx.trained]
        with replayed(ctx.state, rows.device):
            for at in range(0, len(rows), ctx.tokens):
                with torch.enable_grad():
                    part = rows[at : at + ctx.tokens].detach().requires_grad_(needed)
                    y = ctx.own(part.unsqueeze(0))[0]
                wanted = ([part] if needed else []) + list(ctx.trained)
                grads = list(torch.autograd.grad(y, wanted, dy[at : at + ctx.tokens], allow_unused=True))
                del y
                if dx is not None:
                    dx[at : at + ctx.tokens] = grads.pop(0)
                for into, g in zip(sums, grads, strict=True):
                    into += 0 if g is None else g  # None: of an adapter that is switched off
        return dx, None, None, *(s.to(p.dtype) for s, p in zip(sums, ctx.trained, strict=True))
