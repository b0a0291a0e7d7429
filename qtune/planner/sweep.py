"""Memory over sequence length and micro-batch, as a picture with the limit drawn in.

Every point is a plan of its own, traced; between them memory is drawn as growing evenly with the tokens. A line ends
at the model's positions, or with the first point beyond BEYOND times the limit (or the smallest plan, if larger).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

from ..errors import QtuneError, one_of
from ..safe_io import expanded, replacing
from ..screen import Screen, size
from .fit import peak
from .knobs import positions
from .plan import stored_as
from .request import Request

BATCHES = (1, 2, 4, 8)
SHORTEST, POINTS = 256, 10  # tokens; points of a line: 256 to 131,072
BEYOND = 1.4
STEPS = 16  # of the line between two points
APART, CLOSE = 0.045, 1.7  # of the height; of the length: labels nearer than that would lie over each other
WIDE = 80  # letters of a line of the title
SUFFIXES = (".png", ".svg", ".pdf")
GIB = 2**30
# Okabe and Ito's, which the colour-blind tell apart, and markers that anybody does
LINES = (("#0072B2", "o"), ("#009E73", "s"), ("#E69F00", "^"), ("#CC79A7", "D"))
INK, PALE, ALARM = "#222222", "#8a8a8a", "#C03A00"


@dataclass(frozen=True)
class Sweep:
    """lines: micro-batch -> (tokens, bytes at the peak) by growing length; own: the recipe's (rows, tokens, bytes)."""

    request: Request
    lines: dict[int, list[tuple[int, int]]]
    own: tuple[int, int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        rows, length, most = self.own
        return {
            "limit": self.request.budget,
            "recipe": {"micro_batch": rows, "length": length, "peak": most},
            "lines": [
                {"micro_batch": rows, "points": [{"length": n, "peak": most} for n, most in points]}
                for rows, points in self.lines.items()
            ],
        }


def check_file(name: str) -> Path:
    """The path of a picture that can be written. Raises QtuneError before anything is computed."""
    path = expanded(name)
    if path.is_dir():
        raise QtuneError("Q102", f"--sweep {path} is a folder; legal: a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix.lower() not in SUFFIXES:
        raise one_of("suffix of --sweep", path.suffix or path.name, SUFFIXES)
    if not path.parent.is_dir():
        raise QtuneError("Q901", f"--sweep {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise QtuneError("Q901", f"--sweep {path}: the folder {path.parent} cannot be written to")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise QtuneError(
            "Q904", "--sweep draws with matplotlib, which is not installed: pip install 'qtune[report]'"
        ) from error
    return path


def lengths_of(request: Request) -> list[int]:
    """Powers of two up to the model's positions, from SHORTEST or, for a short model, from an eighth of them."""
    most = positions(request)
    first = SHORTEST
    while first > max(2, most // 8):
        first //= 2
    return [first << i for i in range(POINTS) if first << i <= most]


def sweep(request: Request, screen: Screen) -> Sweep:
    """Plans for every micro-batch of BATCHES and every length of `lengths_of`."""
    bare = replace(request, lengths=None)
    shape = request.shape()
    lengths = lengths_of(bare)
    own = (shape.rows, shape.length, peak(request.plan()))
    lines: dict[int, list[tuple[int, int]]] = {}
    with screen.bar("planning", len(BATCHES) * len(lengths)) as advance:
        for rows in BATCHES:
            points = lines[rows] = []
            for number, length in enumerate(lengths):
                recipe = request.recipe.with_({"train.micro_batch": rows, "data.max_length": length})
                points.append((length, peak(bare.plan(recipe))))
                advance(note=f"{rows} x {length:,}")
                if points[-1][1] > BEYOND * max(request.budget, lines[BATCHES[0]][0][1]):
                    advance(len(lengths) - 1 - number)
                    break
    return Sweep(request, lines, own)


# ---- the picture


def draw(made: Sweep, path: Path) -> None:
    """Write the picture; a file at `path` is replaced once it is whole."""
    figure = picture(made)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=160)


def picture(made: Sweep) -> Any:
    """A matplotlib Figure; without pyplot, so that no window system is asked for."""
    from matplotlib.figure import Figure

    request = made.request
    limit = request.budget / GIB
    peaks = [most / GIB for points in made.lines.values() for _, most in points]
    top = min(max(1.08 * max(peaks), 1.12 * limit), BEYOND * max(limit, min(peaks)))
    figure = Figure(figsize=(9, 5.6), facecolor="white")
    axes = figure.add_axes((0.085, 0.175, 0.81, 0.645))
    axes.set_xscale("log", base=2)
    lengths = sorted({n for points in made.lines.values() for n, _ in points})
    axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
    axes.set_ylim(0, top)
    axes.axhspan(limit, top, color=ALARM, alpha=0.07, linewidth=0)
    axes.axhline(limit, color=ALARM, linewidth=1.4)
    named = zip(LINES, made.lines.items(), strict=False)
    _labels(axes, [_line(axes, *look, rows, points, top) for look, (rows, points) in named], top)
    _own(axes, made, top)
    _limit(axes, request, limit, lengths[0])
    _frame(axes, lengths)
    _texts(figure, made)
    return figure


def _line(
    axes: Any, colour: str, marker: str, rows: int, points: list[tuple[int, int]], top: float
) -> tuple[float, float, dict[str, Any]]:
    """Draw it. Returns where its name belongs, at the end or where it leaves the picture, and how it is written."""
    xs, ys = [n for n, _ in points], [most / GIB for _, most in points]
    axes.plot(*_between(xs, ys), color=colour, linewidth=2, zorder=3)
    axes.plot(xs, ys, color=colour, marker=marker, markersize=6, linewidth=0, markeredgecolor="white", zorder=4)
    label = {"s": f"batch {rows}", "color": colour, "weight": "bold"}
    if ys[-1] <= top:
        return xs[-1], ys[-1], label
    share = (top - ys[-2]) / (ys[-1] - ys[-2]) if len(xs) > 1 and ys[-2] < top else 0.0
    x = xs[-1] if len(xs) == 1 else xs[-2] + share * (xs[-1] - xs[-2])  # where the line leaves the picture
    return x, top, label


def _labels(axes: Any, ends: list[tuple[float, float, dict[str, Any]]], top: float) -> None:
    """The names of the lines at their ends, none over another: those at the right one above the other, those above the
    picture in two rows."""
    lowest = -APART * top
    for x, y, label in sorted((end for end in ends if end[1] < top), key=lambda end: end[1]):
        lowest = max(y, lowest + APART * top)
        axes.annotate(label.pop("s"), (x, lowest), (9, 0), textcoords="offset points", va="center", **label)
    before, raised = 0.0, False
    for x, _, label in sorted((end for end in ends if end[1] >= top), key=lambda end: end[0]):
        raised = x < CLOSE * before and not raised
        offset = (0, 17 if raised else 5)
        axes.annotate(label.pop("s"), (x, top), offset, textcoords="offset points", ha="center", va="bottom", **label)
        before = x


def _between(xs: list[int], ys: list[float]) -> tuple[list[float], list[float]]:
    """The points with STEPS - 1 more in each gap, even in tokens."""
    parts = [i / STEPS for i in range(STEPS)]
    ends = zip(xs, ys, xs[1:], ys[1:], strict=False)
    dense = [(x + p * (u - x), y + p * (v - y)) for x, y, u, v in ends for p in parts]
    dense.append((xs[-1], ys[-1]))
    return [x for x, _ in dense], [y for _, y in dense]


def _own(axes: Any, made: Sweep, top: float) -> None:
    rows, length, most = made.own
    lowest = min(least for points in made.lines.values() for _, least in points) / GIB
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, length / 1.12), max(right, length * 1.12))
    y = min(most / GIB, top)
    axes.plot(
        [length], [y], marker="o", markersize=13, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6,
        zorder=5, clip_on=False,
    )  # fmt: skip
    side = "right" if length > 0.4 * right else "left" if length < 2.5 * left else "center"
    at = {"left": 0.05, "center": 0.5, "right": 0.95}[side]  # where the leader starts
    below = lowest > 0.16 * top  # where a base takes much, at any length, there is room below all lines
    axes.annotate(
        f"this recipe: {rows} x {length:,}, {size(most)}", (length, y),
        (length, 0.45 * min(lowest, top) if below else y + 0.16 * top), color=INK, ha=side,
        va="top" if below else "bottom", zorder=2,
        arrowprops={"arrowstyle": "-", "color": PALE, "shrinkB": 8, "relpos": (at, float(below))},
    )  # fmt: skip


