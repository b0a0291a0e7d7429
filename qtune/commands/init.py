"""`qtune init`: three questions, and a recipe that fits the device, with a comment behind every value.

What is not given as a flag is asked for where there is a terminal; answers are looked at one by one. Nothing heavy is
imported before it runs.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QtuneError, all_of, tried
from ..yaml_text import dump_yaml

if TYPE_CHECKING:
    from ..planner.devices import Device
    from ..proposal import Asked, Proposal
    from ..screen import Screen

COLUMN = 48  # of comments, at most
MODEL = "Model to train: a folder, a .gguf file or a hub id (owner/name)"
DATA = "Data to learn from: a .jsonl, .json, .csv, .parquet or .txt file, a folder, or hf:owner/name"
DEVICE = "Device to train on: a card such as rtx4090, the memory of one such as 24GB, or cpu"


def options(parser: argparse.ArgumentParser) -> None:
    """The options of `qtune init`."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="folder, .gguf file or hub id of the model to train")
    add("--data", metavar="FILE", help="what it learns from: a data file, a folder or hf:owner/name")
    add("--eval", metavar="FILE", help="held-out data to measure on; default: a part of --data")
    add("--device", metavar="NAME", help="a card such as rtx4090, a size such as 24GB, or cpu; default: this machine's")
    add("--budget", metavar="SIZE", help="memory that may be used, such as 8GB; default: all of the device's")
    add("--out", metavar="FILE", default="recipe.yaml", help="the recipe to write (recipe.yaml)")
    add("--yes", action="store_true", help="ask nothing: what is not given takes its default")
    add("--force", action="store_true", help="replace a recipe of that name")


