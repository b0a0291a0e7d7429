"""Talk to a run or to a model, word by word. The run's own chat template (data.template) or else the tokenizer's is
used where there is one; without any the text is simply continued."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from .data import read_template
from .errors import QtuneError
from .evaluate import generate
from .model.source import open_source
from .recipe import Recipe
from .runs import is_run, load_base, open_run
from .screen import Screen

HELP = "/new starts over, /exit or Ctrl-D ends"


def chat(
    source: str,
    screen: Screen,
    *,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    scheme: str | None,
    device: str | None,
    emit: Callable[[Any], None],
) -> None:
    """One answer to `prompt`, or a conversation over stdin until it ends (Ctrl-D, `/exit`); `/new` forgets. `emit`
    gets the pair of prompt and answer, of a conversation the list of them when it ends."""
    if temperature < 0 or max_new_tokens < 1:
        raise QtuneError(
            "Q102",
            f"--temperature must be 0 or more (is {temperature}), --max-new-tokens 1 or more (is {max_new_tokens})",
        )
    template = None
    if is_run(source):
        if scheme is not None:
            raise QtuneError("Q103", f"--scheme {scheme}: {source} is a run, whose base is stored as its recipe says")
        run = open_run(Path(source), screen, device=device)
        model, tokenizer, named = run.model, run.tokenizer, run.recipe.data.template
        template = read_template(named) if named else None
    else:
        tree = {"model": source, "device": device or "auto"} | ({} if scheme is None else {"scheme": scheme})
        recipe = Recipe.load(tree, training=False)
        stored = scheme is None and open_source(source).kind == "qtune"
        model, tokenizer = load_base(recipe, screen, stored=stored)
    start = [{"role": "system", "content": system}] if system else []
    turns = list(start)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if prompt is not None:
        answer = generate(
            model, tokenizer, _ids(tokenizer, template, [*turns, {"role": "user", "content": prompt}]), **options
        )
        screen.line(answer)
        emit({"prompt": prompt, "answer": answer})
        return
    screen.line(HELP, "dim")
    told = []
    while (text := _ask(screen)) is not None:
        if text == "/new":
            turns = list(start)
            continue
        if text.startswith("/") and text[1:].isalpha():
            screen.line(HELP, "dim")
            continue
        turns.append({"role": "user", "content": text})
        ids = _ids(tokenizer, template, turns)
        answer = generate(model, tokenizer, ids, stream=screen.console.file, **options)
        turns.append({"role": "assistant", "content": answer})
        told.append({"prompt": text, "answer": answer})
    emit(told)


def _ask(screen: Screen) -> str | None:
    """The next line of the user that is not empty, or None at the end."""
    while True:
        prompt = "> " if sys.stdin.isatty() else ""
        if screen.console.stderr:  # stdout is for the JSON alone, and input() writes there
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        try:
            text = input(prompt).strip()
        except EOFError:
            return None
        if text == "/exit":
            return None
        if text:
            return text


def _ids(tokenizer: Any, template: str | None, turns: list[dict[str, str]]) -> list[int]:
    if template or tokenizer.chat_template:
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        try:
            return list(tokenizer.apply_chat_template(turns, chat_template=template, **options)["input_ids"])
        except jinja2.TemplateError as error:
            raise QtuneError("Q212", f"the chat template refuses the conversation: {error}") from error
    return list(tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"])
