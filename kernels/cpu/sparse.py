"""Sparse products on the CPU: ctypes wrappers of sparse.cpp; the ops are those of qtune/ops/sparse.py.

S is checked in C before every product (row pointers that rise from 0 to nnz, columns within the matrix): one pass of
compares over the indices, some hundredths of the product's time, so nothing needs to be remembered between calls.
Functions take the ops' own arguments; `simd` (scalar, avx2, avx512) forces a path, for tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import DTYPES, FLAG, POINTER, SIZE, Library, fits, pointer, require, simd_number

POINTERS, COLUMNS = (torch.int32, torch.int64), (torch.int16, torch.int32)


def _self_test(library: ctypes.CDLL) -> bool:
    """(2, 3) times the matrix [[0, 5], [0, 0]], transposed, is (15, 0)."""
    x, y, values = (ctypes.c_float * 2)(2, 3), (ctypes.c_float * 2)(), (ctypes.c_float * 1)(5)
    rows, cols, plan = (ctypes.c_int32 * 3)(0, 1, 1), (ctypes.c_int32 * 1)(1), (ctypes.c_int64 * 3)()
    library.qtune_sparse_plan(0, 0, 1, 2, 1, -1, plan)
    scratch = (ctypes.c_float * plan[2])()
    library.qtune_sparse_matmul(x, 0, 1, rows, 0, cols, 0, values, 2, 2, None, None, None, y, scratch, plan, -1)
    return (y[0], y[1]) == (15.0, 0.0)


_P, _S, _F = POINTER, SIZE, FLAG
LIBRARY = Library(
    "sparse.cpp",
    ("lanes.h", "sparse_path.h", "simd.h", "simd_x86.h"),
    {
        "qtune_sparse_check": (_P, _F, _P, _F, _S, _S, _P),
        "qtune_sparse_plan": (_F, _F, _S, _S, _F, _F, _P),
        "qtune_sparse_matmul": (_P, _F, _S, _P, _F, _P, _F, _P, _S, _S, _P, _P, _P, _P, _P, _P, _F),
        "qtune_sampled_product": (_P, _P, _F, _S, _P, _F, _P, _F, _S, _S, _P, _P, _P, _F),
    },
    _self_test,
)


def _ends(name: str, t: Tensor, width: int) -> list[tuple[bool, str]]:
    """Checks of a dense operand [..., width]."""
    return [
        (fits(t, t.numel(), *DTYPES), f"{name} of {t.dtype} on {t.device}; legal: {list(DTYPES)} on cpu"),
        (t.dim() > 0 and t.shape[-1] == width, f"{name} of shape {list(t.shape)}; wanted [..., {width}]"),
    ]


def _structure(rows: Tensor, cols: Tensor, out: int) -> list[tuple[bool, str]]:
    return [
        (out >= 0 and fits(rows, out + 1, *POINTERS) and rows.dim() == 1,
         f"row pointers {rows.dtype} {list(rows.shape)}; wanted int32 or int64 [{out + 1}]"),
        (fits(cols, cols.numel(), *COLUMNS) and cols.dim() == 1,
         f"columns {cols.dtype} {list(cols.shape)}; wanted int16 (unsigned) or int32 [nnz]"),
    ]  # fmt: skip


def _inside(rows: Tensor, cols: Tensor, out: int, width: int) -> None:
    """QtuneError unless every index of S points inside."""
    report, nnz = (ctypes.c_int64 * 3)(), cols.numel()
    kinds = rows.dtype == torch.int64, cols.dtype == torch.int16
    LIBRARY.call("qtune_sparse_check", rows.data_ptr(), kinds[0], cols.data_ptr(), kinds[1], out, nnz, report)
    least, most = report[1], report[2]
    require([
        (report[0] < 0, f"row pointers do not rise from 0 to {nnz}, the number of columns: see pointer {report[0]}"),
        (not nnz or 0 <= least <= most < width, f"columns {least} to {most}; wanted 0 to {width - 1}"),
    ])  # fmt: skip


def _plan(sampled: bool, x: Tensor, tokens: int, isa: int) -> tuple[Any, Tensor]:
    """How to share out a product that gathers from x, and its scratch."""
    plan = (ctypes.c_int64 * 3)()
    LIBRARY.call("qtune_sparse_plan", sampled, DTYPES[x.dtype], tokens, x.shape[-1], torch.get_num_threads(), isa, plan)
    return plan, torch.empty(plan[2], dtype=torch.float32)


def _matmul(
    x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int], t: bool, simd: str
) -> Tensor:
    (out, width), isa = shape, simd_number(simd)
    values_fit = fits(values, cols.numel(), *DTYPES) and values.dim() == 1
    require([
        *_ends("dy" if t else "x", x, out if t else width),
        *_structure(rows, cols, out),
        (values_fit, f"values {values.dtype} {list(values.shape)}; wanted {list(DTYPES)} [{cols.numel()}] on cpu"),
    ])  # fmt: skip
    x, rows, cols, values = x.contiguous(), rows.contiguous(), cols.contiguous(), values.float().contiguous()
    _inside(rows, cols, out, width)
    tokens = x.shape[:-1].numel()
    plan, scratch = _plan(False, x, tokens, isa)
    kinds = (width + 1, torch.int64), (cols.numel(), torch.int32), (cols.numel(), torch.float32)
    turned = [torch.empty(size, dtype=dtype) for size, dtype in kinds] if t else [None] * 3
    y = torch.empty((*x.shape[:-1], width if t else out), dtype=x.dtype)
    wide, narrow = rows.dtype == torch.int64, cols.dtype == torch.int16
    matrix = rows.data_ptr(), wide, cols.data_ptr(), narrow, values.data_ptr(), out, width
    goal = *map(pointer, turned), y.data_ptr(), scratch.data_ptr(), plan, isa
    LIBRARY.call("qtune_sparse_matmul", x.data_ptr(), DTYPES[x.dtype], tokens, *matrix, *goal)
    return y


def sparse_matmul(
    x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, out_features: int, simd: str = "auto"
) -> Tensor:
    """x [..., in] -> x S^T [..., out], x's dtype; sums in fp32, rounded once."""
    return _matmul(x, rows, cols, values, (out_features, x.shape[-1] if x.dim() else 0), False, simd)


