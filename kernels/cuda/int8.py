"""int8 rows on CUDA through Triton: twins of the ops in qtune/ops/packed.py, bit-equal but for the product.

    w ~ code * absmax[row] / 127

`int8_matmul_fused` multiplies without a dense W: codes become a tile of W in registers, and the scale is applied in
fp32 to the sums, forward, or to the tokens, backward (to W's tile in fp16, which has no range for that). Left out:
products of int8 with int8, splitting K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import FLOATS, LIBRARY, Kernels, cdiv, dot_type, fits, jit, launch, part, power_of_2, require, tl, together

__all__ = ["KERNELS", "LIBRARY", "SMALL_TOKENS"]

SMALL_TOKENS = 64  # up to here the product in packed form serves; not measured: the prior of blockwise4.py
INT8_STEP = 1.0 / 127.0

# ---- kernels


@jit
def _pack(w, width, codes, absmax, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program, read twice. Rounds half to even by adding 1.5 * 2^23, where the spacing of fp32 is 1."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    most = tl.zeros((TILE,), tl.int32)  # as integers, of which NaN is the largest
    for start in range(0, width, TILE):
        value = tl.load(w + row * width + start + column, mask=column < width - start, other=0.0)
        most = tl.maximum(most, tl.abs(value.to(tl.float32)).to(tl.int32, bitcast=True))
    peak = tl.zeros((TILE,), tl.float32) + tl.max(most, 0).to(tl.float32, bitcast=True)
    # by way of the reciprocal, as torch divides a number by a tensor
    factor = tl.where(peak > 0, tl.div_rn(tl.full((TILE,), 1.0, tl.float32), peak) * 127.0, 0.0)
    for start in range(0, width, TILE):
        value = (
            tl.load(w + row * width + start + column, mask=column < width - start, other=0.0).to(tl.float32) * factor
        )
        value = tl.where(value == value, value, 0.0)  # a subnormal absmax: 0 * infinity
        value = tl.minimum(tl.maximum(value, -127.0), 127.0)
        value = (value + 12582912.0) - 12582912.0
        tl.store(codes + row * width + start + column, value.to(tl.int8), mask=column < width - start)
    tl.store(absmax + row + column, peak, mask=column < 1)


@jit(debug=True)  # keeps the assertion
def _unpack(ids, codes, absmax, out, height, width, STEP: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """TILE values of a row a program; of row ids[program], if there are ids; unscaled, if there is no absmax."""
    goal = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask, row = column < width, goal
    if ids is not None:
        wanted = tl.load(ids + goal).to(tl.int64)
        row = tl.minimum(tl.maximum(wanted, 0), height - 1)  # no read outside before the assertion ends the program
        tl.device_assert(row == wanted, "an id is outside of the table")
    value = tl.load(codes + row * width + column, mask=mask, other=0).to(tl.float32)
    if absmax is not None:
        value = value * (tl.load(absmax + row) * STEP)
    tl.store(out + goal * width + column, value.to(out.dtype.element_ty), mask=mask)


@jit
def _scale(x, absmax, out, width, STEP: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = x * absmax / 127 along the rows of x."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.load(absmax + column, mask=column < width, other=0.0) * STEP
    tl.store(out + row * width + column, (value * scale).to(out.dtype.element_ty), mask=column < width)


@jit
def _forward(  # type: ignore[no-untyped-def]
    x, codes, absmax, y, tokens, height, width,
    UNIT: tl.constexpr, DOT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y = (x C^T) * scale: a tile of TOKENS x COLUMNS rows of C, STEP values of each at a time."""
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k, inside, here = tl.arange(0, STEP), n < height, m[:, None] < tokens
    sources = x + m[:, None].to(tl.int64) * width + k[None, :]
    packed = codes + n[:, None] * width + k[None, :]
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, width, STEP):
        rest = (k < width - start)[None, :]
        value = tl.load(sources + start, mask=here & rest, other=0.0).to(tl.float32).to(DOT)
        code = tl.load(packed + start, mask=inside[:, None] & rest, other=0).to(tl.float32).to(DOT)
        total = tl.dot(value, tl.trans(code), total, input_precision="ieee")
    scale = tl.load(absmax + n, mask=inside, other=0.0) * UNIT
    goal = y + m[:, None].to(tl.int64) * height + n[None, :]
    tl.store(goal, (total * scale[None, :]).to(y.dtype.element_ty), mask=here & inside[None, :])


