"""Pages of the documentation that the code itself states: recipe keys, commands, methods, schemes, recipes, Python API.

MkDocs runs `on_files` (mkdocs.yml, hooks) at each build and shows the pages beside those of docs/; nothing is written.
`python docs/generate.py` prints them. MkDocs is imported by the hook alone, so the tests read the pages without it.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from qtune.cli import build_parser
from qtune.keys import legal
from qtune.listing import facts, methods, paragraphs, schemes
from qtune.recipe import SECTIONS, KeyRow, Recipe
from qtune.sections import Source

ROOT = Path(__file__).resolve().parent.parent
USAGE_WIDTH = 76  # of a command's usage: what a page shows without scrolling
WRITTEN = {  # pages that are files of the repository
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
}
# the Python names of the API page, by what they are for; every public name of qtune is among them
API = {
    "A whole run": ("qtune.train", "qtune.recipe.Recipe", "qtune.plan", "qtune.planner.plan.Plan", "qtune.merge"),
    "Load and pack": ("qtune.load", "qtune.start", "qtune.quantize", "qtune.SCHEMES", "qtune.quant.Scheme"),
    "Adapt": ("qtune.adapt", "qtune.METHODS", "qtune.adapters.AdapterSpec", "qtune.adapters.Adapter"),
    "Use what was trained": (
        "qtune.runs.open_run", "qtune.runs.Run", "qtune.adapters.files.save_adapter",
        "qtune.adapters.files.load_adapter", "qtune.adapters.enable_adapters", "qtune.load_adapters",
        "qtune.adapters.many.Adapters", "qtune.runs.open_base",
        "qtune.load_router",
    ),
    "Inside of a model": ("qtune.quant.QuantLinear", "qtune.adapters.Adapted", "qtune.errors.QtuneError"),
}  # fmt: skip
FOLDERS = {  # of recipes, with what they are
    "configs": ("Start here", "`first.yaml` names every key; the others train a popular model on a consumer card."),
    "configs/cards": (
        "By card", "A 7B, and a 70B, on cards of 4 to 24 GB. What is said of them is planned, not measured on a card.",
    ),
    "configs/methods": (
        "By method", "One recipe a method, on the model and the task that `make demo` fetches.",
    ),
}  # fmt: skip


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown."""
    return {
        "recipes.md": recipes(),
        "reference/keys.md": keys(),
        "reference/commands.md": commands(),
        "reference/methods.md": method_pages(),
        "reference/schemes.md": scheme_pages(),
        "reference/api.md": api(),
        **{page: (ROOT / name).read_text("utf-8") for page, name in WRITTEN.items()},
    }


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' hook: add the pages to those that were found."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


# ---- recipe keys


def keys() -> str:
    """Every key by section, from the dataclasses that the recipe itself is read by."""
    rows = Recipe.keys()
    parts = [
        "# Recipe keys",
        "A recipe is one YAML file. Only `model`, `data.train` and `output` must be given. On the command line a key "
        "is written with dots, and may be changed there: `qtune train recipe.yaml train.lr=1e-4 scheme=int8`. An "
        "unknown key or a value that is not legal is an error that names what is legal; all faults come at once.",
        "`configs/first.yaml` ([shown here](../recipes.md#first)) has all of them with their defaults.",
        "## The run",
        _key_table([row for row in rows if "." not in row.name or row.name.startswith("scheme.")]),
        "The options of a scheme are in [Schemes](schemes.md), those of a method in [Methods](methods.md). "
        "`adapter.targets` says where the adapter goes: `all-linear`, a pattern, or a list of patterns; with neither, "
        "where its method goes by default.",
    ]
    for name, section in SECTIONS.items():
        mine = [row for row in rows if row.name.startswith(f"{name}.")]
        parts += [f"## {name}", _prose(section.__doc__), _key_table(mine)]
        if name == "data":
            entry = [
                KeyRow(f.name, "required" if f.name == "file" else f.default, legal(f.metadata), f.metadata["doc"])
                for f in fields(Source)
            ]
            parts += ["### An entry of data.train or data.eval", _prose(Source.__doc__), _key_table(entry, "source.")]
    return _joined(parts)


