"""`qtune train`: its options, and what it says in the end. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def options(parser: argparse.ArgumentParser) -> None:
    """The options of `qtune train`."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file (`qtune init` writes one), or the folder of a run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe, such as train.lr=1e-4"
    )
    parser.add_argument(
        "--from", dest="start_from", metavar="RUN", help="start from the adapter of another run (weights only)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the output folder from its last checkpoint, to the losses that it would have had; "
        "where nothing was saved yet, from the start",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run that lies in the output folder")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, data, memory, disk and one real step, say how long it will take, and leave nothing behind",
    )


def train(args: argparse.Namespace, screen: Any, emit: Callable[[Any], None]) -> None:
    """Train, and say what is there and what comes next. Raises SystemExit(130) where the run was interrupted."""
    import shlex

    from ..adapters import METHODS
    from ..adapters.files import FIRST, INFO, TENSORS
    from ..model.names import KEPT
    from ..report.page import PAGE
    from ..report.read import RUN
    from ..runs import METRICS, RECIPE
    from ..state import FOLDER, folder_of
    from ..trainer import train, way_on

    recipe = recipe_of(args)
    if args.dry_run:
        _dry_run(args, recipe, screen, emit)
        return
    result = train(
        recipe, screen=screen, overwrite=args.overwrite, resume=args.resume,
        start_from=Path(args.start_from) if args.start_from else None,
    )  # fmt: skip
    run = result.folder
    screen.title("Interrupted" if result.interrupted else "Done")
    names = (RECIPE, TENSORS, INFO, METRICS, FIRST, f"{KEPT}.safetensors", RUN, PAGE)
    step = f"step {result.steps}" if result.best is None else f"step {result.best}, the best by its evaluation"
    screen.line(f"{run} holds {', '.join(n for n in names if (run / n).is_file())} (adapter of {step}) and {FOLDER}/")
    if result.best not in (None, result.steps):
        screen.line(f"the adapter of the last step, {result.steps}, is in {folder_of(run, result.steps)}")
    if result.interrupted:
        screen.line(f"go on:  {way_on(run)}")
    quoted = shlex.quote(str(run))
    words = ("eval", *["merge"] * METHODS[recipe.adapter.method].mergeable, "chat")
    screen.line("next:  " + "   ".join(f"qtune {word} {quoted}" for word in words))
    evals = {name: e.to_dict() for name, e in (("before", result.before), ("after", result.after)) if e is not None}
    emit({
        "run": run, "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds,
        "interrupted": result.interrupted, "best": result.best, "early": result.early, **evals,
    })  # fmt: skip
    if result.interrupted:
        raise SystemExit(130)


def _dry_run(args: argparse.Namespace, recipe: Any, screen: Any, emit: Callable[[Any], None]) -> None:
    import shlex

    from ..dry_run import dry_run
    from ..errors import QtuneError
    from ..screen import duration

    if args.resume:
        raise QtuneError(
            "Q103", "--dry-run looks at a run that is to begin, --resume goes on with one; give one of them"
        )
    start = Path(args.start_from) if args.start_from else None
    found = dry_run(recipe, screen=screen, overwrite=args.overwrite, start_from=start)
    screen.line(f"all checked in {duration(found['took'])}, nothing was written")
    words = [args.recipe, *args.overrides, *(["--from", args.start_from] if start else [])]
    words += ["--overwrite"] * args.overwrite
    screen.line(f"next:  qtune train {' '.join(map(shlex.quote, words))}")
    emit(found)


def recipe_of(args: argparse.Namespace) -> Any:
    """The recipe that is named; of a run's folder its own, with the folder as it is called now. Raises QtuneError for
    a folder that is none, and for a run without --resume."""
    from ..errors import QtuneError
    from ..recipe import Recipe
    from ..runs import RECIPE
    from ..safe_io import expanded

    path = expanded(args.recipe)
    if not path.exists():
        raise QtuneError("Q104", f"there is no recipe {path}; `qtune init` writes one")
    if kind := {".gguf": "a model", **dict.fromkeys((".jsonl", ".csv", ".tsv", ".parquet"), "data")}.get(path.suffix):
        raise QtuneError("Q104", f"{path} is {kind}, not a recipe, which is a YAML file; `qtune init` writes one")
    if not path.is_dir():
        return Recipe.load(Path(args.recipe), args.overrides)
    if not (path / RECIPE).is_file():
        raise QtuneError(
            "Q104", f"{path} is a folder without a {RECIPE}; give a recipe, or the folder of a run with --resume"
        )
    if not args.resume:
        raise QtuneError(
            "Q410", f"{path} is a run: go on with it by --resume, or train {path / RECIPE} with another output=..."
        )
    return Recipe.load(path / RECIPE, [f"output={_as_yaml(path)}", *args.overrides])


def _as_yaml(path: Path) -> str:
    import json

    return json.dumps(str(path), ensure_ascii=False)
