"""What was looked at as tables, on a terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..screen import Screen
from .look import LEFT, Learned, Look, Packed, by_kind
from .measures import Overlap, Spread

Rows = list[dict[str, str]]
NOISE = {"kurtosis": "1.8", "largest 1 %": "3.0 %", "rows": "1.0", "columns": "1.0"}  # uniform


def learned_rows(layers: Sequence[Learned]) -> Rows:
    """By kind of layer: means, and the share of the whole change."""
    total = sum(one.size**2 for one in layers)
    return [
        {
            "layers": kind,
            "number": str(len(some)),
            "of ||W||": f"{_mean(some, lambda one: one.relative):.2%}",
            "share": f"{sum(one.size**2 for one in some) / total if total else 0:.1%}",
            "effective rank": f"{_mean(some, lambda one: one.effective):.1f}",
            "stable rank": f"{_mean(some, lambda one: one.stable):.1f}",
            "half loses": _percent(some, lambda one: one.cut),
        }
        for kind, some in by_kind(layers, lambda one: one.site).items()
    ]


def _percent(layers: Sequence[Learned], pick: Callable[[Learned], Spread | None]) -> str:
    found = [cut.relative for one in layers if (cut := pick(one)) is not None]
    return f"{sum(found) / len(found):.1%}" if found else "-"


def overlap_rows(sites: Mapping[str, Overlap]) -> Rows:
    """By kind of layer: means, and what chance gives."""
    rows = []
    for kind, some in by_kind(list(sites.items()), lambda pair: pair[0]).items():
        seen = [one for _, one in some]
        read, written = (sum(one.by_chance[i] for one in seen) / max(1, len(seen)) for i in (0, 1))
        rows.append({
            "layers": kind, "number": str(len(seen)), "cosine": f"{_mean(seen, lambda one: one.cosine):+.3f}",
            "read alike": f"{_mean(seen, lambda one: one.read):.1%}", "by chance": f"{read:.1%}",
            "written alike": f"{_mean(seen, lambda one: one.written):.1%}", "by chance ": f"{written:.1%}",
        })  # fmt: skip
    return rows


def packed_rows(layers: Sequence[Packed]) -> Rows:
    """By kind of layer: means, and noise beside them."""
    if not layers:
        return []
    rows = [
        {
            "layers": kind,
            "number": str(len(some)),
            "of ||W||": f"{_mean(some, lambda one: one.error.relative):.2%}",
            "kurtosis": f"{_mean(some, lambda one: one.error.kurtosis):.2f}",
            "largest 1 %": f"{_mean(some, lambda one: one.error.largest):.1%}",
            "rows": f"{_mean(some, lambda one: one.error.rows):.1f}",
            "columns": f"{_mean(some, lambda one: one.error.columns):.1f}",
            f"rank {LEFT} leaves": _left(some),
        }
        for kind, some in by_kind(layers, lambda one: one.site).items()
    ]
    return [*rows, dict.fromkeys(rows[0], "") | {"layers": "uniform"} | NOISE]


def _left(layers: Sequence[Packed]) -> str:
    found = [one.left.size / one.error.size for one in layers if one.left is not None]
    return f"{sum(found) / len(found):.1%}" if found else "-"


def _mean(items: Sequence[Any], value: Callable[[Any], float]) -> float:
    return sum(map(value, items)) / len(items) if items else 0.0


def show(found: Look, screen: Screen) -> None:
    """All tables on the terminal."""
    for name, layers in found.runs.items():
        _table(screen, f"Learned by {name} ({found.about[name]})", learned_rows(layers))
    for (a, b), sites in found.pairs.items():
        _table(screen, f"Overlap of {a} and {b}", overlap_rows(sites))
    if found.packed:
        _table(screen, f"Error of packing in {found.scheme}", packed_rows(found.packed))
    screen.line()
    if found.runs:
        screen.line(
            "effective rank: exp of the entropy of the singular values; stable rank: the sum of their squares by the "
            "largest", "dim",
        )  # fmt: skip
        screen.line("half loses: what the best delta of half the rank lacks, of ||delta||", "dim")
    if found.pairs:
        screen.line(
            "alike: of the first 8 singular vectors, 100 % for one subspace; read: inputs, written: outputs", "dim"
        )
    if found.packed:
        screen.line(
            "kurtosis, rows, columns: how unevenly the error E lies over entries, rows and columns; rank "
            f"{LEFT} leaves: the share of ||E|| that its best correction of this rank does not reach", "dim",
        )  # fmt: skip
    for note in found.notes:
        screen.line(f"note: {note}", "yellow")


def _table(screen: Screen, title: str, rows: Rows) -> None:
    screen.title(title)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "layers" else "right")
    for row in rows:
        table.add_row(*(Text(cell, "dim" if row["layers"] == "uniform" else "") for cell in row.values()))
    screen.console.print(table)
