"""Runtime: what the process takes beside its tensors.

CUDA: the context, from the device's entry. CPU: the resident memory of a child process that imports what training
imports, touches torch's threads, and trains a model of a few kilobytes for two steps: what is loaded at its first use.
That takes some seconds, so the answer is kept in the user's cache under everything that it depends on. Left out: the
tokenizer and the examples of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from ..errors import QtuneError
from ..safe_io import write_json
from ..version import version_of
from .devices import Device

LIBRARIES = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "accelerate")
MEASURED = "measured on this machine: a process that trains next to nothing"
SECONDS = 180  # that importing may take on a machine at work


@dataclass(frozen=True)
class Runtime:
    """nbytes: what the process takes, 0 where that is unknown. note: whence."""

    nbytes: int
    note: str


def process_bytes(device: Device) -> int:
    """Bytes of a training process on the device beside its tensors; 0 where this system does not tell (see
    `runtime_note`)."""
    return device.context if device.kind == "cuda" else host_runtime().nbytes


def runtime_note(device: Device) -> str:
    """Whence `process_bytes` has it."""
    return device.context_source if device.kind == "cuda" else host_runtime().note


@cache
def host_runtime() -> Runtime:
    """Resident memory of a process with everything imported, from the cache or measured now."""
    import torch

    key = {
        "python": platform.python_version(),
        "machine": [platform.platform(), platform.processor(), os.cpu_count()],
        "threads": torch.get_num_threads(),
        "kernels": os.environ.get("QTUNE_KERNELS", ""),
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    text = json.dumps(key, sort_keys=True)
    try:
        folder: Path | None = import_module("qtune.kernels.cpu.build").cache_folder()
    except RuntimeError:  # a user without a home
        folder = None
    path = folder / f"runtime-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json" if folder else None
    if path is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text("utf-8"))
            if kept["key"] == text and type(kept["nbytes"]) is int and kept["nbytes"] > 0:
                return Runtime(kept["nbytes"], MEASURED)
    nbytes, why = _measured(torch.get_num_threads())
    if nbytes and path is not None:
        with suppress(QtuneError):  # a cache that cannot be written costs time, no more
            write_json(path, {"key": text, "nbytes": nbytes})
    return Runtime(nbytes, why)


def _measured(threads: int) -> tuple[int, str]:
    """Bytes, or 0 and why not."""
    try:
        done = subprocess.run(
            child_command("runtime", "child", str(threads)), capture_output=True, text=True, timeout=SECONDS,
            env=child_environment(),
        )  # fmt: skip
        nbytes = int(done.stdout.split()[-1]) if done.returncode == 0 else 0
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        nbytes = 0
    if nbytes:
        return nbytes, MEASURED
    return 0, "unknown: this system does not tell what memory a process takes, so it is not in the plan"


def child_command(module: str, function: str, *arguments: str) -> list[str]:
    """The command of a fresh process that calls a function of a module of this package with these strings."""
    code = f"import sys; from qtune.planner import {module}; {module}.{function}(*sys.argv[1:])"
    return [sys.executable, "-c", code, *arguments]


def child_environment() -> dict[str, str]:
    """This process's environment, in which a child finds the same qtune, quiet and without a network."""
    home = str(Path(__file__).resolve().parents[2])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return os.environ | quiet | {"PYTHONPATH": os.pathsep.join(paths)}


# ---- in the child


def child(threads: str) -> None:
    """Prints the resident bytes of this process once it is ready to train; 0 where the system does not tell."""
    warm(int(threads))
    import_module("qtune.planner.measure").tiny_steps()
    memory = resident()
    print(memory.own + memory.files if memory else 0)


def warm(threads: int) -> None:
    """Import what `qtune train` imports and use once what takes memory at its first use."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from .. import backend

    import_module("qtune.cli")
    import_module("qtune.trainer")  # by name: it comes after this package
    torch.set_num_threads(threads)
    x = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
    (x @ x).sum().backward()  # starts the product's library and autograd
    torch.ones(1 << 20).exp_()  # starts every thread
    if backend.mode() != "reference":
        for module in backend.MODULES["cpu"]:
            import_module(f"qtune.kernels.cpu.{module}").LIBRARY.built()


@dataclass(frozen=True)
class Resident:
    """Bytes that a process holds in memory: its own, and pages of files (libraries, mapped checkpoints)."""

    own: int
    files: int


def resident() -> Resident | None:
    """Of this process, now; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text("ascii", errors="replace").splitlines()
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        found = {name: int(fields[name][0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem")}
    except (OSError, KeyError, ValueError, IndexError):
        return _peak()
    return Resident(found["RssAnon"] + found["RssShmem"], found["RssFile"])


def _peak() -> Resident | None:
    """Where there is no /proc: the peak so far, all of it counted as the process's own."""
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Resident(peak if sys.platform == "darwin" else peak * 1024, 0)
