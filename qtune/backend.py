"""Which kernel serves which op on this machine: decided once per (op, device type), never silently.

A kernel module lives under kernels/<device type>/ and holds `KERNELS` (op name -> function with the op's own
arguments) and `LIBRARY` (`why_not()`: None, or why none of them can run here; `reset()`). It is imported at the
first question, and only then may it compile. The environment variable QTUNE_KERNELS chooses: `auto` (a kernel if one
runs here, else the torch reference), `reference` (never a kernel), `require` (a kernel that cannot run is an error).
Left out: several kernels of one op.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from .errors import QtuneError, one_of

MODES = ("auto", "reference", "require")
MODULES: dict[str, tuple[str, ...]] = {
    "cpu": ("blockwise4", "int8", "grouped", "adamw8", "hadamard", "sparse", "layers", "loss", "attention", "matmul"),
    "cuda": ("blockwise4", "int8", "grouped", "adamw8", "layers", "loss", "hadamard", "sparse"),
}
DEVICES = tuple(MODULES)

_lock = threading.RLock()
_decided: dict[tuple[str, str], Callable[..., Any] | None] = {}


def mode() -> str:
    """QTUNE_KERNELS, checked; `auto` where it is not set."""
    given = os.environ.get("QTUNE_KERNELS") or "auto"
    if given not in MODES:
        raise one_of("value of QTUNE_KERNELS", given, MODES)
    return given


def _find(name: str, device_type: str) -> tuple[Callable[..., Any] | None, str, bool]:
    """The kernel of an op, or None; why; and whether one is written."""
    for module in MODULES.get(device_type, ()):
        found = import_module(f"qtune.kernels.{device_type}.{module}")
        if name in found.KERNELS:
            why = found.LIBRARY.why_not()
            return (None, why, True) if why else (found.KERNELS[name], f"kernels/{device_type}/{module}.py", True)
    return None, f"no {device_type} kernel of this op is written", False


def kernel(name: str, device_type: str) -> Callable[..., Any] | None:
    """The function that serves op `name` in place of its reference on this device type, or None; decided once.

    Raises QtuneError for a wrong QTUNE_KERNELS, and under `require` where a kernel is written but cannot run. Ops and
    devices that no kernel is written for are the references' business in every mode.
    """
    key = (name, device_type)
    if key in _decided:  # without the lock: this is asked for every op call
        return _decided[key]
    with _lock:
        if key not in _decided:
            wanted, found, why, written = mode(), None, "", False
            if wanted != "reference":
                found, why, written = _find(name, device_type)
            if wanted == "require" and found is None and written:
                raise QtuneError(
                    "Q602",
                    f"QTUNE_KERNELS=require, but no kernel serves op {name!r} on {device_type}: {why}. "
                    "With QTUNE_KERNELS=auto the torch reference serves it.",
                )
            _decided[key] = found
        return _decided[key]


def scratch(name: str, device_type: str) -> Callable[..., dict[str, int] | None] | None:
    """What the kernel of op `name` takes beside its results, from the op's arguments on any device: {"temporary" or the
    name of a buffer that it keeps: bytes}, None where it does not serve them; None for a kernel that takes nothing."""
    if kernel(name, device_type) is None:
        return None
    for module in MODULES[device_type]:
        found = getattr(import_module(f"qtune.kernels.{device_type}.{module}"), "SCRATCH", {})
        if name in found:
            return found[name]  # type: ignore[no-any-return]
    return None


def report(names: Iterable[str]) -> list[dict[str, Any]]:
    """Rows {op, device, provider, why, written} for every device type that qtune writes kernels for.

    written: is there a kernel, whether it can run here or not. provider: `kernel`, `reference`, or `none` where
    QTUNE_KERNELS=require and the kernel cannot run.
    """
    wanted, rows = mode(), []
    for device in DEVICES:
        for name in names:
            found, why, written = (
                (None, "QTUNE_KERNELS=reference", False) if wanted == "reference" else _find(name, device)
            )
            provider = "kernel" if found else "none" if wanted == "require" and written else "reference"
            rows.append({"op": name, "device": device, "provider": provider, "why": why, "written": written})
    return rows


def cpu_features() -> dict[str, Any]:
    """What the CPU kernels run on: {simd, openmp, compiler, library, why}; builds them if need be."""
    features: dict[str, Any] = import_module("qtune.kernels.cpu.blockwise4").LIBRARY.features()
    return features


def simd(module: str) -> str:
    """The SIMD path that kernels/cpu/<module> takes on this machine, or `none`; builds it if need be."""
    return str(import_module(f"qtune.kernels.cpu.{module}").LIBRARY.features()["simd"])


def reset() -> None:
    """Forget what was decided, builds included: for tests, which change the environment."""
    with _lock:
        _decided.clear()
        for device, modules in MODULES.items():
            for module in modules:
                import_module(f"qtune.kernels.{device}.{module}").LIBRARY.reset()
