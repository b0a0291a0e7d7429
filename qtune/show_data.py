"""`qtune data`: what a file of training data, or the data of a recipe, is made of.

Without a model there are no tokens, so only records, formats and duplicates are told. Nothing heavy is imported before
the command runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Example
    from .recipe import Recipe
    from .screen import Screen

SHOWN = 2  # examples, by default
WIDTH = 40  # characters of the longest bar
RECIPES = (".yaml", ".yml")


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune data`."""
    add = sub.add_argument
    add("data", metavar="FILE|RECIPE", help="a data file, folder or hf:owner/name; or the YAML file of a recipe")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="keys of a recipe, such as data.max_length=2048")
    add("--model", metavar="NAME", help="whose tokenizer and chat template are used; default: the recipe's")
    add("--show", type=int, default=SHOWN, metavar="N", help=f"examples to show, trained tokens marked ({SHOWN})")


def show_data(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run the command. emit: takes the value for a program."""
    from .errors import QtuneError
    from .recipe import Recipe

    if args.show < 0:
        raise QtuneError("Q102", f"--show is {args.show}; legal: 0 or more")
    is_recipe = Path(args.data).suffix.lower() in RECIPES
    tree: Any = Path(args.data) if is_recipe else {"model": args.model or "none", "data": {"train": args.data}}
    recipe = Recipe.load(tree, [*args.overrides, *([f"model={args.model}"] if args.model else [])], training=False)
    if recipe.data.train is None:
        raise QtuneError("Q106", f"{args.data} names no data.train; give a data file, or a recipe with data")
    if is_recipe or args.model:
        _tokens(recipe, args.show, screen, emit)
    else:
        _records(recipe, args.show, screen, emit)


def _records(recipe: Recipe, show: int, screen: Screen, emit: Callable[[Any], None]) -> None:
    """What is known without a tokenizer."""
    from .data import read_records
    from .sections import entries

    assert recipe.data.train is not None
    found: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    for source in entries(recipe.data.train):
        records = read_records(source, recipe.data)
        before = len(seen)
        seen.update(record.digest() for record in records)
        ignored = sorted({key for record in records for key in record.ignored})
        row = {
            "path": source.file, "format": records[0].format, "records": len(records),
            "duplicates": len(records) - (len(seen) - before), "ignored": ignored,
            "tools": sum(bool(record.tools) for record in records),
        }  # fmt: skip
        found.append(row)
        screen.line(
            f"{source.file}: {len(records):,} records ({row['format']}), {row['duplicates']:,} equal to an earlier one"
            + (f", {row['tools']:,} with tools" if row["tools"] else "")
        )
        if ignored:
            screen.line(f"note: keys that are not used: {', '.join(ignored)}", "yellow")
        for record in records[:show]:
            screen.line()
            screen.line(record.where, "dim")
            for message in record.messages:
                said = message.get("content") or message.get("tool_calls")
                screen.line(f"{message['role']}: {said}")
            if not record.messages:
                screen.line(f"{record.prompt}{record.answer}"[:2000])
    screen.line()
    screen.line("for tokens, lengths and what is trained, name a model: --model FOLDER")
    emit({"sources": found})


def _tokens(recipe: Recipe, show: int, screen: Screen, emit: Callable[[Any], None]) -> None:
    """The examples as training has them."""
    from .data import load_sets
    from .data.report import quantiles
    from .runs import tokenizer_of

    tokenizer, _ = tokenizer_of(recipe)
    sets = load_sets(recipe.data, tokenizer, seed=recipe.train.seed, screen=screen)
    value: dict[str, Any] = {}
    for name, examples, report in (("train", sets.train, sets.report), ("eval", sets.held_out, sets.held_out_report)):
        if report is None:
            continue
        lengths = [len(example.input_ids) for example in examples]
        screen.title(f"data.{name}" if name == "train" or recipe.data.eval else "data.split")
        screen.line(str(report))
        _bars(lengths, screen)
        value[name] = {**report.to_dict(), "lengths": {**quantiles(lengths), "histogram": _rows(lengths)}}
    shown = [_shown(example, tokenizer, screen) for example in sets.train[:show]]
    emit({**value, "examples": shown})


def _rows(lengths: list[int]) -> list[dict[str, int]]:
    from .data.report import histogram

    return [{"from": low, "to": high, "examples": count} for low, high, count in histogram(lengths)]


def _bars(lengths: list[int], screen: Screen) -> None:
    """The histogram of lengths, in tokens after cutting."""
    from rich.table import Table

    from .data.report import quantiles

    rows = _rows(lengths)
    most = max(row["examples"] for row in rows)
    table = Table(box=None, padding=(0, 1), title_justify="left")
    for name, side in (("tokens", "right"), ("examples", "right"), ("", "left")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for row in rows:
        bar = "█" * round(WIDTH * row["examples"] / most) or "▏" * bool(row["examples"])
        span = f"{row['from']:,} - {row['to']:,}" if row["to"] > row["from"] else f"{row['to']:,}"
        table.add_row(span, f"{row['examples']:,}", f"[cyan]{bar}[/cyan]")
    screen.console.print(table)
    told = ", ".join(f"{share} up to {length:,}" for share, length in quantiles(lengths).items())
    screen.line(f"tokens of an example: {told}; longest {max(lengths):,}")


def _shown(example: Example, tokenizer: Any, screen: Screen) -> dict[str, Any]:
    from .data import show_example

    screen.line()
    screen.line(f"{example.where}, what is trained marked:", "dim")
    screen.line(show_example(example, tokenizer, colour=screen.console.is_terminal))
    text = show_example(example, tokenizer, colour=False, limit=10_000).plain
    return {"where": example.where, "tokens": len(example.input_ids), "trained": example.trained.count(1), "text": text}
