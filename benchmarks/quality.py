"""What a quantization-aware start is worth: layer error, perplexity before and after fine-tuning, accuracy, cost.

    python benchmarks/quality.py [--only SCHEME/METHOD] [--full] [--jobs 2]    adds to benchmarks/results/quality.jsonl
SmolLM2-135M on nf4, int3 and int2 (groups of 64), five starts of the same number of trained values (rank 16, every
linear layer), 60 steps of 2 x 256 tokens. The learning rate is chosen on seed 0 from three, two more seeds follow. Two
ablations by layer error and perplexity before fine-tuning only. int4 in groups of 32 is never measured: the checkpoint
was made from weights of that form, and looks lossless in it.
Text: 1,000 paragraphs of Wikipedia out of the package evals; every fifth is held out, calibration text is of the rest.
Task: the demo's. One process for each scheme and start; a row for each finished run. Rows of the same settings are not
measured again (--same-code: unless the code is another by now; each row has its digest). What a start and a step cost
is measured apart (cells of the group cost), one process at a time, and only with --jobs 1. A seed is the order of the
text and LoRA's first A; the other starts are made once, as they draw nothing that matters. `--part 1/2` takes half of
the work, for another machine.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from cells import Rows, cell_parser, each_apart, given, prepare
from results import FOLDER

RESULTS = FOLDER / "quality.jsonl"
SCHEMES: dict[str, dict[str, Any]] = {
    "bf16": {"name": "dense"},
    "nf4": {"name": "nf4", "block": 64, "double": True},
    "nf4-single": {"name": "nf4", "block": 64, "double": False},  # LoftQ's and PiSSA's papers have no double one
    **{f"int{bits}-g{group}": {"name": f"int{bits}", "group": group} for bits in (2, 3, 4) for group in (64, 128)},
}
RANK = 16
# learning rates to choose from: half a decade apart, about what 24 steps of each liked
LOW_RANK, PRINCIPAL, SPARSE = (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3), (3e-5, 1e-4, 3e-4)
# name -> method, its options, learning rates. alpha = rank: every paper but LoRA's has no scale
STARTS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "lora": ("lora", {"alpha": float(RANK)}, LOW_RANK),
    "loftq": ("loftq", {"iterations": 5}, LOW_RANK),
    "pissa": ("pissa", {"iterations": 5}, PRINCIPAL),
    "cloq": ("cloq", {}, LOW_RANK),
    "qwha": ("qwha", {}, SPARSE),
}
BATCH, LENGTH, STEPS, SEEDS, TASK_SEEDS = 2, 256, 60, (0, 1, 2), (0,)
FULL_STEPS, FULL_SEEDS, COST_STEPS = 300, (0, 1, 2, 3, 4), 12
CALIBRATION, HELD_OUT, WINDOW = 32, 20, 512  # windows, and tokens of each
ERROR_WINDOWS = 8  # of each text, evenly taken, for layer errors
TASK_SCHEMES, TASK_BATCH = ("bf16", "nf4", "int3-g64"), 8
OWN = {"rounds": 0}  # of QWHA: as in the paper
ABLATED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwha": ("qwha", {}),
    "qwha, no exchange (the paper's)": ("qwha", OWN),
    "qwha, no exchange, no refinement": ("qwha", OWN | {"refine": False}),
    "qwha, no exchange, uniform": ("qwha", OWN | {"allocate": "uniform"}),
    "qwha, no exchange, uniform, random": ("qwha", OWN | {"allocate": "uniform", "select": "random"}),
    "qwha, no exchange, by energy": ("qwha", OWN | {"select": "energy"}),
    "qwha, no exchange, weight, energy (the authors' code)": ("qwha", OWN | {"allocate": "weight", "select": "energy"}),
    "sparse without a transform": ("qwha", {"transform": "none"}),
    "sparse without a transform, by energy": ("qwha", {"transform": "none", "select": "energy"}),
    "cloq": ("cloq", {}),
}
AT_3_BITS = ("qwha", "qwha, no exchange (the paper's)", "qwha, no exchange, no refinement", "cloq",
             "sparse without a transform", "sparse without a transform, by energy")  # fmt: skip
ON_GPTQ = ("qwha", "sparse without a transform, by energy", "cloq")
ITERATED = {
    **{f"loftq T={t}": ("loftq", {"iterations": t}) for t in (1, 2, 5)},
    **{f"pissa T={t}": ("pissa", {"iterations": t}) for t in (1, 5)},
    "pissa T=5, refit": ("pissa", {"iterations": 5, "refit": True}),
}


# ---- the work


@dataclass(frozen=True)
class Cell:
    """One start on one scheme, and what is measured of it. rates: none for an ablation."""

    group: str  # the table that it is for
    scheme: str
    name: str
    method: str
    rank: int = RANK
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    codes: str = "nearest"
    rates: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """What --only looks in."""
        return f"{self.group}/{self.scheme}/{self.name}" + ("" if self.codes == "nearest" else f"/{self.codes}")

    def key(self, kind: str, full: bool, **more: Any) -> dict[str, Any]:
        """The settings that tell its rows apart: of a start, a run or a task."""
        given = {k: v for k, v in asdict(self).items() if k != "rates"}
        given["windows"] = [CALIBRATION, HELD_OUT, ERROR_WINDOWS, WINDOW]
        count = COST_STEPS if kind == "cost" else FULL_STEPS if full else STEPS
        steps = {} if kind == "start" else {"steps": count, "batch": [BATCH, LENGTH]}
        return {"kind": kind, **given, **steps, **more}


def cells() -> list[Cell]:
    """Everything, the slow part first."""
    found = [Cell("main", "bf16", "lora", *_first("lora"))]
    for scheme in ("int2-g64", "int3-g64", "nf4"):
        found += [Cell("main", scheme, name, *_first(name)) for name in STARTS]
    for scheme, names in (("int4-g64", tuple(ABLATED)), ("int3-g64", AT_3_BITS)):
        ablated = [(name, "nearest") for name in names] + [(name, "gptq") for name in ON_GPTQ]
        found += [Cell("ablation", scheme, n, ABLATED[n][0], 12, ABLATED[n][1], codes) for n, codes in ablated]
    for name in ("lora", "cloq", "qwha"):  # the papers' bases are GPTQ's at 2 bits
        found.append(Cell("ablation", "int2-g64", name, name, 12, {}, "gptq"))
        found.append(Cell("ablation", "int4-g128", name, name, 12))
    found += [Cell("cost", "int3-g64", name, *_first(name)[:-1]) for name in STARTS]
    # rank: width / 32, as 128 is of 4,096
    found += [
        Cell("nuclear", "nf4-single", name, method, 18, {"alpha": 18.0, **o}) for name, (method, o) in ITERATED.items()
    ]
    return found


def _first(name: str) -> tuple[str, int, dict[str, Any], str, tuple[float, ...]]:
    method, options, rates = STARTS[name]
    return method, RANK, options, "nearest", rates


class Book(Rows):
    """The rows that are there, and what is to be done."""

    def __init__(self, full: bool, same_code: bool) -> None:
        super().__init__(RESULTS, "python benchmarks/quality.py" + " --full" * full, same_code)
        self.full = full

    def start_key(self, cell: Cell) -> dict[str, Any]:
        return cell.key("start", self.full)

    def runs(self, cell: Cell) -> list[tuple[str, float, int]]:
        """Runs to do next, as (kind, learning rate, seed): those of seed 0 that choose the rate, or all that follow."""
        if cell.group == "cost":
            rate = STARTS[cell.name][2][0]
            return [] if self.find(self.run_key(cell, "cost", rate, 0)) else [("cost", rate, 0)]
        rates = [("run", rate, 0) for rate in cell.rates]
        missing = [run for run in rates if not self.find(self.run_key(cell, *run))]
        if missing or not rates:
            return missing
        seeds, task_seeds = (FULL_SEEDS, FULL_SEEDS) if self.full else (SEEDS, TASK_SEEDS)
        more = [("run", self.chosen(cell), seed) for seed in seeds]
        if cell.scheme in TASK_SCHEMES:
            more += [("task", self.chosen(cell), seed) for seed in task_seeds]
        return [run for run in more if not self.find(self.run_key(cell, *run))]

    def run_key(self, cell: Cell, kind: str, rate: float, seed: int) -> dict[str, Any]:
        return cell.key(kind, self.full, lr=rate, seed=seed)

    def chosen(self, cell: Cell) -> float:
        """The learning rate with the least perplexity on seed 0."""
        rows = {rate: self.find(self.run_key(cell, "run", rate, 0)) for rate in cell.rates}
        return min(rows, key=lambda rate: (rows[rate] or {}).get("perplexity") or math.inf)

    def done(self, cell: Cell) -> bool:
        return self.find(self.start_key(cell)) is not None and not self.runs(cell)


# ---- all cells


def main() -> None:
    parser = cell_parser(__doc__, "cells whose GROUP/SCHEME/START holds this", f"{FULL_STEPS} steps and 5 seeds")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts of the work")
    options = parser.parse_args()
    book, everything = Book(options.full, options.same_code), cells()
    if options.cell:
        from quality_cell import run_cell

        return run_cell(next(cell for cell in everything if cell.label == options.cell), options.folder, book)
    part, parts = map(int, options.part.split("/"))
    wanted = [cell for cell in everything[part - 1 :: parts] if options.only in cell.label]
    if options.jobs > 1:
        wanted = [cell for cell in wanted if cell.group != "cost"]
    if options.list:
        return print("\n".join(f"{'there  ' if book.done(cell) else 'missing'} {cell.label}" for cell in wanted))
    prepare(options.folder)
    each_apart(__file__, [cell.label for cell in wanted if not book.done(cell)], given(options), options.jobs)
    print(f"rows are in {RESULTS}; the README's tables: python benchmarks/tables.py")


if __name__ == "__main__":
    main()
