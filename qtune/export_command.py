"""`qtune export`: its options, and what it says in the end. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import one_of

if TYPE_CHECKING:
    from .screen import Screen


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune export`."""
    sub.add_argument("run", metavar="RUN", help="folder of a run")
    sub.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    sub.add_argument(
        "--keep-base",
        help="trained: for the packed base (default); original: what was learned, for the weights before quantization "
        "(default where no other tool has that base)",
    )


def export(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Export, and say where it goes on."""
    from .export import KEEP_BASE, export_peft
    from .runs import open_run

    if args.keep_base not in (None, *KEEP_BASE):
        raise one_of("--keep-base", args.keep_base, KEEP_BASE)
    run = open_run(Path(args.run), screen, device="cpu")
    kl = export_peft(run, Path(args.out), screen, args.keep_base)
    screen.line(f"wrote {args.out}: peft.PeftModel.from_pretrained(base, {args.out!r})")
    if kl is None:
        screen.line(f"it goes on the base that it was trained on: {run.recipe.model} in {run.recipe.scheme}")
    else:
        screen.line(
            f"it goes on the original weights; there the quantization error is gone: KL(trained || exported) "
            f"{kl:.2e} nats a token"
        )
    emit({"out": args.out, "format": "peft", "kl": kl})
