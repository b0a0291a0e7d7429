"""int8 rows on the CPU: ctypes wrappers of int8.cpp, bit-equal to the references in qtune/ops/packed.py.

Functions take the ops' own arguments; `simd` (scalar, avx2, avx512) forces a path, for tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import DTYPES, FLAG, POINTER, SIZE, Library, fits, part, pointer, require, simd_number


def _self_test(library: ctypes.CDLL) -> bool:
    """A row by hand: 2, -1, 0.5 have the codes 127, -64 (half to even), 32, and 127 stands for 2 again."""
    codes, absmax, back = (ctypes.c_int8 * 3)(), (ctypes.c_float * 1)(), (ctypes.c_float * 3)()
    library.qtune_int8_pack((ctypes.c_float * 3)(2.0, -1.0, 0.5), 0, 1, 3, codes, absmax, 1, -1)
    library.qtune_int8_unpack(codes, absmax, None, 1, 1, 3, back, 0, 1, -1)
    return (*codes, absmax[0]) == (127, -64, 32, 2.0) and abs(back[0] - 2.0) < 1e-6


_P, _S, _F = POINTER, SIZE, FLAG
LIBRARY = Library(
    "int8.cpp",
    ("int8_x86.h", "simd.h", "simd_x86.h"),
    {
        "qtune_int8_pack": (_P, _F, _S, _S, _P, _P, _F, _F),
        "qtune_int8_scale": (_P, _F, _P, _S, _S, _P, _F, _F),
        "qtune_int8_unpack": (_P, _P, _P, _S, _S, _S, _P, _F, _F, _F),
    },
    _self_test,
)


def _matrix(what: str, t: Tensor, *dtypes: torch.dtype) -> tuple[bool, str]:
    names = ", ".join(map(str, dtypes))
    return t.dim() == 2 and fits(t, t.numel(), *dtypes), (
        f"{what} {list(t.shape)} of {t.dtype} on {t.device}; legal: a matrix of {names} on cpu"
    )


def int8_pack(w: Tensor, simd: str = "auto") -> tuple[Tensor, Tensor]:
    """w [out, in] fp32, bf16 or fp16 -> codes int8 [out, in], absmax fp32 [out]; round half to even."""
    require([_matrix("weight", w, *DTYPES)])
    rows, cols = w.shape
    flat, codes = w.contiguous(), torch.empty(w.shape, dtype=torch.int8)
    absmax = torch.empty(rows, dtype=torch.float32)
    results = codes.data_ptr(), absmax.data_ptr(), torch.get_num_threads(), simd_number(simd)
    LIBRARY.call("qtune_int8_pack", flat.data_ptr(), DTYPES[w.dtype], rows, cols, *results)
    return codes, absmax


def _unpack(codes: Tensor, absmax: Tensor | None, ids: Tensor | None, out: Tensor, simd: str) -> None:
    table, cols = codes.shape if codes.dim() == 2 else (0, 0)
    rows = table if ids is None else ids.numel()
    if not (
        codes.dtype == torch.int8
        and codes.dim() == 2
        and codes.is_cpu
        and out.dtype in DTYPES
        and out.is_cpu
        and out.is_contiguous()
        and out.numel() == rows * cols
        and (absmax is None or fits(absmax, table, torch.float32))
    ):
        require([
            _matrix("codes", codes, torch.int8),
            part("absmax", absmax, table, torch.float32),
            (fits(out, rows * cols, *DTYPES), f"out {list(out.shape)} of {out.dtype} on {out.device}; "
                                              f"wanted {rows * cols} of {list(DTYPES)} on cpu"),
            (out.is_contiguous(), "out is not contiguous"),
        ])  # fmt: skip
    codes = codes.contiguous()
    absmax = absmax if absmax is None else absmax.contiguous()
    sources = codes.data_ptr(), pointer(absmax), pointer(ids), table, rows, cols
    goal = out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads(), simd_number(simd)
    LIBRARY.call("qtune_int8_unpack", *sources, *goal)


def int8_unpack_into(codes: Tensor, absmax: Tensor | None, out: Tensor, simd: str = "auto") -> None:
    """codes int8 [out, in] -> `out` (contiguous, fp32, bf16 or fp16): times absmax / 127, rounded once; without absmax
    the codes themselves."""
    _unpack(codes, absmax, None, out, simd)


def int8_unpack(codes: Tensor, absmax: Tensor, dtype: torch.dtype, simd: str = "auto") -> Tensor:
    """codes int8 [out, in], absmax fp32 [out] -> a fresh weight of `dtype`: fp32 product, rounded once."""
    out = torch.empty(codes.shape, dtype=dtype)
    _unpack(codes, absmax, None, out, simd)
    return out


def int8_rows(ids: Tensor, codes: Tensor, absmax: Tensor, dtype: torch.dtype, simd: str = "auto") -> Tensor:
    """Gather rows: ids int64 or int32 [...] -> [..., in]. Raises IndexError for an id outside of the table."""
    require([(ids.dtype in (torch.int64, torch.int32) and ids.is_cpu, f"ids of {ids.dtype} on {ids.device}")])
    out = torch.empty((*ids.shape, codes.shape[-1]), dtype=dtype)
    flat = ids.to(torch.int64).contiguous()
    if flat.numel():
        low, high = (int(v) for v in flat.aminmax())
        if low < 0 or high >= codes.shape[0]:
            raise IndexError(f"row {low if low < 0 else high} of a table of {codes.shape[0]} rows")
    _unpack(codes, absmax, flat, out, simd)
    return out


def int8_scale_into(x: Tensor, absmax: Tensor, out: Tensor, simd: str = "auto") -> None:
    """x [..., n], absmax fp32 [n] -> `out` (contiguous, like x; may be x): x * absmax / 127, rounded once."""
    cols = x.shape[-1] if x.dim() else 0
    require([
        (fits(x, x.numel(), *DTYPES), f"x of {x.dtype} on {x.device}; legal: {list(DTYPES)} on cpu"),
        (out.shape == x.shape and fits(out, x.numel(), x.dtype), f"out {list(out.shape)} of {out.dtype} on {out.device}"
                                                                 f"; wanted {list(x.shape)} of {x.dtype} on cpu"),
        (out.is_contiguous(), "out is not contiguous"),
        part("absmax", absmax, cols, torch.float32),
    ])  # fmt: skip
    x, absmax = x.contiguous(), absmax.contiguous()  # these names keep the memory alive for the call
    rows = x.numel() // cols if cols else 0
    goal = rows, cols, out.data_ptr(), torch.get_num_threads(), simd_number(simd)
    LIBRARY.call("qtune_int8_scale", x.data_ptr(), DTYPES[x.dtype], absmax.data_ptr(), *goal)


KERNELS: dict[str, Callable[..., Any]] = {
    "int8_pack": int8_pack,
    "int8_unpack": int8_unpack,
    "int8_unpack_into": int8_unpack_into,
    "int8_rows": int8_rows,
    "int8_scale_into": int8_scale_into,
}
