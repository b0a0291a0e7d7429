"""`qtune combine`: its options, and what it says. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..screen import Screen
    from .write import Combined


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune combine`."""
    add = sub.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of two or more runs that were trained on one base")
    add("--out", metavar="DIR", required=True, help="folder of the new run; must be empty or absent")
    add(
        "--how", required=True, metavar="WAY", help="concat (the weighted sum, exact: ranks add up), svd (the same, "
        "cut to a rank), ties, dare, dare-ties, regmean or fisher (by each run's data), lorahub (weights "
        "searched for on --data)",
    )  # fmt: skip
    add(
        "--weights", metavar="W,W", help="one for each run, as 0.7,0.3; default: equal shares, with ties, dare-ties, "
        "regmean and fisher, which average by themselves, 1 each; with lorahub where the search begins",
    )  # fmt: skip
    add(
        "--rank", type=int, metavar="R", help="of the new adapter; default: the largest of the runs (twice that for "
        "starts such as loftq), with regmean and lorahub their sum",
    )  # fmt: skip
    add("--density", type=float, metavar="P", help="share of entries kept; default 0.2 with ties, 0.5 with dare")
    add("--seed", type=int, metavar="N", help="of what dare drops, fisher draws and where lorahub looks (0)")
    add("--data", metavar="FILE", help="records that lorahub takes the loss of")
    add("--trials", type=int, metavar="N", help="weights that lorahub tries (40)")
    add("--device", help="auto, cuda, mps or cpu, where the model must compute; default: the first run's")


def combine_command(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run `qtune combine`. emit: takes the value for a program."""
    from ..safe_io import expanded
    from .combine import Asked, combine

    asked = Asked(
        args.how, _numbers(args.weights), args.rank, args.density, args.seed, args.data, args.trials,
    )  # fmt: skip
    made = combine([expanded(run) for run in args.runs], expanded(args.out), asked, device=args.device, screen=screen)
    show(made, screen)
    emit(made.to_dict())


def _numbers(text: str | None) -> tuple[float, ...] | None:
    from ..errors import QtuneError

    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise QtuneError("Q102", f"--weights {text}: legal are numbers with commas between them, as 0.7,0.3") from error


def show(made: Combined, screen: Screen) -> None:
    """What was made of what, and what each kind of layer lost."""
    from rich.table import Table

    from .combine import NOTED

    about = made.about
    density = f", density {about['density']:g}" if about["density"] is not None else ""
    screen.line(f"how   {about['how']}{density}")
    for run, weight in zip(about["runs"], about["weights"], strict=True):
        rank = f", rank {run['rank']}" if run["rank"] else ""
        screen.line(f"from  {weight:g} x {run['folder']}  ({run['method']}{rank}, {run['sites']} layers)")
    if "loss" in about:
        screen.line(f"loss  {about['loss_before']:.4f} -> {about['loss']:.4f} after {about['trials']} trials")
    screen.line()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layers", "number", "||delta||", "lost"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for kind, (layers, size, lost) in made.kinds.items():
        table.add_row(kind, str(layers), f"{size:.4g}", "nothing" if lost < 1e-6 else f"{lost:.2%}")
    screen.console.print(table)
    screen.line()
    if made.lost > NOTED:
        screen.line(
            f"note: rank {made.rank} leaves out {made.lost:.0%} of the combined delta; a larger --rank keeps more, "
            "`qtune inspect` of the runs shows how much", "yellow",
        )  # fmt: skip
    screen.line(f"wrote {made.out}: lora, rank {made.rank}, {made.parameters:,} parameters; use it as any run:")
    screen.line(f"  qtune eval {made.out} --data FILE    qtune chat {made.out}    qtune merge {made.out}")
