"""RMS norm, SwiGLU and rotary embedding in Triton: one pass over memory each, fp32 arithmetic, rounded once.

    n = x * rsqrt(mean(x^2) + eps);  y = n * (offset + weight)       cast_first: n is rounded to x's dtype first
    dx = rstd * (g - n * mean(g * n)),  g = dy * (offset + weight)   no gradient for the weight
    y = silu(gate) * up;  rotary: y = x * cos + rotate_half(x) * sin

Sources: RMSNorm (arXiv 1910.07467), SwiGLU (2002.05202), RoPE (2104.09864). A norm holds whole rows in registers, so
the hidden size is at most 2^17. Left out: gradients for weights, fusions across ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import FLOATS, LIBRARY, Kernels, cdiv, jit, launch, part, power_of_2, require, tl, together

__all__ = ["KERNELS", "LIBRARY", "rms_norm", "rms_norm_backward", "rotary", "swiglu", "swiglu_backward"]

WIDEST = 1 << 17  # the largest row of a norm; beyond it the registers of a program would spill everything
TILE = 2048  # elements of a program at least: short rows share one


@jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x, weight, y, rstd, rows, width, x_row, eps, offset,
    CAST_FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    n = tl.load(x + row[:, None] * x_row + at[None, :], mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(n * n, 1) / width + eps)
    tl.store(rstd + row, r, mask=row < rows)
    w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32) + offset
    n = n * r[:, None]
    if CAST_FIRST:
        n = n.to(y.dtype.element_ty).to(tl.float32)
        w = w.to(weight.dtype.element_ty).to(tl.float32)
    tl.store(y + row[:, None] * width + at[None, :], (n * w[None, :]).to(y.dtype.element_ty), mask=inside)


@jit
def _rms_norm_backward(  # type: ignore[no-untyped-def]
    dy, x, weight, rstd, dx, rows, width, dy_row, x_row, offset,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    r = tl.load(rstd + row, mask=row < rows, other=0.0)
    w = tl.load(weight + at, mask=at < width, other=0.0).to(tl.float32) + offset
    g = tl.load(dy + row[:, None] * dy_row + at[None, :], mask=inside, other=0.0).to(tl.float32) * w[None, :]
    n = tl.load(x + row[:, None] * x_row + at[None, :], mask=inside, other=0.0).to(tl.float32) * r[:, None]
    mean = tl.sum(g * n, 1) / width
    d = r[:, None] * (g - n * mean[:, None])
    tl.store(dx + row[:, None] * width + at[None, :], d.to(dx.dtype.element_ty), mask=inside)


@jit
def _swiglu(  # type: ignore[no-untyped-def]
    gate, up, y, width, gate_row, up_row, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * gate_row + at, mask=at < width, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=at < width)


@jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    dy, gate, up, dgate, dup, width, dy_row, gate_row, up_row, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dy + row * dy_row + at, mask=at < width, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + at, mask=at < width, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=at < width, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    into = row * width + at
    tl.store(dgate + into, (d * u * (s * (1.0 + g * tl.sigmoid(-g)))).to(dgate.dtype.element_ty), mask=at < width)
    tl.store(dup + into, (d * (g * s)).to(dup.dtype.element_ty), mask=at < width)


@jit
def _rotary(  # type: ignore[no-untyped-def]
    x, cos, sin, y, seq, heads, dim, half, x_batch, x_seq, x_head, cos_batch, cos_seq, sin_batch, sin_seq,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One token, HEADS heads: pairs (i, i + half), then the values from 2 * half on as they are."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // seq, token % seq
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    c = cos + batch * cos_batch + place * cos_seq + i
    s = sin + batch * sin_batch + place * sin_seq + i
    c1 = tl.load(c, mask=i < half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(c + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(s, mask=i < half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(s + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    source = x + batch * x_batch + place * x_seq + head.to(tl.int64)[:, None] * x_head
    target = y + (token * heads + head)[:, None] * dim
    inside = (head < heads)[:, None] & (i < half)[None, :]
    x1 = tl.load(source + i[None, :], mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + half + i[None, :], mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    tl.store(target + i[None, :], y1.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half + i[None, :], y2.to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        j = 2 * half + tl.arange(0, REST)
        inside = (head < heads)[:, None] & (j < dim)[None, :]
        tl.store(target + j[None, :], tl.load(source + j[None, :], mask=inside), mask=inside)


# ---- wrappers


def _ok(what: str, t: Tensor) -> tuple[bool, str]:
    return part(what, t, t.numel(), *FLOATS)


def _rows(t: Tensor) -> Tensor:
    """[..., h] -> [rows, h] whose last stride is 1; a copy only where no view is."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] < 2 else flat.contiguous()


