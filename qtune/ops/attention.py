"""Attention that keeps q, k, v, the result and one number a query (lse), but never the score matrix.

    S = scale Q K^T,  P = softmax(S over the keys seen),  O = P V,  lse = log sum exp S
    dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q        with P = exp(S - lse)

Source: FlashAttention (arXiv 2205.14135). The references work on some query rows at a time and never repeat K or V for
the query heads that share them. Left out: dropout, float masks, masks that differ between heads, soft caps, sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import backend
from .registry import Scratch, is_fp64, op

CHUNK = 1 << 22  # scores that a reference holds at a time


def _wide(x: Tensor) -> Tensor:
    """[B, n, H, D] -> [B, H, n, D] in the dtype of the arithmetic."""
    return x.to(torch.float64 if is_fp64(x) else torch.float32).transpose(1, 2)


def _rows(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices of the queries, each with what its queries see: bool [B or 1, 1, 1, rows, S], or None for everything."""
    (B, T, H, _), S = q.shape, k.shape[1]
    rows = max(1, CHUNK // max(1, B * H * S))
    for start in range(0, T, rows):
        part = slice(start, min(start + rows, T))
        seen = None if mask is None else mask[:, :, part].unsqueeze(1)
        if causal:
            query = torch.arange(part.start, part.stop, device=q.device).unsqueeze(1)
            before = torch.arange(S, device=q.device) <= query + (S - T)
            seen = before if seen is None else seen & before
        yield part, seen


def _grouped(x: Tensor, part: slice, groups: int) -> Tensor:
    """Rows `part` of [B, H, T, D] -> [B, HK, G * rows, D]: the heads of a group below each other."""
    rows = x[:, :, part]
    return rows.reshape(x.shape[0], groups, -1, x.shape[3])


def _scores(q: Tensor, k: Tensor, part: slice, seen: Tensor | None, scale: float) -> Tensor:
    """scale Q K^T [B, HK, G, rows, S] of some rows, -inf where unseen; q, k [B, heads, n, D]."""
    B, HK, S = k.shape[0], k.shape[1], k.shape[2]
    s = _grouped(q, part, HK) @ k.transpose(2, 3) * scale
    s = s.view(B, HK, q.shape[1] // HK, part.stop - part.start, S)
    return s if seen is None else s.masked_fill_(~seen, float("-inf"))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k, v [B, S, HK, D], H a multiple of HK -> out [B, T, H, D] in q's dtype, lse fp32 [B, H, T].

    mask: None or bool [B or 1, 1, T, S], True where a query sees a key. causal: query i sees key j only if
    j <= i + (S - T). lse is the natural logarithm; a query that sees nothing has out 0 and lse -inf.
    """
    (B, T, H, D), (S, HK) = q.shape, k.shape[1:3]
    wide_q, wide_k, wide_v = _wide(q), _wide(k), _wide(v)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((B, H, T), float("-inf"), dtype=wide_q.dtype, device=q.device)
    for part, seen in _rows(q, k, mask, causal) if out.numel() and S else ():
        s = _scores(wide_q, wide_k, part, seen, scale)
        total = s.logsumexp(-1, keepdim=True)
        p = (s - total.masked_fill(total == float("-inf"), 0)).exp_()
        o = p.view(B, HK, -1, S) @ wide_v
        out[:, part] = o.view(B, H, -1, D).transpose(1, 2).to(q.dtype)
        lse[:, :, part] = total.view(B, H, -1)
    return out, lse


def _kernels_own(name: str, device_type: str, q: Tensor, *rest: Any) -> Scratch:
    sizes = None if is_fp64(q) else backend.scratch(name, device_type)
    return (sizes(q, *rest) if sizes else None) or {}


@op(attention, scratch=lambda device_type, *args: _kernels_own("attention", device_type, *args))
def _(q, k, v, mask, causal, scale):  # type: ignore[no-untyped-def]
    (B, T, H, _), kind = q.shape, torch.float64 if is_fp64(q) else torch.float32
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=kind)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout, out [B, T, H, D] and lse of `attention` -> dq, dk, dv, contiguous, in the shapes and dtypes of q, k, v."""
    (B, _, H, D), (S, HK) = q.shape, k.shape[1:3]
    wide_q, wide_k, wide_v, wide_do = _wide(q), _wide(k), _wide(v), _wide(dout)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    if not q.numel() or not S:
        return dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
    delta = (wide_do * _wide(out)).sum(-1)
    finite = lse.masked_fill(lse == float("-inf"), 0)
    for part, seen in _rows(q, k, mask, causal):
        rows = (B, HK, H // HK, part.stop - part.start, 1)
        p = (_scores(wide_q, wide_k, part, seen, scale) - finite[:, :, part].reshape(rows)).exp_()
        do = _grouped(wide_do, part, HK)
        dv += p.view(B, HK, -1, S).transpose(2, 3) @ do
        dp = (do @ wide_v.transpose(2, 3)).view(p.shape)
        ds = (dp.sub_(delta[:, :, part].reshape(rows)).mul_(p)).view(B, HK, -1, S)
        dk += ds.transpose(2, 3) @ _grouped(wide_q, part, HK)
        dq[:, part] = ((ds @ wide_k) * scale).view(B, H, -1, D).transpose(1, 2).to(q.dtype)
    dk *= scale
    return dq, dk.transpose(1, 2).to(k.dtype).contiguous(), dv.transpose(1, 2).to(v.dtype).contiguous()


@op(attention_backward, scratch=lambda device_type, *args: _kernels_own("attention_backward", device_type, *args))
def _(dout, q, k, v, out, lse, mask, causal, scale):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


# ---- with a gradient


class FlashAttention(torch.autograd.Function):
    """The two ops as one differentiable function; keeps q, k, v, out and lse for the backward, nothing else."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        out, lse = torch.ops.qtune.attention(q, k, v, mask, causal, scale)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, lse, mask)
            ctx.how = causal, scale
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        grads = torch.ops.qtune.attention_backward(dout, q, k, v, out, lse, mask, *ctx.how)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return (*(grad if needed else None for grad, needed in wanted), None, None, None)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`attention` with a gradient for q, k and v: out [B, T, H, D]. Shapes and mask as there."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return FlashAttention.apply(q, k, v, mask, causal, scale)  # type: ignore[no-any-return]
    return torch.ops.qtune.attention(q, k, v, mask, causal, scale)[0]  # type: ignore[no-any-return]
