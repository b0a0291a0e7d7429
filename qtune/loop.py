"""The loop over steps: evaluation, metrics, checkpoints, stops. The Trainer takes built objects and knows no method and
no scheme.

A run can end in five ways, and in each all that was saved is whole: done; Ctrl-C, SIGTERM or SIGHUP (saved after the
step at hand); a loss that is not finite, an error, a killed process (the last checkpoint stays). From a checkpoint it
goes on as if it had never been stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters.files import TENSORS
from .batches import Capacity, steps_of, stream
from .data import Example
from .errors import QtuneError
from .evaluate import EvalResult, evaluate
from .headroom import at_worst, dry_step, largest, wants_dry_step
from .memory.layers import device_of
from .memory.random import random_states, set_random_states
from .optim import lr_factor, optimizer_of
from .report.record import Recorder
from .runs import METRICS
from .screen import Screen, deferred_interrupt
from .sections import MemoryKeys, TrainKeys
from .state import Checkpoints, Saved, steps_in
from .step import LanguageModel, NonFinite, TrainStep

RECENT = 20  # steps whose mean loss the screen shows
SAVES = 10  # checkpoints in a run, where the recipe does not say
OPTIMIZER, RANDOM, LOSSES = "optimizer/", "random/", "losses"  # names of a checkpoint's tensors


class _Stopped(Exception):
    """Ctrl-C came during an evaluation on the way."""


@dataclass
class TrainResult:
    """steps: done, of which `skipped` changed nothing (with train.update_in_backward: only layers above the one whose
    gradient was not finite); with what was done before a resumption. before, after:
    evaluations at step 0 and at the end. interrupted: by Ctrl-C or SIGTERM, saved. best: the step whose adapter is the
    run's, where train.keep_best chose it. early: stopped by train.patience."""

    folder: Path
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    interrupted: bool = False
    losses: list[float] = field(default_factory=list)
    before: EvalResult | None = None
    after: EvalResult | None = None
    best: int | None = None
    early: bool = False


