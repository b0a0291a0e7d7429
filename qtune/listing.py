"""`qtune keys`, `qtune methods` and `qtune schemes`: what there is, read from the code itself."""

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
from .errors import one_of
from .quant import SCHEMES
from .recipe import Recipe


def keys(word: str | None, json_out: bool) -> None:
    """Every key of a recipe whose name holds `word`: meaning, default, legal values. Raises QtuneError where none
    does."""
    every = Recipe.keys()
    rows = [row for row in every if word is None or word.strip().lower() in row.name]
    if not rows:
        raise one_of("key", word, (row.name for row in every))
    if json_out:
        print(json.dumps([row._asdict() for row in rows], indent=2, default=list))
        return
    console = Console(highlight=False)
    for row in rows:
        default = row.default if isinstance(row.default, str) else json.dumps(row.default)
        required = default == "required"
        console.print(Text.assemble((row.name, "bold cyan"), "  ", "required" if required else f"default: {default}"))
        for text in filter(None, (row.doc, row.legal and f"legal: {row.legal}")):
            console.print(Padding(Text(text), (0, 0, 0, 6)))
    told = (
        "change one in the file, or behind a command as KEY=VALUE: train.lr=1e-4; the options of `adapter` and `scheme`"
    )
    console.print(Text(f"{told}: qtune methods, qtune schemes", style="dim"))


HOOKS = ("before_step", "see_gradients", "after_step")


def methods(json_out: bool, name: str | None = None) -> None:
    """A line for every method, or all about one. Raises QtuneError where `name` is none."""
    if name is not None and name not in METHODS:
        raise one_of("adapter method", name, METHODS)
    rows = [_method(one, METHODS[one]) for one in ([name] if name else sorted(METHODS))]
    if json_out:
        print(json.dumps(rows[0] if name else rows, indent=2, default=list))
        return
    console = Console(highlight=False)
    if name:
        _whole(console, rows[0])
        return
    width = max(len(row["method"]) for row in rows)
    for row in rows:
        line = Text.assemble((f"{row['method']:{width}}", "bold cyan"), "  ", row["equation"])
        if console.is_terminal:
            console.print(line, no_wrap=True, overflow="ellipsis")
        else:
            console.print(line, soft_wrap=True)
    console.print(Text("all about one: qtune methods NAME; use it as `adapter: {method: NAME, ...}`", style="dim"))


def _whole(console: Console, row: dict[str, Any]) -> None:
    console.print(Text.assemble((row["method"], "bold cyan"), "  ", row["equation"]))
    for head, items in paragraphs(row["about"]):
        console.print(Padding(Text(head), (1, 0, 0, 6)))
        for item in items:
            console.print(Padding(Text(f"- {item}"), (0, 0, 0, 8)))
    console.print()
    for key, value in facts({**row, "options": _options(row["options"])}).items():
        console.print(Padding(Text.assemble((f"{key:12}", "dim"), value), (0, 0, 0, 6)))


def paragraphs(text: str) -> list[tuple[str, list[str]]]:
    """A docstring's paragraphs, each with the items of the list in it; a line that is indented by two begins one."""
    text = re.sub(r"(\n  [^\n]*)\n(?=\S)", r"\1\n\n", text)  # what follows a list stands by itself
    found = [re.split(r"\n  (?=\S)", f"\n{paragraph}") for paragraph in text.split("\n\n")]
    lines = [[" ".join(item.split()) for item in items] for items in found]
    return [(head, items) for head, *items in lines]


def facts(row: dict[str, Any]) -> dict[str, str]:
    """What is said of a method in a line each, by its name for people."""
    refused = "; ".join(f"not {scheme} ({why})" for scheme, why in row["refuses"].items())
    said = {
        "paper": row["source"],
        "starts": row["starts"],
        "needs": ", ".join(row["needs"]),
        "goes to": ", ".join(row["targets"]),
        "schemes": refused or "all",
        "merges": row["merges"],
        "as PEFT's": row["peft"] or "no",
        "options": row.get("options"),
    }
    return {key: value for key, value in said.items() if isinstance(value, str) and value}


def _method(name: str, method: type[Adapter]) -> dict[str, Any]:
    doc = inspect.cleandoc(sys.modules[method.__module__].__doc__ or "")
    head, _, rest = doc.partition("\n\n")
    source = re.match(r".*?\(.*?\)", " ".join(rest.split()))
    return {
        "method": name,
        "equation": " ".join(head.split()).partition(":")[2].strip().rstrip("."),
        "source": source[0] if source else "",
        "about": rest.strip(),
        "options": {o: p.default for o, p in method.options().items()},
        "targets": list(method.targets),
        "starts": _start(method),
        "needs": _needs(method),
        "refuses": _refusals(method),
        "merges": _merges(method),
        "peft": method.peft.peft_type if method.peft else "",
    }


def _needs(method: type[Adapter]) -> list[str]:
    """What it takes besides the packed layer and the input."""
    names = {"weight": "each weight before it is packed", "gram": "calibration text", "grad": "gradients of a loss"}
    found = [text for name, text in names.items() if name in method.needs(_defaults(method))]
    found += ["a module that all sites share"] * method.has_own("shared")
    found += ["to change between steps"] * any(method.has_own(hook) for hook in HOOKS)
    return found + ["a penalty in the loss"] * method.has_own("penalty")


def _merges(method: type[Adapter]) -> str:
    """What it can be merged into, and how exact that is."""
    if not method.mergeable:
        return "no: what it adds hangs on the input, so use the run itself"
    return "into dense weights, exactly in fp32" + "; into packed ones, too" * method.has_own("merge_into")


def _defaults(method: type[Adapter]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in method.options().items()}


def _start(method: type[Adapter]) -> str:
    """What the first values come from, and how far from the original weights they are."""
    needs = method.needs(_defaults(method))
    names = {"weight": "each weight before it is packed", "gram": "calibration text", "grad": "gradients"}
    sources = " and ".join(text for name, text in names.items() if name in needs)
    if method.bound is None:
        return f"as the base alone{f', from {sources}' if sources else ''}"
    farther = "no farther" if method.bound == 1 else f"at most {method.bound - 1:.0%} farther"
    return f"from {sources}; {farther} from the original than the base alone"


def _refusals(method: type[Adapter]) -> dict[str, str]:
    """Scheme -> why the method makes no sense on it."""
    found = {name: method.refuses(scheme(), _defaults(method)) for name, scheme in sorted(SCHEMES.items())}
    return {name: why for name, why in found.items() if why}


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
    console = Console(highlight=False)
    console.print(table)
    console.print(
        Text(
            'several in one model: `scheme: {default: int3, "*.down_proj": int4}`, '
            "or as an average of bits: `scheme: {bits: 2.5, high: nf4, low: nf2}`",
            style="dim",
        )
    )


def _options(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={_plain(value)}" for key, value in options.items()) or "none"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