@jit
def _backward(  # type: ignore[no-untyped-def]
    x, codes, absmax, y, tokens, height, width,
    UNIT: tl.constexpr, DOT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    SCALE_W: tl.constexpr,
):  # fmt: skip
    """y = (x * scale) C, or x (scale * C) with SCALE_W: TOKENS x COLUMNS columns of C, STEP rows of C at a time."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k, inside, here = tl.arange(0, STEP), (n < width)[None, :], m[:, None] < tokens
    sources = x + m[:, None].to(tl.int64) * height + k[None, :]
    row = tl.zeros((STEP,), tl.int64) + k
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, height, STEP):
        rest = k < height - start
        value = tl.load(sources + start, mask=here & rest[None, :], other=0.0).to(tl.float32)
        code = tl.load(codes + row[:, None] * width + n[None, :], mask=rest[:, None] & inside, other=0).to(tl.float32)
        scale = tl.load(absmax + row, mask=rest, other=0.0) * UNIT
        if SCALE_W:
            code = code * scale[:, None]
        else:
            value = value * scale[None, :]
        total = tl.dot(value.to(DOT), code.to(DOT), total, input_precision="ieee")
        row += STEP
    goal = y + m[:, None].to(tl.int64) * width + n[None, :]
    tl.store(goal, total.to(y.dtype.element_ty), mask=here & inside)


# ---- the ops


def _float(what: str, t: Tensor) -> tuple[bool, str]:
    return fits(t, t.numel(), *FLOATS), f"{what} of {t.dtype} on {t.device}; legal: {list(FLOATS)}"


def _packed(codes: Tensor, absmax: Tensor | None, *checks: tuple[bool, str]) -> None:
    """Raises QtuneError unless codes are int8 [out, in], absmax fp32 [out], and all else holds."""
    rows = codes.shape[0] if codes.dim() == 2 else 0
    matrix = codes.dim() == 2, f"codes of shape {tuple(codes.shape)}; wanted [out, in]"
    both = part("codes", codes, codes.numel(), torch.int8), part("scales", absmax, rows, torch.float32)
    require([matrix, *both, *checks, together(codes, absmax)])


def _tile(width: int) -> int:
    return min(1024, power_of_2(width))


def int8_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [out, in] -> codes int8 [out, in], absmax fp32 [out]; round half to even."""
    require([_float("weight", w), (w.dim() == 2, f"weight of shape {tuple(w.shape)}; wanted [out, in]")])
    height, width = w.shape
    codes = torch.empty((height, width), dtype=torch.int8, device=w.device)
    absmax = torch.empty(height, dtype=torch.float32, device=w.device)
    launch(_pack, (height,), w, w.contiguous(), width, codes, absmax, TILE=_tile(width))
    return codes, absmax


def int8_unpack_into(codes: Tensor, absmax: Tensor | None, out: Tensor) -> None:
    """codes int8 [out, in], absmax fp32 [out] -> `out` (contiguous, [out, in]): fp32 product, rounded once. Without
    absmax the codes themselves."""
    size = out.numel() == codes.numel() and out.is_contiguous(), f"out {tuple(out.shape)} is no contiguous [out, in]"
    _packed(codes, absmax, _float("out", out), size, together(codes, out))
    height, width = codes.shape
    tile, scales = _tile(width), absmax.contiguous() if absmax is not None else None
    grid = (height, cdiv(width, tile))
    options = {"STEP": INT8_STEP, "TILE": tile, "sanitize_overflow": False}
    launch(_unpack, grid, out, None, codes.contiguous(), scales, out, height, width, **options)


