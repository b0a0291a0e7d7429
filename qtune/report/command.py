"""`qtune report` and `qtune compare`: their options, and what they do. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..screen import Screen

Emit = Callable[[Any], None]


def report_options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune report`."""
    sub.add_argument("run", metavar="RUN", help="folder of a run, finished or not")
    sub.add_argument("--out", metavar="FILE", help="file to write; default: RUN/report.html")


def compare_options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune compare`."""
    sub.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    sub.add_argument("--out", metavar="FILE", help="also write a page to this file")


def report(args: argparse.Namespace, screen: Screen, emit: Emit) -> None:
    """Run `qtune report`. emit: takes the value for a program, where one is asked for."""
    from .advice import advise
    from .facts import numbers
    from .page import PAGE, write_page
    from .read import read_run

    run = read_run(Path(args.run))
    path = page_file(args.out) if args.out else Path(args.run) / PAGE
    write_page(run, path)
    told = advise(run.rows)
    for advice in told:
        screen.line(str(advice), "yellow")
    screen.line(f"wrote {path}, {path.stat().st_size / 1000:,.0f} kB: open it in a browser")
    emit(
        {
            "file": str(path),
            "numbers": {n.label: {"value": n.value, "start": n.start, "note": n.note} for n in numbers(run)},
            "advice": [{"kind": a.kind, "step": a.step, "text": a.text, "tip": a.tip} for a in told],
        }
    )


def compare(args: argparse.Namespace, screen: Screen, emit: Emit) -> None:
    """Run `qtune compare`. emit: as in `report`."""
    from .compare import compare as laid_out
    from .compare import show, write_comparison
    from .read import read_run

    made = laid_out([read_run(Path(run)) for run in args.runs])
    value = made.to_dict()
    show(made, screen)
    if args.out:
        path = page_file(args.out)
        write_comparison(made, path)
        screen.line()
        screen.line(f"wrote {path}: open it in a browser")
        value["file"] = str(path)
    emit(value)


def page_file(name: str) -> Path:
    """The path of a page that can be written. Raises QtuneError for what is no .html file."""
    from ..errors import QtuneError
    from ..safe_io import expanded

    path = expanded(name)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise QtuneError("Q102", f"--out {name}: a page is a file that ends in .html")
    return path
