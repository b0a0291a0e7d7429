"""Packing and unpacking NF4 on the CPU: qtune's kernel, its torch reference, bitsandbytes, and the limit of the memory.

    python benchmarks/kernels.py           prints the table, writes benchmarks/results/kernels.json
4096 x 4096, blocks of 64, bf16. Providers take turns, so that a slow moment of the machine hits all of them; no time is
reported for a provider whose result is not bit-equal. The limit of unpacking is a copy of the output.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")

import bitsandbytes.functional as bnb
import torch
from results import machine, write
from rich.console import Console
from rich.table import Table

from qtune import backend, ops
from qtune.quant import NF4

RESULTS = Path(__file__).parent / "results" / "kernels.json"
SHAPE, ROUNDS = (4096, 4096), 25
LIMIT = "limit: a copy of the output"


def cases() -> dict[str, dict[str, Callable[[], Any]]]:
    """Op -> provider -> what is timed; the first provider is ours, the results of all are compared with it."""
    torch.manual_seed(0)
    w = torch.randn(SHAPE).bfloat16()
    parts = NF4().pack(w)
    codes, absmax, nested, offset = (parts[k] for k in ("codes", "absmax", "nested_absmax", "nested_offset"))
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    arguments = (codes, absmax, nested, offset, "nf4", 64)
    copied = torch.empty_like(w)
    into, kernel_out, reference_out = (
        backend.kernel("blockwise4_unpack_into", "cpu"),
        *torch.empty(2, *SHAPE).bfloat16(),
    )
    pack = backend.kernel("blockwise4_pack", "cpu")
    if into is None or pack is None:
        raise SystemExit(f"no CPU kernel runs here: {backend.cpu_features()['why']}")
    return {
        "unpack NF4 (double) to bf16": {
            "qtune": lambda: into(*arguments, kernel_out) or kernel_out,
            "reference": lambda: ops.blockwise4_unpack_into(*arguments, reference_out) or reference_out,
            "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
            LIMIT: lambda: copied.copy_(w),
        },
        "pack bf16 to NF4": {
            "qtune": lambda: pack(w, "nf4", 64)[0],
            "reference": lambda: ops.REFERENCES["blockwise4_pack"](w, "nf4", 64)[0],
            "bitsandbytes": lambda: torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)[0].view(-1),
        },
    }


def measure(providers: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Milliseconds of each provider, in turns; raises where a result is not bit-equal to the first provider's."""
    first = next(iter(providers.values()))().clone()
    for name, run in providers.items():
        if not torch.equal(run(), first) and name != LIMIT:
            raise SystemExit(f"{name} is not bit-equal: no time is reported")
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(ROUNDS):
        for name, run in providers.items():
            if round_ >= 5 and statistics.median(times[name]) > 100:
                continue  # five rounds of a slow one are enough
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    rows = []
    table = Table(title=f"{SHAPE[0]} x {SHAPE[1]}, {torch.get_num_threads()} threads, ms", title_justify="left")
    for column in ("op", "provider", "p20", "p50", "p80", "times qtune's"):
        table.add_column(column, justify="left" if column in ("op", "provider") else "right")
    for op, providers in cases().items():
        times = measure(providers)
        own = statistics.median(times["qtune"])
        for name, values in times.items():
            p20, p50, p80 = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
            rows.append({"op": op, "shape": SHAPE, "provider": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80})
            table.add_row(op, name, f"{p20:.2f}", f"{p50:.2f}", f"{p80:.2f}", f"{p50 / own:.2f}")
    Console().print(table)
    features = backend.cpu_features()
    threads = torch.get_num_threads()
    write(
        RESULTS,
        {
            "command": "python benchmarks/kernels.py",
            **machine(),
            "threads": threads,
            "simd": features["simd"],
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
