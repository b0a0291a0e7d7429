"""NF4/FP4 pack and unpack on the CPU: ctypes wrappers of blockwise4.cpp, bit-equal to the references in qtune/ops.py.

Functions take the ops' own arguments; `simd` (scalar, avx2, avx512, neon) forces a path, for tests.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtune.errors import QtuneError, one_of
from qtune.tables import NESTED_BLOCK, TABLES, bounds, dynamic8, dynamic8_grid, table

from .build import Built, build

SOURCE = Path(__file__).with_name("blockwise4.cpp")
HEADERS = (Path(__file__).with_name("blockwise4_x86.h"),)
SIMD = {"auto": -1, "scalar": 0, "avx2": 1, "avx512": 2, "neon": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CPU = torch.device("cpu")

_lock = threading.Lock()
_built: Built | None = None


# ---- tables: pointers into them go to the library, and qtune.tables keeps the tensors as long as the process


def values(kind: str) -> Tensor:
    """fp32 [16]: what each nibble stands for."""
    if kind not in TABLES:
        raise one_of("4-bit kind", kind, TABLES)
    return table(kind, CPU)


# ---- the library


def _self_test(library: ctypes.CDLL) -> bool:
    """Two values through pack and unpack, by hand: 1 and -0.5 are nf4's codes 15 and 2, with scale 1."""
    _declare(library)
    code, absmax, back = (ctypes.c_uint8 * 1)(), (ctypes.c_float * 1)(), (ctypes.c_float * 2)()
    nf4 = (ctypes.c_float * 16)(*TABLES["nf4"])
    middle = (ctypes.c_float * 15)(*((a + b) / 2 for a, b in zip(nf4, nf4[1:], strict=False)))
    order = (ctypes.c_uint8 * 16)(*range(16))
    library.qtune_blockwise4_pack((ctypes.c_float * 2)(1.0, -0.5), 0, 2, 2, middle, order, code, absmax, 1, -1)
    library.qtune_blockwise4_unpack(code, absmax, None, None, None, nf4, 2, 2, back, 0, 1, -1)
    return (code[0], absmax[0], back[0], back[1]) == (0xF2, 1.0, 1.0, nf4[2])


def _declare(library: ctypes.CDLL) -> None:
    p, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.qtune_isa.argtypes = [flag]
    library.qtune_blockwise4_pack.argtypes = [p, flag, size, size, p, p, p, p, flag, flag]
    library.qtune_dynamic8_pack.argtypes = [p, size, p, p, p, flag]
    library.qtune_blockwise4_unpack.argtypes = [p, p, p, p, p, p, size, size, p, flag, flag, flag]


def built() -> Built:
    """The library, compiled at the first call if the cache does not hold it."""
    global _built
    if _built is None:
        with _lock:
            if _built is None:
                _built = build(SOURCE, HEADERS, _self_test)
    return _built


def why_not() -> str | None:
    """None, or why these kernels cannot run here."""
    return None if built().library else built().why


def reset() -> None:
    """Forget the loaded library: the next call looks into the cache again."""
    global _built
    _built = None


def features() -> dict[str, Any]:
    """{simd, openmp, compiler, library, why}: what runs here, or why nothing does."""
    now = built()
    names = {number: name for name, number in SIMD.items()}
    return {
        "simd": names[now.library.qtune_isa(-1)] if now.library else "none",
        "openmp": bool(now.library and now.library.qtune_openmp()),
        "compiler": now.compiler,
        "library": str(now.path) if now.path else "",
        "why": now.why,
    }


def simd_paths() -> list[str]:
    """The paths that this machine can run."""
    library = built().library
    return [name for name, number in SIMD.items() if number >= 0 and library and library.qtune_isa(number) >= 0]


def _call(function: str, *arguments: object) -> None:
    library = built().library
    if library is None:
        raise QtuneError(f"the CPU kernels cannot run: {built().why}")
    if status := getattr(library, function)(*arguments):
        raise QtuneError(f"{function}: " + ("this machine lacks the SIMD path" if status == 2 else "wrong arguments"))


