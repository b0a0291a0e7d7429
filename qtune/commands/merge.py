"""`qtune merge`: its options, and what it says in the end. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import QtuneError


def options(parser: argparse.ArgumentParser) -> None:
    """The options of `qtune merge`."""
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", metavar="DIR", help="folder to write, with --gguf a file; default: RUN/merged[.gguf]")
    parser.add_argument("--dtype", help="bfloat16 (default), float16 or float32")
    parser.add_argument("--gguf", metavar="TYPE", help="write a GGUF file, its matrices as f32, f16, bf16 or q8_0")
    parser.add_argument(
        "--keep", metavar="SCHEME", help="write a packed checkpoint, as large as the packed base: merged weights are "
        "packed as SCHEME (nf4, int8 ...); exact where the method merges into packed parts (qalora, its own scheme)",
    )  # fmt: skip
    parser.add_argument(
        "--codes", help="with --keep, how codes are chosen: nearest (default), feedback, by what was learned, gptq or "
        "magr-gptq, by the training data",
    )  # fmt: skip
    parser.add_argument(
        "--remainder", type=int, metavar="RANK", help="with --keep, also write what packing lost as a LoRA of this "
        "rank, a run of its own: DIR/remainder",
    )  # fmt: skip
    parser.add_argument(
        "--least-kept", type=float, metavar="SHARE", help="with --keep, the least share of what was learned that "
        "packing may leave, of all layers and with the remainder (0.5: half, and no more than one and a half)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-base",
        help="trained: the dequantized base (default); original: the weights before quantization",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that lies in DIR")
    parser.add_argument("--device", help="auto, cuda, mps or cpu; default: the recipe's")


def merge_command(args: argparse.Namespace, screen: Any, emit: Callable[[Any], None]) -> None:
    """Merge, and say what was verified and what to do with it."""
    from ..screen import size

    _check(args)
    out = Path(args.out) if args.out else Path(args.run) / ("merged.gguf" if args.gguf else "merged")
    report = (_gguf if args.gguf else _packed if args.keep else _plain)(args, out, screen)
    screen.title("Verified")
    for line in report.verification.lines():
        screen.line(line)
    if report.base_kl is not None:
        screen.line(
            f"base     KL(trained || this) {report.base_kl:.2e} nats: it stands on the original weights, "
            "not on the quantized ones that it was trained on"
        )
    plain = f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    packed = "llama.cpp, a recipe's `model`, or `qtune chat`" if args.gguf else "a recipe's `model`, or `qtune chat`"
    use = packed if args.gguf or args.keep else plain
    screen.line(f"wrote    {out} ({size(report.nbytes)}, {report.dtype}): {use}")
    emit(report.to_dict())


def _check(args: argparse.Namespace) -> None:
    """Raises QtuneError for options that do not go together."""
    first = "--gguf" if args.gguf else "--keep" if args.keep else ""
    given = {"--keep": args.keep and args.gguf, "--dtype": args.dtype, "--keep-base": args.keep_base}
    wrong = [name for name, value in given.items() if first and value]
    if not args.keep:
        given = {"--codes": args.codes, "--least-kept": args.least_kept, "--remainder": args.remainder}
        wrong += [name for name, value in given.items() if value is not None]
        first = first or "a merge without --keep"
    if wrong:
        raise QtuneError("Q801", f"{', '.join(wrong)} and {first} do not go together")


def _plain(args: argparse.Namespace, out: Path, screen: Any) -> Any:
    from ..export import check_merge, merge
    from ..runs import open_run, read_recipe

    dtype, kept = args.dtype or "bfloat16", args.keep_base or "trained"
    check_merge(read_recipe(Path(args.run)), out, dtype, kept, args.overwrite)
    run = open_run(Path(args.run), screen, device=args.device)
    return merge(run, out, dtype=dtype, keep_base=kept, screen=screen, overwrite=args.overwrite)


def _gguf(args: argparse.Namespace, out: Path, screen: Any) -> Any:
    from ..gguf_merge import check_gguf, merge_gguf
    from ..runs import open_run

    check_gguf(out, args.gguf, args.overwrite)
    run = open_run(Path(args.run), screen, device=args.device)
    return merge_gguf(run, out, args.gguf, screen=screen, overwrite=args.overwrite)


def _packed(args: argparse.Namespace, out: Path, screen: Any) -> Any:
    from ..packed_merge import LEAST, check_packed, merge_packed
    from ..runs import open_run, read_recipe

    codes, least = args.codes or "nearest", LEAST if args.least_kept is None else args.least_kept
    check_packed(read_recipe(Path(args.run)), args.keep, out, args.overwrite, codes, args.remainder)
    run = open_run(Path(args.run), screen, device=args.device)
    return merge_packed(
        run, out, args.keep, codes=codes, least=least, remainder=args.remainder, screen=screen,
        overwrite=args.overwrite,
    )  # fmt: skip
