"""`qtune plan`: its options, and which of its answers is asked for.

Nothing heavy is imported before the command runs: the options are declared whenever `qtune --help` is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..screen import Screen
    from .request import Request


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune plan`."""
    add = sub.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="YAML file of a run; or leave it out and name a --model")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe, such as train.micro_batch=1")
    add("--model", metavar="NAME", help="in place of RECIPE: llama-3.1-8b, a hub id, a folder or a .gguf file")
    add(
        "--device",
        metavar="NAME",
        help="a card such as rtx4090, a size such as 24GB, cpu, cuda; default: this machine's",
    )
    add("--scheme", metavar="NAME", help="how the weights are stored: nf4, int8 ...")
    add("--method", metavar="NAME", help="the adapter method: lora, dora ...")
    add("--rank", type=int, metavar="N", help="rank of the adapter (adapter.rank)")
    add("--batch", type=int, metavar="N", help="examples in a micro-batch (train.micro_batch)")
    add(
        "--seq",
        type=int,
        metavar="N",
        help="tokens of the longest example (data.max_length); the data is not read then",
    )
    add("--budget", metavar="SIZE", help="memory that may be used, such as 20GB; default: all of the device's")
    add(
        "--host",
        metavar="SIZE",
        help="memory of the machine around a GPU; default: this machine's, where it has the GPU",
    )
    add("--disk", metavar="SIZE", help="free space for the files of memory.*: disk; default: memory.folder's, as above")
    add("--stack", default="qtune", metavar="NAME", help="qtune (default); hf or hf:installed: the stock PEFT stack")
    one = sub.add_mutually_exclusive_group()
    one.add_argument("--fit", nargs="?", const="", metavar="SIZE", help="find the recipe that fits, and what it costs")
    one.add_argument("--explain", action="store_true", help="what each knob of the recipe saves, one row each")
    one.add_argument("--sweep", metavar="FILE", help="draw memory over batch and sequence (.png, .svg or .pdf)")
    one.add_argument("--measure", action="store_true", help="run one real step here and set it beside the plan")


def plan(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run the command. emit: takes the value for a program, where one is asked for."""
    from .request import read_request

    request = read_request(args)
    if request.first_note:
        screen.line(f"note: {request.first_note}", "yellow")
        screen.line()
    if args.fit is not None:
        _fit(request, screen, emit)
    elif args.explain:
        _explain(request, screen, emit)
    elif args.sweep:
        _sweep(request, args.sweep, screen, emit)
    elif args.measure:
        _measure(request, screen, emit)
    else:
        _plan(request, screen, emit)


def _plan(request: Request, screen: Screen, emit: Callable[[Any], None]) -> None:
    from .fit import fit, shown
    from .report import show_plan, show_way_out
    from .request import with_phases
    from .values import plan_dict

    made = with_phases(request.plan())
    own = request.plan(stack="qtune") if request.stack != "qtune" else None
    show_plan(made, request, screen, own)
    value = plan_dict(made, request)
    if own is not None:
        value["qtune"] = plan_dict(own, request)
    elif made.verdict == "no" and (found := fit(request, screen)).start.verdict == "no":  # else it knows no knob
        show_way_out(found, request, screen)
        value["change"] = shown(found.change) if not found.missing else None
    emit(value)


def _fit(request: Request, screen: Screen, emit: Callable[[Any], None]) -> None:
    from .fit import fit
    from .report import show_fit
    from .request import with_phases
    from .values import fit_dict

    found = fit(request, screen)
    if found.plan.verdict != "no":  # the whole job must fit
        found = replace(found, plan=with_phases(request.plan(found.plan.recipe)))
    show_fit(found, request, screen)
    emit(fit_dict(found, request))


def _explain(request: Request, screen: Screen, emit: Callable[[Any], None]) -> None:
    from .fit import explain
    from .report import show_explained
    from .values import rows_dict

    start, rows = explain(request, screen)
    show_explained(start, rows, request, screen)
    emit(rows_dict(start, rows, request))


def _sweep(request: Request, file: str, screen: Screen, emit: Callable[[Any], None]) -> None:
    from .report import show_sweep
    from .sweep import check_file, draw, sweep

    path = check_file(file)
    made = sweep(request, screen)
    replaced = path.exists()
    draw(made, path)
    show_sweep(made, path, replaced, screen)
    emit({"file": str(path), **made.to_dict()})


def _measure(request: Request, screen: Screen, emit: Callable[[Any], None]) -> None:
    from .measure import measure
    from .report import show_measured
    from .values import plan_dict

    found = measure(request.recipe, request.device, request.shape(), screen)
    show_measured(found, request, screen)
    emit(
        {
            "plan": plan_dict(found.plan, request),
            "weights": found.weights,
            "measured": found.rows(),
            "notes": found.notes,
        }
    )
