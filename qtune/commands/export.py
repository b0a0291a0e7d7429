"""`qtune export`: its options, and what it says in the end. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QtuneError, one_of

if TYPE_CHECKING:
    from ..runs import Run
    from ..screen import Screen


FORMS = ("peft", "lora", "gguf")
WORST = 3  # layers that are told of, of those that lost most


def options(sub: argparse.ArgumentParser) -> None:
    """Declare the options of `qtune export`."""
    sub.add_argument("run", metavar="RUN", help="folder of a run")
    sub.add_argument("--out", metavar="PATH", required=True, help="folder to write; with --as gguf a file")
    sub.add_argument(
        "--as", dest="form", default="peft",
        help="peft (default): as PEFT has the method; lora: as a LoRA, whatever the method is, by the SVD of what it "
        "changed; gguf: that LoRA as a file for llama.cpp's --lora",
    )  # fmt: skip
    sub.add_argument("--rank", type=int, metavar="R", help="with --as lora and gguf: the rank in each layer")
    sub.add_argument(
        "--error", type=float, metavar="E",
        help="instead of --rank: the smallest rank by which a layer loses at most this share of its change; default: "
        "nothing where the change has factors, else 0.05",
    )  # fmt: skip
    sub.add_argument(
        "--keep-base",
        help="trained: for the packed base (default); original: what was learned, for the weights before quantization "
        "(default where no other tool has that base)",
    )


def export(args: argparse.Namespace, screen: Screen, emit: Callable[[Any], None]) -> None:
    """Export, and say where it goes on. Raises QtuneError."""
    from ..adapter_export import export_peft
    from ..export import KEEP_BASE
    from ..runs import open_run

    if args.form not in FORMS:
        raise one_of("--as", args.form, FORMS)
    if args.keep_base not in (None, *KEEP_BASE):
        raise one_of("--keep-base", args.keep_base, KEEP_BASE)
    if args.form == "peft" and (args.rank is not None or args.error is not None):
        raise QtuneError("Q103", "--rank and --error cut a LoRA; give --as lora or --as gguf with them")
    out = Path(args.out)
    if args.form == "gguf" and out.exists():
        raise QtuneError("Q801", f"{out} exists; choose another --out")
    run = open_run(Path(args.run), screen, device="cpu")
    if args.form != "peft":
        _as_lora(args, run, screen, emit)
        return
    kl = export_peft(run, out, screen, args.keep_base)
    screen.line(f"wrote {args.out}: peft.PeftModel.from_pretrained(base, {args.out!r})")
    if kl is None:
        screen.line(f"it goes on the base that it was trained on: {run.recipe.model} in {run.recipe.scheme}")
    else:
        screen.line(
            f"it goes on the original weights; there the quantization error is gone: KL(trained || exported) "
            f"{kl:.2e} nats a token"
        )
    emit({"out": args.out, "format": "peft", "kl": kl})


def _as_lora(args: argparse.Namespace, run: Run, screen: Screen, emit: Callable[[Any], None]) -> None:
    from dataclasses import asdict

    from ..adapter_export import export_gguf, export_lora

    how = export_gguf if args.form == "gguf" else export_lora
    left = how(run, Path(args.out), screen, args.keep_base, args.rank, args.error)
    ranks = sorted({cut.rank for cut in left.cuts})
    of = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    screen.line(f"a LoRA of {of} in {len(left.cuts)} layers; of what was learned it lost {left.lost:.1%}")
    for cut in sorted(left.cuts, key=lambda cut: -cut.lost)[: WORST * (left.lost > 0)]:
        screen.line(f"  {cut.site}: {cut.lost:.1%} at rank {cut.rank}")
    packed = f"that it was trained on: {run.recipe.model} in {run.recipe.scheme}"
    base = "of the original weights" if left.keep_base == "original" else packed
    screen.line(f"it goes on the base {base}: there KL(trained || exported) is {left.kl:.2e} nats a token")
    use = f"llama-cli -m BASE.gguf --lora {args.out}" if args.form == "gguf" else None
    screen.line(f"wrote {args.out}: {use or f'peft.PeftModel.from_pretrained(base, {args.out!r})'}")
    emit({"out": args.out, "format": args.form, **asdict(left)})