def sparse_matmul_t(
    dy: Tensor, rows: Tensor, cols: Tensor, values: Tensor, in_features: int, simd: str = "auto"
) -> Tensor:
    """dy [..., out] -> dy S [..., in], dy's dtype; sums in fp32, rounded once."""
    return _matmul(dy, rows, cols, values, (rows.numel() - 1, in_features), True, simd)


def sampled_product(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, simd: str = "auto") -> Tensor:
    """dy [..., out], x [..., in] of one dtype -> dy^T x at S's places, fp32 [nnz]."""
    out, width, isa = rows.numel() - 1, x.shape[-1] if x.dim() else 0, simd_number(simd)
    same = f"dy {dy.dtype} {list(dy.shape)} and x {x.dtype} {list(x.shape)} differ in dtype or tokens"
    require([
        *_ends("dy", dy, out),
        *_ends("x", x, width),
        *_structure(rows, cols, out),
        (dy.dtype == x.dtype and dy.shape[:-1] == x.shape[:-1], same),
    ])  # fmt: skip
    dy, x, rows, cols = dy.contiguous(), x.contiguous(), rows.contiguous(), cols.contiguous()
    _inside(rows, cols, out, width)
    tokens = x.shape[:-1].numel()
    plan, scratch = _plan(True, x, tokens, isa)
    result = torch.empty(cols.shape, dtype=torch.float32)
    kinds = rows.dtype == torch.int64, cols.dtype == torch.int16
    matrix = rows.data_ptr(), kinds[0], cols.data_ptr(), kinds[1], out, width
    goal = result.data_ptr(), scratch.data_ptr(), plan, isa
    LIBRARY.call("qtune_sampled_product", dy.data_ptr(), x.data_ptr(), DTYPES[x.dtype], tokens, *matrix, *goal)
    return result


KERNELS: dict[str, Callable[..., Any]] = {
    "sparse_matmul": sparse_matmul,
    "sparse_matmul_t": sparse_matmul_t,
    "sampled_product": sampled_product,
}