def _key_table(rows: Iterable[KeyRow], prefix: str = "") -> str:
    table = ["| key | default | what it is | legal |", "| --- | --- | --- | --- |"]
    for row in rows:
        default = "required" if row.default == "required" else f"`{_yaml(row.default)}`"
        anchor = f'<a id="{prefix}{row.name}"></a>`{row.name}`'
        table.append(f"| {anchor} | {default} | {_cell(row.doc)} | {_cell(row.legal)} |")
    return _wrapped("keys", "\n".join(table))


def _yaml(value: Any) -> str:
    """A value as a recipe has it."""
    return value if isinstance(value, str) else json.dumps(value)


# ---- commands


def commands() -> str:
    """Every command with its usage and options, from the parser that reads them."""
    parser = build_parser()
    subs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    listed = [f"| [`qtune {name}`](#qtune-{name}) | {_cell(sub.description)} |" for name, sub in subs.choices.items()]
    parts = [
        "# Commands",
        "\n".join(["| command | what it does |", "| --- | --- |", *listed]),
        "`KEY=VALUE` pairs change keys of the recipe ([all of them](keys.md)) and may stand anywhere among the "
        "options. All commands take `--json` (one JSON value on stdout, for programs; everything else goes to stderr) "
        "and `--debug` (the traceback of an error). Exit codes: 0 done, 1 a fault, 2 wrong use, 130 interrupted.",
    ]
    for name, sub in subs.choices.items():
        sub.formatter_class = partial(argparse.HelpFormatter, width=USAGE_WIDTH)
        usage = sub.format_usage().removeprefix("usage: ").rstrip()
        usage = re.sub(r"\n +", "\n    ", re.sub(r"\x1b\[[0-9;]*m", "", usage))
        parts += [f"## qtune {name}", _prose(sub.description), f"```text\n{usage}\n```", _option_table(sub)]
    return _joined(parts)


