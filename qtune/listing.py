"""`qtune methods` and `qtune schemes`: what there is, read from the code itself."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .adapters import METHODS
from .quant import SCHEMES


def methods(json_out: bool) -> None:
    """Every method: equation, options with defaults, where it goes, merge, PEFT."""
    rows: list[dict[str, Any]] = []
    for name, method in sorted(METHODS.items()):
        doc = (sys.modules[method.__module__].__doc__ or "").strip()
        options = {o: p.default for o, p in method.options().items()}
        rows.append(
            {
                "method": name,
                "equation": doc.splitlines()[0].partition(":")[2].strip().rstrip("."),
                "options": options,
                "targets": list(method.targets),
                "merge": method.mergeable,
                "peft": method.peft is not None,
            }
        )
    if json_out:
        print(json.dumps(rows, indent=2, default=list))
        return
    _table(
        "adapter methods",
        ("method", "equation", "options (defaults)", "targets", "merges", "PEFT"),
        [
            (
                r["method"],
                r["equation"],
                ", ".join(f"{k}={_plain(v)}" for k, v in r["options"].items()),
                ", ".join(r["targets"]),
                _yes(r["merge"]),
                _yes(r["peft"]),
            )
            for r in rows
        ],
    )


def schemes(json_out: bool) -> None:
    """Every scheme: what it is, bits per weight at 4096 x 4096, options with defaults."""
    rows: list[dict[str, Any]] = []
    for name, cls in sorted(SCHEMES.items()):
        scheme = cls()
        options = {k: v for k, v in scheme.to_dict().items() if k != "name"}
        rows.append(
            {
                "scheme": name,
                "what": inspect.getdoc(cls),
                "bits_per_weight": round(scheme.bits_per_weight(), 3),
                "options": options,
            }
        )
    if json_out:
        print(json.dumps(rows, indent=2))
        return
    cells = [
        (
            r["scheme"],
            r["what"],
            f"{r['bits_per_weight']:g}",
            ", ".join(f"{k}={_plain(v)}" for k, v in r["options"].items()),
        )
        for r in rows
    ]
    _table("storage schemes", ("scheme", "what", "bits per weight", "options (defaults)"), cells)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, style="bold" if i == 0 else None, no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _plain(value: Any) -> str:
    return (
        "|".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
