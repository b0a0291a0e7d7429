"""Talk to a run or to a model, word by word. The run's own chat template (data.template) or else the tokenizer's is
used where there is one; without any the text is simply continued."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from .adapters.many import Adapters
from .data import read_template
from .errors import QtuneError
from .evaluate import generate
from .model.source import open_source
from .recipe import Recipe
from .routing import Router, load_router
from .runs import is_run, load_base, open_run
from .screen import Screen
from .together import folders_of, mixture_of, open_together, told

HELP = "/new starts over, /exit or Ctrl-D ends"
HELP_MANY = f"/use NAME or /use A=0.7 B=0.3 changes the adapter, /off takes none, /adapters lists them, {HELP}"
HELP_ROUTE = f"/route lets the next prompt choose the adapter again, {HELP_MANY}"


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
    adapters: Sequence[str] | None = None,
    use: Sequence[str] | None = None,
    route: bool = False,
    emit: Callable[[Any], None],
) -> None:
    """One answer to `prompt`, or a conversation over stdin until it ends (Ctrl-D, `/exit`); `/new` forgets. `emit`
    gets the pair of prompt and answer, of a conversation the list of them when it ends.

    adapters, use, route: as the options --adapter, --use and --route. With several adapters `/use`, `/off` and
    `/adapters` are there, with route `/route`.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise QtuneError(
            "Q102",
            f"--temperature must be 0 or more (is {temperature}), --max-new-tokens 1 or more (is {max_new_tokens})",
        )
    template, loaded = None, None
    folders = folders_of(source, adapters)
    first = _first(list(folders), use, route)
    if is_run(source):
        if scheme is not None:
            raise QtuneError("Q103", f"--scheme {scheme}: {source} is a run, whose base is stored as its recipe says")
        if folders:
            run, many = open_together(folders, screen, device=device)
            loaded = _Loaded(many, screen, first, load_router(many, screen=screen) if route else None)
        else:
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
        ids = _ids(tokenizer, template, [*turns, {"role": "user", "content": prompt}])
        if loaded:
            loaded.hear(ids)
        answer = generate(model, tokenizer, ids, **options)
        screen.line(answer)
        emit({"prompt": prompt, "answer": answer} | (loaded.said() if loaded else {}))
        return
    help_text = (HELP_ROUTE if route else HELP_MANY) if loaded else HELP
    screen.line(help_text, "dim")
    said = []
    while (text := _ask(screen)) is not None:
        if text == "/new":
            turns = list(start)
            if loaded:
                loaded.begin()
            continue
        if loaded and loaded.obeys(text):
            continue
        if text.startswith("/") and text[1:].isalpha():
            screen.line(help_text, "dim")
            continue
        turns.append({"role": "user", "content": text})
        ids = _ids(tokenizer, template, turns)
        if loaded:
            loaded.hear(ids)
        answer = generate(model, tokenizer, ids, stream=screen.console.file, **options)
        turns.append({"role": "assistant", "content": answer})
        said.append({"prompt": text, "answer": answer} | (loaded.said() if loaded else {}))
    emit(said)


def _first(names: Sequence[str], use: Sequence[str] | None, route: bool) -> dict[str, float]:
    """The adapters that begin, with weights. Raises QtuneError for options that do not go together."""
    if use and (not names or len(use) > 1):
        given = "once, with all that answer together" if names else "with --adapter NAME=RUN"
        raise QtuneError("Q103", f"--use {' --use '.join(use)}: legal: {given}")
    if route and (use or not names):
        given = "without --use, which chooses as well" if use else "with --adapter NAME=RUN, to choose among several"
        raise QtuneError("Q103", f"--route: legal: {given}")
    return mixture_of(use[0], names) if use else dict.fromkeys(names[:1], 1.0)


class _Loaded:
    """The adapters of a conversation, and which of them answer. With a router the next prompt chooses while `open`;
    `by_hand`: the user chose, and it stays so."""

    def __init__(self, adapters: Adapters, screen: Screen, first: dict[str, float], router: Router | None) -> None:
        self.adapters, self.screen, self.router = adapters, screen, router
        self.open, self.by_hand = True, False
        self.use(first)

    def use(self, weights: dict[str, float]) -> None:
        """From the next answer on."""
        self.adapters.use(weights)
        self.now = weights

    def begin(self) -> None:
        """A new conversation begins."""
        self.open = not self.by_hand

    def hear(self, ids: Sequence[int]) -> None:
        """Before a prompt, with all that stands before it, is answered."""
        if self.router is not None and self.open:
            (name,) = self.router.choose([ids])
            self.use({name: 1.0})
            self.screen.line(f"route: {name}", "dim")
        self.open = False

    def said(self) -> dict[str, Any]:
        """For a program."""
        return {"adapters": self.now}

    def obeys(self, text: str) -> bool:
        """Is it a command of these? Then it is done; what is wrong with it is told, and nothing changes."""
        word, _, rest = text.partition(" ")
        words = ("/use", "/off", "/adapters", *(["/route"] if self.router else []))
        if word not in words or (rest and word != "/use"):
            return False
        if word == "/route":
            self.open, self.by_hand = True, False
            self.screen.line("the next prompt chooses the adapter", "dim")
            return True
        try:
            if word != "/adapters":
                self.use(mixture_of(rest, self.adapters.names) if word == "/use" else {})
                self.open, self.by_hand = False, True
                self.screen.line(f"in use: {told(self.now)}", "dim")
                return True
        except QtuneError as error:
            self.screen.line(str(error), "yellow")
            return True
        for name, spec in self.adapters.specs.items():
            weight = f"weight {self.now[name]:g}" if self.now.get(name) else "not in use"
            self.screen.line(f"{name:16} {spec.method:12} {weight}", "dim")
        return True


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
