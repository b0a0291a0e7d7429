"""`qtune train --dry-run`: everything that can stop a run, looked at before it starts. Nothing stays behind.

What does not hang on each other is looked at even where something is at fault, so that all faults come at once. In the
end the model is loaded as for training, and its largest micro-batch goes through two real steps, the second of which
gives the time of the whole run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .adapters import adapted_sites
from .batches import Capacity, order_of
from .data import Example, load_sets, show_example
from .data.load import Sets
from .errors import QtuneError
from .headroom import peak_memory, told_out_of_memory
from .loop import Trainer
from .recipe import Recipe
from .report.record import Recorder
from .report.trackers import check_trackers
from .runs import check_files, pick_device, refuse_ranks, tokenizer_of
from .safe_io import alone, claimed
from .screen import Screen, count, duration, size
from .sections import MemoryKeys
from .trainer import (
    carrying_adapter,
    check_disk,
    check_free,
    check_start,
    checkpoints_of,
    language_of,
    tell_rows,
    tell_unread,
)
from .units import parse_size
from .vocabulary import Token

FORWARD = 1 / 3  # of a training step: a backward pass computes twice as much as a forward pass
T = TypeVar("T")


class _Undone(Exception):
    """Leaves `claimed` so that what it made goes again."""


@dataclass
class _Checks:
    """What was looked at: (name, the code of what is at fault, in words); told at once."""

    screen: Screen
    rows: list[tuple[str, str | None, str]] = field(default_factory=list)

    def look(self, name: str, check: Callable[[], tuple[T, str]]) -> T | None:
        """What a check returns beside its words; None, noted, where it finds a fault."""
        try:
            value, words = check()
        except QtuneError as error:
            self._tell(name, error.code, str(error))
            return None
        self._tell(name, None, words)
        return value

    def _tell(self, name: str, code: str | None, words: str) -> None:
        self.rows.append((name, code, words))
        mark, style = ("✓", "green") if code is None else ("✗", "bold red")
        self.screen.beside(f"{mark} {name:8}", words, style)

    def done(self) -> None:
        """Raises QtuneError where something was at fault."""
        faults = [f"{name}: {words}" for name, code, words in self.rows if code]
        codes = [code for _, code, _ in self.rows if code]
        if faults:
            code = codes[0] if len(codes) == 1 else "Q111"
            raise QtuneError(
                code,
                f"{len(faults)} of {len(self.rows)} checks found a fault, and nothing was changed:"
                + "".join(f"\n  {fault}" for fault in faults),
            )


def dry_run(
    recipe: Recipe, *, screen: Screen, overwrite: bool = False, start_from: Path | None = None
) -> dict[str, Any]:
    """Look at all that training `recipe` needs. overwrite, start_from: as in `trainer.train`. Returns plain values:
    the checks, and seconds, steps and peak bytes. Raises one QtuneError with everything that is at fault."""
    refuse_ranks()
    assert recipe.output is not None and recipe.data.train is not None, "the recipe is one to train"
    started, checks = time.monotonic(), _Checks(screen)
    folder = Path(recipe.output).expanduser()
    checks.look("recipe", lambda: (True, _recipe_words(recipe)))
    device = checks.look("device", lambda: ((place := pick_device(recipe.device)), str(place)))
    if device is not None and recipe.memory != MemoryKeys():
        checks.look("memory", lambda: (True, "; ".join(check_files(recipe, device.type)) or "as the recipe says"))
    checks.look("output", lambda: _output(recipe, folder, overwrite, start_from))
    if recipe.train.trackers:
        checks.look("trackers", lambda: _trackers(recipe))
    words = checks.look("model", lambda: _tokenizer(recipe))
    sets = checks.look("data", lambda: _data(recipe, words[0], screen)) if words is not None else None
    if sets is not None and words is not None:
        tokenizer, tokens = words
        tell_rows(recipe, sets.train, sets.report.format, tokenizer, screen)
        screen.line("first example, what is trained marked:", "dim")
        screen.line(show_example(sets.train[0], tokenizer, colour=screen.console.is_terminal))
        tell_unread(recipe, tokenizer, tokens, sets.train, screen)
    fits = None
    if sets is not None and device is not None:
        fits = checks.look("plan", lambda: _plan(recipe, device, sets, screen))
    found: dict[str, Any] = {}
    if sets is not None and words is not None and fits:
        found = _step(checks, recipe, _standing(folder), words, sets, start_from, screen)
    checks.done()
    told = [{"name": name, "words": words} for name, _, words in checks.rows]
    return {"checks": told, "took": time.monotonic() - started, **found}


def _recipe_words(recipe: Recipe) -> str:
    options = recipe.adapter.options
    rank = f" of rank {options['rank']}" if "rank" in options else ""
    keys = recipe.train
    length = f"{keys.steps} steps" if keys.steps is not None else f"{keys.epochs:g} epoch{'s' * (keys.epochs != 1)}"
    return f"{recipe.adapter.method}{rank} on {recipe.scheme.name}, {length}, lr {keys.lr:g}"


def _output(recipe: Recipe, folder: Path, overwrite: bool, start_from: Path | None) -> tuple[bool, str]:
    if start_from is not None:
        check_start(recipe, start_from, folder)
    if not overwrite:
        check_free(folder)
    with suppress(_Undone), claimed(folder), alone(folder):
        raise _Undone
    replaced = ", and replaces the run in it" if overwrite and folder.exists() else ""
    return True, f"{folder} can be written to{replaced}"


def _trackers(recipe: Recipe) -> tuple[bool, str]:
    check_trackers(recipe.train.trackers)
    return True, ", ".join(recipe.train.trackers)


def _standing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _tokenizer(recipe: Recipe) -> tuple[tuple[Any, tuple[Token, ...]], str]:
    tokenizer, tokens = tokenizer_of(recipe)
    template = "its own chat template" if tokenizer.chat_template else "no chat template"
    if recipe.data.template:
        template = "the chat template of data.template"
    rows = f", {len(tokens)} with rows of their own" if tokens else ""
    return (tokenizer, tokens), f"{recipe.model}: {len(tokenizer):,} tokens in the vocabulary{rows}, {template}"


def _data(recipe: Recipe, tokenizer: Any, screen: Screen) -> tuple[Sets, str]:
    sets = load_sets(recipe.data, tokenizer, seed=recipe.train.seed, screen=screen)
    Capacity.of(recipe.train).check([*sets.train, *sets.held_out])
    reports = [str(report) for report in (sets.report, sets.held_out_report) if report is not None]
    return sets, "\n".join(reports)


def _plan(recipe: Recipe, here: torch.device, sets: Sets, screen: Screen) -> tuple[bool, str]:
    """Does it fit? What cannot be planned is no fault, unless there is a budget that it should be held to."""
    from .planner.devices import find_device
    from .planner.fit import peak, refuse_beyond
    from .planner.measure import free_memory
    from .planner.request import lengths_of

    if here.type not in ("cpu", "cuda") and recipe.budget is None:
        return True, f"none: what training takes on {here.type} cannot be planned"
    try:
        device = find_device(str(here))
        budget = parse_size(recipe.budget) if recipe.budget else device.memory
        shape = lengths_of([*sets.train, *sets.held_out])
        plan = refuse_beyond(recipe, budget, device, shape=shape, screen=screen)
    except QtuneError as error:
        if recipe.budget is None and error.code == "Q506":
            return True, f"none: {error}"
        raise
    free = free_memory(device)
    if peak(plan) > free:
        raise QtuneError(
            "Q502",
            f"the plan's peak is {size(peak(plan))}, and of {size(device.memory)} of {device.name} {size(free)} are "
            "free now: end what else uses it",
        )
    return True, f"{size(peak(plan))} at the peak, of {size(budget)}; {size(free)} are free on {device.name} now"


# ---- a real step


def _step(
    checks: _Checks, recipe: Recipe, there: Path, words: tuple[Any, tuple[Token, ...]], sets: Sets,
    start_from: Path | None, screen: Screen,
) -> dict[str, Any]:  # fmt: skip
    """Load as training does and try the largest micro-batch. there: a folder for files without a name. words: the
    tokenizer, and the tokens with rows of their own."""
    if recipe.memory.folder is None:
        recipe = replace(recipe, memory=replace(recipe.memory, folder=str(there)))
    trainer = checks.look("load", lambda: _loaded(recipe, there, words, sets, start_from, screen))
    if trainer is None:
        return {}
    checks.look("disk", lambda: _room(trainer, recipe))

    def tried() -> tuple[tuple[int, float], str]:
        with told_out_of_memory(recipe, [*sets.train, *sets.held_out], screen, lambda: "nothing was trained"):
            places, seconds = trainer.dry_step()
        peak = peak_memory(trainer.device)
        words = f"forward, backward and update of the largest micro-batch ({places:,} tokens): {duration(seconds)}"
        return (places, seconds), words + (f"; {size(peak)} at the peak" if peak else "")

    made = checks.look("step", tried)
    if made is None:
        return {}
    seconds = run_seconds(recipe, trainer.steps, *made, sets.train, sets.held_out)
    keys = recipe.train
    screen.line(
        f"the whole run: {trainer.steps:,} step{'s' * (trainer.steps != 1)} of {keys.accumulate} x {trainer.capacity}"
        f"{' and its evaluations' * bool(sets.held_out)}, about {duration(seconds)}",
        "bold",
    )
    return {"steps": trainer.steps, "seconds": seconds, "peak": peak_memory(trainer.device)}


def _loaded(
    recipe: Recipe, there: Path, words: tuple[Any, tuple[Token, ...]], sets: Sets, start_from: Path | None,
    screen: Screen,
) -> tuple[Trainer, str]:  # fmt: skip
    """Everything up to the first step."""
    tick = time.monotonic()
    model = carrying_adapter(recipe, start_from, None, there, *words, sets.train, screen)
    language = language_of(recipe, model, [*sets.train, *sets.held_out], screen)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer = Trainer(
        language, sets.train, sets.held_out, recipe.train, folder=there, screen=Screen(quiet=True),
        checkpoints=checkpoints_of(recipe, there, model, {}), record=Recorder(recipe, there, screen),
        memory=recipe.memory, files=there,
    )  # fmt: skip
    sites = len(adapted_sites(model))
    return trainer, f"{count(trained)} trained parameters on {sites} layers, in {duration(time.monotonic() - tick)}"


def _room(trainer: Trainer, recipe: Recipe) -> tuple[bool, str]:
    needed, free = check_disk(trainer, recipe, trainer.steps)
    return True, f"{size(needed)} for the adapter and the checkpoints that are kept, {size(free)} are free"


def run_seconds(
    recipe: Recipe, steps: int, places: int, seconds: float, examples: Sequence[Example], held_out: Sequence[Example]
) -> float:
    """Seconds of a run, by what a micro-batch of so many `places` took: time goes by places, padding counted."""
    keys, one = recipe.train, seconds / places
    total, micro = _places(examples, recipe)
    training = steps * keys.accumulate * total / micro * one
    if not held_out:
        return training
    times = keys.eval_at_start + 1 + ((steps - 1) // keys.eval_every if keys.eval_every else 0)
    return training + times * _places(held_out, recipe)[0] * one * FORWARD


def _places(examples: Sequence[Example], recipe: Recipe) -> tuple[int, int]:
    """Places of an epoch, and its micro-batches."""
    capacity, lengths = Capacity.of(recipe.train), [len(example.input_ids) for example in examples]
    taken = list(capacity.fill(order_of(len(lengths), recipe.train.seed, 0), lengths))
    if capacity.packed:
        return sum(lengths), len(taken)
    return sum(len(one) * max(lengths[i] for i in one) for one in taken), len(taken)
