"""Products with a packed W that is never dense in memory, on the CPU: ctypes wrappers of matmul.cpp.

Serves bf16 on machines with AMX; each function returns None where it does not, or where unpacking W first is better.
W's values are those of `blockwise4_unpack`, bit for bit (int8: the codes, exactly); sums are fp32, rounded once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtune.tables import NESTED_BLOCK, dynamic8

from .blockwise4 import values
from .library import FLAG, POINTER, Library, fits, part, pointer, require

KEPT = 4 << 20  # bytes of scratch a thread that stay for the next call
STEP = 32  # values of a step of the reduction, columns of a block
INT8_STEP = 1.0 / 127.0
AMX = 5
FORMS = {"blockwise4": 0, "dense": 1, "int8": 2}
CPU = torch.device("cpu")


def _self_test(library: ctypes.CDLL) -> bool:
    """Without AMX nothing is served. With it: 3 x 1 row of 32 ones is 96."""
    if library.qtune_isa(-1) != AMX:
        return True
    numbers, size = (ctypes.c_int64 * 7)(1, 32, 1, 0, 1, 0, 0), ctypes.c_int64()
    library.qtune_matmul_scratch(numbers, 1, ctypes.byref(size))
    scratch = (ctypes.c_char * (size.value + 64))()
    aligned = ctypes.addressof(scratch) + -ctypes.addressof(scratch) % 64
    x, w, y = (ctypes.c_uint16 * 32)(*[0x4040] * 32), (ctypes.c_uint16 * 32)(*[0x3F80] * 32), (ctypes.c_uint16 * 1)()
    library.qtune_matmul(numbers, x, w, *[None] * 8, y, aligned, 1)
    return y[0] == 0x42C0


_kept = threading.local()
_P, _F = POINTER, FLAG
LIBRARY = Library(
    "matmul.cpp",
    ("matmul_task.h", "matmul_fill.h", "matmul_tile.h", "amx.h", "simd.h", "simd_x86.h"),
    {"qtune_matmul_scratch": (_P, _F, _P), "qtune_matmul": (*[_P] * 13, _F)},
    _self_test,
)


def _runs() -> bool:
    library = LIBRARY.built().library
    return library is not None and library.qtune_isa(-1) == AMX


def _scratch(numbers: Any, threads: int) -> Tensor:
    size = ctypes.c_int64()
    LIBRARY.call("qtune_matmul_scratch", numbers, threads, ctypes.byref(size))
    kept = getattr(_kept, "scratch", None)
    if kept is not None and kept.numel() >= size.value:
        return kept  # type: ignore[no-any-return]
    with torch.inference_mode(False):
        scratch = torch.empty(size.value, dtype=torch.uint8)
    if size.value <= KEPT * threads:
        _kept.scratch = scratch
    return scratch


def _product(
    x: Tensor,
    form: str,
    shape: Sequence[int],
    transpose: bool,
    block: int,
    sources: Sequence[Tensor | None],
    scales: Tensor | None = None,
    inner: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """sources: codes, absmax, map, nested scales, offset, values. All but x is checked and contiguous."""
    long, wide = shape if transpose else (shape[1], shape[0])
    rows = x.contiguous()
    y = torch.empty((*x.shape[:-1], wide), dtype=x.dtype)
    rank, threads = 0 if inner is None else inner.shape[-1], torch.get_num_threads()
    numbers = (ctypes.c_int64 * 7)(x.numel() // long, long, wide, rank, FORMS[form], block, transpose)
    scratch = _scratch(numbers, threads)
    pointers = map(pointer, (rows, *sources, scales, inner, factor, y, scratch))
    LIBRARY.call("qtune_matmul", numbers, *pointers, threads)
    return y


def _serves(x: Tensor, shape: Sequence[int]) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() > 0 and 0 not in shape and _runs()


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
) -> Tensor | None:
    """x bf16 [..., in] -> x W^T [..., out]; with `transpose` x [..., out] -> x W [..., in]. None for other dtypes,
    without AMX, and for blocks that are no multiple of 32 or do not divide a row."""
    height, width = shape
    if not _serves(x, shape) or block % STEP or block <= 0 or width % block:
        return None
    sixteen, blocks, nested = values(kind), height * width // block, nested_absmax is not None
    inner = height if transpose else width
    require([
        (x.is_cpu and x.shape[-1] == inner, f"x {tuple(x.shape)} on {x.device}; wanted [..., {inner}] on cpu"),
        part("codes", codes, height * width // 2, torch.uint8),
        part("scales", absmax, blocks, torch.uint8 if nested else torch.float32),
        part("nested scales", nested_absmax, -(blocks // -NESTED_BLOCK), torch.float32),
        part("nested offset", nested_offset, 1, torch.float32),
        (nested == (nested_offset is not None), "nested scales and their offset come together"),
    ])  # fmt: skip
    nested_absmax = nested_absmax.contiguous() if nested_absmax is not None else None
    map8 = dynamic8(CPU) if nested else None
    sources = codes.contiguous(), absmax.contiguous(), map8, nested_absmax, nested_offset, sixteen
    return _product(x, "blockwise4", shape, transpose, block, sources)


KERNELS: dict[str, Callable[..., Any]] = {"blockwise4_matmul_fused": blockwise4_matmul_fused}