def _norm_options(rows: int, width: int) -> tuple[tuple[int], dict[str, Any]]:
    wide = power_of_2(width)
    several = max(1, TILE // wide)
    warps = min(32, max(4, several * wide // 1024))
    return (cdiv(rows, several),), {"ROWS": several, "WIDTH": wide, "num_warps": warps}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """x [..., h], weight [h] -> y like x, contiguous; rstd fp32 [...]."""
    width = x.shape[-1]
    require(
        [
            _ok("x", x),
            _ok("weight", weight),
            together(x, weight),
            (weight.shape == (width,), f"weight {tuple(weight.shape)} for rows of {width}"),
            (width <= WIDEST, f"rows of {width}; at most {WIDEST}"),
        ]
    )
    flat = _rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    grid, options = _norm_options(flat.shape[0], width)
    scalars = (flat.shape[0], width, flat.stride(0), float(eps), float(offset))
    launch(_rms_norm, grid, x, flat, weight.contiguous(), y, rstd, *scalars, CAST_FIRST=bool(cast_first), **options)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """dy, x [..., h], weight [h], rstd fp32 [...] -> dx like x, contiguous."""
    width = x.shape[-1]
    require(
        [
            _ok("dy", dy),
            _ok("x", x),
            _ok("weight", weight),
            together(dy, x, weight, rstd),
            (dy.shape == x.shape, f"dy {tuple(dy.shape)} for x {tuple(x.shape)}"),
            (weight.shape == (width,), f"weight {tuple(weight.shape)} for rows of {width}"),
            (
                rstd.shape == x.shape[:-1] and rstd.dtype == torch.float32,
                f"rstd {rstd.dtype} {tuple(rstd.shape)} for x {tuple(x.shape)}",
            ),
            (width <= WIDEST, f"rows of {width}; at most {WIDEST}"),
        ]
    )
    given, flat = _rows(dy), _rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, options = _norm_options(flat.shape[0], width)
    scalars = (flat.shape[0], width, given.stride(0), flat.stride(0), float(offset))
    tensors = (given, flat, weight.contiguous(), rstd.contiguous(), dx)
    launch(_rms_norm_backward, grid, x, *tensors, *scalars, **options)
    return dx


def _tiles(*tensors: Tensor) -> tuple[list[Tensor], int, int]:
    """Tensors of one shape as [rows, width] each: one row where all are contiguous, else as they lie (the halves of a
    fused gate and up, say)."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors], 1, tensors[0].numel()
    flat = [_rows(t) for t in tensors]
    return flat, flat[0].shape[0], flat[0].shape[1]


def _swiglu_checks(*named: tuple[str, Tensor]) -> None:
    shapes, dtypes = {tuple(t.shape) for _, t in named}, {str(t.dtype) for _, t in named}
    require(
        [
            *(_ok(name, t) for name, t in named),
            together(*(t for _, t in named)),
            (len(shapes) == 1, f"shapes differ: {sorted(shapes)}"),
            (len(dtypes) == 1, f"dtypes differ: {sorted(dtypes)}"),
        ]
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., n], rounded once -> contiguous."""
    _swiglu_checks(("gate", gate), ("up", up))
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (g, u), rows, width = _tiles(gate, up)
    tiles = cdiv(width, TILE)
    launch(_swiglu, (rows * tiles,), gate, g, u, y, width, g.stride(0), u.stride(0), tiles, BLOCK=TILE)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dy, gate, up [..., n] -> dgate, dup, contiguous."""
    _swiglu_checks(("dy", dy), ("gate", gate), ("up", up))
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    (d, g, u), rows, width = _tiles(dy, gate, up)
    tiles = cdiv(width, TILE)
    strides = (d.stride(0), g.stride(0), u.stride(0))
    launch(_swiglu_backward, (rows * tiles,), gate, d, g, u, dgate, dup, width, *strides, tiles, BLOCK=TILE)
    return dgate, dup


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x [batch, seq, heads, dim], last stride 1; cos, sin [batch or 1, seq, rotary_dim <= dim] -> y contiguous."""
    batch, seq, heads, dim = x.shape
    turned = cos.shape[-1]
    require(
        [
            *(_ok(name, t) for name, t in (("x", x), ("cos", cos), ("sin", sin))),
            together(x, cos, sin),
            (cos.shape == sin.shape, f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"),
            (
                cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == seq,
                f"cos {tuple(cos.shape)} for x {tuple(x.shape)}",
            ),
            (turned % 2 == 0 and turned <= dim, f"{turned} values to turn, of {dim}"),
        ]
    )
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = power_of_2(turned // 2)
    several = min(power_of_2(heads), max(1, TILE // (2 * half)))
    steps = [0 if t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    strides = (*x.stride()[:3], steps[0], cos.stride(1), steps[1], sin.stride(1))
    rest = power_of_2(dim - turned) if dim > turned else 0
    grid, scalars = (batch * seq, cdiv(heads, several)), (seq, heads, dim, turned // 2)
    options = {"INVERSE": bool(inverse), "HEADS": several, "HALF": half, "REST": rest}
    launch(_rotary, grid, x, x, cos, sin, y, *scalars, *strides, **options)
    return y


KERNELS: Kernels = {
    function.__name__: function for function in (rms_norm, rms_norm_backward, swiglu, swiglu_backward, rotary)
}
