"""Training: steps, evaluation, metrics, saves. The Trainer takes built objects and knows no method and no scheme.

A run can end in four ways, and in each the folder is whole: done, Ctrl-C (saved after the step at hand), a loss that
is not finite (the last saved adapter stays), an error. Left out: exact resume, packing.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .adapters import adapted_sites
from .adapters.files import FIRST, INFO, TENSORS, load_adapter, read_adapter_json, save_adapter, save_first
from .data import Capacity, Example, load_data, padding, show_example, steps_of, stream
from .errors import QtuneError
from .evaluate import EvalResult, evaluate
from .headroom import dry_step, largest, peak_memory, told_out_of_memory, wants_dry_step, within_budget
from .loss import loss_options
from .memory.layers import device_of
from .model import load_tokenizer
from .model.names import KEPT
from .optim import lr_factor, optimizer_of
from .quant import storage_from
from .recipe import Recipe
from .runs import (
    METRICS,
    RECIPE,
    anchored,
    calibration_text,
    folder_of,
    kept_in,
    load_base,
    pick_device,
    refuse_ranks,
    save_kept,
    start_base,
)
from .safe_io import claim_folder, write_text
from .screen import Screen, deferred_interrupt, size
from .sections import MemoryKeys, TrainKeys
from .step import LanguageModel, NonFinite, TrainStep

SAVES = 10  # saves of the adapter in a run, where the recipe does not say


class _Stopped(Exception):
    """Ctrl-C came during an evaluation on the way."""


@dataclass
class TrainResult:
    """steps: done, of which `skipped` changed nothing. before, after: evaluations at step 0 and at the end.
    interrupted: by Ctrl-C, saved."""

    folder: Path
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    interrupted: bool = False
    losses: list[float] = field(default_factory=list)
    before: EvalResult | None = None
    after: EvalResult | None = None


class Trainer:
    """Runs the steps of one run. `save(step)` writes the adapter; `log(row)` writes a metrics line."""

    def __init__(
        self,
        model: LanguageModel,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        keys: TrainKeys,
        *,
        folder: Path,
        screen: Screen,
        save: Callable[[int], None],
        memory: MemoryKeys,
        files: Path,
    ) -> None:
        self.model, self.examples, self.held_out, self.keys = model, examples, held_out, keys
        self.screen, self.save, self.folder = screen, save, folder
        self.memory, self.files = memory, files
        self.capacity = Capacity.of(keys)
        self.steps = steps_of(keys, [len(example.input_ids) for example in examples])
        self.device = device_of(model.model)
        self.saved: int | None = None
        self.in_row = 0  # steps that were skipped, up to now
        self.train_step = self._step()

    def _step(self) -> TrainStep:
        return TrainStep(self.model, optimizer_of(self.model.model, self.keys, self.memory), clip=self.keys.clip)

    def run(self) -> TrainResult:
        """All steps, with evaluation before (where asked), on the way and after. Raises NonFinite naming the last
        good save."""
        result = TrainResult(self.folder)
        if wants_dry_step(self.keys, self.device):  # first of all: what has no room is told before an evaluation
            self._dry_step()
        if self.held_out and self.keys.eval_at_start:
            result.before = self._evaluate(0, "before training")
        with deferred_interrupt() as interrupted:
            with self._training():
                self._loop(result, interrupted)
            self._save(result.steps)
            result.interrupted = interrupted()
        if self.held_out and not result.interrupted:
            try:
                result.after = self._evaluate(result.steps, "after training")
            except KeyboardInterrupt:  # all is saved: the run ends as after any other Ctrl-C
                result.interrupted = True
        return result

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The model as it trains, and afterwards as it evaluates."""
        self.model.arrange(self.keys, self.memory, self.files)
        self.model.model.train()
        try:
            yield
        finally:
            self.model.restore()
            self.model.model.eval()

    def _dry_step(self) -> None:
        """The largest micro-batches of the data once, and nothing of it left but the allocator's room."""
        tick, batches = time.perf_counter(), largest(self.examples, self.capacity)
        with self._training():
            dry_step(self.train_step, batches, self.keys.accumulate)
        del self.train_step  # its optimizer's states go before new ones are made
        self.train_step = self._step()
        sizes = " and ".join("{} x {}".format(*batch.input_ids.shape) for batch in batches)
        self.screen.line(f"dry step  {sizes} tokens, the largest of the data: {time.perf_counter() - tick:.1f} s")

    def _loop(self, result: TrainResult, interrupted: Callable[[], bool]) -> None:
        data = stream(self.examples, self.capacity, self.keys.seed)
        save_every = self.keys.save_every or max(1, math.ceil(self.steps / SAVES))
        started = time.perf_counter()
        with self.screen.bar("training", self.steps) as advance:
            for step in range(1, self.steps + 1):
                tick = time.perf_counter()
                batches = [batch.to(self.device) for batch in islice(data, self.keys.accumulate)]
                factor = lr_factor(step - 1, self.steps, self.keys.schedule, self.keys.warmup)
                try:
                    done = self.train_step(batches, step, self.steps, factor)
                except NonFinite as error:
                    self._skip(step, factor, error, result)
                else:
                    self.in_row = 0
                    result.tokens += done.tokens
                    result.losses.append(done.loss)
                    result.seconds = time.perf_counter() - started
                    if step % self.keys.log_every == 0 or step == self.steps:
                        speed = done.tokens / (time.perf_counter() - tick)
                        self._log(step, {
                            "loss": done.loss, "lr": self.keys.lr * factor, "grad_norm": done.grad_norm,
                            "tokens": result.tokens, "trained": done.trained, "tokens_per_s": speed,
                            "seconds": result.seconds,
                        })  # fmt: skip
                result.steps, result.seconds = step, time.perf_counter() - started
                recent = result.losses[-20:]
                mean = sum(recent) / max(1, len(recent))
                advance(1, f"loss {mean:.3f}  {result.tokens / result.seconds:.0f} tok/s")
                if interrupted():
                    return
                if step < self.steps and step % save_every == 0 and not self.in_row:
                    self._save(step)
                if step < self.steps and self.keys.eval_every and step % self.keys.eval_every == 0:
                    with suppress(_Stopped):
                        self._evaluate(step, f"step {step}", interrupted)
                if interrupted():
                    return

    def _skip(self, step: int, factor: float, error: NonFinite, result: TrainResult) -> None:
        """Count a step that changed nothing, as its loss or gradient is not finite. It stays a step of the schedule and
        of the data. Raises NonFinite where there were train.max_skipped in a row before it."""
        self.in_row += 1
        if self.in_row > self.keys.max_skipped:
            before = f", and nothing better in {self.in_row - 1} before it" if self.in_row > 1 else ""
            raise NonFinite(
                f"{error}{before}; {self.last_save()}. A lower train.lr or a longer train.warmup helps most often"
            ) from error
        if not result.skipped:
            self.screen.line(f"note: {error}; the step is skipped, and so are others, as {METRICS} tells", "yellow")
        result.skipped += 1
        self._log(step, {"skipped": result.skipped, "why": str(error), "lr": self.keys.lr * factor})

    def _evaluate(self, step: int, label: str, interrupted: Callable[[], bool] = lambda: False) -> EvalResult:
        with self.screen.bar("evaluating", len(self.held_out)) as advance:

            def tick(n: int) -> None:
                advance(n)
                if interrupted():
                    raise _Stopped

            result = evaluate(self.model, self.held_out, capacity=self.capacity, advance=tick)
        self._log(step, result.to_dict())
        self.screen.line(f"eval  {label}: {result}")
        return result

    def _save(self, step: int) -> None:
        self.save(step)
        self.saved = step

    def last_save(self) -> str:
        """What of the run is on disk, in words."""
        if self.saved is None:
            return "nothing was saved yet"
        return f"{self.folder / TENSORS} holds the adapter of step {self.saved}"

    def _log(self, step: int, row: dict[str, Any]) -> None:
        path = self.folder / METRICS
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
        except OSError as error:
            raise QtuneError(f"cannot write {path}: {error.strerror or error}; {self.last_save()}") from error