class Trainer:
    """Runs the steps of one run. checkpoints: writes them. record: completes the rows of metrics. files: folder of the
    files of `memory`."""

    def __init__(
        self,
        model: LanguageModel,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        keys: TrainKeys,
        *,
        folder: Path,
        screen: Screen,
        checkpoints: Checkpoints,
        record: Recorder,
        memory: MemoryKeys,
        files: Path,
    ) -> None:
        self.model, self.examples, self.held_out, self.keys = model, examples, held_out, keys
        self.screen, self.checkpoints, self.folder, self.record = screen, checkpoints, folder, record
        self.memory, self.files = memory, files
        self.capacity = Capacity.of(keys)
        self.steps = steps_of(keys, [len(example.input_ids) for example in examples])
        self.save_every = keys.save_every or max(1, math.ceil(self.steps / SAVES))
        self.device = device_of(model.model)
        self.saved: int | None = None
        self.in_row = 0  # steps that were skipped, up to now
        self.best: tuple[float, int] | None = None  # evaluation loss and step, with keep_best
        self.before: tuple[Saved, Sequence[Mapping[str, Any]]] | None = None
        self.evaluated: dict[int, EvalResult] = {}  # by step, also of before a resumption
        self.figures: dict[str, str] = {}  # of the last step and evaluation, for the screen
        self.train_step = self._step()

    def _step(self) -> TrainStep:
        return TrainStep(self.model, optimizer_of(self.model.model, self.keys, self.memory), clip=self.keys.clip)

    def go_on_from(self, saved: Saved, rows: Sequence[Mapping[str, Any]]) -> None:
        """Let `run` begin behind a checkpoint, whose adapter the model carries. rows: of metrics.jsonl up to there."""
        self.before, self.saved = (saved, rows), saved.step

    def run(self) -> TrainResult:
        """All steps, with evaluation before (where asked), on the way and after. Raises NonFinite naming the last
        good save."""
        result = TrainResult(self.folder)
        if wants_dry_step(self.keys, self.device):  # first of all: what has no room is told before an evaluation
            self.dry_step()
        if self.before is not None:
            self._restore(result, *self.before)
        elif self.held_out and self.keys.eval_at_start:
            result.before = self._evaluate(0, "before training")
        with deferred_interrupt() as interrupted:
            with self._training():
                self._loop(result, interrupted)
            self._save(result)
            result.interrupted = interrupted()
        if self.held_out and not result.interrupted:
            try:
                result.after = self._evaluate(result.steps, "after training")
            except KeyboardInterrupt:  # all is saved: the run ends as after any other Ctrl-C
                result.interrupted = True
        if not result.interrupted:
            self._choose(result)
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

    def dry_step(self) -> tuple[int, float]:
        """The largest micro-batches of the data once, and nothing of it left but the allocator's room. Returns the
        places of the largest, and the seconds that it takes."""
        tick, batches = time.perf_counter(), largest(self.examples, self.capacity)
        with self._training(), at_worst(self.train_step.sites, self.steps):
            del self.train_step  # its masters have other sizes
            self.train_step = self._step()
            seconds = dry_step(self.train_step, batches, self.keys.accumulate)
        del self.train_step  # its optimizer's states go before new ones are made
        self.train_step = self._step()
        sizes = " and ".join("{} x {}".format(*batch.input_ids.shape) for batch in batches)
        self.screen.line(f"dry step  {sizes} tokens, the largest of the data: {time.perf_counter() - tick:.1f} s")
        return batches[0].input_ids.numel(), seconds[0]

    # ---- the steps

    def _loop(self, result: TrainResult, interrupted: Callable[[], bool]) -> None:
        data = stream(self.examples, self.capacity, self.keys.seed, skip=result.steps * self.keys.accumulate)
        started = time.perf_counter() - result.seconds
        with self.screen.steps("training", self.steps, result.steps) as show:
            if result.steps:
                self._on_the_way(result, interrupted)
            for step in range(result.steps + 1, self.steps + 1):
                if interrupted() or self._no_better(result):
                    return
                tick = time.perf_counter()
                batches = [batch.to(self.device) for batch in islice(data, self.keys.accumulate)]
                factor = lr_factor(step - 1, self.steps, self.keys.schedule, self.keys.warmup)
                try:
                    done = self.train_step(batches, step, self.steps, factor)
                except NonFinite as error:
                    self._skip(step, factor, error, result)
                else:
                    self.in_row, factor = 0, done.factor
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
                    self.figures["grad norm"] = f"{done.grad_norm:.3g}"
                result.steps, result.seconds = step, time.perf_counter() - started
                show(self._figures(result, self.keys.lr * factor))
                if not interrupted():
                    if step < self.steps and step % self.save_every == 0 and not self.in_row:
                        self._save(result)
                    self._on_the_way(result, interrupted)

    def _figures(self, result: TrainResult, lr: float) -> dict[str, str]:
        """What the screen shows of the last step: the loss is the mean of the last steps, for one step's is noise."""
        recent = result.losses[-RECENT:]
        found = {
            "loss": f"{sum(recent) / len(recent):.3f}" if recent else "",
            "eval loss": self.figures.get("eval loss", ""),
            "lr": f"{lr:.2e}",
            "grad norm": self.figures.get("grad norm", ""),
            "tok/s": f"{result.tokens / result.seconds:,.0f}",
            "memory": self.record.memory(),
            "skipped": str(result.skipped) if result.skipped else "",
        }
        return {name: value for name, value in found.items() if value}

    def _on_the_way(self, result: TrainResult, interrupted: Callable[[], bool]) -> None:
        """Evaluate where it is time to and this was not done before the run was stopped."""
        due = self.keys.eval_every and result.steps % self.keys.eval_every == 0 and result.steps < self.steps
        if due and self.held_out and result.steps not in self.evaluated:
            with suppress(_Stopped):
                found = self._evaluate(result.steps, f"step {result.steps}", interrupted)
                if self._is_best(result.steps, found.loss):
                    self._save(result)

    def _skip(self, step: int, factor: float, error: NonFinite, result: TrainResult) -> None:
        """Count a step that changed nothing, as its loss or gradient is not finite. It stays a step of the schedule and
        of the data. Raises NonFinite where there were train.max_skipped in a row before it."""
        self.in_row += 1
        if self.in_row > self.keys.max_skipped:
            before = f", and nothing better in {self.in_row - 1} before it" if self.in_row > 1 else ""
            raise NonFinite(
                "Q701",
                f"{error}{before}; {self.last_save()}. A lower train.lr or a longer train.warmup helps most often",
            ) from error
        if not result.skipped:
            self.screen.line(f"note: {error}; the step is skipped, and so are others, as {METRICS} tells", "yellow")
        result.skipped += 1
        self._log(step, {"skipped": result.skipped, "why": str(error), "lr": self.keys.lr * factor})

    def _evaluate(self, step: int, label: str, interrupted: Callable[[], bool] = lambda: False) -> EvalResult:
        if step in self.evaluated:  # before the run was stopped, or on the way
            result = self.evaluated[step]
        else:
            with self.screen.bar("evaluating", len(self.held_out), passing=True) as advance:

                def tick(n: int) -> None:
                    advance(n)
                    if interrupted():
                        raise _Stopped

                result = evaluate(self.model, self.held_out, capacity=self.capacity, advance=tick)
            self.evaluated[step] = result
            since = {} if self.keys.patience is None else {"since_best": self._since_best()[1]}
            self._log(step, result.to_dict() | since)
        self.screen.line(f"eval  {label}: {result}")
        self.figures["eval loss"] = f"{result.loss:.3f} (step {step})"
        return result

    def _is_best(self, step: int, loss: float) -> bool:
        """Note an evaluation. Is it the best so far, with train.keep_best?"""
        better = self.keys.keep_best and math.isfinite(loss) and (self.best is None or loss < self.best[0])
        if better:
            self.best = loss, step
        return better

    def _since_best(self) -> tuple[int, int]:
        """The step of the lowest loss of all evaluations, and how many came after it."""
        steps = sorted(self.evaluated)
        losses = [found.loss if math.isfinite(found.loss) else math.inf for _, found in sorted(self.evaluated.items())]
        at = losses.index(min(losses))
        return steps[at], len(steps) - 1 - at

    def _no_better(self, result: TrainResult) -> bool:
        """Has train.patience run out? Told once."""
        if self.keys.patience is None or not self.evaluated:
            return False
        best, since = self._since_best()
        result.early = since >= self.keys.patience
        if result.early:
            self.screen.line(
                f"stopped at step {result.steps} of {self.steps}: {since} evaluation{'s' * (since != 1)} in a row "
                f"without a lower loss than the {self.evaluated[best].loss:.4f} of step {best} (train.patience)",
                "yellow",
            )
        return result.early

    def _choose(self, result: TrainResult) -> None:
        """At the end: with train.keep_best the run's adapter is that of the best evaluation."""
        if result.after is not None:
            self._is_best(result.steps, result.after.loss)
        if self.best is not None:
            result.best = self.best[1]
            self.checkpoints.publish(result.best)

    # ---- what is written, and read again

    def _save(self, result: TrainResult) -> None:
        """A checkpoint of the step at hand, unless there is one."""
        if self.saved == result.steps:
            return
        optimizer = self.train_step.optimizer.state()
        tensors = {f"{OPTIMIZER}{name}": value for name, value in optimizer.items() if isinstance(value, Tensor)}
        tensors |= {f"{RANDOM}{kind}": state for kind, state in random_states(self.device).items()}
        tensors[LOSSES] = torch.tensor(result.losses, dtype=torch.float64)
        values = {
            "steps": self.steps, "micro_batches": result.steps * self.keys.accumulate, "tokens": result.tokens,
            "skipped": result.skipped, "in_row": self.in_row, "seconds": result.seconds,
            "numbers": {name: value for name, value in optimizer.items() if not isinstance(value, Tensor)},
        }  # fmt: skip
        try:
            self.checkpoints.save(result.steps, tensors, values, self.best and self.best[1])
        except QtuneError as error:
            raise QtuneError(error.code, f"{error}; {self.last_save()}") from error
        self.saved = result.steps

    def _restore(self, result: TrainResult, saved: Saved, rows: Sequence[Mapping[str, Any]]) -> None:
        """Everything as it was when the checkpoint was written."""
        tensors, info = saved.tensors(), saved.info
        states = {n.removeprefix(OPTIMIZER): t for n, t in tensors.items() if n.startswith(OPTIMIZER)}
        try:
            self.train_step.optimizer.restore({**states, **info["numbers"]})
        except QtuneError as error:
            raise QtuneError("Q409", f"cannot go on from {saved.folder}: {error}") from error
        for kind in set_random_states(
            {n.removeprefix(RANDOM): t for n, t in tensors.items() if n.startswith(RANDOM)}, self.device
        ):
            self.screen.line(f"note: the checkpoint has no random state of {kind}: dropout draws anew there", "yellow")
        result.steps, result.tokens, result.skipped = saved.step, info["tokens"], info["skipped"]
        result.seconds, result.losses, self.in_row = info["seconds"], tensors[LOSSES].tolist(), info["in_row"]
        self.evaluated = {row["step"]: EvalResult.of(row) for row in rows if "eval_loss" in row}
        result.before = self.evaluated.get(0)
        there = steps_in(self.folder)
        for step, found in sorted(self.evaluated.items()):
            if step in there:
                self._is_best(step, found.loss)

    def last_save(self) -> str:
        """What of the run is on disk, in words."""
        if self.saved is None:
            return "nothing was saved yet"
        return f"{self.folder / TENSORS} holds the adapter of step {self.saved}"

    def _log(self, step: int, row: dict[str, Any]) -> None:
        row = self.record.row({"step": step, **row})
        path = self.folder / METRICS
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise QtuneError("Q901", f"cannot write {path}: {error.strerror or error}; {self.last_save()}") from error
