"""Tests of Triton kernels on a machine without a GPU: compile what a wrapper launches, and run it interpreted.

`interpreted(name)` is a second copy of kernels/cuda/<name>.py, decorated under TRITON_INTERPRET=1: its wrappers take
CPU tensors and compute with numpy (fp32 only: Triton 3.9's interpreter is wrong in bf16). `recorded(...)` calls a
wrapper of the true module on CPU or meta tensors and notes its launches; `compile_all` compiles them for every target.
`places(...)` are the interpreter, and the GPU where there is one: (module, device) for tests that run on both.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.runtime.interpreter as interpreter  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TARGETS = (75, 80, 86, 89, 90, 120)
FOLDER = Path(__file__).resolve().parent.parent / "kernels" / "cuda"
COPY = "interpreted_cuda_kernels"  # the package that the interpreted copies live in
NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.uint16: "u16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip

Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, its arguments by name, options


# ---- the interpreter

_inner: dict[int, Any] = {}


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """Triton's own functions (tl.zeros, tl.cdiv, tl.sigmoid) were decorated when Triton was imported, so not for the
    interpreter, which would refuse them."""
    made = _inner.setdefault(id(self), interpreter.InterpretedFunction(self.fn))
    return made(*args, **kwargs)


def _call_inner(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As Triton's, but what the outermost call patched is not patched again: that would never be undone."""
    rewritten = self.rewrite()
    return rewritten(*args, **kwargs)


def interpreted(name: str) -> types.ModuleType:
    """kernels/cuda/<name>.py for the interpreter, with copies of the modules of that folder that it imports."""
    full = f"{COPY}.{name}"
    if full in sys.modules:
        return sys.modules[full]
    if COPY not in sys.modules:
        package = types.ModuleType(COPY)
        package.__path__ = [str(FOLDER)]
        sys.modules[COPY] = package
        JITFunction.__call__ = _call
        interpreter.InterpretedFunction.__call__ = _call_inner
        options = interpreter.interpreter_builder.options
        object.__setattr__(options, "debug", True)  # tl.device_assert asserts
        object.__setattr__(options, "sanitize_overflow", False)  # uint32 wraps, in random bits
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        module = importlib.import_module(full)
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
    for other in list(sys.modules.values()):
        if other.__name__.startswith(f"{COPY}."):
            other.__dict__["core"] = (
                triton.language.core
            )  # seen by the interpreter, which then patches it, and undoes it
    return module


def true(name: str) -> types.ModuleType:
    """kernels/cuda/<name>.py itself."""
    return importlib.import_module(f"qtune.kernels.cuda.{name}")


def places(name: str) -> list[tuple[types.ModuleType, str]]:
    """(module, device) to run on: the interpreter on the CPU, and the GPU where there is one."""
    return [(interpreted(name), "cpu")] + ([(true(name), "cuda")] if torch.cuda.is_available() else [])


# ---- compilation without a GPU


def recorded(function: Callable[..., Any], *args: Any, device: str = "meta", **kwargs: Any) -> list[Launch]:
    """What `function`, a wrapper of a true module, launches for tensors on `device` (meta: any size costs nothing)."""
    launch = true("launch")
    seen: list[Launch] = []

    def note(kernel: Any, grid: Sequence[int], like: Tensor, *arguments: Any, **options: Any) -> None:
        names = kernel.arg_names
        constants = {name: options.pop(name) for name in list(options) if name in names}
        seen.append((kernel, dict(zip(names, arguments, strict=False)) | constants, options))

    module = sys.modules[function.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "DEVICE", device)
        patch.setattr(launch, "launch", note)
        patch.setattr(module, "launch", note, raising=False)
        function(*args, **kwargs)
    return seen


def source(launch: Launch) -> ASTSource:
    """What Triton would compile for a launch: types, constants, and pointers and sizes that 16 divides."""
    kernel, arguments, _ = launch
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized(parameter)):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i1" if isinstance(value, bool) else "i32" if abs(value) < 2**31 else "i64"
        aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and specialized(parameter):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def specialized(parameter: Any) -> bool:
    """Does Triton compile this parameter anew for 1 and for multiples of 16?"""
    return not parameter.do_not_specialize


def compile_all(launches: Sequence[Launch], targets: Sequence[int] = TARGETS) -> dict[int, list[Any]]:
    """Compile launches to a cubin for every target; target -> Triton's compiled kernels (`.asm`: ttir, ptx, cubin)."""
    assert launches, "nothing was launched"
    made: dict[int, list[Any]] = {}
    for target in targets:
        for launch in launches:
            options = true("launch").OPTIONS | {"debug": bool(launch[0].debug)} | launch[2]
            made.setdefault(target, []).append(
                triton.compile(source(launch), target=GPUTarget("cuda", target, 32), options=options)
            )
            assert made[target][-1].asm["cubin"], (launch[0].__name__, target)
    return made
