"""NF4/FP4 on CUDA through Triton: twins of the ops in qtune/ops/packed.py, bit-equal but for the product.

Unpacking is one pass, from bytes and 8-bit scales to bf16: 0.52 B read and 2 B written a weight, so memory is its limit
as long as a weight costs less than some 15 instructions: the 16 values come from one cache line, a scale is computed
once for the 8 neighbours that a thread writes as 16 bytes. `blockwise4_matmul_fused` multiplies without a dense W,
in both directions, the gradient's too: bytes become a tile of W in registers. Left out: splitting K, the tensor cores'
own 4-bit formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from qtune.errors import one_of
from qtune.tables import NESTED_BLOCK, TABLES, bounds, dynamic8, dynamic8_grid, table

from .launch import FLOATS, LIBRARY, Kernels, cdiv, dot_type, fits, jit, launch, part, power_of_2, require, tl, together

__all__ = ["KERNELS", "LIBRARY", "SMALL_TOKENS"]

TINY = 1e-38  # bitsandbytes' floor for a block's absmax
# Up to here the product in packed form serves. Not measured: a prior. bitsandbytes' own kernels for few tokens stop
# winning between 64 and 128 on a 4090 and are never used above 512: beyond, each tile of W would be unpacked too often.
SMALL_TOKENS = 64

# ---- kernels


@jit
def _scales(absmax, map8, nested, offset, which, mask, NESTED: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fp32 scales of blocks `which`: rounded after the product and after the sum, as the reference's."""
    scale = tl.load(absmax + which, mask=mask, other=0)
    if NESTED:
        scale = tl.load(map8 + scale.to(tl.int32))
        scale = scale * tl.load(nested + which // GROUP, mask=mask, other=0.0) + tl.load(offset)
    return scale


@jit
def _values(sixteen, byte, scale, DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both values of each byte [a, b], scaled and rounded to DOT. The table goes through shared memory: loads of it
    would be prefetched as the bytes are, value by value."""
    size: tl.constexpr = byte.shape[0] * byte.shape[1]
    high = tl.reshape(tl.gather(sixteen, tl.reshape(byte >> 4, (size,)), 0), byte.shape)
    low = tl.reshape(tl.gather(sixteen, tl.reshape(byte & 15, (size,)), 0), byte.shape)
    return (high * scale).to(DOT), (low * scale).to(DOT)


@jit
def _pack(  # type: ignore[no-untyped-def]
    w, n, size, middle, order, codes, absmax,
    TINY: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks a program, each in a row of WIDTH >= BLOCK."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    left = n - first * BLOCK  # values from here to the end
    place = row * BLOCK + column
    x = tl.load(w + first * BLOCK + place, mask=(column < BLOCK) & (place < left), other=0.0).to(tl.float32)
    # as integers, of which NaN is the largest; below, comparisons that NaN fails: it gets the last code, as in torch
    peak = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    floor = tl.full((ROWS,), TINY, tl.float32)  # a bare TINY, below fp32's normal range, would be taken as fp64
    floored = tl.where(peak < floor, floor, peak)
    full = left - tl.arange(0, ROWS) * BLOCK >= BLOCK
    # bitsandbytes multiplies by the reciprocal, but divides in the last, partial block and stores its floored absmax
    factor = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), floored)
    scaled = x * factor[:, None]
    if left < ROWS * BLOCK:
        share = tl.div_rn(x, tl.broadcast_to(floored[:, None], (ROWS, WIDTH)))
        scaled = tl.where(full[:, None], scaled, share)
    scaled = tl.where(scaled < -1.0, -1.0, tl.where(scaled > 1.0, 1.0, scaled))
    count = tl.zeros((ROWS, WIDTH), tl.int32)
    for i in tl.static_range(15):
        count += tl.where(scaled <= tl.load(middle + i), 0, 1)
    code = tl.load(order + count).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (ROWS, WIDTH // 2, 2)))
    column = tl.arange(0, WIDTH // 2)[None, :]
    byte = row * (BLOCK // 2) + column
    mask = (column < BLOCK // 2) & (byte < size - first * (BLOCK // 2))
    tl.store(codes + first * (BLOCK // 2) + byte, ((high << 4) | low).to(tl.uint8), mask=mask)
    block = tl.arange(0, ROWS)
    tl.store(absmax + first + block, tl.where(full, peak, floored), mask=block * BLOCK < left)


@jit
def _pack8(x, m, grid, codes, absmax, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block a program, rounded by a table over 65536 points."""
    first, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = i < m - first * BLOCK
    value = tl.load(x + first * BLOCK + i, mask=mask, other=0.0)
    peak = tl.max(tl.abs(value).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    normed = value * tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32) + peak)
    clamped = tl.minimum(tl.maximum(normed, -1.0), 1.0)
    clamped = tl.where(normed != normed, -1.0, clamped)  # 0 * infinity
    point = ((clamped + 1.0) * 0.5 * 65535.0 + 0.5).to(tl.int32)
    tl.store(codes + first * BLOCK + i, tl.load(grid + point), mask=mask)
    tl.store(absmax + first, peak)


@jit
def _unpack(  # type: ignore[no-untyped-def]
    codes, absmax, map8, nested, offset, values, out, n, size,
    NESTED: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS runs of STRIDE bytes a program, each in a row of WIDTH >= STRIDE; a block is PIECES runs."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    left = n - first * (2 * STRIDE)  # values from here to the end
    scale = _scales(absmax, map8, nested, offset, (first + row) // PIECES, row * (2 * STRIDE) < left, NESTED, GROUP)
    place = row[:, None] * STRIDE + column
    mask = place < size - first * STRIDE  # a size of its own: 16 divides it, so bytes come four at a time
    if WIDTH != STRIDE:
        mask = mask & (column < STRIDE)
    byte = tl.load(codes + first * STRIDE + place, mask=mask, other=0).to(tl.int32)
    kind = out.dtype.element_ty
    high = (tl.load(values + (byte >> 4)) * scale[:, None]).to(kind)
    low = (tl.load(values + (byte & 15)) * scale[:, None]).to(kind)
    column = tl.arange(0, 2 * WIDTH)[None, :]
    place = row[:, None] * (2 * STRIDE) + column
    mask = place < left
    if WIDTH != STRIDE:
        mask = mask & (column < 2 * STRIDE)
    tl.store(out + first * (2 * STRIDE) + place, tl.interleave(high, low), mask=mask)


@jit(debug=True)  # keeps the assertion
def _rows(  # type: ignore[no-untyped-def]
    ids, codes, absmax, map8, nested, offset, values, out, height, width,
    NESTED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """WIDTH values of one gathered row a program; a row may start within a block, or a byte."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    wanted = tl.load(ids + token).to(tl.int64)
    row = tl.minimum(tl.maximum(wanted, 0), height - 1)  # no read outside before the assertion ends the program
    tl.device_assert(row == wanted, "an id is outside of the table")
    mask, place = column < width, row * width + column
    byte = tl.load(codes + place // 2, mask=mask, other=0).to(tl.int32)
    code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    scale = _scales(absmax, map8, nested, offset, place // BLOCK, mask, NESTED, GROUP)
    tl.store(out + token * width + column, (tl.load(values + code) * scale).to(out.dtype.element_ty), mask=mask)


@jit
def _forward(  # type: ignore[no-untyped-def]
    x, codes, absmax, map8, nested, offset, values, y, tokens, height, width,
    NESTED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y = x W^T: a tile of TOKENS x COLUMNS rows of W, STEP (a divisor of BLOCK) values of each at a time.

    The even and the odd values of a tile are two products: no interleaving of W.
    """
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = n < height
    k, half = tl.arange(0, STEP), tl.arange(0, STEP // 2)
    sources = x + m[:, None].to(tl.int64) * width + k[None, :]
    packed = codes + n[:, None] * (width // 2) + half[None, :]
    block = n * (width // BLOCK)
    sixteen = tl.load(values + tl.arange(0, 16))
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, width, STEP):
        value = tl.load(sources + start, mask=m[:, None] < tokens, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(value.to(DOT), (TOKENS, STEP // 2, 2)))
        byte = tl.load(packed + start // 2, mask=inside[:, None], other=0).to(tl.int32)
        scale = _scales(absmax, map8, nested, offset, block + start // BLOCK, inside, NESTED, GROUP)[:, None]
        high, low = _values(sixteen, byte, scale, DOT)
        total = tl.dot(even, tl.trans(high), total, input_precision="ieee")
        total = tl.dot(odd, tl.trans(low), total, input_precision="ieee")
    goal = y + m[:, None].to(tl.int64) * height + n[None, :]
    tl.store(goal, total.to(y.dtype.element_ty), mask=(m[:, None] < tokens) & inside[None, :])


@jit
def _backward(  # type: ignore[no-untyped-def]
    x, codes, absmax, map8, nested, offset, values, y, tokens, height, width,
    NESTED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """y = x W: a tile of TOKENS x COLUMNS (a divisor of BLOCK) columns of W, STEP rows of W at a time.

    The even and the odd columns are two sums, interleaved once at the end.
    """
    column = tl.program_id(0) * COLUMNS
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    k, half = tl.arange(0, STEP), tl.arange(0, COLUMNS // 2)
    sources = x + m[:, None].to(tl.int64) * height + k[None, :]
    packed = codes + column // 2 + k[:, None].to(tl.int64) * (width // 2) + half[None, :]
    row = tl.full((1,), 0, tl.int64) + width
    first = column // BLOCK + k.to(tl.int64) * (width // BLOCK)
    sixteen = tl.load(values + tl.arange(0, 16))
    even = tl.zeros((TOKENS, COLUMNS // 2), tl.float32)
    odd = tl.zeros((TOKENS, COLUMNS // 2), tl.float32)
    for start in range(0, height, STEP):
        inside = k < height - start
        value = tl.load(sources + start, mask=(m[:, None] < tokens) & inside[None, :], other=0.0).to(tl.float32).to(DOT)
        byte = tl.load(packed, mask=inside[:, None], other=0).to(tl.int32)
        scale = _scales(absmax, map8, nested, offset, first, inside, NESTED, GROUP)[:, None]
        high, low = _values(sixteen, byte, scale, DOT)
        even = tl.dot(value, high, even, input_precision="ieee")
        odd = tl.dot(value, low, odd, input_precision="ieee")
        packed += row * (STEP // 2)
        first += row // BLOCK * STEP
    n = column + tl.arange(0, COLUMNS)
    goal = y + m[:, None].to(tl.int64) * width + n[None, :]
    tl.store(goal, tl.interleave(even, odd).to(y.dtype.element_ty), mask=(m[:, None] < tokens) & (n[None, :] < width))


# ---- the ops


def _known(kind: str, block: int) -> tuple[bool, str]:
    """Refuses an unknown kind; a check of the block for `require`."""
    if kind not in TABLES:
        raise one_of("4-bit kind", kind, TABLES)
    return block >= 2 and block % 2 == 0, f"block {block} is not an even number above 0"


def blockwise4_pack(w: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """w (any shape, n values, fp32, bf16 or fp16) -> codes uint8 [ceil(n/2)], absmax fp32 [ceil(n/block)]."""
    even, n = _known(kind, block), w.numel()
    require([(fits(w, n, *FLOATS), f"weight of {w.dtype} on {w.device}; legal: {list(FLOATS)}"), even])
    middle, order = bounds(kind, w.device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(cdiv(n, block), dtype=torch.float32, device=w.device)
    width = power_of_2(block)
    rows = max(1, 2048 // width)
    shape = {"BLOCK": block, "WIDTH": width, "ROWS": rows, "TINY": TINY}
    launch(_pack, (cdiv(n, block * rows),), w, w.contiguous(), n, codes.numel(), middle, order, codes, absmax, **shape)
    return codes, absmax


def dynamic8_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [m] -> codes uint8 [m], absmax fp32 [ceil(m/256)]; a block of zeros gets code 0 and absmax 0."""
    m = x.numel()
    require([(fits(x, m, torch.float32), f"scales of {x.dtype} on {x.device}; legal: torch.float32")])
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(cdiv(m, NESTED_BLOCK), dtype=torch.float32, device=x.device)
    grid = dynamic8_grid(x.device)
    launch(_pack8, (absmax.numel(),), x, x.contiguous(), m, grid, codes, absmax, BLOCK=NESTED_BLOCK, num_warps=2)
    return codes, absmax


Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]


def _parts(
    n: int,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    *checks: tuple[bool, str],
) -> Parts:
    """What the kernels take of a weight of n values: codes, scales, map, nested scales, offset, table. Raises
    QtuneError for all that does not fit."""
    even, nested = _known(kind, block), nested_absmax is not None
    blocks = cdiv(n, block) if block > 0 else 0
    require([
        even,
        *checks,
        part("codes", codes, (n + 1) // 2, torch.uint8),
        part("scales", absmax, blocks, torch.uint8 if nested else torch.float32),
        part("nested scales", nested_absmax, cdiv(blocks, NESTED_BLOCK), torch.float32),
        part("nested offset", nested_offset, 1, torch.float32),
        (nested == (nested_offset is not None), "nested scales and their offset come together"),
        together(codes, absmax, nested_absmax, nested_offset),
    ])  # fmt: skip
    nested_absmax = nested_absmax.contiguous() if nested_absmax is not None else None
    map8 = dynamic8(codes.device) if nested else None
    return codes.contiguous(), absmax.contiguous(), map8, nested_absmax, nested_offset, table(kind, codes.device)


def blockwise4_unpack_into(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    out: Tensor,
) -> None:
    """Dequantize into `out` (contiguous, n values): fp32 product of value and scale, rounded once, to nearest even."""
    n = out.numel()
    known = fits(out, n, *FLOATS), f"out of {out.dtype} on {out.device}; legal: {list(FLOATS)}"
    dense = out.is_contiguous(), "out is not contiguous"
    parts = _parts(n, codes, absmax, nested_absmax, nested_offset, kind, block, known, dense, together(codes, out))
    half, warps = block // 2, 4
    whole = half & (half - 1)  # not 0: no power of two
    width = power_of_2(half) if whole else min(half, 128 * warps)
    stride = half if whole else width
    rows = max(1, 128 * warps // width)  # 4 bytes, 8 values a thread
    shape = {"STRIDE": stride, "PIECES": half // stride, "WIDTH": width, "ROWS": rows, "num_warps": warps}
    grid = (cdiv(n, 2 * stride * rows),)
    launch(_unpack, grid, out, *parts, out, n, codes.numel(), NESTED=parts[2] is not None, GROUP=NESTED_BLOCK, **shape)


def blockwise4_unpack(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Packed parts -> a fresh weight of `shape` and `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    blockwise4_unpack_into(codes, absmax, nested_absmax, nested_offset, kind, block, out)
    return out


def blockwise4_rows(
    ids: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Gather rows: ids (integers) [...] -> [..., shape[1]]. An id outside of the table is a device-side assertion."""
    whole = ids.dtype in (torch.int64, torch.int32), f"ids of {ids.dtype}; legal: int64, int32"
    legal = dtype in FLOATS, f"result of {dtype}; legal: {list(FLOATS)}"
    known = whole, legal, together(ids, codes)
    parts = _parts(prod(shape), codes, absmax, nested_absmax, nested_offset, kind, block, *known)
    height, width = shape
    out = torch.empty((*ids.shape, width), dtype=dtype, device=codes.device)
    tile = min(1024, power_of_2(width))
    options = {"NESTED": parts[2] is not None, "GROUP": NESTED_BLOCK, "BLOCK": block, "WIDTH": tile}
    grid = (ids.numel(), cdiv(width, tile))
    launch(_rows, grid, out, ids.contiguous(), *parts, out, height, width, sanitize_overflow=False, **options)
    return out


def blockwise4_matmul_fused(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    shape: Sequence[int],
    transpose: bool,
    low: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor | None:
    """x [..., in] -> x W^T [..., out]; with `transpose` x [..., out] -> x W [..., in], W never dense: its tiles are
    rounded to x's dtype, sums are fp32; low factor^T (`transpose`: low factor) is added by torch. None where unpacking
    W first is better: above SMALL_TOKENS tokens, for blocks that cross rows or are no power of two from 32 on, and
    where tensor cores do not serve: fp32, Turing."""
    height, width = shape
    inner, outer = (height, width) if transpose else (width, height)
    tokens = x.numel() // max(1, x.shape[-1])
    if tokens > SMALL_TOKENS or width % block or block < 32 or block & (block - 1) or 0 in (tokens, height, width):
        return None
    if x.is_cuda and (x.dtype == torch.float32 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return None
    known = x.dtype in FLOATS and x.shape[-1] == inner, f"x {tuple(x.shape)} of {x.dtype}; wanted [..., {inner}]"
    parts = _parts(prod(shape), codes, absmax, nested_absmax, nested_offset, kind, block, known, together(x, codes))
    y = torch.empty((*x.shape[:-1], outer), dtype=x.dtype, device=x.device)
    rows = min(64, max(16, power_of_2(tokens)))
    columns, step = (min(block, 64), 64) if transpose else (32, min(block, 128))
    options = {"NESTED": parts[2] is not None, "GROUP": NESTED_BLOCK, "BLOCK": block, "DOT": dot_type(x.dtype)}
    tile = {"TOKENS": rows, "COLUMNS": columns, "STEP": step, "num_warps": 4, "num_stages": 5}
    kernel, grid = _backward if transpose else _forward, (cdiv(outer, columns), cdiv(tokens, rows))
    launch(kernel, grid, x, x.contiguous(), *parts, y, tokens, height, width, **options, **tile)
    if low is not None and factor is not None:
        y.view(tokens, outer).addmm_(low.reshape(tokens, -1), factor if transpose else factor.t())
    return y


KERNELS: Kernels = {
    "blockwise4_pack": blockwise4_pack,
    "dynamic8_pack": dynamic8_pack,
    "blockwise4_unpack": blockwise4_unpack,
    "blockwise4_unpack_into": blockwise4_unpack_into,
    "blockwise4_rows": blockwise4_rows,
    "blockwise4_matmul_fused": blockwise4_matmul_fused,
}