def int8_unpack(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """codes int8 [out, in], absmax fp32 [out] -> a fresh weight [out, in] of `dtype`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    int8_unpack_into(codes, absmax, out)
    return out


def int8_rows(ids: Tensor, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather rows: ids (integers) [...] -> [..., in]. An id outside of the table is a device-side assertion."""
    whole = ids.dtype in (torch.int64, torch.int32), f"ids of {ids.dtype}; legal: int64, int32"
    legal = dtype in FLOATS, f"result of {dtype}; legal: {list(FLOATS)}"
    _packed(codes, absmax, whole, legal, together(ids, codes))
    height, width = codes.shape
    out = torch.empty((*ids.shape, width), dtype=dtype, device=codes.device)
    tile, parts = _tile(width), (ids.contiguous(), codes.contiguous(), absmax.contiguous())
    grid = (ids.numel(), cdiv(width, tile))
    launch(_unpack, grid, out, *parts, out, height, width, STEP=INT8_STEP, TILE=tile, sanitize_overflow=False)
    return out


def int8_scale_into(x: Tensor, absmax: Tensor, out: Tensor) -> None:
    """x [..., n], absmax fp32 [n] -> `out` (contiguous, x's shape and dtype; may be x): x * absmax / 127 in fp32,
    rounded once."""
    width = x.shape[-1]
    like = out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous(), "out is not contiguous, or not as x"
    require([_float("x", x), like, part("scales", absmax, width, torch.float32), together(x, absmax, out)])
    tile = _tile(width)
    grid = (x.numel() // max(1, width), cdiv(width, tile))
    launch(_scale, grid, out, x.contiguous(), absmax.contiguous(), out, width, STEP=INT8_STEP, TILE=tile)


def int8_matmul_fused(x: Tensor, codes: Tensor, absmax: Tensor, transpose: bool) -> Tensor | None:
    """x [..., in] -> (x C^T) * scale; with `transpose` (x * scale) C, C never dense. None where unpacking first is
    better: above SMALL_TOKENS tokens, and where tensor cores do not serve: fp32, Turing."""
    height, width = codes.shape
    inner, outer = (height, width) if transpose else (width, height)
    tokens = x.numel() // max(1, x.shape[-1])
    if tokens > SMALL_TOKENS or 0 in (tokens, height, width):
        return None
    if x.is_cuda and (x.dtype == torch.float32 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return None
    fit = x.shape[-1] == inner, f"x {tuple(x.shape)}; wanted [..., {inner}]"
    _packed(codes, absmax, _float("x", x), fit, together(x, codes))
    y = torch.empty((*x.shape[:-1], outer), dtype=x.dtype, device=x.device)
    rows = min(64, max(16, power_of_2(tokens)))
    columns, step = (64, 64) if transpose else (32, 128 if rows < 64 else 64)
    sizes = {"UNIT": INT8_STEP, "DOT": dot_type(x.dtype), "TOKENS": rows, "COLUMNS": columns, "STEP": step}
    options = sizes | ({"SCALE_W": x.dtype == torch.float16} if transpose else {})
    kernel, grid = _backward if transpose else _forward, (cdiv(outer, columns), cdiv(tokens, rows))
    parts = x.contiguous(), codes.contiguous(), absmax.contiguous(), y
    launch(kernel, grid, x, *parts, tokens, height, width, **options, num_warps=4, num_stages=4)
    return y


KERNELS: Kernels = {
    "int8_pack": int8_pack,
    "int8_unpack": int8_unpack,
    "int8_unpack_into": int8_unpack_into,
    "int8_rows": int8_rows,
    "int8_scale_into": int8_scale_into,
    "int8_matmul_fused": int8_matmul_fused,
}