def init(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run the command. Raises QtuneError with every fault of the flags; an answer at fault is asked for again."""
    from ..planner.fit import peak
    from ..planner.report import head, speed_lines, verdict
    from ..proposal import propose
    from ..safe_io import write_text

    out = Path(args.out).expanduser()
    if out.exists() and (out.is_dir() or not args.force):
        hint = "is a folder; give a file's name" if out.is_dir() else "is there already; give another --out, or --force"
        raise QtuneError("Q801", f"{out} {hint}")
    proposal = propose(_asked(args, screen), screen)
    text = written(proposal, _heading(proposal, out))
    write_text(out, text)
    plan, request = proposal.plan, proposal.request
    screen.title("Plan")
    for line in head(plan):
        screen.line(line)
    screen.line(verdict(plan))
    screen.line(speed_lines(plan.speed, request)[0])
    screen.title("Recipe")
    screen.line(f"wrote {out}: read it, every value says why it is what it is")
    file = shlex.quote(str(out))
    screen.line(f"next:  qtune data {file}              what is learned")
    screen.line(f"       qtune train {file} --dry-run   checks everything")
    screen.line(f"       qtune train {file}             trains")
    emit({
        "recipe": str(out), "values": dict(proposal.values), "verdict": plan.verdict, "peak": peak(plan),
        "budget": plan.budget, "steps": request.steps(), "examples": len(proposal.sets.train),
        "held_out": len(proposal.sets.held_out),
    })  # fmt: skip


# ---- questions


def _asked(args: argparse.Namespace, screen: Screen) -> Asked:
    """The flags, and what is asked for in their place."""
    from ..proposal import Asked, check_model

    asks = not args.yes and sys.stdin.isatty()
    missing = [f"--{name}" for name in ("model", "data") if getattr(args, name) is None]
    if not args.yes and args.device is None and args.budget is None:
        missing.append("--device or --budget (or --yes for this machine)")
    if missing and not asks:
        why = "--yes asks nothing" if args.yes else "there is no terminal to ask on"
        raise QtuneError("Q103", f"{why}, so give {', '.join(missing)}")
    faults: list[QtuneError] = []
    if args.model is not None:
        tried(lambda: check_model(args.model), faults)
    for name in filter(None, (args.data, args.eval)):
        tried(partial(_check_data, name), faults)
    device, where = tried(lambda: _device(args.device), faults) or (None, "")
    limit = None if args.budget is None else tried(lambda: _limit(args.budget), faults)
    if faults:
        raise all_of(faults, "Q111")
    assert device is not None
    model = args.model or _answer(MODEL, "", check_model, screen)[0]
    data = args.data or _answer(DATA, "", _check_data, screen)[0]
    if asks and args.device is None and args.budget is None:
        this = f"this machine: {device.name}"
        device, where = _answer(DEVICE, this, lambda text: _device(text or None), screen)[1]
    return Asked(
        model=model, data=data, held_out=args.eval, device=device, where=where, limit=limit or device.memory,
        budget=args.budget, output=_free_folder(model),
    )  # fmt: skip


def _answer(question: str, default: str, check: Callable[[str], Any], screen: Screen) -> tuple[str, Any]:
    """An answer that `check` takes, and what it returns. default: what an empty answer means, in words."""
    screen.line(question + (f" (Enter: {default})" if default else ""))
    while True:
        try:
            text = screen.console.input("> ").strip()
        except EOFError as error:
            raise QtuneError("Q102", f"no answer to: {question}") from error
        if not text and not default:
            continue
        try:
            return text, check(text)
        except QtuneError as error:
            screen.line(str(error), "yellow")


def _check_data(name: str) -> None:
    from ..data.sources import open_source

    open_source(name)


def _device(name: str | None) -> tuple[Device, str]:
    """The device to plan for, and the recipe's `device`: of a card by name or by its memory that is CUDA's."""
    import torch

    from ..planner.devices import find_device
    from ..planner.roofline import measured

    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = find_device(name or here)
    if device.kind == "cpu":
        device = measured(device)
    if name is None:
        return device, "auto"
    return device, name.lower() if re.fullmatch(r"cpu|cuda(:\d+)?", name.lower()) else "cuda"


def _limit(budget: str) -> int:
    from ..units import parse_size

    return parse_size(budget, "--budget")


def _free_folder(model: str) -> str:
    """A folder for the run that is not there yet."""
    path = Path(model.rstrip("/"))
    stem = path.stem if path.suffix.lower() == ".gguf" else path.name
    name = re.sub(r"[^\w.-]+", "-", stem) or "run"
    names = [f"runs/{name}", *(f"runs/{name}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not Path(name).exists())


# ---- the file


def _heading(proposal: Proposal, out: Path) -> list[str]:
    from ..planner.fit import peak
    from ..screen import size

    plan, file = proposal.plan, shlex.quote(str(out))
    most = f"{size(peak(plan))} of {size(plan.budget)}"
    return [
        f"Made by `qtune init` for {plan.device.name}. By the plan it takes {most} at the peak.",
        f"  qtune data {file}                 what is learned, in colour",
        f"  qtune plan {file} --explain       what each knob saves or costs",
        f"  qtune train {file} --dry-run      checks everything, trains nothing",
        f"  qtune train {file}                trains; train.lr=1e-4 behind it changes a value",
        "What is not here has its default: `qtune keys` lists all. Paths are relative to the current folder.",
    ]


def written(proposal: Proposal, heading: Sequence[str]) -> str:
    """The recipe as YAML text, a comment behind each value that was chosen."""
    from ..recipe import Recipe

    order = {row.name: index for index, row in enumerate(Recipe.keys())}
    tops = list(proposal.recipe.to_dict())
    keys = sorted(proposal.values, key=lambda key: (tops.index(key.partition(".")[0]), order.get(key, 0)))
    lines, section = [f"# {line}" for line in heading], ""
    rows: list[tuple[int, str, str | None]] = []
    for key in keys:
        top, _, leaf = key.partition(".")
        if top != section and not (section == "model" and top == "device"):
            lines.append("")
        if leaf and top != section:
            lines.append(f"{top}:")
        section = top
        rows.append((len(lines), _line(f"  {leaf}" if leaf else top, proposal.values[key]), proposal.why.get(key)))
        lines.append(rows[-1][1])
    column = min(COLUMN, max(len(text) for _, text, _ in rows))
    for place, text, why in rows:
        lines[place] = f"{text:{column}}  # {why}" if why else text
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    """A key with its value on one line."""
    text = dump_yaml(value).removesuffix("...\n").strip()
    if isinstance(value, float) and value < 0.001:
        text = f"{value:.1e}".replace("e-0", "e-")
    if "\n" in text:  # YAML reads JSON
        text = json.dumps(value, ensure_ascii=False)
    return f"{name}: {text}"
