"""Every adapter method at the same number of trained values: rank of what was learned, memory, time, perplexity.

    python benchmarks/family.py [--only WORDS] [--full] [--jobs 2] [--smoke]   adds to benchmarks/results/family.jsonl
SmolLM2-135M, nf4, every linear layer; a method that refuses nf4 is on the first scheme that it takes, beside LoRA. A
method's option of size (`rank`, else the first whole number that changes the count) is chosen so that the trained
values come nearest to those of LoRA of rank 16; one that comes no nearer than a quarter is sparing by nature, and runs
at its defaults. The learning rate climbs half decades while the mean loss of the last steps of a pilot falls. Then 24
steps of 256 tokens of Wikipedia for each of 2 seeds, at the next best rate where one diverges, and held-out perplexity.
`--full`: every scheme, 5 seeds, the demo's task; `--smoke`: 2 steps, one seed, one rate, into a file that is not kept.
A row for each finished run. Ranks: `family_cell.ranks`, of the first seed. Bytes: the most alive at once in a step of
2 x 256, planned, and by the allocator's events of a real one (`qtune plan --measure`). Time: a median step of 2 x 256
by LoRA's, in turns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cells import Rows, begin, cell_parser, each_apart, given, prepare, with_smoke
from method_tables import PICTURE, family_points
from quality import BATCH, LENGTH
from results import FOLDER, read_rows

RESULTS = FOLDER / "family.jsonl"
RANK, REFERENCE = 16, "lora"
RATES = tuple(float(f"{mantissa}e{power}") for power in range(-5, 0) for mantissa in (1, 3))
FIRST_RATE, JUDGED = 1e-3, 4  # where the climb begins, and the last steps of a pilot that count
DIVERGED = 1.5  # times its first loss: a run whose last ones are above went wrong
NEAR, MOST = 1.25, 8  # times LoRA's trained values; times an option's default that is tried
STEPS, PILOT, SEEDS, FULL_SEEDS, TURNS = 24, 8, (0, 1), (0, 1, 2, 3, 4), 4
ROWS = 1  # windows of a training step; what a step takes is measured with quality.py's
SCHEME, OTHERS = "nf4", ("int4", "int3", "int8", "dense")


@dataclass(frozen=True)
class Cell:
    """One method on one scheme."""

    scheme: str
    method: str

    @property
    def label(self) -> str:
        """What --only looks in."""
        return f"{self.scheme}/{self.method}"


class Book(Rows):
    """The rows that are there, and what is to be done."""

    def __init__(self, full: bool = False, same_code: bool = False, smoke: Path | None = None) -> None:
        super().__init__(smoke or RESULTS, "python benchmarks/family.py" + " --full" * full, same_code)
        self.full, self.smoke = full, smoke is not None
        self.steps = 2 if smoke else STEPS
        self.seeds = (0,) if smoke else FULL_SEEDS if full else SEEDS

    def key(self, cell: Cell, kind: str, rate: float | None = None, seed: int | None = None) -> dict[str, Any]:
        """The settings that tell a row apart."""
        shape = [BATCH if kind == "cost" else ROWS, LENGTH]
        steps = {"steps": PILOT if kind == "rate" else self.steps, "batch": shape, "lr": rate, "seed": seed}
        return {"kind": kind, **asdict(cell), "rank": RANK, **(steps if rate is not None else {})}

    def next(self, cell: Cell) -> tuple[str, float | None, int | None] | None:
        """What to do now: (kind, learning rate, seed), or nothing more. start first: it tells what is refused."""
        start = self.find(self.key(cell, "start"))
        if start is None:
            return "start", None, None
        if "refused" in start:
            return None
        if self.find(self.key(cell, "plan")) is None:
            return "plan", None, None
        rate = self.unknown_rate(cell)
        if rate is not None:
            return "rate", rate, 0
        best = self.chosen(cell)
        kinds = ("run", "task") if self.full and not self.smoke else ("run",)
        runs = [(kind, best, seed) for kind in kinds for seed in self.seeds] + [("cost", best, 0)]
        return next((run for run in runs if self.find(self.key(cell, *run)) is None), None)

    def tried(self, cell: Cell) -> dict[float, float]:
        """Learning rate -> mean of the last losses of its pilot; infinite where that or a run diverged."""
        rows = {rate: self.find(self.key(cell, "rate", rate, 0)) for rate in RATES}
        return {
            rate: math.inf if "diverged" in row or self.went_wrong(cell, rate) else last(row["losses"])
            for rate, row in rows.items()
            if row
        }

    def went_wrong(self, cell: Cell, rate: float) -> bool:
        """Did a run at this learning rate diverge?"""
        rows = (self.find(self.key(cell, "run", rate, seed)) for seed in self.seeds)
        return any("diverged" in row or last(row["losses"]) > DIVERGED * row["losses"][0] for row in rows if row)

    def unknown_rate(self, cell: Cell) -> float | None:
        """The learning rate to try now; None: the best has worse ones on both sides."""
        tried = self.tried(cell)
        if self.smoke:
            return None
        if not tried:
            return FIRST_RATE
        place = RATES.index(min(tried, key=lambda rate: (tried[rate], rate)))
        beside = (RATES[i] for i in (place + 1, place - 1) if 0 <= i < len(RATES))
        return next((rate for rate in beside if rate not in tried), None)

    def chosen(self, cell: Cell) -> float:
        """The learning rate of the runs."""
        tried = self.tried(cell)
        return FIRST_RATE if self.smoke else min(tried, key=lambda rate: (tried[rate], rate))


def last(losses: Sequence[float]) -> float:
    """The mean of the last ones that count."""
    return sum(losses[-JUDGED:]) / len(losses[-JUDGED:])


def cells(full: bool) -> list[Cell]:
    """Every method on every scheme that is asked for, LoRA first: the others are measured beside it."""
    from qtune.adapters import METHODS
    from qtune.quant import SCHEMES

    methods = [REFERENCE, *sorted(METHODS.keys() - {REFERENCE})]
    schemes = [SCHEME, *sorted(SCHEMES.keys() - {SCHEME})] if full else [SCHEME]
    found = [Cell(scheme, method) for scheme in schemes for method in methods if takes(scheme, method)]
    for method in methods if not full else ():
        other = scheme_for(method)
        found += [Cell(other, one) for one in (REFERENCE, method) if Cell(other, one) not in found]
    return found


def takes(scheme: str, method: str) -> bool:
    """Is the method, at its defaults, for this scheme?"""
    from qtune.adapters import METHODS, AdapterSpec
    from qtune.quant import SCHEMES

    return not METHODS[method].refuses(SCHEMES[scheme](), AdapterSpec(method).resolved())


def scheme_for(method: str) -> str:
    """The main scheme, or the first other one that the method takes."""
    return next(scheme for scheme in (SCHEME, *OTHERS) if takes(scheme, method))


def nearest(default: int, counts: Mapping[int, int | None], target: int) -> list[int]:
    """Values of an option to count next: powers of two up to `MOST` times the default, then ever nearer to the best."""
    top = MOST * default
    ladder = [value for value in (1 << i for i in range(top.bit_length())) if value <= top]
    if missing := [value for value in ladder if value not in counts]:
        return missing
    known = [value for value, count in counts.items() if count is not None]
    if not known:
        return []
    best = min(known, key=lambda value: (distance(counts[value] or 0, target), value))
    found = []
    for side in (-1, 1):
        others = [value for value in counts if (value - best) * side > 0]
        middle = (best + min(others, key=lambda value: abs(value - best))) // 2 if others else best
        found += [middle] if middle not in counts else []
    return found


def distance(count: int, target: int) -> float:
    """How many times one of two numbers of trained values is the other, as a logarithm."""
    return abs(math.log(count / target)) if count else math.inf


# ---- the picture


GREY, RED = "#808080", "#c0504d"  # legible on light and on dark


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against measured bytes of every method on the main scheme."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    points = [(p["measured"] / 2**20, p["perplexity"], p["method"]) for p in family_points(rows, SCHEME) if p["drawn"]]
    if not points:
        return
    points.sort(key=lambda point: point[2] == REFERENCE)  # drawn over what lies at its place
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "family", "font.size": 9}):
        figure = Figure(figsize=(9, 7), layout="constrained")
        canvas = FigureCanvasAgg(figure)  # measures text; the file is SVG
        axes = figure.add_subplot(facecolor="none")
        colours = [RED if name == REFERENCE else "#3f7fbf" for _, _, name in points]
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], s=22, color=colours, zorder=3)
        axes.set_xlabel(f"most bytes alive in a step, MiB, measured ({SCHEME})", color=GREY)
        axes.set_ylabel("held-out perplexity after fine-tuning", color=GREY)
        axes.tick_params(colors=GREY)
        axes.grid(color=GREY, alpha=0.25)
        axes.margins(0.08)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.draw_without_rendering()
        places = axes.transData.transform([(x, y) for x, y, _ in points])
        taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in places]
        for x, y, name in sorted(points, key=lambda point: (point[2] != REFERENCE, -point[1], point[0])):
            taken.append(_label(axes, canvas, (x, y), name, taken))
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    print(f"wrote {path}")


def _label(axes: Any, canvas: Any, at: tuple[float, float], name: str, taken: list[Any]) -> Any:
    """Write a method's name at the nearest free place around its point, with a line where that is far; its box."""
    from matplotlib.text import Text

    colour = RED if name == REFERENCE else GREY
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "alpha": 0.7, "shrinkA": 1, "shrinkB": 3}
    where = {"xytext": (0, 0), "textcoords": "offset points", "va": "center"}
    text = axes.annotate(name, at, color=colour, fontsize=8, arrowprops=line, **where)
    for radius in range(8, 130, 6):
        text.arrow_patch.set_visible(radius > 14)
        number = max(4, radius // 2)  # a dozen points of arc from one another
        for turn in range(number):
            angle = 2 * math.pi * (turn + 0.25) / number
            text.set_position((radius * math.cos(angle), radius * math.sin(angle)))
            text.set_horizontalalignment("left" if math.cos(angle) >= 0 else "right")
            text.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(text, canvas.get_renderer())  # of the name alone, without its line
            if not any(box.overlaps(other) for other in taken):
                return box
    return box


# ---- all cells


def main() -> None:
    full = f"every scheme, {len(FULL_SEEDS)} seeds, the task too"
    begin(with_smoke(cell_parser(__doc__, "cells whose SCHEME/METHOD is among these words", full)), run, RESULTS.name)


def run(options: argparse.Namespace) -> None:
    """What was asked for."""
    book, words = Book(options.full, options.same_code, options.rows), options.only.replace(",", " ").split()
    everything = cells(options.full)
    if options.cell:
        from family_cell import run_cell

        return run_cell(next(cell for cell in everything if cell.label == options.cell), options.folder, book)
    wanted = [cell for cell in everything if not words or cell.label in words or cell.method in words]
    if options.list:
        return print("\n".join(f"{cell.label:20} {(book.next(cell) or ['done'])[0]}" for cell in wanted))
    prepare(options.folder)
    try:
        each_apart(__file__, [cell.label for cell in wanted if book.next(cell)], given(options), options.jobs)
    finally:
        if not options.smoke and RESULTS.exists():
            picture(read_rows(RESULTS), PICTURE)
            print(f"rows are in {RESULTS}; the table: python benchmarks/tables.py")


if __name__ == "__main__":
    main()