def _limit(axes: Any, request: Request, limit: float, left: int) -> None:
    whose = request.device.name if request.budget == request.device.memory else "the limit given"
    axes.annotate(
        f"{whose}: {size(request.budget)}", (left, limit), (0, 4), textcoords="offset points",
        color=ALARM, weight="bold", va="bottom", zorder=6,  # a line may cross it
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _frame(axes: Any, lengths: list[int]) -> None:
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("sequence length, tokens", color=INK)
    axes.set_ylabel("peak memory, GiB", color=INK)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def _texts(figure: Any, made: Sweep) -> None:
    recipe, request = made.request.recipe, made.request
    rank = f" rank {recipe.adapter.options['rank']}" if "rank" in recipe.adapter.options else ""
    stack = "" if request.stack == "qtune" else f", by the stack {request.stack!r}"
    name = Path(request.model.name).name  # of a folder
    title = "\n".join(wrap(f"Memory to fine-tune {name} on {request.device.name}", WIDE))
    figure.text(0.085, 0.925, title, color=INK, size=15 if len(title) < 55 else 11.5, weight="bold")
    keys = recipe.train
    detail = (
        f"{stored_as(recipe)}, {recipe.adapter.method}{rank}, {keys.optimizer}, "
        f"{'checkpointing' if keys.checkpointing else 'no checkpointing'}{stack}; one line per micro-batch"
    )
    figure.text(0.085, 0.885, detail, color=PALE, size=min(10.5, 10.5 * 110 / len(detail)))
    note = (
        "Peak of the process, all tokens trained. Marked points are traced; between them memory grows with the tokens."
    )
    figure.text(0.085, 0.035, note, color=PALE, size=9)
