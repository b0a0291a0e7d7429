"""`qtune inspect`: its options. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..screen import Screen


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune inspect`."""
    add = sub.add_argument
    add("subjects", nargs="+", metavar="RUN|MODEL", help="a run, several of one base, or a model")
    add("--out", metavar="FILE", help="also write a page with pictures to this file")
    add("--scheme", help="how a MODEL is packed, to see what that loses; default: nf4")
    add("--original", metavar="MODEL", help="what a packed MODEL was packed from")
    add("--device", help="auto, cuda, mps or cpu; default: the recipe's, for a MODEL auto")


def inspect_command(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run `qtune inspect`. emit: takes the value for a program."""
    from ..report.command import page_file
    from ..report.curves import need_matplotlib
    from .look import look
    from .page import write_look
    from .show import show

    path = page_file(args.out) if args.out else None
    if path is not None:
        need_matplotlib()
    found = look(args.subjects, scheme=args.scheme, original=args.original, device=args.device, screen=screen)
    show(found, screen)
    value = found.to_dict()
    if path is not None:
        write_look(found, path)
        screen.line(f"wrote {path}, {path.stat().st_size / 1000:,.0f} kB: open it in a browser")
        value["file"] = str(path)
    emit(value)
