"""The page of what was looked at: pictures and tables in one HTML file, as `qtune report` draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..report import curves
from ..report.curves import SMALL, Line, draw
from ..report.page import render, svg
from ..safe_io import write_text
from .look import Learned, Look, Packed, by_kind, number_of
from .measures import BINS, EDGE, SHARES, Spread
from .show import learned_rows, overlap_rows, packed_rows

UNIFORM = 3**0.5  # the edge of uniform noise of mean square 1
KINDS = 8  # that have a colour of their own


@dataclass(frozen=True)
class Key:
    """A line's name and colour in a caption. kind: how its sign looks ("", dash)."""

    name: str
    role: str
    kind: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture with its caption, and a sentence on how to read it."""

    caption: str
    keys: Sequence[Key]
    picture: Markup
    note: str


def write_look(found: Look, path: Path) -> None:
    """Draw it and write the page; a file at `path` is replaced once it is whole."""
    curves.need_matplotlib()
    title = " and ".join(found.runs) if found.runs else Path(found.model).name
    write_text(path, render(
        "inspect.html", title=title, found=found, base=Path(found.model).name, figures=figures(found),
        learned={name: learned_rows(layers) for name, layers in found.runs.items()},
        pairs={f"{a} and {b}": overlap_rows(sites) for (a, b), sites in found.pairs.items()},
        packed=packed_rows(found.packed),
    ))  # fmt: skip


def figures(found: Look) -> list[Figure]:
    """All pictures that there is something to draw in."""
    made: list[Figure] = []
    if found.runs:
        lines = _series(found)
        spectra = [(key, _mean_spectrum(layers)) for key, layers in lines]
        made.append(_figure(
            "spectrum", "Singular values, the largest 1", [(key, range(1, len(ys) + 1), ys) for key, ys in spectra],
            "a steep fall: a smaller rank would do", x_label="singular value", log=True,
        ))  # fmt: skip
        for name, caption, value, note in (
            ("relative", "Size of the change, ||delta|| / ||W||", lambda one: one.relative, "how far each layer moved"),
            ("effective", "Effective rank", lambda one: one.effective, "how many directions carry the change"),
        ):
            made.append(_by_layer(name, caption, lines, value, note))
    if found.pairs:
        made += _overlaps(found)
    return made + _errors(found)


def _series(found: Look) -> list[tuple[Key, list[Learned]]]:
    """What has a line: the kinds of layer of one run, or the runs."""
    if len(found.runs) > 1:
        return [(Key(name, f"c{i}"), layers) for i, (name, layers) in enumerate(found.runs.items())]
    (layers,) = found.runs.values()
    kinds = by_kind(layers, lambda one: one.site)
    whole = kinds.pop("all")
    if len(kinds) > KINDS:
        return [(Key("all layers", "c0"), whole)]
    return [(Key(kind, f"c{i}"), some) for i, (kind, some) in enumerate(kinds.items())]


def _mean_spectrum(layers: Sequence[Learned]) -> list[float]:
    """Mean of sigma_i / sigma_1 over the layers that have one."""
    values = [[value / one.values[0] for value in one.values] for one in layers if one.values]
    count = max((len(one) for one in values), default=0)
    every = [[one[i] for one in values if i < len(one)] for i in range(count)]
    return [sum(some) / len(some) for some in every]


def _by_layer(
    name: str, caption: str, lines: Sequence[tuple[Key, Sequence[Any]]], value: Callable[[Any], float], note: str
) -> Figure:
    """A line over the numbers of layers, the mean where several have the same."""
    drawn = []
    for key, items in lines:
        groups: dict[int, list[float]] = {}
        for item in items:
            if (number := number_of(item.site)) is not None and math.isfinite(value(item)):
                groups.setdefault(number, []).append(value(item))
        xs = sorted(groups)
        drawn.append((key, xs, [sum(groups[x]) / len(groups[x]) for x in xs]))
    return _figure(name, caption, drawn, note, x_label="layer", zero=True)


def _figure(
    name: str, caption: str, lines: Sequence[tuple[Key, Sequence[float], Sequence[float]]], note: str, *, x_label: str,
    log: bool = False, zero: bool = False,
) -> Figure:  # fmt: skip
    given = [Line(list(xs), list(ys), role=key.role, dashed=key.kind == "dash") for key, xs, ys in lines]
    picture = draw(name, given, size=SMALL, log=log, zero=zero, form=curves.short, x_label=x_label)
    return Figure(caption, [key for key, _, _ in lines], svg(picture), note)


def _overlaps(found: Look) -> list[Figure]:
    """Cosine and directions of pairs, over the layers."""
    pairs = [(f"{a} and {b}", sites) for (a, b), sites in found.pairs.items() if sites][:KINDS]
    made = []
    for name, caption, pick, note in (
        ("cosine", "Cosine of the changes", lambda o: abs(o.cosine),
         "0: they do not touch; 1: one change; without sign"),
        ("read", "Directions that both read", lambda o: o.read,
         "of the first singular vectors of inputs; 1: the same"),
    ):  # fmt: skip
        lines = [
            (Key(label, f"c{i}"), [_Value(site, pick(one)) for site, one in sites.items()])
            for i, (label, sites) in enumerate(pairs)
        ]
        made.append(_by_layer(name, caption, lines, lambda one: one.value, note))
    return made


@dataclass(frozen=True)
class _Value:
    site: str
    value: float


def _errors(found: Look) -> list[Figure]:
    """How errors lie in their matrices, beside noise without structure."""
    kinds: list[tuple[Key, list[Spread]]] = [(Key("packing", "c0"), [one.error for one in found.packed])]
    kinds.append((Key("what its rank-16 correction leaves", "c2"), [one.left for one in found.packed if one.left]))
    cuts = [one.cut for layers in found.runs.values() for one in layers if one.cut]
    kinds.append((Key("delta cut to half its rank", "c1"), cuts))
    there = [(key, spreads) for key, spreads in kinds if spreads]
    if not there:
        return []
    centres = [(i + 0.5) * EDGE / BINS for i in range(BINS)]
    noise = [(Key("uniform noise", "planned", "dash"), centres, [1 / UNIFORM if x < UNIFORM else 0.0 for x in centres])]
    noise.append((Key("normal noise", "muted", "dash"), centres, [_normal(x) for x in centres]))
    densities = [(key, centres, _means([one.density for one in spreads])) for key, spreads in there]
    percent = [100 * share for share in SHARES]
    shares = [(key, percent, _means([one.shares for one in spreads])) for key, spreads in there]
    even = (Key("uniform noise", "planned", "dash"), percent, [1 - (1 - share) ** 3 for share in SHARES])
    made = [
        _figure("density", "Density of |error|, in root mean squares", [*densities, *noise],
                "flat up to 1.7: uniform, as rounding alone gives", x_label="root mean squares", zero=True),
        _figure("shares", "Share of the squared error in the largest entries", [*shares, even],
                "the more it bulges, the fewer entries hold the error", x_label="% of the entries", zero=True),
    ]  # fmt: skip
    if found.packed:
        made.append(_structure(found.packed))
    return made


def _structure(packed: Sequence[Packed]) -> Figure:
    rows = [(Key("rows", "c0"), [_Value(one.site, one.error.rows) for one in packed])]
    columns = [(Key("columns", "c1"), [_Value(one.site, one.error.columns) for one in packed])]
    return _by_layer(
        "structure", "Rows and columns of the packing error", [*rows, *columns], lambda one: one.value,
        "variance of their sums of squares by that of noise: 1 is none",
    )  # fmt: skip


def _normal(x: float) -> float:
    """Density of |x|."""
    return math.sqrt(2 / math.pi) * math.exp(-x * x / 2)


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
