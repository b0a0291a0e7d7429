"""`qtune mix`: a recipe whose layers take the schemes that err least at an average of bits. Nothing heavy is imported
before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QtuneError

if TYPE_CHECKING:
    from ..screen import Screen


def options(parser: argparse.ArgumentParser) -> None:
    """The options of `qtune mix`."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="YAML file; its model is measured")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe, such as model=FOLDER")
    add("--bits", type=float, metavar="N", required=True, help="bits a weight on average, scales included, such as 3.5")
    add("--among", metavar="SCHEMES", default="nf2,nf3,nf4,int8", help="what to choose from (nf2,nf3,nf4,int8)")
    add("--data", metavar="FILE", help="text on which the errors of layers' outputs are taken; default: of weights")
    add("--out", metavar="FILE", required=True, help="the recipe to write: the same with these schemes")


def mix(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Run the command. Raises QtuneError for its flags' faults before anything is read."""
    from ..mixing import mix
    from ..quant import scheme_from
    from ..recipe import Recipe
    from ..runs import anchored
    from ..safe_io import write_text
    from ..screen import size

    out = Path(args.out).expanduser()
    if out.exists():
        raise QtuneError("Q801", f"{out} is there already; choose another --out")
    among = [scheme_from(name.strip()) for name in args.among.split(",")]
    if len({str(scheme) for scheme in among}) < max(2, len(among)):
        raise QtuneError("Q102", f"--among is {args.among}; legal: two schemes or more, each once")
    recipe = Recipe.load(args.recipe, args.overrides, training=False)
    asked = recipe.with_({"calibrate.data": args.data})
    found = mix(asked, args.bits, among, screen)
    written = anchored(replace(recipe, scheme=found.scheme))
    write_text(out, written.to_yaml())
    for name, (bits, error) in found.alone.items():
        screen.line(f"all in {name}: {bits:.3f} bits a weight, squared error {error:.4g}")
    what = ", ".join(f"{name} in {count}" for name, count in found.layers.items())
    screen.line(f"mixed: {found.bits:.3f} bits a weight, squared error {found.error:.4g}, {size(found.nbytes)}: {what}")
    screen.line(f"wrote {out}; next: qtune plan {out}")
    emit({
        "recipe": str(out), "scheme": written.to_dict()["scheme"], "bits": found.bits,
        "bytes": found.nbytes, "error": found.error, "layers": found.layers,
        "alone": {name: {"bits": bits, "error": error} for name, (bits, error) in found.alone.items()},
    })  # fmt: skip
