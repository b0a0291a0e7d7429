"""The pointwise layers of a decoder, each one pass over its memory: RMS norm, SwiGLU, rotary positions.

    rms_norm   y = n * (w + offset),  n = x * rsqrt(mean(x^2) + eps)          (arXiv 1910.07467)
    swiglu     y = silu(gate) * up,   silu(g) = g / (1 + exp(-g))             (2002.05202)
    rotary     y = x * cos + rotate_half(x) * sin                             (2104.09864)
Arithmetic in fp32 (fp64 for fp64 input), rounded once; the gradients are ops of their own. The `fused_*` functions
put autograd around them: same values, dtypes and layouts as transformers' code, but they keep their inputs only, no
intermediate. Left out: gradients of norm weights (plain torch code serves a trained one) and of cos and sin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import QtuneError
from .registry import op

CHUNK = 1 << 20  # elements a reference handles at a time, so that its temporaries stay small


def _wide(t: Tensor) -> Tensor:
    """The dtype that is computed in."""
    return t if t.dtype == torch.float64 else t.float()


def _rows(t: Tensor) -> int:
    """Rows of t that a reference handles at a time."""
    return max(1, CHUNK // max(1, t.shape[-1]))


# ---- RMS norm ----


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """x [..., h], weight [h] -> y like x, contiguous, and rstd [...], fp32 (fp64 for fp64 x): rsqrt(mean(x^2) + eps).

    cast_first: n is rounded to x's dtype and then multiplied by weight + offset, taken in the weight's dtype (Llama);
    else all is fp32 and rounded once (Gemma, offset 1).
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.shape[:-1].numel()
    flat, out = x.reshape(rows, x.shape[-1]), y.view(rows, x.shape[-1])
    rstd = torch.empty(rows, dtype=_wide(x[..., :0]).dtype, device=x.device)
    factor = _wide(weight + offset) if cast_first else _wide(weight) + offset
    for start in range(0, rows, _rows(x)):
        part = slice(start, start + _rows(x))
        wide = _wide(flat[part])
        scale = rstd[part] = torch.rsqrt(wide.square().mean(-1) + eps)
        n = wide * scale.unsqueeze(1)
        out[part] = (_wide(n.to(x.dtype)) if cast_first else n) * factor
    return y, rstd.view(x.shape[:-1])


