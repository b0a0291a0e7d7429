"""The planner's trace of the stock stack (`qtune plan --stack hf`) against memory that other people measured.

    python benchmarks/published.py [ID ...]     prints the table; without IDs, writes benchmarks/results/published.jsonl

`published_memory.csv` holds the runs: settings, what torch counted, and the source of both. Nothing is fitted to them:
what the planner knows of the stack comes from the sources of torch, transformers, PEFT and bitsandbytes. `moment`: the
peak, or what was allocated after the forward or the backward. `setup`: settings of `HFSettings` off their defaults.
Reserved bytes hang on the history of the allocator, of which the trace knows two steps, and not the loading.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from results import FOLDER, write_rows
from rich.console import Console
from rich.table import Table

from qtune.planner.devices import Device, find_device, workspaces
from qtune.planner.hf import HFSettings, hf_trace
from qtune.planner.models import find_model
from qtune.planner.plan import tiers
from qtune.planner.trace import UPDATE, Trace

ROWS = Path(__file__).parent / "published_memory.csv"
MIB = 2**20
# Models that are not in the catalogue. deepseek-coder-1.3b: `model_config` of its rows; llama-160m: config.json of
# JackFram/llama-160m; answer.ai-1b: the notebook's create_model
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-coder-1.3b": {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 5504,
        "vocab_size": 32256,
    },
    "llama-160m": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "vocab_size": 32000,
    },
    "answer.ai-1b": {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "vocab_size": 32000,
    },
}  # fmt: skip


def read_rows(path: Path = ROWS) -> list[dict[str, str]]:
    """The published runs, as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def config_of(name: str) -> Any:
    """A model's configuration."""
    if name in SHAPES:
        return transformers.LlamaConfig(**SHAPES[name], max_position_embeddings=16384, tie_word_embeddings=False)
    return find_model(name).config


def settings_of(row: dict[str, str]) -> HFSettings:
    """The settings of a run."""
    setup = row["setup"].split()
    given = dict(word.split("=") for word in setup if "=" in word)
    return HFSettings(
        scheme=row["scheme"], rank=int(row["rank"]) if row["rank"] else None, targets=tuple(row["targets"].split("+")),
        rows=int(row["rows"]), length=int(row["length"]), checkpointing=row["checkpointing"] == "on",
        attention=row["attention"], compute=row["compute"], optimizer=row["optimizer"],
        loss=given.get("loss", "cross-entropy"), adapters=given.get("adapters", "float32"),
        dropout=float(given.get("dropout", 0)), prepared="unprepared" not in setup, inputs="no-inputs" not in setup,
        masters="masters" in setup, masked="masked" in setup, expanded="expanded" in setup, cached="cached" in setup,
        upcast="upcast" in setup, contiguous="contiguous" in setup, buffered="buffered" in setup,
    )  # fmt: skip


def planned(row: dict[str, str]) -> tuple[int, int]:
    """Bytes allocated at the row's moment, and reserved at the most."""
    device = find_device(row["gpu"])
    trace = hf_trace(config_of(row["model"]), settings_of(row), device)
    if row["moment"] == "peak":
        allocated, reserved, _, _ = tiers(trace, device)
        return allocated, reserved
    return at_moment(trace, row["moment"], device), 0


def at_moment(trace: Trace, moment: str, device: Device) -> int:
    """Bytes that live when the first step's forward has returned, or its backward."""
    if moment == "after forward":
        event = next(i for i, e in enumerate(trace.events) if e >= 0 and trace.ops[e].startswith("aten::mean")
                     and not trace.where[e].endswith("norm"))  # fmt: skip
    else:
        event = next(i for i, at in enumerate(trace.at) if trace.segments[at].part == UPDATE)
    return workspaces(device) + sum(-(-trace.sizes[block] // 512) * 512 for block in trace.alive(event - 1))


def compared(row: dict[str, str]) -> dict[str, Any]:
    """A row of the results: MiB published and planned, and the errors in per cent."""
    allocated, reserved = (nbytes / MIB for nbytes in planned(row))
    published = float(row["allocated_mib"])
    found: dict[str, Any] = {
        **{name: row[name] for name in ("id", "source", "model", "gpu", "moment")}, "settings": what(row),
        "published_mib": published, "planned_mib": round(allocated, 1), "error": round(allocated / published - 1, 5),
    }  # fmt: skip
    if row["reserved_mib"] and reserved:
        known = float(row["reserved_mib"])
        found |= {"published_reserved_mib": known, "planned_reserved_mib": round(reserved, 1)}
        found["reserved_error"] = round(reserved / known - 1, 5)
    if row["process_mib"] and reserved:
        process = reserved + find_device(row["gpu"]).context / MIB
        found["process_error"] = round(process / float(row["process_mib"]) - 1, 5)
    return found


def what(row: dict[str, str]) -> str:
    """A run's settings in words."""
    rank = f"r{row['rank']}" if row["rank"] else "full"
    ckpt = "ckpt" if row["checkpointing"] == "on" else "no ckpt"
    return f"{row['scheme']} {rank} {row['rows']}x{row['length']} {ckpt} {row['attention']}"


def errors(rows: list[dict[str, Any]], key: str) -> tuple[float, float, int]:
    """Mean and worst absolute error, and of how many rows."""
    found = [abs(row[key]) for row in rows if key in row]
    return (sum(found) / len(found), max(found), len(found)) if found else (0.0, 0.0, 0)


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line a tier. What was allocated after a pass comes from releases of early 2024 and has a line of its own."""
    peaks = [row for row in rows if row["moment"] == "peak"]
    others = [row for row in rows if row["moment"] != "peak"]
    for name, key, some in (
        ("allocated, peak", "error", peaks), ("allocated after a pass (transformers of early 2024)", "error", others),
        ("reserved", "reserved_error", rows), ("process", "process_error", rows),
    ):  # fmt: skip
        mean, worst, count = errors(some, key)
        if count:
            yield f"{name}: mean error {mean:.2%}, worst {worst:.2%}, of {count} rows"


def table(rows: list[dict[str, Any]]) -> Table:
    """All rows, MiB."""
    made = Table(title="The stock stack: published and planned memory, MiB")
    for column in ("id", "model", "settings", "moment"):
        made.add_column(column, no_wrap=True)
    for column in ("published", "planned", "error", "reserved", "planned", "error"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["id"], row["model"], row["settings"], row["moment"], f"{row['published_mib']:,.0f}",
                 f"{row['planned_mib']:,.0f}", f"{row['error']:+.2%}"]  # fmt: skip
        if "reserved_error" in row:
            cells += [f"{row['published_reserved_mib']:,.0f}", f"{row['planned_reserved_mib']:,.0f}"]
            cells.append(f"{row['reserved_error']:+.1%}")
        made.add_row(*cells)
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these rows; the results file is left as it is")
    wanted = parser.parse_args(argv).ids
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = [row for row in read_rows() if not wanted or row["id"] in wanted]
    found = []
    for row in rows:
        found.append(compared(row))
        print(f"{row['id']} {found[-1]['error']:+.2%}", file=sys.stderr, flush=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(found))
    for line in summary(found):
        console.print(line)
    if not wanted:
        write_rows(FOLDER / "published.jsonl", "python benchmarks/published.py", found, device="meta")


if __name__ == "__main__":
    main()