# ---- the ops


def _require(checks: Sequence[tuple[bool, str]]) -> None:
    """One error for all that does not fit: the kernels get bare pointers, so nothing after this would notice."""
    if found := [text for holds, text in checks if not holds]:
        raise QtuneError(f"4-bit kernel: {'; '.join(found)}")


def _is(t: Tensor, numel: int, *dtypes: torch.dtype) -> bool:
    return t.device.type == "cpu" and t.dtype in dtypes and t.numel() == numel


def _part(what: str, t: Tensor | None, numel: int, dtype: torch.dtype) -> tuple[bool, str]:
    if t is None:
        return True, ""
    return _is(t, numel, dtype), f"{what}: {t.numel()} of {t.dtype} on {t.device}; wanted {numel} of {dtype} on cpu"


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _simd(name: str) -> int:
    if name not in SIMD:
        raise one_of("SIMD path", name, SIMD)
    return SIMD[name]


def _block_check(block: int) -> tuple[bool, str]:
    return block >= 2 and block % 2 == 0, f"block {block} is not an even number above 0"


def blockwise4_pack(w: Tensor, kind: str, block: int, simd: str = "auto") -> tuple[Tensor, Tensor]:
    """w (any shape, n values, fp32, bf16 or fp16) -> codes uint8 [ceil(n/2)], absmax fp32 [ceil(n/block)]."""
    values(kind)  # refuses an unknown kind
    n, flat, (middle, order) = w.numel(), w.contiguous(), bounds(kind, CPU)
    _require(
        [(_is(w, n, *DTYPES), f"weight of {w.dtype} on {w.device}; legal: {list(DTYPES)} on cpu"), _block_check(block)]
    )
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(n // -block), dtype=torch.float32)
    tables = middle.data_ptr(), order.data_ptr()
    results = codes.data_ptr(), absmax.data_ptr()
    threads = torch.get_num_threads()
    _call("qtune_blockwise4_pack", flat.data_ptr(), DTYPES[w.dtype], n, block, *tables, *results, threads, _simd(simd))
    return codes, absmax


def dynamic8_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [m] -> codes uint8 [m], absmax fp32 [ceil(m/256)]; a block of zeros gets code 0 and absmax 0."""
    m, flat, bins = x.numel(), x.contiguous(), dynamic8_grid(CPU)
    _require([(_is(x, m, torch.float32), f"scales of {x.dtype} on {x.device}; legal: torch.float32 on cpu")])
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(-(m // -NESTED_BLOCK), dtype=torch.float32)
    results = codes.data_ptr(), absmax.data_ptr()
    _call("qtune_dynamic8_pack", flat.data_ptr(), m, bins.data_ptr(), *results, torch.get_num_threads())
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
    _require([
        _block_check(block),
        (_is(out, n, *DTYPES), f"out of {out.dtype} on {out.device}; legal: {list(DTYPES)} on cpu"),
        (out.is_contiguous(), "out is not contiguous"),
        _part("codes", codes, (n + 1) // 2, torch.uint8),
        _part("scales", absmax, blocks, scale_type),
        _part("nested scales", nested_absmax, groups, torch.float32),
        _part("nested offset", nested_offset, 1, torch.float32),
        (nested == (nested_offset is not None), "nested scales and their offset come together"),
    ])  # fmt: skip
    # these names keep the memory alive for the call
    codes, absmax = codes.contiguous(), absmax.contiguous()
    nested_absmax = nested_absmax.contiguous() if nested_absmax is not None else None
    map8 = dynamic8(CPU) if nested else None
    sources = (codes, absmax, map8, nested_absmax, nested_offset, table)
    goal = n, block, out.data_ptr(), DTYPES[out.dtype]
    _call("qtune_blockwise4_unpack", *map(_pointer, sources), *goal, torch.get_num_threads(), _simd(simd))


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