@op(rms_norm)
def _(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """dy and x [..., h] of one dtype, weight [h], rstd [...] -> dx like x: with g = dy (weight + offset), n = x rstd,
    dx = rstd (g - n mean(g n))."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.shape[:-1].numel()
    flat, into = x.reshape(rows, x.shape[-1]), dx.view(rows, x.shape[-1])
    upstream, scales, factor = dy.reshape(flat.shape), rstd.reshape(rows, 1), _wide(weight) + offset
    for start in range(0, rows, _rows(x)):
        part = slice(start, start + _rows(x))
        n, g = _wide(flat[part]) * scales[part], _wide(upstream[part]) * factor
        into[part] = (g - n * (g * n).mean(-1, keepdim=True)) * scales[part]
    return dx


@op(rms_norm_backward)
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    return x.new_empty(x.shape)


class _RmsNorm(torch.autograd.Function):
    """x [..., h], frozen weight [h] -> y like x; keeps x and rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
        y, rstd = torch.ops.qtune.rms_norm(x, weight, eps, offset, cast_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        return torch.ops.qtune.rms_norm_backward(dy, x, weight, rstd, ctx.offset), None, None, None, None


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> Tensor:
    """x [..., h], weight [h] -> y: transformers' LlamaRMSNorm (offset 0, cast_first) and Gemma's (offset 1, not).

    A weight that is trained, or whose dtype would widen the result, is served by plain torch code.
    """
    widens = cast_first and torch.promote_types(x.dtype, weight.dtype) != x.dtype
    if not widens and not weight.requires_grad:
        return _RmsNorm.apply(x, weight, eps, offset, cast_first)
    wide = _wide(x)
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if cast_first:
        return (weight + offset if offset else weight) * n.to(x.dtype)
    return (n * (offset + _wide(weight))).to(x.dtype)


# ---- SwiGLU ----


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up of one shape and dtype -> silu(gate) * up, contiguous."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    flat, gates, ups = y.view(-1), gate.reshape(-1), up.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        flat[part] = F.silu(_wide(gates[part])) * _wide(ups[part])
    return y


@op(swiglu)
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dy, gate and up of one shape and dtype -> dgate, dup, contiguous: with s = sigmoid(gate),
    dgate = dy up s (1 + gate (1 - s)), dup = dy gate s."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    sources, results = [t.reshape(-1) for t in (dy, gate, up)], (dgate.view(-1), dup.view(-1))
    for start in range(0, gate.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        d, g, u = (_wide(t[part]) for t in sources)
        s = torch.sigmoid(g)
        results[0][part] = d * u * s * (1 + g * torch.sigmoid(-g))
        results[1][part] = d * g * s
    return dgate, dup


@op(swiglu_backward)
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


class _Swiglu(torch.autograd.Function):
    """gate, up -> silu(gate) * up; keeps both."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.qtune.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return torch.ops.qtune.swiglu_backward(dy, *ctx.saved_tensors)


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up of one shape and dtype -> silu(gate) * up; other pairs are broadcast and promoted by torch."""
    if gate.dtype != up.dtype or gate.shape != up.shape:
        return F.silu(gate) * up
    return _Swiglu.apply(gate, up)


# ---- rotary positions ----


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x [batch, seq, heads, dim] of any strides, cos and sin [batch or 1, seq, r], r <= dim and even, of x's dtype or
    fp32 -> y like x, contiguous: the first r values of each head turned, the rest copied. inverse: the transposed map,
    which is the gradient (and the turn back, where cos^2 + sin^2 = 1)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r, half = cos.shape[-1], cos.shape[-1] // 2
    step = max(1, CHUNK // max(1, x[:, :1].numel()))
    for start in range(0, x.shape[1], step):
        part = slice(start, start + step)
        turned = _wide(x[:, part, :, :r])
        c, s = (_wide(t[:, part]).unsqueeze(2) for t in (cos, sin))
        if inverse:
            low, high = (turned * s).tensor_split((half,), -1)
            y[:, part, :, :r] = turned * c + torch.cat((high, -low), -1)
        else:
            low, high = turned.tensor_split((half,), -1)
            y[:, part, :, :r] = turned * c + torch.cat((-high, low), -1) * s
    y[..., r:] = x[..., r:]
    return y


@op(rotary)
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


class _Rotary(torch.autograd.Function):
    """q and k [batch, seq, heads, dim] -> both turned, contiguous; keeps cos and sin."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        turn = torch.ops.qtune.rotary
        return turn(q, cos, sin, False), turn(k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors  # once: a checkpoint unpacks it once
        pairs = zip(upstream, ctx.needs_input_grad[:2], strict=True)
        turned = [torch.ops.qtune.rotary(d, cos, sin, True) if needed else None for d, needed in pairs]
        return (*turned, None, None)


def fused_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb for Llama's halves, whole or partial: q, k [batch, heads, seq, dim], or with
    unsqueeze_dim=2 [batch, seq, heads, dim]; cos, sin [batch or 1, seq, r] -> q, k turned, memory [batch, seq, heads,
    dim] either way. Where cos is wider than q, q is widened, as torch's product would. Raises QtuneError for another
    unsqueeze_dim."""
    if unsqueeze_dim not in (1, 2):
        raise QtuneError("Q603", f"rotary positions: unsqueeze_dim {unsqueeze_dim}; legal: 1, 2")
    wider = torch.promote_types(q.dtype, cos.dtype)
    q, k, cos, sin = (t if t.dtype == wider else t.to(wider) for t in (q, k, cos, sin))
    if unsqueeze_dim == 2:
        return _Rotary.apply(q, k, cos, sin)
    q, k = _Rotary.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)
