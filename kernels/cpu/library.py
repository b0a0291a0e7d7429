"""What the ctypes wrappers of the CPU kernels share: a library built at first use, and checks before pointers go out.

One C++ source is one library; it holds every SIMD path and chooses at run time. Wrappers take the op's own arguments
and `simd` (a name in SIMD), which forces a path, for tests.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtune.errors import QtuneError, one_of

from .build import Built, build

SIMD = {"auto": -1, "scalar": 0, "avx2": 1, "avx512": 2, "neon": 3, "avx512_bf16": 4, "amx": 5}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FOLDER = Path(__file__).parent
FAULTS = {1: "wrong arguments", 2: "this machine lacks the SIMD path", 3: "out of memory"}

POINTER, SIZE, FLAG, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Library:
    """A source of this folder, compiled at the first call if the cache does not hold it."""

    def __init__(
        self,
        source: str,
        headers: Sequence[str],
        functions: Mapping[str, Sequence[Any]],
        self_test: Callable[[ctypes.CDLL], bool],
    ) -> None:
        """functions: exported name -> types of its arguments (POINTER, SIZE, FLAG, REAL). self_test: does the loaded
        library compute a case known by hand?"""
        self.source, self.functions, self.self_test = FOLDER / source, functions, self_test
        self.headers = tuple(FOLDER / name for name in headers)
        self._lock = threading.Lock()
        self._built: Built | None = None

    def _check(self, library: ctypes.CDLL) -> bool:
        library.qtune_isa.argtypes = [FLAG]
        for name, types in self.functions.items():
            getattr(library, name).argtypes = list(types)
        return self.self_test(library)

    def built(self) -> Built:
        """The loaded library, or why there is none."""
        if self._built is None:
            with self._lock:
                if self._built is None:
                    self._built = build(self.source, self.headers, self._check)
        return self._built

    def why_not(self) -> str | None:
        """None, or why these kernels cannot run here."""
        return None if self.built().library else self.built().why

    def reset(self) -> None:
        """Forget the loaded library: the next call looks into the cache again."""
        self._built = None

    def features(self) -> dict[str, Any]:
        """{simd, openmp, compiler, library, why}: what runs here, or why nothing does."""
        now = self.built()
        names = {number: name for name, number in SIMD.items()}
        return {
            "simd": names[now.library.qtune_isa(-1)] if now.library else "none",
            "openmp": bool(now.library and now.library.qtune_openmp()),
            "compiler": now.compiler,
            "library": str(now.path) if now.path else "",
            "why": now.why,
        }

    def simd_paths(self) -> list[str]:
        """The paths that this machine can run."""
        library = self.built().library
        return [name for name, number in SIMD.items() if number >= 0 and library and library.qtune_isa(number) >= 0]

    def call(self, function: str, *arguments: object) -> None:
        """Call an exported function; raises QtuneError where it returns a fault."""
        library = self.built().library
        if library is None:
            raise QtuneError("Q602", f"the CPU kernels cannot run: {self.built().why}")
        if status := getattr(library, function)(*arguments):
            raise QtuneError("Q603", f"{function}: {FAULTS.get(status, f'fault {status}')}")


def require(checks: Sequence[tuple[bool, str]]) -> None:
    """One error for all that does not fit: the kernels get bare pointers, so nothing after this would notice."""
    for holds, _ in checks:
        if not holds:
            raise QtuneError("Q603", f"CPU kernel: {'; '.join(text for holds, text in checks if not holds)}")


def fits(t: Tensor, numel: int, *dtypes: torch.dtype) -> bool:
    """Is t on the CPU, of one of `dtypes`, with `numel` values?"""
    return t.device.type == "cpu" and t.dtype in dtypes and t.numel() == numel


def part(what: str, t: Tensor | None, numel: int, dtype: torch.dtype) -> tuple[bool, str]:
    """A check for `require` that t, unless it is None, has `numel` values of `dtype`."""
    if t is None or fits(t, numel, dtype):
        return True, ""
    return False, f"{what}: {t.numel()} of {t.dtype} on {t.device}; wanted {numel} of {dtype} on cpu"


def pointer(t: Tensor | None) -> int | None:
    """The address of t's first value; None stays None."""
    return None if t is None else t.data_ptr()


def simd_number(name: str) -> int:
    """The number of a SIMD path. Raises QtuneError for a name that is none."""
    if name not in SIMD:
        raise one_of("SIMD path", name, SIMD)
    return SIMD[name]
