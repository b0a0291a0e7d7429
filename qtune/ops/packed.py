"""Operations on packed weights: each a schema, a torch reference (the truth) and a shape function, so all runs on meta.

    w ~ table[code] * absmax[block]          4-bit: blocks of the flat weight, two codes a byte, high nibble first
    absmax ~ map8[code8] * nested + offset   double quantization: blocks of 256, bitsandbytes' signed dynamic 8-bit map
    w ~ code * absmax[row] / 127             int8: one scale a row, applied after the product

Sources: QLoRA (arXiv 2305.14314), LLM.int8 (2208.07339), dynamic map (1511.04561). Codes and scales are bit-equal to
bitsandbytes 0.50 on CPU. Left out: products of quantized activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tables import NESTED_BLOCK, bounds, dynamic8, dynamic8_grid, pairs, table
from .product import arena_product, product_like, product_scratch, rows_of_blocks, serving, without_unpacking
from .registry import Scratch, op

TINY = 1e-38  # bitsandbytes' floor for a block's absmax
CHUNK = 1 << 22  # elements a reference handles at a time, so that its temporaries stay small


# ---- 4-bit blocks ----


def blockwise4_pack(w: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """w (any shape, n elements, finite) -> codes uint8 [ceil(n/2)], absmax fp32 [ceil(n/block)]."""
    flat = w.reshape(-1)
    n = flat.numel()
    middle, order = bounds(kind, w.device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(n // -block), dtype=torch.float32, device=w.device)
    step = CHUNK // block * block
    for start in range(0, n, step):
        part = flat[start : start + step].float()
        full = part.numel() // block * block
        body = part[:full].view(-1, block)
        peak = body.abs().amax(dim=1) if full else part.new_empty(0)
        scaled = (body * (1.0 / peak.clamp(min=TINY)).unsqueeze(1)).clamp(-1, 1).view(-1)
        if full < part.numel():  # bitsandbytes divides in the last, partial block and stores its floored absmax
            tail = part[full:].abs().max().clamp(min=TINY)
            peak = torch.cat((peak, tail.unsqueeze(0)))
            scaled = torch.cat((scaled, (part[full:] / tail).clamp(-1, 1)))
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        code = order.index_select(0, torch.bucketize(scaled, middle, out_int32=True))  # [...] would copy to int64
        absmax[start // block : start // block + peak.numel()] = peak
        codes[start // 2 : start // 2 + code.numel() // 2] = (code[::2] << 4) | code[1::2]
    return codes, absmax


@op(blockwise4_pack)
def _(w: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    return w.new_empty((n + 1) // 2, dtype=torch.uint8), w.new_empty(-(n // -block), dtype=torch.float32)


def dynamic8_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [m] -> codes uint8 [m], absmax fp32 [ceil(m/256)]; a block of zeros gets code 0 and absmax 0."""
    m = x.numel()
    blocks = torch.nn.functional.pad(x, (0, -m % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    normed = (blocks * (1.0 / absmax).unsqueeze(1)).clamp(-1, 1).nan_to_num_(nan=-1.0)
    # bitsandbytes' build may fuse the multiply-add; a test of all 2^25 shares shows the same point either way
    point = ((normed + 1.0) * 0.5 * 65535 + 0.5).to(torch.int32)
    return dynamic8_grid(x.device)[point].view(-1)[:m].contiguous(), absmax


@op(dynamic8_pack)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(-(x.numel() // -NESTED_BLOCK))


def block_scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """The fp32 scale of each block, double quantization undone."""
    if nested_absmax is None:
        return absmax
    values = dynamic8(absmax.device)[absmax.to(torch.int32)]
    nested = nested_absmax.repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
    assert nested_offset is not None
    return values * nested + nested_offset


def blockwise4_unpack_into(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    out: Tensor,
) -> None:
    """Dequantize into `out` (contiguous, n elements): fp32 product of table value and scale, rounded once to out's
    dtype."""
    flat, both = out.view(-1), pairs(kind, codes.device)
    n, step = flat.numel(), CHUNK // block * block
    scales = block_scales(absmax, nested_absmax, nested_offset)
    for start in range(0, n, step):
        size = min(step, n - start)
        byte = codes[start // 2 : (start + size + 1) // 2].to(torch.int32)
        values = both.index_select(0, byte).view(-1)[:size]
        full = size // block * block
        scale = scales[start // block : start // block - (size // -block)]
        torch.mul(
            values[:full].view(-1, block),
            scale[: full // block].unsqueeze(1),
            out=flat[start : start + full].view(-1, block),
        )
        if full < size:
            torch.mul(values[full:], scale[-1], out=flat[start + full : start + size])


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


@op(blockwise4_unpack)
def _(codes, absmax, nested_absmax, nested_offset, kind, block, shape, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty(shape, dtype=dtype)


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
    """Gather rows: ids int64 [...] -> [..., shape[1]], touching only the bytes of those rows.

    An id outside of the table is an IndexError on the CPU, a device-side assertion on CUDA.
    """
    width = shape[1]
    flat, out = ids.reshape(-1).long(), torch.empty((ids.numel(), width), dtype=dtype, device=codes.device)
    rows = max(1, CHUNK // 8 // max(1, width))  # a value costs 40 bytes of temporaries here
    for start in range(0, flat.numel(), rows):
        row = flat[start : start + rows].unsqueeze(1)
        place = (row * width + torch.arange(width, device=ids.device)).view(-1)
        byte = codes.index_select(0, place >> 1)  # refuses a negative place, where codes[...] would count from the end
        code = torch.where(place % 2 == 0, byte >> 4, byte & 15)
        which = place // block
        scale = absmax[which]
        if nested_absmax is not None:
            assert nested_offset is not None
            scale = dynamic8(ids.device)[scale.to(torch.int32)] * nested_absmax[which // NESTED_BLOCK] + nested_offset
        out[start : start + rows] = (table(kind, ids.device)[code.to(torch.int32)] * scale).view(-1, width)
    return out.view(*ids.shape, width)


@op(blockwise4_rows)
def _(ids, codes, absmax, nested_absmax, nested_offset, kind, block, shape, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty((*ids.shape, shape[1]), dtype=dtype)


# ---- products ----


def blockwise4_matmul(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    shape: Sequence[int],
    transpose: bool,
    inner: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """x [..., in] -> x W^T [..., out]; with `transpose` x [..., out] -> x W [..., in]. W is unpacked to x's dtype in
    the arena, or a tile at a time where a kernel does that. inner [..., r] and factor [out, r] ([r, in]) add inner
    factor^T (inner factor)."""
    parts = codes, absmax, nested_absmax, nested_offset, kind, block
    if (y := without_unpacking("blockwise4_matmul", x, *parts, shape, transpose, inner, factor)) is not None:
        return y
    both = block * NESTED_BLOCK

    def fill(first: int, last: int, w: Tensor) -> None:
        start, end, tile = first * shape[1], last * shape[1], parts
        if last - first < shape[0]:
            nested = None if nested_absmax is None else nested_absmax[start // both : -(end // -both)]
            scales = absmax[start // block : -(end // -block)]
            tile = codes[start // 2 : (end + 1) // 2], scales, nested, nested_offset, kind, block
        serving(blockwise4_unpack_into, w)(*tile, w)

    step = _whole_blocks(shape[1], block, nested_absmax)
    return arena_product(fill, step, x, shape, transpose, inner, factor)


def _whole_blocks(width: int, block: int, nested_absmax: Tensor | None) -> int:
    """Rows after which a block of codes begins, and of scales, if they are quantized: a tile of W may begin there."""
    return rows_of_blocks(width, block * (1 if nested_absmax is None else NESTED_BLOCK))


def _blockwise4_scratch(device_type: str, x: Tensor, *rest: Any) -> Scratch:
    """rest: the other arguments of `blockwise4_matmul`."""
    nested_absmax, block, shape, transpose = rest[2], *rest[5:8]
    step = _whole_blocks(shape[1], block, nested_absmax)
    return product_scratch("blockwise4_matmul", device_type, shape, step, transpose, x, *rest)


@op(blockwise4_matmul, scratch=_blockwise4_scratch)
def _(  # type: ignore[no-untyped-def]
    x, codes, absmax, nested_absmax, nested_offset, kind, block, shape, transpose, inner=None, factor=None
):
    return product_like(x, shape, transpose)


# ---- int8 rows ----

INT8_STEP = 1.0 / 127.0


def int8_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [out, in] -> codes int8 [out, in], absmax fp32 [out]; round half to even, as bitsandbytes'
    `int8_vectorwise_quant`."""
    absmax = torch.zeros(w.shape[0], dtype=torch.float32, device=w.device)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    rows = max(1, CHUNK // max(1, w.shape[1]))
    for start in range(0, w.shape[0] if w.shape[1] else 0, rows):
        part = w[start : start + rows].float()
        peak = absmax[start : start + rows] = part.abs().amax(dim=1)
        factor = torch.where(peak > 0, 127.0 / peak, 0.0).unsqueeze(1)
        # the clamp matters for a subnormal absmax only, whose reciprocal overflows
        codes[start : start + rows] = (part * factor).nan_to_num_().round_().clamp_(-127, 127)
    return codes, absmax


@op(int8_pack)
def _(w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w, dtype=torch.int8), w.new_empty(w.shape[0], dtype=torch.float32)


def int8_unpack_into(codes: Tensor, absmax: Tensor | None, out: Tensor) -> None:
    """codes int8 [out, in], absmax fp32 [out] -> `out` [out, in]: fp32 product, rounded once. Without absmax the codes
    themselves, exact in every dtype."""
    if absmax is None:
        out.copy_(codes)
        return
    scale = (absmax * INT8_STEP).unsqueeze(1)
    rows = max(1, CHUNK // max(1, codes.shape[1]))  # on the CPU torch.mul copies what it casts
    for start in range(0, codes.shape[0], rows):
        part = slice(start, start + rows)
        torch.mul(codes[part], scale[part], out=out[part])


def int8_unpack(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """codes int8 [out, in], absmax fp32 [out] -> a fresh weight [out, in] of `dtype`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    int8_unpack_into(codes, absmax, out)
    return out


@op(int8_unpack)
def _(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def int8_rows(ids: Tensor, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather rows: ids int64 [...] -> [..., in]. An id outside of the table: see `blockwise4_rows`."""
    flat = ids.reshape(-1)
    rows = torch.empty((flat.numel(), codes.shape[1]), dtype=dtype, device=codes.device)
    torch.mul(codes.index_select(0, flat), (absmax.index_select(0, flat) * INT8_STEP).unsqueeze(1), out=rows)
    return rows.view(*ids.shape, codes.shape[1])


@op(int8_rows)
def _(ids: Tensor, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*ids.shape, codes.shape[1]), dtype=dtype)


def int8_scale_into(x: Tensor, absmax: Tensor, out: Tensor) -> None:
    """x [..., n], absmax fp32 [n] -> `out` (contiguous, like x; may be x): x * absmax / 127 in fp32, rounded once."""
    torch.mul(x, absmax * INT8_STEP, out=out)


def int8_matmul(x: Tensor, codes: Tensor, absmax: Tensor, transpose: bool) -> Tensor:
    """x [..., in] -> (x C^T) * scale; with `transpose` (x * scale) C. The scale is applied in fp32 outside of the
    product.

    fp16 has no range for that (codes up to 127 overflow the product with a large activation, a 127th of a gradient
    vanishes): there W is scaled.
    """
    if (y := without_unpacking("int8_matmul", x, codes, absmax, transpose)) is not None:
        return y
    scaled, scale = x.dtype == torch.float16, serving(int8_scale_into, x)

    def fill(first: int, last: int, w: Tensor) -> None:
        serving(int8_unpack_into, w)(codes[first:last], absmax[first:last] if scaled else None, w)

    if transpose and not scaled:
        scaled_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale(x, absmax, scaled_x)
        x = scaled_x
    y = arena_product(fill, 1, x, codes.shape, transpose)
    if not transpose and not scaled:
        scale(y, absmax, y)
    return y


def _int8_scratch(device_type: str, x: Tensor, codes: Tensor, absmax: Tensor, transpose: bool) -> Scratch:
    taken = product_scratch("int8_matmul", device_type, codes.shape, 1, transpose, x, codes, absmax, transpose)
    scaled = x.numel() * x.element_size() if transpose and x.dtype != torch.float16 else 0
    return {**taken, "temporary": taken.get("temporary", 0) + scaled}


@op(int8_matmul, scratch=_int8_scratch)
def _(x: Tensor, codes: Tensor, absmax: Tensor, transpose: bool) -> Tensor:
    return product_like(x, codes.shape, transpose)
