"""What is evaluated, by name: the base, adapters, mixtures, and with a router each prompt by the adapter that it
chooses. A router's examples are measured adapter by adapter, so that each is computed as where it is alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ..adapters import enable_adapters
from ..together import told

if TYPE_CHECKING:
    from ..adapters.many import Adapters
    from ..routing import Router

ROUTE = "route"  # the name of what a router makes of several adapters
Prompts = Sequence[Sequence[int]]
T = TypeVar("T")


@dataclass
class Subject:
    """One thing. switch: makes the model be it."""

    name: str
    switch: Callable[[], Any]

    def turns(self, prompts: Prompts) -> Iterator[list[int]]:
        """The model becomes this: which of the prompts, by number, are its to be measured on. For a router, one adapter
        after another."""
        self.switch()
        yield list(range(len(prompts)))

    def chosen(self, prompts: Prompts) -> list[str]:
        """The adapter of each prompt, if prompts choose; else none."""
        return []

    def marked(self, rows: list[dict[str, Any]], prompts: Prompts) -> list[dict[str, Any]]:
        """The rows of prompts, with the adapter of each, if prompts choose."""
        names = self.chosen(prompts)
        return [row | {"adapter": name} for row, name in zip(rows, names, strict=True)] if names else rows


@dataclass
class Routed(Subject):
    """What a router makes of several adapters. become: makes the model be one of them."""

    router: Router
    become: Callable[[str], Any]
    known: dict[tuple[int, ...], str] = field(default_factory=dict)

    def turns(self, prompts: Prompts) -> Iterator[list[int]]:
        names = self.chosen(prompts)
        for name in dict.fromkeys(names):
            self.become(name)
            yield [i for i, own in enumerate(names) if own == name]

    def chosen(self, prompts: Prompts) -> list[str]:
        given = [tuple(prompt) for prompt in prompts]
        new = [prompt for prompt in dict.fromkeys(given) if prompt not in self.known]
        self.known |= zip(new, self.router.choose(new), strict=True)
        return [self.known[prompt] for prompt in given]


def subjects(
    model: Any,
    adapters: Adapters | None,
    uses: Sequence[Mapping[str, float]],
    *,
    base: bool,
    is_run: bool,
    parts: int | None,
    router: Router | None,
) -> list[Subject]:
    """All that is asked for, in order. uses: mixtures of the adapters; base: it first; parts: of `Adapters.select`."""
    if adapters is None:
        named = [("base", False)] * base + [("adapter", True)] if is_run else [("model", True)]
        return [Subject(name, partial(enable_adapters, model, enabled)) for name, enabled in named]
    use = adapters.use if parts is None else partial(adapters.select, count=parts)
    found = [Subject("base", partial(adapters.use, None))] * base
    found += [Subject(told(weights), partial(use, weights)) for weights in uses]
    if router is not None:
        found.append(Routed(ROUTE, partial(adapters.use, None), router, use))
    return found


def shares(names: Sequence[str], among: Sequence[str]) -> dict[str, int]:
    """How many prompts chose each adapter; those that none chose with 0."""
    counted = Counter(names)
    return {name: counted[name] for name in among}


def in_order(turns: Iterable[tuple[list[int], Sequence[T]]]) -> list[T]:
    """The values of each turn's numbers, as one list by number."""
    found = {i: value for rows, values in turns for i, value in zip(rows, values, strict=True)}
    return [found[i] for i in range(len(found))]
