"""NF4/FP4 pack and unpack on the CPU: ctypes wrappers of blockwise4.cpp, bit-equal to the references in qtune/ops/.

Functions take the ops' own arguments; `simd` (scalar, avx2, avx512, neon) forces a path, for tests.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtune.errors import one_of
from qtune.tables import NESTED_BLOCK, TABLES, bounds, dynamic8, dynamic8_grid, table

from .library import DTYPES, FLAG, POINTER, SIZE, Library, fits, part, pointer, require, simd_number

CPU = torch.device("cpu")


def values(kind: str) -> Tensor:
    """fp32 [16]: what each nibble stands for. qtune.tables keeps the tensor, so pointers into it stay good."""
    if kind not in TABLES:
        raise one_of("4-bit kind", kind, TABLES)
    return table(kind, CPU)


def _self_test(library: ctypes.CDLL) -> bool:
    """Two values through pack and unpack, by hand: 1 and -0.5 are nf4's codes 15 and 2, with scale 1."""
    code, absmax, back = (ctypes.c_uint8 * 1)(), (ctypes.c_float * 1)(), (ctypes.c_float * 2)()
    nf4 = (ctypes.c_float * 16)(*TABLES["nf4"])
    middle = (ctypes.c_float * 15)(*((a + b) / 2 for a, b in zip(nf4, nf4[1:], strict=False)))
    order = (ctypes.c_uint8 * 16)(*range(16))
    library.qtune_blockwise4_pack((ctypes.c_float * 2)(1.0, -0.5), 0, 2, 2, middle, order, code, absmax, 1, -1)
    library.qtune_blockwise4_unpack(code, absmax, None, None, None, nf4, 2, 2, back, 0, 1, -1)
    return (code[0], absmax[0], back[0], back[1]) == (0xF2, 1.0, 1.0, nf4[2])


_P, _S, _F = POINTER, SIZE, FLAG
LIBRARY = Library(
    "blockwise4.cpp",
    ("blockwise4_x86.h", "simd.h", "simd_x86.h"),
    {
        "qtune_blockwise4_pack": (_P, _F, _S, _S, _P, _P, _P, _P, _F, _F),
        "qtune_dynamic8_pack": (_P, _S, _P, _P, _P, _F),
        "qtune_blockwise4_unpack": (_P, _P, _P, _P, _P, _P, _S, _S, _P, _F, _F, _F),
        "qtune_blockwise4_rows": (_P, _P, _P, _P, _P, _P, _P, _S, _S, _S, _S, _P, _F, _F, _F),
    },
    _self_test,
)


# ---- the ops


def _block_check(block: int) -> tuple[bool, str]:
    return block >= 2 and block % 2 == 0, f"block {block} is not an even number above 0"


