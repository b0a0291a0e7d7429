"""`qtune doctor`: what this system can do, and which kernel serves which op."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, backend
from .ops import REFERENCES
from .screen import size

INSIDE = "blockwise4_unpack_into"  # no op of its own: blockwise4_matmul unpacks through it into its arena
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "bitsandbytes", "peft", "gguf", "triton")


def doctor(*, json_out: bool, markdown: bool) -> None:
    """Print the findings as tables, as one JSON value, or the kernels as Markdown."""
    rows = backend.report([*REFERENCES, INSIDE])
    if markdown:
        print("| op | device | served by | why |\n| --- | --- | --- | --- |")
        for row in rows:
            print(f"| `{row['op']}` | {row['device']} | {row['provider']} | {row['why']} |")
        return
    facts = findings()
    if json_out:
        print(json.dumps({"system": facts, "kernels": rows}, indent=2, default=str))
        return
    console = Console()
    table = Table(title=f"qtune {__version__} on this machine", title_justify="left", show_header=False)
    for key, value in facts.items():
        table.add_row(key, str(value), style=None)
    console.print(table)
    table = Table(title="ops", title_justify="left")
    for column in ("op", "device", "served by", "why"):
        table.add_column(column, overflow="fold")
    here = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    for row in rows:
        if row["device"] in here:
            table.add_row(row["op"], row["device"], row["provider"], row["why"])
    console.print(table)
    console.print(f"blockwise4_matmul unpacks through {INSIDE}, then multiplies with torch's GEMM", style="dim")


def findings() -> dict[str, Any]:
    """System, devices, what can be trained on them, packages, CPU kernels."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": f"{os.cpu_count()} cores ({torch.get_num_threads()} torch threads), "
        f"{torch.backends.cpu.get_cpu_capability()}, {_memory()}",
        "cuda": _cuda(),
        "mps": "available (reference kernels; not tested by this project)"
        if torch.backends.mps.is_available()
        else "not available",
        "can do": _abilities(),
        "packages": ", ".join(f"{name} {_installed(name)}" for name in PACKAGES),
    }
    features = backend.cpu_features()
    facts["cpu kernels"] = ", ".join(f"{key}: {value}" for key, value in features.items() if value not in (None, ""))
    return facts


def _cuda() -> str:
    if not torch.cuda.is_available():
        why = "has no CUDA" if torch.version.cuda is None else "finds no GPU"
        return f"not available (torch {torch.__version__} {why})"
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        fast = properties.major >= 8 or torch.version.hip  # torch's own test also counts bf16 that is emulated
        bf16 = "bf16" if fast else "no fast bf16: dtype float32 is safe, float16 trains without loss scaling"
        found.append(
            f"cuda:{i} {properties.name}, {size(properties.total_memory)}, "
            f"sm{properties.major}{properties.minor}, {bf16}"
        )
    return "; ".join(found)


def _abilities() -> str:
    """What runs here, in a sentence; Windows, macOS and Linux differ only in their devices and in the compiler."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    text = f"quantize, train, evaluate, merge, chat on {device} with every scheme and method"
    if (
        device == "cpu"
        and "AVX512" not in torch.backends.cpu.get_cpu_capability()
        and platform.machine() in ("x86_64", "AMD64")
    ):
        text += "; this CPU has no fast bf16 product: dtype float32 may be faster"
    if _installed("gguf") == "not installed":
        text += "; .gguf models need the extra: pip install 'qtune[gguf]'"
    return text


def _memory() -> str:
    try:
        return f"{size(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} memory"
    except (AttributeError, ValueError, OSError):
        return "memory unknown"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
