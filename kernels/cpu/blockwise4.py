"""NF4/FP4 pack and unpack on the CPU: ctypes wrappers of blockwise4.cpp, bit-equal to the references in qtune/ops/.

Functions take the ops' own arguments; `simd` (scalar, avx2, avx512, neon) forces a path, for tests.
"""

from __future__ import annotations

import ctypes
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
    n, nested, table = out.numel(), nested_absmax is not None, values(kind)
    blocks = -(n // -block) if block > 0 else 0
    groups = -(blocks // -NESTED_BLOCK)
    scale_type = torch.uint8 if nested else torch.float32
    require([
        _block_check(block),
        (fits(out, n, *DTYPES), f"out of {out.dtype} on {out.device}; legal: {list(DTYPES)} on cpu"),
        (out.is_contiguous(), "out is not contiguous"),
        part("codes", codes, (n + 1) // 2, torch.uint8),
        part("scales", absmax, blocks, scale_type),
        part("nested scales", nested_absmax, groups, torch.float32),
        part("nested offset", nested_offset, 1, torch.float32),
        (nested == (nested_offset is not None), "nested scales and their offset come together"),
    ])  # fmt: skip
    # these names keep the memory alive for the call
    codes, absmax = codes.contiguous(), absmax.contiguous()
    nested_absmax = nested_absmax.contiguous() if nested_absmax is not None else None
    map8 = dynamic8(CPU) if nested else None
    sources = (codes, absmax, map8, nested_absmax, nested_offset, table)
    goal = n, block, out.data_ptr(), DTYPES[out.dtype]
    LIBRARY.call("qtune_blockwise4_unpack", *map(pointer, sources), *goal, torch.get_num_threads(), simd_number(simd))


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


KERNELS: dict[str, Callable[..., Any]] = {
    "blockwise4_pack": blockwise4_pack,
    "dynamic8_pack": dynamic8_pack,
    "blockwise4_unpack": blockwise4_unpack,
    "blockwise4_unpack_into": blockwise4_unpack_into,
}