def _option_table(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.help is None or action.dest in ("help", "debug", "json"):
            continue
        value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        value = f" [{value.strip()}]" if action.nargs == "?" and action.option_strings else value
        name = ", ".join(action.option_strings) + value if action.option_strings else value.strip()
        rows.append(f"| `{name}` | {_cell(action.help % vars(action) if '%(' in action.help else action.help)} |")
    table = "\n".join(["| argument | what it is |", "| --- | --- |", *rows])
    return _wrapped("options", table) if rows else "No arguments of its own."


# ---- methods and schemes


def method_pages() -> str:
    """What `qtune methods` knows of each method, with the recipe that shows it."""
    rows = _listed(methods)
    parts = [
        "# Methods",
        "What can be trained on a frozen base, read from the docstrings as `qtune methods` reads them. Each works on "
        "every scheme unless it says what it refuses, can be planned, saved, merged and verified. "
        "[Choosing a method](../choosing-a-method.md) says which to take, [Methods compared](../methods.md) what each "
        "learned, took and cost at the same number of trained values.",
        _method_table(rows),
    ]
    for row in rows:
        found = {name: _cell(text) for name, text in facts(row).items()}
        if (ROOT / "configs" / "methods" / f"{row['method']}.yaml").is_file():
            found["recipe"] = (
                f"[configs/methods/{row['method']}.yaml](../recipes.md#{_slug('methods-' + row['method'])})"
            )
        lines = [f"| {name} | {text} |" for name, text in found.items()]
        table = "\n".join(["| | |", "| --- | --- |", *lines])
        options = "\n".join(f"  {name}: {_yaml(value)}" for name, value in row["options"].items())
        parts += [
            f"## {row['method']}", _cell(row["equation"]) + ".", _docstring(row["about"]), _wrapped("facts", table),
            "With every option at its default:", f"```yaml\nadapter:\n  method: {row['method']}\n{options}\n```",
        ]  # fmt: skip
    return _joined(parts)


def _method_table(rows: list[dict[str, Any]]) -> str:
    table = ["| method | equation | needs | schemes | as PEFT's |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        name, refused = row["method"], ", ".join(f"`{scheme}`" for scheme in row["refuses"])
        cells = [f"[`{name}`](#{_slug(name)})", _cell(row["equation"]), _cell(", ".join(row["needs"]))]
        cells += [f"not {refused}" if refused else "all", f"`{row['peft']}`" if row["peft"] else ""]
        table.append(f"| {' | '.join(cells)} |")
    return _wrapped("rows", "\n".join(table))


def _docstring(text: str) -> str:
    """A docstring's paragraphs and lists as Markdown."""
    parts = [(_cell(head), "\n".join(f"- {_cell(item)}" for item in items)) for head, items in paragraphs(text)]
    return "\n\n".join(part for both in parts for part in both if part)


def scheme_pages() -> str:
    """What `qtune schemes` knows of each scheme."""
    table = ["| scheme | bits a weight | options and defaults | what it is |", "| --- | --- | --- | --- |"]
    for row in _listed(schemes):
        options = ", ".join(f"`{name}: {_yaml(value)}`" for name, value in row["options"].items()) or "none"
        anchor = f'<a id="{row["scheme"]}"></a>`{row["scheme"]}`'
        table.append(f"| {anchor} | {row['bits_per_weight']:g} | {options} | {_cell(row['what'])} |")
    return _joined(
        [
            "# Schemes",
            "How frozen weights are stored, read from the code as `qtune schemes` reads it. Bits include the scales, "
            "at 4096 x 4096. [Choosing a scheme](../choosing-a-scheme.md) says which to take.",
            _wrapped("schemes", "\n".join(table)),
            "A name stands for the scheme with its defaults; options are given in a mapping:",
            "```yaml\nscheme: {name: nf4, block: 128, double: false}\n```",
            "Several in one model: by pattern (the first that matches a layer decides), or as an average of bits that "
            "the first layers spend.",
            '```yaml\nscheme: {default: int3, "*.down_proj": int4}\n```',
            "```yaml\nscheme: {bits: 2.5, high: nf4, low: nf2}\n```",
        ]
    )


def _listed(command: Any) -> list[dict[str, Any]]:
    """The rows that a listing command gives to programs."""
    out = io.StringIO()
    with redirect_stdout(out):
        command(True)
    return list(json.loads(out.getvalue()))


# ---- recipes


def recipes() -> str:
    """Each file of configs/ as it stands; its header says what it is, how it is run and what is known of it."""
    parts = [
        "# Recipes",
        "Files of `configs/`, as they are. Copy one, change `model`, `data` and `output`, or change them on the "
        "command line. `qtune plan FILE` says what it takes on your device before anything is downloaded.",
    ]
    for folder, (title, text) in FOLDERS.items():
        parts += [f"## {title}", text]
        for path in sorted((ROOT / folder).glob("*.yaml"), key=lambda path: (path.stem != "first", path.stem)):
            body = path.read_text("utf-8").rstrip()
            head = body.partition("\n")[0].removeprefix("#").strip()
            name = path.stem if folder == "configs" else f"{path.parent.name}-{path.stem}"
            shown = f"```yaml\n{body}\n```"
            parts += [f"### {path.relative_to(ROOT)} {{: #{_slug(name)} }}", _cell(head), shown]
    return _joined(parts)


# ---- Python


def api() -> str:
    """Directives of mkdocstrings, which reads signatures and docstrings from the source; the README's example first."""
    example = re.search(r"```python\n.*?\n```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert example, "README.md has no example in Python"
    parts = [
        "# Python API",
        "What the commands do, from Python. Names directly under `qtune` are the public ones; the others are imported "
        "from where the page says. What reads something that a user gave raises "
        "[`QtuneError`](#qtune.errors.QtuneError) with all faults in one text.",
        example[0],
    ]
    for title, names in API.items():
        parts += [f"## {title}", *(f"::: {name}" for name in names)]
    return _joined(parts)


# ---- Markdown


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _prose(text: str | None) -> str:
    return _cell(" ".join((text or "").split()))


def _cell(text: str | None) -> str:
    """Plain text as Markdown, in a table too: nothing of it is markup, but for `code`."""
    pieces = re.split(r"(`[^`\n]+`)", text or "")
    for at, piece in enumerate(pieces):
        if at % 2:
            pieces[at] = piece.replace("|", "\\|")
        else:
            escaped = re.sub(r"([\\*_{}\[\]#|])", r"\\\1", piece)
            pieces[at] = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(pieces)


def _wrapped(name: str, table: str) -> str:
    """A table that style.css knows by `name`."""
    return f'<div class="{name}" markdown>\n\n{table}\n\n</div>'


def _slug(text: str) -> str:
    """The anchor of a heading, as Python-Markdown makes it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


if __name__ == "__main__":
    for page, markdown in pages().items():
        print(f"<!-- {page} -->\n\n{markdown}")
