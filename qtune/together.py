"""Runs whose adapters are loaded together: the options `--adapter`, `--use` and `--route` of `qtune chat` and `qtune
eval`, and how they are read. Nothing heavy is imported before it is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import QtuneError, one_of

if TYPE_CHECKING:
    from .adapters.many import Adapters
    from .runs import Run
    from .screen import Screen


def options(parser: argparse.ArgumentParser, use: str, route: str) -> None:
    """Declare the options. use, route: what `--use` and `--route` do in this command."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=RUN",
        help="also load the adapter of another run on the same base, under this name; may be given several times; "
        "RUN's own has the name of its folder",
    )
    parser.add_argument("--use", action="append", metavar="NAME,..", help=use)
    parser.add_argument("--route", action="store_true", help=route)


def folders_of(run: str, given: Sequence[str] | None) -> dict[str, Path]:
    """Names and folders of a run's own adapter and of those of `--adapter`; empty where there are none.

    Raises QtuneError for a name that is given twice, and for a folder that is no run.
    """
    from .runs import is_run, read_recipe
    from .state import run_of

    if not given:
        return {}
    if not is_run(run):
        raise QtuneError(
            "Q103",
            f"--adapter: {run} is no run; the adapters go on the base of a run: give the folder of one of them there",
        )
    folders = {_name(run_of(Path(run).expanduser())): Path(run).expanduser()}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else name).expanduser()
        name = name if equals else _name(run_of(path))
        if not name or "," in name or " " in name:
            raise QtuneError(
                "Q102", f"--adapter {text}: {name!r} is no name; legal: NAME=RUN, without commas and spaces"
            )
        if name in folders:
            raise QtuneError("Q103", f"--adapter {text}: {name!r} is {folders[name]} already; give another NAME=RUN")
        read_recipe(path)
        folders[name] = path
    return folders


def _name(folder: Path) -> str:
    return folder.absolute().name.replace("=", "-").replace(",", "-").replace(" ", "-")


def mixture_of(text: str, names: Sequence[str]) -> dict[str, float]:
    """`law`, `law=0.7,code=0.3` (or with spaces between) as weights by name, and `none` as no weights.

    Raises QtuneError for names that are not among `names`, and for what is no number.
    """
    weights: dict[str, float] = {}
    words = text.replace(",", " ").split()
    if not words:
        raise QtuneError("Q102", f"no adapter is named; legal: one of {', '.join(names)}, or NAME=WEIGHT NAME=WEIGHT")
    if words == ["none"] and "none" not in names:
        return {}
    for word in words:
        name, equals, number = word.partition("=")
        if name not in names:
            raise one_of("adapter", name, names)
        if name in weights:
            raise QtuneError("Q102", f"{name} stands twice in {text!r}; legal: once, with the sum of its weights")
        try:
            weights[name] = float(number) if equals else 1.0
        except ValueError:
            raise QtuneError("Q102", f"the weight of {name} is {number!r}; legal: a number, such as 0.5") from None
    return weights


def told(weights: Mapping[str, float]) -> str:
    """The inverse of `mixture_of`, in its shortest form."""
    return ",".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in weights.items()) or "none"


def open_together(folders: Mapping[str, Path], screen: Screen, *, device: str | None = None) -> tuple[Run, Adapters]:
    """Load the base of the first run, and onto it the adapters of all."""
    from .runs import load_adapters, open_base

    run = open_base(next(iter(folders.values())), screen, device=device)
    adapters = load_adapters(run.model, folders)
    shown = ", ".join(f"{name} ({spec.method})" for name, spec in adapters.specs.items())
    screen.line(f"adapters  {shown}")
    return run, adapters
