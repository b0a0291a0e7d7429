"""What the Triton wrappers share: whether Triton can run here, checks before pointers go out, and the launch.

Triton is imported with the first module of this folder, never with qtune; without it the modules import all the same
and LIBRARY says why nothing runs. A kernel loads in any float type, computes in fp32 and stores what its output
pointer holds. `enable_fp_fusion=False` everywhere: a fused multiply-add would differ from the references. Under
TRITON_INTERPRET=1 (tests) the same wrappers take CPU tensors. Left out: ROCm, autotuning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from qtune.errors import QtuneError

try:
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
except ImportError:
    triton = tl = None

OLDEST = (3, 4)  # Triton
CAPABILITY = (7, 5)  # the oldest that the kernels are compiled for in the tests
OPTIONS = {"enable_fp_fusion": False}  # of every launch
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, with or without options; without Triton the bare function, which LIBRARY keeps from being used."""
    if triton is None:
        return function if function is not None else lambda f: f
    return triton.jit(function, **options)


@jit
def _add_one(x, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[:n] += 1: the self-test."""
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n, other=0.0) + 1, mask=i < n)


INTERPRETED = triton is not None and not isinstance(_add_one, triton.runtime.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"  # the type of device that the wrappers take


class Library:
    """Asked by qtune.backend for every module of this folder; decides once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._why: str | None = None
        self._asked = False

    def why_not(self) -> str | None:
        """None, or why these kernels cannot run here. Runs a kernel once: Triton needs a C compiler and a driver."""
        if not self._asked:
            with self._lock:
                if not self._asked:
                    self._why, self._asked = _look(), True
        return self._why

    def reset(self) -> None:
        """Look again at the next question."""
        self._asked = False

    def features(self) -> dict[str, Any]:
        """{triton, devices, why}: the version, or "" where Triton is absent, and what would run the kernels."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [f"{torch.cuda.get_device_name(i)} sm{_capability(i)}" for i in range(count)]
        return {"triton": triton.__version__ if triton else "", "devices": names, "why": self.why_not() or ""}


LIBRARY = Library()


def _capability(index: int) -> str:
    return "{}{}".format(*torch.cuda.get_device_capability(index))


def _look() -> str | None:
    if triton is None:
        return "Triton is not installed"
    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if INTERPRETED:
        return "TRITON_INTERPRET is set"
    if torch.version.hip is not None:
        return "this torch is for ROCm, on which the Triton kernels have never run"
    if not torch.cuda.is_available():
        return "Triton finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) < CAPABILITY:
            wanted = ".".join(map(str, CAPABILITY))
            return f"{torch.cuda.get_device_name(index)} is below compute capability {wanted}, Triton's oldest here"
    try:
        x = torch.ones(3, device="cuda")
        launch(_add_one, (1,), x, x, 2, BLOCK=16)
        return None if x.tolist() == [2.0, 2.0, 1.0] else "Triton computes wrongly here"
    except Exception as fault:  # noqa: BLE001  (no C compiler, no driver, a wrong ptxas: all have types of their own)
        return f"Triton fails here: {type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]}"


def launch(kernel: Any, grid: Sequence[int], like: Tensor, *arguments: Any, **options: Any) -> None:
    """Run kernel[grid](*arguments, **options) on like's device and its current stream; nothing for an empty grid.

    options: constexprs and num_warps, num_stages. Raises QtuneError where the grid is beyond CUDA's limits.
    """
    if 0 in grid:
        return
    if grid[0] >= 2**31 or any(size > 65535 for size in grid[1:]):
        raise QtuneError("Q603", f"CUDA kernel {kernel.__name__}: no grid of {tuple(grid)}: the tensor is too large")
    with torch.cuda.device_of(like):
        kernel[tuple(grid)](*arguments, **OPTIONS | options)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(a // -b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; 1 for n < 1."""
    return 1 << max(0, n - 1).bit_length()


def dot_type(dtype: torch.dtype) -> Any:
    """Triton's type for the operands of a tl.dot between values of `dtype`; the interpreter gets fp32, for its bf16 is
    broken. With fp32 pass input_precision="ieee"."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(
        torch.float32 if INTERPRETED else dtype, tl.float32
    )


def require(checks: Sequence[tuple[bool, str]]) -> None:
    """One error for all that does not fit: the kernels get bare pointers, so nothing after this would notice."""
    if faults := [text for holds, text in checks if not holds]:
        raise QtuneError("Q603", f"CUDA kernel: {'; '.join(faults)}")


def fits(t: Tensor, numel: int, *dtypes: torch.dtype) -> bool:
    """Is t on a CUDA device, of one of `dtypes`, with `numel` values?"""
    return t.device.type == DEVICE and t.dtype in dtypes and t.numel() == numel


def part(what: str, t: Tensor | None, numel: int, *dtypes: torch.dtype) -> tuple[bool, str]:
    """A check for `require` that t, unless it is None, has `numel` values of one of `dtypes`."""
    if t is None or fits(t, numel, *dtypes):
        return True, ""
    wanted = " or ".join(map(str, dtypes))
    return False, f"{what}: {t.numel()} of {t.dtype} on {t.device}; wanted {numel} of {wanted} on {DEVICE}"


def together(*tensors: Tensor | None) -> tuple[bool, str]:
    """A check for `require` that all tensors are on one device."""
    devices = {str(t.device) for t in tensors if t is not None}
    return len(devices) < 2, f"tensors on {sorted(devices)}"


Kernels = dict[str, Callable[..., Any]]
