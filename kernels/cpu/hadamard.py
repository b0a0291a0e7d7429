"""The Walsh-Hadamard transform on the CPU: ctypes wrapper of hadamard.cpp.

The function takes the op's own arguments; `simd` (scalar, avx2, avx512) forces a path, for tests; all give the same
bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import DTYPES, FLAG, POINTER, REAL, SIZE, Library, fits, require, simd_number

LARGEST, LARGEST_ORDER = 1 << 16, 1 << 10  # as in hadamard.cpp


def _self_test(library: ctypes.CDLL) -> bool:
    """H_2 of (3, 1), halved, is (2, 1)."""
    x, y = (ctypes.c_float * 2)(3.0, 1.0), (ctypes.c_float * 2)()
    library.qtune_hadamard(x, 0, 1, 2, None, 1, 0, None, 0.5, y, 1, -1)
    return (y[0], y[1]) == (2.0, 1.0)


LIBRARY = Library(
    "hadamard.cpp",
    ("lanes.h", "hadamard_path.h", "simd.h", "simd_x86.h"),
    {
        "qtune_hadamard": (POINTER, FLAG, SIZE, SIZE, POINTER, SIZE, FLAG, POINTER, REAL, POINTER, FLAG, FLAG),
    },
    _self_test,
)


def hadamard_kronecker(x: Tensor, base: Tensor, scale: float, transpose: bool, simd: str = "auto") -> Tensor:
    """x [..., n] fp32, bf16 or fp16, base int8 [K, K] of 1 and -1 -> scale x (base (x) H_{2^m})^T.

    With `transpose` it multiplies by base (x) H_{2^m} itself. K is 1 or a multiple of 4, at
    most 1024; n = K 2^m, at most 65536.
    """
    n, order = x.shape[-1], base.shape[0]
    length = n // order if order else 0
    square = fits(base, order * order, torch.int8) and base.dim() == 2
    require([
        (fits(x, x.numel(), *DTYPES), f"x of {x.dtype} on {x.device}; legal: {list(DTYPES)} on cpu"),
        (square, f"base {base.dtype} {list(base.shape)} is not int8 [K, K]"),
        (order == 1 or (order > 0 and order % 4 == 0), f"a base of order {order}; legal: 1 and multiples of 4"),
        (order <= LARGEST_ORDER, f"a base of order {order}; at most {LARGEST_ORDER}"),
        (0 < n <= LARGEST, f"size {n}; legal: 1 to {LARGEST}"),
        (length * order == n and length & (length - 1) == 0, f"size {n} is not {order} times a power of two"),
    ])  # fmt: skip
    flat, base = x.contiguous(), base.contiguous()
    if order == 1:  # the library leaves it out
        scale *= base.item()
    y = torch.empty(x.shape, dtype=x.dtype)
    index = torch.empty(order * order // 4, dtype=torch.uint8)
    LIBRARY.call(
        "qtune_hadamard",
        flat.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // n,
        n,
        base.data_ptr(),
        order,
        transpose,
        index.data_ptr(),
        scale,
        y.data_ptr(),
        torch.get_num_threads(),
        simd_number(simd),
    )
    return y


KERNELS: dict[str, Callable[..., Any]] = {"hadamard_kronecker": hadamard_kronecker}
