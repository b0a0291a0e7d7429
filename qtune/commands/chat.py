"""`qtune chat`: its options. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ..together import options as adapter_options


def options(parser: argparse.ArgumentParser) -> None:
    """The options of `qtune chat`."""
    add = parser.add_argument
    add("model", metavar="RUN|MODEL", help="folder of a run, a checkpoint folder, a .gguf file or a hub id")
    add("--prompt", help="answer this and stop, instead of a conversation")
    add("--system", help="system message")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    adapter_options(
        parser,
        "with --adapter: what answers, such as law or law=0.7,code=0.3; default: RUN's own adapter",
        "with --adapter: the first prompt of a conversation chooses the adapter whose training data is most like it",
    )
    add("--scheme", help="how a MODEL is quantized while loading; default: as it is packed, or nf4")
    add("--device", help="auto, cuda, mps or cpu; default: the recipe's, for a MODEL auto")


def chat(args: argparse.Namespace, screen: Any, emit: Callable[[Any], None]) -> None:
    """Run the command. emit: takes the value for a program."""
    from ..chat import chat

    chat(
        args.model, screen, prompt=args.prompt, system=args.system, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, scheme=args.scheme, device=args.device, adapters=args.adapter, use=args.use,
        route=args.route, emit=emit,
    )  # fmt: skip
