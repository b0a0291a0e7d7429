"""`qtune doctor`: what this system can do, which kernel serves which op, and how near each is to the limit."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import backend
from .memory import host_memory, keep_freed_memory
from .memory.cuda import told
from .ops import REFERENCES
from .screen import size
from .speed import cases, machine, seconds
from .version import version, version_of

# an op that is served through another one -> that other one, and what is added
INSIDE = {
    "blockwise4_matmul": ("blockwise4_unpack_into", " and torch's product"),
    "int8_matmul": ("int8_unpack_into", " and torch's product"),
    "grouped_matmul": ("grouped_unpack_into", " and torch's product"),
    "hadamard": ("hadamard_kronecker", ""),
}
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "bitsandbytes", "peft", "gguf", "triton")


def doctor(*, json_out: bool, markdown: bool, measure: bool = True) -> None:
    """Print the findings as tables, as one JSON value, or the kernels as Markdown. measure: also time every op, which
    takes some seconds (and compiles what is not compiled yet)."""
    rows = served()
    if markdown:
        print("| op | device | served by | why |\n| --- | --- | --- | --- |")
        for row in rows:
            print(f"| `{row['op']}` | {row['device']} | {row['provider']} | {row['why']} |")
        return
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    facts = findings()
    console = Console(stderr=json_out)
    if not json_out:
        table = Table(title=f"qtune {version()} on this machine", title_justify="left", show_header=False)
        for key, value in facts.items():
            table.add_row(key, str(value), style=None)
        console.print(table)
    speeds = {}
    if measure:
        with console.status("timing every op (a first time compiles the kernels) ..."):
            refused = {row["device"] for row in rows if row["provider"] == "none"}  # the ops would only raise
            speeds = {device.type: speed(device) for device in devices if device.type not in refused}
    if json_out:
        print(json.dumps({"system": facts, "kernels": rows, "speed": speeds}, indent=2, default=str))
        return
    for device in devices:
        _print_ops(console, [row for row in rows if row["device"] == device.type], speeds.get(device.type))
    if len(devices) == 1:
        written = sum(row["written"] for row in rows if row["device"] == "cuda")
        console.print(f"cuda: kernels for {written} ops, none in use: there is no CUDA device here", style="dim")


def served() -> list[dict[str, Any]]:
    """Rows {op, device, provider, why, written} of every op: those of `backend.report`, but an op that goes through
    another one is served by what serves that one."""
    inner = [name for name, _ in INSIDE.values()]
    rows = {(row["op"], row["device"]): row for row in backend.report([*REFERENCES, *inner])}
    for (name, device), row in rows.items():
        if name in INSIDE and not row["written"]:
            through, added = INSIDE[name]
            found = rows[through, device]
            why = found["why"] + added if found["provider"] == "kernel" else found["why"]
            inside = backend.kernel(f"{name}_fused", device) if added and found["provider"] == "kernel" else None
            if device == "cpu" and inside and backend.simd("matmul") == "amx":
                why = f"kernels/cpu/matmul.py in bf16, else {why}"
            row |= {"provider": found["provider"], "why": why, "written": found["written"]}
    return [row for (name, _), row in rows.items() if name not in inner]


def speed(device: torch.device) -> dict[str, Any]:
    """{copy: GB/s, product: {dtype: GFLOP/s}, ops: {op: {shape, ms, rate, unit, of_limit}}} measured now."""
    if device.type == "cpu":
        keep_freed_memory()  # as a training step does
    here = machine(device)
    ops = {}
    for case in cases():
        arguments = case.make(device)
        took = seconds(lambda case=case, arguments=arguments: case.run(arguments), device, 3)  # type: ignore[misc]
        bound = case.flop / here.product[case.dtype] > case.bytes / here.copy
        ops[case.op] = {
            "shape": case.shape,
            "ms": 1e3 * took,
            "rate": (case.flop if bound else case.bytes) / took / 1e9,
            "unit": "GFLOP/s" if bound else "GB/s",
            "of_limit": here.limit(case) / took,
        }
    product = {str(dtype).removeprefix("torch."): rate / 1e9 for dtype, rate in here.product.items()}
    return {"copy": here.copy / 1e9, "product": product, "ops": ops}


def _print_ops(console: Console, rows: list[dict[str, Any]], speeds: dict[str, Any] | None) -> None:
    table = Table(title=f"ops on {rows[0]['device']}", title_justify="left")
    table.add_column("op", no_wrap=True)
    table.add_column("served by", overflow="fold")
    for column in ("size", "ms", "rate", "of limit") if speeds else ():
        table.add_column(column, justify="left" if column == "size" else "right", no_wrap=column != "size")
    for row in rows:
        kernel = row["provider"] == "kernel"
        by = row["why"].replace("kernels/", "").replace(".py", "") if kernel else row["provider"]
        cells = []
        if speeds and (found := speeds["ops"].get(row["op"])):
            digits = 0 if found["rate"] >= 10 else 1
            rate = f"{found['rate']:,.{digits}f} {found['unit']}"
            cells = [found["shape"], f"{found['ms']:.2f}", rate, f"{found['of_limit']:.0%}"]
        table.add_row(row["op"], by, *cells, style=None if kernel else "yellow")
    console.print(table)
    if speeds:
        products = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in speeds["product"].items())
        console.print(
            "limit: the longer of reading and writing what an op must at the speed of a copy "
            f"({speeds['copy']:.0f} GB/s here, now) and of its arithmetic at the speed of torch's product "
            f"({products}, at 1024 tokens of a 7B layer); above 100%: in the cache, or a product of its own",
            style="dim",
        )
    for why in dict.fromkeys(row["why"] for row in rows if row["provider"] != "kernel"):
        names = ", ".join(row["op"] for row in rows if row["why"] == why)
        console.print(f"no kernel for {names}: {why}", style="yellow")


def findings() -> dict[str, Any]:
    """System, devices, what can be trained on them, packages, CPU kernels."""
    memory = host_memory()
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        "cpu": f"{os.cpu_count()} cores ({torch.get_num_threads()} torch threads), "
        f"{torch.backends.cpu.get_cpu_capability()}, "
        f"{'memory unknown' if memory is None else f'{size(memory)} memory'}",
        "cuda": _cuda(),
        "cuda memory": told(),
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


def _installed(name: str) -> str:
    return version_of(name) or "not installed"
