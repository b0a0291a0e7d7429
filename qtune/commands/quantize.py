"""`qtune quantize`: its options, and what it says. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..screen import Screen


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune quantize`."""
    sub.add_argument("model", metavar="MODEL", help="checkpoint folder, .gguf file or hub id")
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="OPTION=VALUE",
        help="scheme options, such as block=128; calibrate.samples=N, calibrate.length=N",
    )
    sub.add_argument("--scheme", default="nf4", help="one of `qtune schemes`; default nf4")
    sub.add_argument("--codes", default="nearest", help="how codes are chosen: nearest (default), gptq, magr-gptq")
    sub.add_argument("--data", metavar="FILE", help="text that gptq and magr-gptq choose by, as for training")
    sub.add_argument("--embeddings", metavar="SCHEME", help="also pack embeddings and head, with this scheme")
    sub.add_argument(
        "--dtype", default="bfloat16", help="of what is not packed: bfloat16 (default), float16 or float32"
    )
    sub.add_argument("--out", metavar="DIR", required=True, help="folder to write")


def quantize_command(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run `qtune quantize`. emit: takes the value for a program."""
    from ..errors import QtuneError, one_of
    from ..quant.calibrate import CODES
    from ..recipe import Recipe
    from ..runs import quantize
    from ..screen import size
    from ..yaml_text import dump_yaml

    if args.codes not in CODES:
        raise one_of("--codes", args.codes, CODES)
    if args.codes != "nearest" and args.data is None:
        raise QtuneError("Q103", f"--codes {args.codes} chooses from text, and there is none; give --data FILE")
    embeddings = [f"scheme.embeddings={args.embeddings}"] if args.embeddings else []
    options = [*embeddings, *(o if o.startswith("calibrate.") else f"scheme.{o}" for o in args.overrides)]
    tree = {"model": args.model, "scheme": args.scheme, "dtype": args.dtype}
    recipe = Recipe.load(tree | {"calibrate": {"codes": args.codes, "data": args.data}}, options, training=False)
    nbytes = quantize(recipe, Path(args.out), screen=screen)
    screen.line(f"wrote {args.out}: {recipe.scheme}, {size(nbytes)}; use it in a recipe as")
    screen.line(
        dump_yaml({key: recipe.with_({"model": args.out}).to_dict()[key] for key in ("model", "scheme")}).rstrip()
    )
    emit({"out": args.out, "scheme": recipe.scheme.to_dict(), "bytes": nbytes})
