"""Products with a packed W that is never dense in memory, on the CPU: ctypes wrappers of matmul.cpp.

Serves bf16 on machines with AMX; each function returns None where it does not, or where unpacking W first is better:
sums of fewer than 256 values for 256 rows or more.
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
from .int8 import int8_scale_into
from .library import FLAG, POINTER, Library, part, pointer, require

KEPT = 4 << 20  # bytes of scratch a thread that stay for the next call
STEP = 32  # values of a step of the reduction, columns of a block
INT8_STEP = 1.0 / 127.0
AMX = 5
SHORT, MANY = 256, 256  # shorter sums for this many rows are a tenth faster unpacked first (measured)
FORMS = {"blockwise4": 0, "dense": 1, "int8": 2}  # dense: the low-rank factor is one; no op is served by it
CPU = torch.device("cpu")


def _self_test(library: ctypes.CDLL) -> bool:
    """Without AMX nothing is served. With it: 32 threes times 32 ones are 96."""
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


def _serves(x: Tensor, shape: Sequence[int], transpose: bool) -> bool:
    long = shape[0] if transpose else shape[1]
    if x.dtype != torch.bfloat16 or x.numel() == 0 or 0 in shape:
        return False
    return (long >= SHORT or x.numel() < MANY * long) and _runs()


def _x_check(x: Tensor, shape: Sequence[int], transpose: bool) -> tuple[bool, str]:
    long = shape[0] if transpose else shape[1]
    fitting = x.is_cpu and x.dim() > 0 and x.shape[-1] == long
    return fitting, f"x {tuple(x.shape)} on {x.device}; wanted [..., {long}] on cpu"


def _low_rank(x: Tensor, inner: Tensor | None, factor: Tensor | None, shape: Sequence[int], transpose: bool):  # type: ignore[no-untyped-def]
    """inner and factor, contiguous (None without a rank), and a check of both."""
    if inner is None or factor is None:
        return None, None, (inner is factor, "inner and factor come together")
    rank = inner.shape[-1] if inner.dim() else 0
    wanted = (rank, shape[1]) if transpose else (shape[0], rank)
    fitting = (
        inner.dtype == factor.dtype == x.dtype
        and inner.is_cpu
        and factor.is_cpu
        and tuple(factor.shape) == wanted
        and inner.shape[:-1] == x.shape[:-1]
    )
    text = f"inner {tuple(inner.shape)} of {inner.dtype}, factor {tuple(factor.shape)} of {factor.dtype}"
    check = fitting, f"{text}; wanted [..., {rank}], {wanted} of {x.dtype} on cpu"
    return (inner.contiguous(), factor.contiguous(), check) if rank else (None, None, check)


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
    inner: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor | None:
    """x bf16 [..., in] -> x W^T [..., out]; with `transpose` x [..., out] -> x W [..., in].

    inner bf16 [..., r] and factor bf16 [out, r] (with `transpose` [r, in]) add inner factor^T (inner factor) to the
    same sums. None for other dtypes of x, without AMX, for blocks that are no multiple of 32 or do not divide a row.
    """
    height, width = shape
    if not _serves(x, shape, transpose) or block % STEP or block <= 0 or width % block:
        return None
    sixteen, blocks, nested = values(kind), height * width // block, nested_absmax is not None
    inner, factor, together = _low_rank(x, inner, factor, shape, transpose)
    require([
        _x_check(x, shape, transpose),
        part("codes", codes, height * width // 2, torch.uint8),
        part("scales", absmax, blocks, torch.uint8 if nested else torch.float32),
        part("nested scales", nested_absmax, -(blocks // -NESTED_BLOCK), torch.float32),
        part("nested offset", nested_offset, 1, torch.float32),
        (nested == (nested_offset is not None), "nested scales and their offset come together"),
        together,
    ])  # fmt: skip
    nested_absmax = nested_absmax.contiguous() if nested_absmax is not None else None
    map8 = dynamic8(CPU) if nested else None
    sources = codes.contiguous(), absmax.contiguous(), map8, nested_absmax, nested_offset, sixteen
    return _product(x, "blockwise4", shape, transpose, block, sources, None, inner, factor)


def int8_matmul_fused(x: Tensor, codes: Tensor, absmax: Tensor, transpose: bool) -> Tensor | None:
    """x bf16 [..., in] -> (x C^T) * scale, the scale in fp32 on the sums; with `transpose` (x * scale, rounded) C.
    None for other dtypes of x, without AMX, for rows of codes that are no multiple of 32."""
    if not _serves(x, codes.shape, transpose) or codes.dim() != 2 or codes.shape[1] % STEP:
        return None
    require([
        _x_check(x, codes.shape, transpose),
        (codes.is_cpu and codes.dtype == torch.int8, f"codes of {codes.dtype} on {codes.device}; wanted int8 on cpu"),
        part("scales", absmax, codes.shape[0], torch.float32),
    ])  # fmt: skip
    sources = codes.contiguous(), *[None] * 5
    if not transpose:
        return _product(x, "int8", codes.shape, False, 1, sources, absmax * INT8_STEP)
    scaled = torch.empty(x.shape, dtype=x.dtype)
    int8_scale_into(x, absmax, scaled)
    return _product(scaled, "int8", codes.shape, True, 1, sources)


def _scratch_of(x: Tensor, shape: Sequence[int], transpose: bool, form: str, block: int, rank: int) -> dict[str, int]:
    """Bytes of the scratch, kept up to KEPT a thread, for tensors on any device."""
    long, wide = shape if transpose else (shape[1], shape[0])
    threads, size = torch.get_num_threads(), ctypes.c_int64()
    numbers = (ctypes.c_int64 * 7)(x.numel() // long, long, wide, rank, FORMS[form], block, transpose)
    LIBRARY.call("qtune_matmul_scratch", numbers, threads, ctypes.byref(size))
    copy = 0 if x.is_contiguous() else x.numel() * x.element_size()
    if size.value <= KEPT * threads:
        return {"matmul": size.value, "temporary": copy}
    return {"temporary": size.value + copy}


def _blockwise4_scratch(
    x: Tensor, codes: Any, absmax: Any, nested: Any, offset: Any, kind: str, block: int, shape: Sequence[int],
    transpose: bool, inner: Tensor | None = None, factor: Tensor | None = None,
) -> dict[str, int] | None:  # fmt: skip
    if not _serves(x, shape, transpose) or block % STEP or block <= 0 or shape[1] % block:
        return None
    return _scratch_of(x, shape, transpose, "blockwise4", block, 0 if inner is None else inner.shape[-1])


def _int8_scratch(x: Tensor, codes: Tensor, absmax: Tensor, transpose: bool) -> dict[str, int] | None:
    if not _serves(x, codes.shape, transpose) or codes.shape[1] % STEP:
        return None
    return _scratch_of(x, codes.shape, transpose, "int8", 1, 0)


SCRATCH: dict[str, Callable[..., dict[str, int] | None]] = {
    "blockwise4_matmul_fused": _blockwise4_scratch,
    "int8_matmul_fused": _int8_scratch,
}
KERNELS: dict[str, Callable[..., Any]] = {
    "blockwise4_matmul_fused": blockwise4_matmul_fused,
    "int8_matmul_fused": int8_matmul_fused,
}
