"""`qtune explain`: what a code such as Q204 means, and what to do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import QtuneError
from .kinds import KINDS, markdown

if TYPE_CHECKING:
    from ..screen import Screen


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune explain`."""
    sub.add_argument("code", nargs="?", metavar="CODE", help="as an error shows it, such as Q204; default: list all")
    sub.add_argument("--markdown", action="store_true", help="all of them as Markdown")


def explain(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run the command. emit: takes the value for a program."""
    if args.markdown:
        print(markdown(), end="")
        return
    if args.code is None:
        for kind in KINDS.values():
            screen.line(f"{kind.code}  {kind.title}")
        emit([asdict(kind) for kind in KINDS.values()])
        return
    code = args.code.strip().upper()
    if code not in KINDS:
        every = f"{min(KINDS)} to {max(KINDS)}, as `qtune explain` lists them; keys of a recipe: `qtune keys`"
        raise QtuneError("Q101", f"unknown code of an error {args.code!r}; legal: {every}")
    kind = KINDS[code]
    screen.line(f"{kind.code}  {kind.title}", "bold cyan")
    screen.line(kind.meaning)
    screen.line()
    screen.line(f"what to do: {kind.advice}")
    emit(asdict(kind))
