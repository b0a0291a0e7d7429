"""The command line: one function a subcommand. Nothing heavy is imported before a subcommand runs, so `qtune --help`
is instant.

Exit codes: 0 done, 1 a fault (one paragraph with its code on stderr; --debug shows the traceback; with --json also a
value on stdout), 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .combining.command import options as combine_options
from .commands.chat import options as chat_options
from .commands.export import options as export_options
from .commands.imports import options as import_options
from .commands.init import options as init_options
from .commands.merge import options as merge_options
from .commands.mix import options as mix_options
from .commands.quantize import options as quantize_options
from .commands.train import options as train_options
from .completion import options as completion_options
from .errors import FREE_MEMORY, QtuneError, is_out_of_memory
from .evaluation.command import options as eval_options
from .explain.command import options as explain_options
from .inspection.command import options as inspect_options
from .planner.command import options as plan_options
from .report.command import compare_options, report_options
from .show_data import options as data_options


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument(
        "--json", action="store_true", help="print one JSON value on stdout; everything else goes to stderr"
    )
    parser = argparse.ArgumentParser(
        prog="qtune", description="Fine-tune large language models on quantized bases, in little memory."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    init_options(command("init", "Write a recipe that fits: three questions, or flags. Where to begin."))
    train_options(command("train", "Train an adapter as a recipe says, or go on with a run."))
    plan_options(command("plan", "Say what training will take, and whether it fits: from the model's configuration."))
    data_options(command("data", "Show what training data is made of: format, counts, tokens, what is trained."))

    eval_options(command("eval", "Loss, perplexity, accuracy, exact match and tasks, of a run or a model."))

    merge_options(
        command("merge", "Write base + adapter as a plain checkpoint, a packed one or a GGUF file, verified.")
    )

    export_options(command("export", "Write the adapter of a run for PEFT or llama.cpp."))
    import_options(command("import", "Take an adapter that PEFT wrote, as the folder of a run."))
    combine_options(command("combine", "Make one adapter of several runs on one base."))
    report_options(command("report", "Write the page of a run: curves, memory, samples, recipe, in one HTML file."))
    inspect_options(
        command("inspect", "Show what adapters learned, how they overlap, and what packing lost, by layer.")
    )
    compare_options(command("compare", "Lay runs side by side: results, and where their recipes differ."))
    _model_commands(command)
    return parser


def _model_commands(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The commands that need no run."""
    chat_options(command("chat", "Talk to a run or to a model."))

    quantize_options(command("quantize", "Write a packed checkpoint that loads without the original."))
    mix_options(command("mix", "Choose each layer's scheme, for the least error at an average of bits."))
    sub = command("keys", "List the keys of a recipe: what each means, its default, what is legal.")
    sub.add_argument("word", nargs="?", metavar="WORD", help="only keys that hold it, such as train or max_length")
    sub = command("methods", "List the adapter methods, or say all about one.")
    sub.add_argument("method", nargs="?", metavar="NAME", help="a method, to be told of in full")
    command("schemes", "List the storage schemes.")
    explain_options(command("explain", "Say what the code of an error means, and what to do."))
    sub = command("doctor", "What this machine can do, which kernel serves which op, and how fast it is here.")
    sub.add_argument("--markdown", action="store_true", help="the table of kernels as Markdown")
    sub.add_argument("--no-timing", action="store_true", help="do not time the ops (some seconds)")
    completion_options(command("completion", "Print a script that completes commands, options and recipe keys."))
    sub = command("demo", "Fine-tune a small real model on a real task, merge, verify, talk to it.")
    sub.add_argument("--out", default="demo", metavar="DIR", help="folder for model, data and run (demo)")
    sub.add_argument("--steps", type=int, metavar="N", help="fewer or more training steps")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of a command; unlike in argparse, KEY=VALUE pairs may stand anywhere among the options."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    args, rest = parser.parse_known_args(argv)
    late = [text for text in rest if "=" in text and not text.startswith("-") and hasattr(args, "overrides")]
    if len(late) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(text for text in rest if text not in late)}")
    if late:
        args.overrides += late
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `qtune`."""
    args = parse(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # we show our own
    try:
        COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        return _fail(args, "", "interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing to say, and nobody to say it to
        return 1
    except QtuneError as error:
        return _fail(args, error.code, str(error))
    except Exception as error:  # noqa: BLE001 (the last door)
        if is_out_of_memory(error):
            reason = (str(error).splitlines() or ["out of memory"])[0]
            way_out = FREE_MEMORY.get(args.command, "free some memory, or use --device cpu")
            return _fail(args, "Q501", f"{reason}; {way_out}")
        if isinstance(error, OSError):  # a full disk, a folder without rights ...
            return _fail(args, "Q902", str(error))
        args.debug = True  # a bug is not hidden
        return _fail(args, "Q000", f"{type(error).__name__}: {error} (not foreseen: please report it with all of this)")


def _fail(args: argparse.Namespace, code: str, text: str, status: int = 1) -> int:
    """One paragraph on stderr, for a program also a value on stdout. code: "" for what is no fault."""
    if args.debug and status == 1:
        traceback.print_exc()
    from rich.console import Console
    from rich.text import Text

    from .screen import printable

    console = Console(stderr=True, highlight=False)
    told = Text.assemble((f"error {code}: " if code else "", "bold red"), printable(text))
    console.print(told, soft_wrap=not console.is_terminal)  # as in Screen.line
    if code and console.is_terminal:
        console.print(Text(f"more: qtune explain {code}", style="dim"))
    if code:
        _emit(args, {"error": text, "code": code})
    return status


def _version() -> str:
    from .version import version

    return f"qtune {version()}"


def _screen(args: argparse.Namespace) -> Any:
    from .model.quiet import quiet
    from .screen import Screen

    quiet()
    return Screen(json=args.json)


def _emit(args: argparse.Namespace, value: Any) -> None:
    """The value for a program, where --json asks for it."""
    if args.json:
        print(json.dumps(value, indent=2, default=str))


# ---- the subcommands ----


def _init(args: argparse.Namespace) -> None:
    from .commands.init import init

    init(args, _screen(args), lambda value: _emit(args, value))


def _train(args: argparse.Namespace) -> None:
    from .commands.train import train

    train(args, _screen(args), lambda value: _emit(args, value))


def _plan(args: argparse.Namespace) -> None:
    from .planner.command import plan

    plan(args, _screen(args), lambda value: _emit(args, value))


def _data(args: argparse.Namespace) -> None:
    from .show_data import show_data

    show_data(args, _screen(args), lambda value: _emit(args, value))


def _eval(args: argparse.Namespace) -> None:
    from .evaluation.command import evaluate_command

    evaluate_command(args, _screen(args), lambda value: _emit(args, value))


def _merge(args: argparse.Namespace) -> None:
    from .commands.merge import merge_command

    merge_command(args, _screen(args), lambda value: _emit(args, value))


def _export(args: argparse.Namespace) -> None:
    from .commands.export import export

    export(args, _screen(args), lambda value: _emit(args, value))


def _import(args: argparse.Namespace) -> None:
    from .commands.imports import import_command

    import_command(args, _screen(args), lambda value: _emit(args, value))


def _combine(args: argparse.Namespace) -> None:
    from .combining.command import combine_command

    combine_command(args, _screen(args), lambda value: _emit(args, value))


def _inspect(args: argparse.Namespace) -> None:
    from .inspection.command import inspect_command

    inspect_command(args, _screen(args), lambda value: _emit(args, value))


def _report(args: argparse.Namespace) -> None:
    from .report.command import compare, report

    {"report": report, "compare": compare}[args.command](args, _screen(args), lambda value: _emit(args, value))


def _chat(args: argparse.Namespace) -> None:
    from .commands.chat import chat

    chat(args, _screen(args), lambda value: _emit(args, value))


def _quantize(args: argparse.Namespace) -> None:
    from .commands.quantize import quantize_command

    quantize_command(args, _screen(args), lambda value: _emit(args, value))


def _mix(args: argparse.Namespace) -> None:
    from .commands.mix import mix

    mix(args, _screen(args), lambda value: _emit(args, value))


def _keys(args: argparse.Namespace) -> None:
    from .listing import keys

    keys(args.word, args.json)


def _methods(args: argparse.Namespace) -> None:
    from .listing import methods

    methods(args.json, args.method)


def _schemes(args: argparse.Namespace) -> None:
    from .listing import schemes

    schemes(args.json)


def _explain(args: argparse.Namespace) -> None:
    from .explain.command import explain
    from .screen import Screen

    explain(args, Screen(json=args.json), lambda value: _emit(args, value))


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import doctor

    doctor(json_out=args.json, markdown=args.markdown, measure=not args.no_timing)


def _completion(args: argparse.Namespace) -> None:
    from .completion import script

    made = script(build_parser(), args.shell)
    _emit(args, {"shell": args.shell, "script": made})
    if not args.json:
        print(made)


def _demo(args: argparse.Namespace) -> None:
    from .demo import demo

    _emit(args, demo(Path(args.out), _screen(args), steps=args.steps))


COMMANDS = {
    "init": _init,
    "train": _train,
    "plan": _plan,
    "data": _data,
    "eval": _eval,
    "merge": _merge,
    "export": _export,
    "import": _import,
    "combine": _combine,
    "inspect": _inspect,
    "report": _report,
    "compare": _report,
    "chat": _chat,
    "quantize": _quantize,
    "mix": _mix,
    "keys": _keys,
    "methods": _methods,
    "schemes": _schemes,
    "explain": _explain,
    "doctor": _doctor,
    "completion": _completion,
    "demo": _demo,
}
