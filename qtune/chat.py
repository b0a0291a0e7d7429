"""Talk to a run or to a model, word by word. The tokenizer's chat template is used where there is one; else the text
is simply continued."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import QtuneError
from .evaluate import generate
from .recipe import Recipe
from .runs import is_run, load_base, open_run
from .screen import Screen


def chat(
    source: str,
    screen: Screen,
    *,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    scheme: str,
    device: str,
    emit: Callable[[Any], None],
) -> None:
    """One answer to `prompt`, or a conversation over stdin until it ends (Ctrl-D, `/exit`); `/new` forgets."""
    if temperature < 0 or max_new_tokens < 1:
        raise QtuneError(
            f"--temperature must be 0 or more (is {temperature}), --max-new-tokens 1 or more (is {max_new_tokens})"
        )
    if is_run(source):
        run = open_run(Path(source), screen, device=device)
        model, tokenizer = run.model, run.tokenizer
    else:
        recipe = Recipe.load({"model": source, "scheme": scheme, "device": device}, training=False)
        model, tokenizer = load_base(recipe, screen)
    start = [{"role": "system", "content": system}] if system else []
    turns = list(start)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if prompt is not None:
        answer = generate(model, tokenizer, _ids(tokenizer, [*turns, {"role": "user", "content": prompt}]), **options)
        screen.line(answer)
        emit({"prompt": prompt, "answer": answer})
        return
    screen.line("/new starts over, /exit or Ctrl-D ends", "dim")
    while (text := _ask()) is not None:
        if text == "/new":
            turns = list(start)
            continue
        turns.append({"role": "user", "content": text})
        answer = generate(model, tokenizer, _ids(tokenizer, turns), stream=True, **options)
        turns.append({"role": "assistant", "content": answer})
        emit({"prompt": text, "answer": answer})


def _ask() -> str | None:
    """The next line of the user that is not empty, or None at the end."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if text == "/exit":
            return None
        if text:
            return text


def _ids(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template:
        return list(
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
        )
    return list(tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"])
