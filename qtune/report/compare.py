"""Runs side by side: their curves on one axis, their results, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..errors import QtuneError
from ..safe_io import write_text
from ..screen import Screen
from . import curves, facts
from .advice import Advice, advise
from .curves import TALL, WIDE, Line, draw, smooth
from .page import render, svg
from .read import Reading
from .trackers import flat

MOST = 8  # runs: as many as there are colours that can be told apart
ABSENT = "-"  # a key that a recipe does not have
APART = ("output",)  # keys of a recipe in which runs always differ


@dataclass(frozen=True)
class Named:
    """A run with the name that tells it from the others, and its colour."""

    name: str
    role: str
    run: Reading
    advice: tuple[Advice, ...]


@dataclass(frozen=True)
class Comparison:
    """results: label -> one cell a run, in words. differences: dotted key of the recipe -> one cell a run."""

    runs: tuple[Named, ...]
    results: dict[str, list[str]]
    differences: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json, numbers as numbers."""
        return {
            "runs": [
                {
                    "name": one.name, "run": str(one.run.folder), "steps": one.run.steps,
                    "loss": dict(zip(("first", "last"), one.run.losses() or (None, None), strict=True)),
                    **{key: one.run.last(key) for key in ("eval_loss", "accuracy", "tokens", "seconds")},
                    "memory_peak": facts.peak(one.run)[0],
                    "advice": [str(advice) for advice in one.advice],
                }
                for one in self.runs
            ],
            "differences": self.differences,
        }  # fmt: skip


def compare(runs: Sequence[Reading]) -> Comparison:
    """Raises QtuneError for fewer than two runs, for more than MOST, and for one given twice."""
    folders = [run.folder.resolve() for run in runs]
    if not 2 <= len(runs) <= MOST or len(set(folders)) < len(folders):
        given = f"{len(runs)} run{'s' * (len(runs) != 1)}" + " (one twice)" * (len(set(folders)) < len(folders))
        raise QtuneError("Q102", f"{given} to compare; legal: 2 to {MOST} different ones")
    named = [
        Named(name, f"c{i}", run, tuple(advise(run.rows)))
        for i, (name, run) in enumerate(zip(names(folders), runs, strict=True))
    ]
    numbers = [{number.label: number for number in facts.numbers(run)} for run in runs]
    labels = list(dict.fromkeys(label for one in numbers for label in one))
    results = {label: [_cell(one.get(label)) for one in numbers] for label in labels}
    return Comparison(tuple(named), results, differences(runs))


def names(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: their paths below the folder that they share."""
    shared = Path(commonpath(folders))
    return [str(folder.relative_to(shared)) if folder != shared else folder.name for folder in folders]


def differences(runs: Sequence[Reading]) -> dict[str, list[str]]:
    """Dotted key -> values in words, of the keys whose values are not the same in all recipes."""
    trees = [flat(run.recipe) for run in runs]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    found = {key: [tree.get(key, ABSENT) for tree in trees] for key in keys if key not in APART}
    apart = {key: values for key, values in found.items() if any(value != values[0] for value in values)}
    return {
        key: [value if value is ABSENT else facts.plain(value) for value in values] for key, values in apart.items()
    }


def _cell(number: facts.Number | None) -> str:
    if number is None:
        return "-"
    return f"{number.start} → {number.value}" if number.start else number.value


def show(made: Comparison, screen: Screen) -> None:
    """Both tables in the terminal."""
    for title, rows in (("Results", made.results), ("Where the recipes differ", made.differences)):
        screen.title(title)
        if not rows:
            screen.line("they are the same")
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        for one in made.runs:
            table.add_column(one.name, justify="right" if rows is made.results else "left", overflow="fold")
        for label, cells in rows.items():
            table.add_row(Text(label, "dim"), *(Text(cell) for cell in cells))
        screen.console.print(table)
    for one in made.runs:
        for advice in one.advice:
            screen.line(f"{one.name}: {advice}", "yellow")


def write_comparison(made: Comparison, path: Path) -> None:
    """Draw the runs and write the page; a file at `path` is replaced once it is whole."""
    curves.need_matplotlib()
    title = (
        " and ".join(one.name for one in made.runs) if len(made.runs) == 2 else f"{len(made.runs)} runs side by side"
    )
    write_text(path, render(
        "compare.html", title=title, runs=made.runs, figures=_figures(made), results=made.results,
        differences=made.differences,
    ))  # fmt: skip


def _figures(made: Comparison) -> dict[str, Any]:
    found = {}
    for name, column in (("loss", "loss"), ("eval", "eval_loss")):
        lines = []
        for one in made.runs:
            steps, values = one.run.series(column)
            if values:
                dots = name == "eval"
                lines.append(Line(steps, values if dots else smooth(values), role=one.role, dots=dots))
        if lines or name == "loss":
            log = curves.wide_range([y for line in lines for y in line.ys])
            found[name] = svg(draw(name, lines, size=WIDE, log=log))
            found[f"{name}_narrow"] = svg(draw(f"{name}-narrow", lines, size=TALL, log=log))
    return found