def train(
    recipe: Recipe, *, screen: Screen | None = None, overwrite: bool = False, start_from: Path | None = None
) -> TrainResult:
    """Run a recipe from nothing to a run folder.

    overwrite: replace a run that lies in the output folder. start_from: a run whose adapter gives the first values
    (its optimizer state is not kept). Raises QtuneError; what was saved stays.
    """
    refuse_ranks()
    screen = screen or Screen(quiet=True)
    if recipe.output is None or recipe.data.train is None:
        raise QtuneError("a recipe to train needs `output` and `data.train`")
    folder = Path(recipe.output).expanduser()
    if start_from is not None:
        _check_start(recipe, start_from, folder)
    _claim(folder, overwrite)
    if recipe.dtype == "float16":
        screen.line(
            "note: float16 trains without loss scaling, so that small gradients vanish: "
            "dtype bfloat16 or float32 is safer",
            "yellow",
        )
    screen.title("Data")  # first, so that a bad record is told before a large model is loaded
    pick_device(recipe.device)
    tokenizer = load_tokenizer(recipe.model)
    examples = _examples(recipe, recipe.data.train, tokenizer, screen)
    held_out = _examples(recipe, recipe.data.eval, tokenizer, screen) if recipe.data.eval else []
    Capacity.of(recipe.train).check([*examples, *held_out])
    screen.line("first example, what is trained marked:")
    screen.line(show_example(examples[0], tokenizer, colour=screen.console.is_terminal))
    if recipe.budget is not None:
        screen.line(within_budget(recipe, recipe.budget, [*examples, *held_out], screen))
    screen.title("Load")
    model = _carrying_adapter(recipe, start_from, tokenizer, examples, screen)
    language = LanguageModel(model, loss_options(recipe.train, recipe.memory, device_of(model).type))
    language.check()
    if chosen := language.choose_attention(max(len(example.input_ids) for example in (*examples, *held_out))):
        screen.line(f"attention  {chosen}")
    torch.manual_seed(recipe.train.seed)
    sites = adapted_sites(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    screen.title("Train")
    screen.line(f"adapter  {recipe.adapter.method} on {len(sites)} layers, {trained:,} trained parameters")

    def save(step: int) -> None:
        save_adapter(
            model,
            recipe.adapter,
            folder,
            {"model": recipe.model, "scheme": recipe.scheme.to_dict(), "dtype": recipe.dtype, "step": step},
        )

    _begin(folder, recipe, model, start_from, screen)
    trainer = Trainer(
        language, examples, held_out, recipe.train, folder=folder, screen=screen, save=save, memory=recipe.memory,
        files=folder_of(recipe),
    )  # fmt: skip
    screen.line(
        f"{trainer.steps} step{'s' * (trainer.steps != 1)} of {recipe.train.accumulate} x "
        f"{trainer.capacity}, peak lr {recipe.train.lr:g}"
    )
    with told_out_of_memory(recipe, [*examples, *held_out], screen, trainer.last_save):
        result = trainer.run()
    peak = peak_memory(trainer.device)
    screen.line(
        f"{result.steps} step{'s' * (result.steps != 1)}, {result.tokens:,} tokens in {result.seconds:.0f} s"
        + (f", {result.skipped} skipped" if result.skipped else "")
        + (f"; peak memory {size(peak)}" if peak else "")
    )
    return result


def _carrying_adapter(
    recipe: Recipe, start_from: Path | None, tokenizer: Any, examples: Sequence[Example], screen: Screen
) -> Any:
    """The base with the recipe's adapter on it: at its start, or with the values of another run."""
    if start_from is not None:
        model, _ = load_base(recipe, screen, kept=kept_in(start_from))
        load_adapter(model, start_from)
        return model
    return start_base(recipe, screen, calibration_text(recipe, tokenizer, screen, examples))


def _examples(recipe: Recipe, path: str, tokenizer: Any, screen: Screen) -> list[Example]:
    keys = recipe.data
    examples, report = load_data(
        path, tokenizer, max_length=keys.max_length, loss_on=keys.loss_on, template=keys.template
    )
    screen.line(str(report))
    if path == keys.train and len(examples) > 1:
        capacity, lengths = Capacity.of(recipe.train), [len(example.input_ids) for example in examples]
        screen.line(f"padding  {padding(lengths, capacity, recipe.train.seed):.0%} of micro-batches of {capacity}")
    if path == keys.train and report.format in ("prompt", "alpaca") and tokenizer.chat_template:
        screen.line(
            f"note: {report.format} records are learned as they stand, without the chat template that `qtune chat` "
            "and most servers put around a question; records with messages are learned with it",
            "yellow",
        )
    return examples


def _claim(folder: Path, overwrite: bool) -> None:
    """Make the output folder, write something to it, and refuse to train over another run."""
    if (folder / TENSORS).exists() and not overwrite:
        raise QtuneError(
            f"{folder} already holds a trained adapter; choose another folder with output=..., "
            "or give --overwrite to replace it"
        )
    claim_folder(folder)


def _check_start(recipe: Recipe, start_from: Path, folder: Path) -> None:
    """The adapter to start from, and its base, must be those that the recipe describes, or the new run's would lie."""
    if start_from.resolve() == folder.resolve():
        raise QtuneError(
            f"{folder} is both the run to start from and the output; choose another folder with output=..."
        )
    info = read_adapter_json(start_from)
    saved = {"model": recipe.model, "adapter": info["adapter"]}
    there, here = Recipe.load(saved, training=False).adapter.to_dict(), recipe.adapter.to_dict()
    faults = [f"{k} is {here.get(k)}, there {there.get(k)}" for k in {**here, **there} if here.get(k) != there.get(k)]
    if faults:
        raise QtuneError(
            f"the recipe's adapter is another one than that of {start_from}: {'; '.join(faults)}. "
            f"Give the recipe the same `adapter` section, or train {start_from / RECIPE}"
        )
    scheme = info["base"].get("scheme", recipe.scheme.to_dict())
    if scheme != recipe.scheme.to_dict():
        faults.append(f"scheme is {recipe.scheme}, there {storage_from(scheme)}")
    if (start_from / RECIPE).is_file():
        other, codes = Recipe.load(start_from / RECIPE, training=False), recipe.calibrate.codes
        if codes != other.calibrate.codes and other.model == anchored(recipe).model:  # else packed with those, maybe
            faults.append(f"calibrate.codes is {codes}, there {other.calibrate.codes}")
    if faults:
        raise QtuneError(
            f"the recipe packs its base otherwise than {start_from}: {'; '.join(faults)}. An adapter fits the codes "
            f"that it was trained on: give the recipe the same, or train {start_from / RECIPE}"
        )


def _begin(folder: Path, recipe: Recipe, model: Any, start_from: Path | None, screen: Screen) -> None:
    """Write the recipe and what the start chose. What an earlier run left goes first: its adapter would lie beside a
    recipe that is not its own until the first save."""
    try:
        for path in (
            *(folder / name for name in (INFO, TENSORS, METRICS, FIRST)),
            *folder.glob(f"{KEPT}*.safetensors*"),
        ):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise QtuneError(f"cannot replace the run in {folder}: {error}") from error
    if nbytes := save_kept(model, folder):
        screen.line(f"base  the codes that the start chose, {size(nbytes)}, are kept in {folder / KEPT}.safetensors")
    if start_from is None:
        save_first(model, folder)
    elif (start_from / FIRST).is_file():
        shutil.copyfile(start_from / FIRST, folder / FIRST)
    if (folder / "merged").exists():
        screen.line(f"note: {folder / 'merged'} is of the run before; merge anew with --overwrite", "yellow")
    write_text(folder / RECIPE, anchored(recipe).to_yaml())