def blockwise4_pack(w: Tensor, kind: str, block: int, simd: str = "auto") -> tuple[Tensor, Tensor]:
    """w (any shape, n values, fp32, bf16 or fp16) -> codes uint8 [ceil(n/2)], absmax fp32 [ceil(n/block)]."""
    values(kind)  # refuses an unknown kind
    n, flat, (middle, order) = w.numel(), w.contiguous(), bounds(kind, CPU)
    require(
        [(fits(w, n, *DTYPES), f"weight of {w.dtype} on {w.device}; legal: {list(DTYPES)} on cpu"), _block_check(block)]
    )
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(n // -block), dtype=torch.float32)
    tables = middle.data_ptr(), order.data_ptr()
    results = codes.data_ptr(), absmax.data_ptr()
    threads = torch.get_num_threads()
    LIBRARY.call(
        "qtune_blockwise4_pack",
        flat.data_ptr(),
        DTYPES[w.dtype],
        n,
        block,
        *tables,
        *results,
        threads,
        simd_number(simd),
    )
    return codes, absmax


def dynamic8_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [m] -> codes uint8 [m], absmax fp32 [ceil(m/256)]; a block of zeros gets code 0 and absmax 0."""
    m, flat, bins = x.numel(), x.contiguous(), dynamic8_grid(CPU)
    require([(fits(x, m, torch.float32), f"scales of {x.dtype} on {x.device}; legal: torch.float32 on cpu")])
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(-(m // -NESTED_BLOCK), dtype=torch.float32)
    results = codes.data_ptr(), absmax.data_ptr()
    LIBRARY.call("qtune_dynamic8_pack", flat.data_ptr(), m, bins.data_ptr(), *results, torch.get_num_threads())
    return codes, absmax


@functools.cache
def _table_pointers(kind: str) -> tuple[int, int]:
    """Addresses of the 16 values and of the 8-bit map, both of which qtune.tables keeps."""
    return values(kind).data_ptr(), dynamic8(CPU).data_ptr()


def _plain(t: Tensor, numel: int, dtype: torch.dtype) -> bool:
    """What `fits` says of a CPU tensor, at a third of its cost, and that the tensor is contiguous."""
    return t.dtype is dtype and t.numel() == numel and t.is_cpu and t.is_contiguous()


def _sources(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    n: int,
    out: Tensor,
) -> tuple[tuple[int | None, ...], tuple[Tensor, ...]]:
    """The pointers that the kernels take for a weight of n values: codes, absmax, map, nested, offset, values; and the
    tensors behind them, to be kept for the call. Checks them and `out`. A training step asks this hundreds of times, so
    what is wrong is looked for, and views are copied, only where something is not as it mostly is."""
    blocks = -(n // -block) if block > 0 else 0
    table, map8 = _table_pointers(kind)
    goal_fits = block >= 2 and block % 2 == 0 and out.dtype in DTYPES and out.is_cpu and out.is_contiguous()
    if goal_fits and _plain(codes, (n + 1) // 2, torch.uint8):
        if nested_absmax is None:
            if nested_offset is None and _plain(absmax, blocks, torch.float32):
                return (codes.data_ptr(), absmax.data_ptr(), None, None, None, table), ()
        elif (
            nested_offset is not None
            and _plain(absmax, blocks, torch.uint8)
            and _plain(nested_absmax, -(blocks // -NESTED_BLOCK), torch.float32)
            and _plain(nested_offset, 1, torch.float32)
        ):
            pointers = codes.data_ptr(), absmax.data_ptr(), map8, nested_absmax.data_ptr(), nested_offset.data_ptr()
            return (*pointers, table), ()
    nested = nested_absmax is not None
    require([
        _block_check(block),
        (fits(out, out.numel(), *DTYPES), f"out of {out.dtype} on {out.device}; legal: {list(DTYPES)} on cpu"),
        (out.is_contiguous(), "out is not contiguous"),
        part("codes", codes, (n + 1) // 2, torch.uint8),
        part("scales", absmax, blocks, torch.uint8 if nested else torch.float32),
        part("nested scales", nested_absmax, -(blocks // -NESTED_BLOCK), torch.float32),
        part("nested offset", nested_offset, 1, torch.float32),
        (nested == (nested_offset is not None), "nested scales and their offset come together"),
    ])  # fmt: skip
    kept = [codes.contiguous(), absmax.contiguous()]
    if nested_absmax is None or nested_offset is None:
        return (*map(pointer, kept), None, None, None, table), tuple(kept)
    kept += [nested_absmax.contiguous(), nested_offset]
    first, second, third, fourth = map(pointer, kept)
    return (first, second, map8, third, fourth, table), tuple(kept)


def blockwise4_unpack_into(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    out: Tensor,
    simd: str = "auto",
) -> None:
    """Dequantize into `out` (contiguous, n values): fp32 product of value and scale, rounded once, to nearest even."""
    n = out.numel()
    sources, _kept = _sources(codes, absmax, nested_absmax, nested_offset, kind, block, n, out)
    goal = n, block, out.data_ptr(), DTYPES[out.dtype]
    LIBRARY.call("qtune_blockwise4_unpack", *sources, *goal, torch.get_num_threads(), simd_number(simd))


def blockwise4_unpack(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    kind: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    simd: str = "auto",
) -> Tensor:
    """Packed parts -> a fresh weight of `shape` and `dtype`."""
    out = torch.empty(shape, dtype=dtype)
    blockwise4_unpack_into(codes, absmax, nested_absmax, nested_offset, kind, block, out, simd)
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
    simd: str = "auto",
) -> Tensor:
    """Gather rows: ids int64 or int32 [...] -> [..., shape[1]]. Raises IndexError for an id outside of the table."""
    require([(ids.dtype in (torch.int64, torch.int32) and ids.is_cpu, f"ids of {ids.dtype} on {ids.device}")])
    rows, width = shape
    flat, out = ids.to(torch.int64).contiguous(), torch.empty((*ids.shape, width), dtype=dtype)
    sources, _kept = _sources(codes, absmax, nested_absmax, nested_offset, kind, block, rows * width, out)
    if flat.numel():
        low, high = (int(v) for v in flat.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(f"row {low if low < 0 else high} of a table of {rows} rows")
    goal = flat.numel(), rows, width, block, out.data_ptr(), DTYPES[dtype], torch.get_num_threads(), simd_number(simd)
    LIBRARY.call("qtune_blockwise4_rows", *sources, flat.data_ptr(), *goal)
    return out


KERNELS: dict[str, Callable[..., Any]] = {
    "blockwise4_pack": blockwise4_pack,
    "dynamic8_pack": dynamic8_pack,
    "blockwise4_unpack": blockwise4_unpack,
    "blockwise4_unpack_into": blockwise4_unpack_into,
    "blockwise4_rows": blockwise4_rows,
}
