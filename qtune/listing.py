"""`qtune methods` and `qtune schemes`: what there is, read from the code itself."""

from __future__ import annotations

import inspect
import json
import re
import sys
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .adapters import METHODS, Adapter
from .quant import SCHEMES


def methods(json_out: bool) -> None:
    """Every method: equation, paper, options with defaults, where it goes, how it leaves."""
    rows = [_method(name, method) for name, method in sorted(METHODS.items())]
    if json_out:
        print(json.dumps(rows, indent=2, default=list))
        return
    console = Console(highlight=False)
    for row in rows:
        console.print(Text.assemble((row["method"], "bold cyan"), "  ", row["equation"]))
        facts = {"options": _options(row["options"]), "targets": ", ".join(row["targets"]), "source": row["source"]}
        facts["leaves as"] = "merged weights" * row["merges"] + ", PEFT adapter" * row["peft"]
        for key, value in facts.items():
            console.print(Padding(Text.assemble((f"{key:10}", "dim"), value), (0, 0, 0, 6)))
    console.print(Text("use one as `adapter: {method: NAME, ...}` in a recipe, or adapter.method=NAME", style="dim"))


def _method(name: str, method: type[Adapter]) -> dict[str, Any]:
    doc = (sys.modules[method.__module__].__doc__ or "").strip()
    head, _, rest = doc.partition("\n\n")
    source = re.match(r".*?\(.*?\)", " ".join(rest.split()))
    return {
        "method": name,
        "equation": " ".join(head.split()).partition(":")[2].strip().rstrip("."),
        "source": source[0] if source else "",
        "options": {o: p.default for o, p in method.options().items()},
        "targets": list(method.targets),
        "merges": method.mergeable,
        "peft": method.peft is not None,
    }


def schemes(json_out: bool) -> None:
    """Every scheme: what it is, bits per weight at 4096 x 4096, options with defaults."""
    rows: list[dict[str, Any]] = []
    for name, cls in sorted(SCHEMES.items()):
        scheme, what = cls(), " ".join((inspect.getdoc(cls) or "").split())
        options = {k: v for k, v in scheme.to_dict().items() if k != "name"}
        rows.append(
            {"scheme": name, "what": what, "bits_per_weight": round(scheme.bits_per_weight(), 3), "options": options}
        )
    if json_out:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("scheme", "bits per weight", "options", "what"):
        table.add_column(column, style="bold cyan" if column == "scheme" else None)
    for row in rows:
        table.add_row(row["scheme"], f"{row['bits_per_weight']:g}", _options(row["options"]), row["what"])
    Console(highlight=False).print(table)


def _options(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={_plain(value)}" for key, value in options.items()) or "none"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
