"""Weights of 4, 3 and 2 bits in groups of one row: each op a schema, a torch reference and a shape function.

    w ~ scale[group] * (code - zero[group])      integers: scale bf16, zero fp16, a float in [0, 2^bits - 1]
    w ~ absmax[group] * level[code]              NormalFloat: absmax fp32, or 8 bits as in `packed.py`
Both are (level[code] - zero) * scale in fp32, a difference and a product, rounded once. Codes lie row by row in units
of 32; a row that 32 does not divide ends in codes of 0. A unit takes 4 bits bytes: with 4 bits byte k holds codes k and
k + 16, low nibble first; with 2 bits codes k, k + 8, k + 16 and k + 24, lowest first; with 3 bits the low two bits of
each code as with 2, then a little-endian uint32 of the high ones. So vectors are unpacked with shifts and masks alone.
Left out: products that unpack inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..tables import NESTED_BLOCK, UNIT, dynamic8, levels, row_bytes
from .packed import CHUNK, block_scales
from .product import arena_product, arena_scratch, product_like, rows_of_blocks, serving
from .registry import Scratch, op

# ---- codes


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, width] below 2^bits -> uint8 [rows, row_bytes(width, bits)]."""
    units = pad(codes, (0, -codes.shape[1] % UNIT)).view(codes.shape[0], -(codes.shape[1] // -UNIT), UNIT)
    if bits == 4:
        low, high = units.split(16, 2)
        return (low | high << 4).flatten(1)
    a, b, c, d = (units & 3).split(8, 2)
    two = a | b << 2 | c << 4 | d << 6
    if bits == 2:
        return two.flatten(1)
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    high = (units >> 2).unflatten(2, (4, 8)) << shifts
    return torch.cat((two, high.sum(3, dtype=torch.uint8)), 2).flatten(1)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """uint8 [rows, bytes] -> uint8 [rows, 32 units]: the codes, those behind the row's end included."""
    units = packed.view(packed.shape[0], packed.shape[1] // (4 * bits), 4 * bits)
    if bits == 4:
        return torch.cat((units & 15, units >> 4), 2).flatten(1)
    two = units[..., :8]
    codes = torch.cat([two >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    if bits == 3:
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        codes |= (units[..., 8:].unsqueeze(3) >> shifts & 1).flatten(2) << 2
    return codes.flatten(1)


# ---- packing


def _by_rows(height: int, width: int) -> list[slice]:
    """Rows in pieces, so that temporaries stay small."""
    step = max(1, CHUNK // max(1, width))
    return [slice(start, start + step) for start in range(0, height, step)]


def _groups(x: Tensor, group: int) -> Tensor:
    """[rows, width] -> [rows, groups, group], filled with zeros."""
    return pad(x, (0, -x.shape[1] % group)).view(x.shape[0], -(x.shape[1] // -group), group)


def spread(scale: Tensor, group: int, width: int) -> Tensor:
    """[rows, groups] -> [rows, width]: each weight its group's."""
    return scale.repeat_interleave(group, 1)[:, :width]


def grouped_int_pack(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """w [out, in], finite -> codes uint8 [out, row_bytes], scale bf16 and zero fp16 [out, ceil(in/group)].

    The scale is rounded up, so that a group's range, which always includes 0, is never clipped; codes are the nearest
    under the scale and the zero that are stored. A group of zeros gets scale 0, zero 0, codes 0.
    """
    codes, scales, zeros = _int_parts(w, bits, group)
    top = float((1 << bits) - 1)
    for part in _by_rows(*w.shape):
        x = w[part].float()
        groups = _groups(x, group)
        if not groups.numel():
            continue
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        step = ((high - low) / top).abs()  # of 0 - -0 too
        scale = ((step.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
        zero = torch.where(scale > 0, (0 - low) / scale, 0.0).clamp(max=top).half()
        scales[part], zeros[part] = scale, zero
        share = torch.where(scale.unsqueeze(2) > 0, groups / scale.unsqueeze(2), 0.0)
        code = (share + zero.float().unsqueeze(2)).clamp_(0, top).round_().to(torch.uint8)
        codes[part] = pack_codes(code.flatten(1)[:, : x.shape[1]], bits)
    return codes, scales, zeros


def _int_parts(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (w.shape[0], -(w.shape[1] // -group))
    codes = w.new_empty((w.shape[0], row_bytes(w.shape[1], bits)), dtype=torch.uint8)
    return codes, w.new_empty(shape, dtype=torch.bfloat16), w.new_empty(shape, dtype=torch.float16)


@op(grouped_int_pack)
def _(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    return _int_parts(w, bits, group)


def grouped_nf_pack(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """w [out, in], finite -> codes uint8 [out, row_bytes], absmax fp32 [out, ceil(in/group)].

    The nearest level of w / absmax, the lower one of two that are as near; a group of zeros has level 0.
    """
    codes, absmax = _nf_parts(w, bits, group)
    values = levels(bits, True, w.device)
    middle = (values[:-1] + values[1:]) / 2
    for part in _by_rows(*w.shape):
        x = w[part].float()
        groups = _groups(x, group)
        if not groups.numel():
            continue
        peak = groups.abs().amax(2)
        absmax[part] = peak
        share = torch.where(peak.unsqueeze(2) > 0, groups / peak.unsqueeze(2), 0.0)
        code = torch.bucketize(share, middle, out_int32=True).to(torch.uint8)
        codes[part] = pack_codes(code.flatten(1)[:, : x.shape[1]], bits)
    return codes, absmax


def _nf_parts(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    codes = w.new_empty((w.shape[0], row_bytes(w.shape[1], bits)), dtype=torch.uint8)
    return codes, w.new_empty((w.shape[0], -(w.shape[1] // -group)), dtype=torch.float32)


@op(grouped_nf_pack)
def _(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    return _nf_parts(w, bits, group)


# ---- unpacking


def group_scales(scale: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """The fp32 scale of each group [out, groups], double quantization undone."""
    return block_scales(scale.reshape(-1), nested_absmax, nested_offset).view(scale.shape).float()


def _decode(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, out: Tensor) -> None:
    """Packed rows with their scales (fp32) and zeros [rows, groups] -> out [rows, width]."""
    width = out.shape[1]
    table = levels(bits, zero is None, codes.device)
    values = table.index_select(0, unpack_codes(codes, bits)[:, :width].flatten().int()).view(out.shape)
    if zero is not None:
        values -= spread(zero.float(), group, width)
    torch.mul(values, spread(scale, group, width), out=out)


def grouped_unpack_into(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bits: int,
    group: int,
    out: Tensor,
) -> None:
    """Dequantize into `out` (contiguous, [out, in]): integers where there is a zero, else NormalFloat."""
    scales = group_scales(scale, nested_absmax, nested_offset)
    for part in _by_rows(*out.shape):
        _decode(codes[part], scales[part], None if zero is None else zero[part], bits, group, out[part])


def grouped_unpack(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bits: int,
    group: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Packed parts -> a fresh weight of `shape` [out, in] and `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    grouped_unpack_into(codes, scale, zero, nested_absmax, nested_offset, bits, group, out)
    return out


@op(grouped_unpack)
def _(codes, scale, zero, nested_absmax, nested_offset, bits, group, shape, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty(shape, dtype=dtype)


def grouped_rows(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bits: int,
    group: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Gather rows: ids int64 [...] -> [..., in], touching only the bytes of those rows.

    An id outside of the table is an IndexError on the CPU, a device-side assertion on CUDA.
    """
    flat, width = ids.reshape(-1).long(), shape[1]
    out = torch.empty((flat.numel(), width), dtype=dtype, device=codes.device)
    for part in _by_rows(*out.shape):
        row = flat[part]
        chosen = scale.index_select(0, row)
        if nested_absmax is not None:
            assert nested_offset is not None
            place = row.unsqueeze(1) * scale.shape[1] + torch.arange(scale.shape[1], device=row.device)
            chosen = dynamic8(row.device)[chosen.int()] * nested_absmax[place // NESTED_BLOCK] + nested_offset
        own = None if zero is None else zero.index_select(0, row)
        _decode(codes.index_select(0, row), chosen.float(), own, bits, group, out[part])
    return out.view(*ids.shape, width)


@op(grouped_rows)
def _(ids, codes, scale, zero, nested_absmax, nested_offset, bits, group, shape, dtype):  # type: ignore[no-untyped-def]
    return codes.new_empty((*ids.shape, shape[1]), dtype=dtype)


# ---- the product


def grouped_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bits: int,
    group: int,
    shape: Sequence[int],
    transpose: bool,
    inner: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """x [..., in] -> x W^T [..., out]; with `transpose` x [..., out] -> x W [..., in]. W is unpacked to x's dtype in
    the arena. inner [..., r] and factor [out, r] ([r, in]) add inner factor^T (inner factor)."""
    parts, groups = (codes, scale, zero, nested_absmax, nested_offset, bits, group), scale.shape[1]

    def fill(first: int, last: int, w: Tensor) -> None:
        tile = parts
        if last - first < shape[0]:
            nested, own = nested_absmax, None if zero is None else zero[first:last]
            if nested is not None:
                nested = nested[first * groups // NESTED_BLOCK : -(last * groups // -NESTED_BLOCK)]
            tile = codes[first:last], scale[first:last], own, nested, nested_offset, bits, group
        serving(grouped_unpack_into, w)(*tile, w)

    return arena_product(fill, _whole_blocks(groups, nested_absmax), x, shape, transpose, inner, factor)


def _whole_blocks(groups: int, nested_absmax: Tensor | None) -> int:
    """Rows after which a block of quantized scales begins: a tile of W may begin there."""
    return 1 if nested_absmax is None else rows_of_blocks(groups, NESTED_BLOCK)


def _scratch(device_type: str, x: Tensor, *rest: Any) -> Scratch:
    """rest: the other arguments of `grouped_matmul`."""
    return arena_scratch(device_type, x, rest[7], _whole_blocks(rest[1].shape[1], rest[3]), rest[8])


@op(grouped_matmul, scratch=_scratch)
def _(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, nested_absmax, nested_offset, bits, group, shape, transpose, inner=None, factor=None
):
    return product_like(x, shape, transpose)
