"""What the metrics of a run say that a person should hear while there is time: a sentence each, and what to try.

Five kinds. spike: the loss leaves what it was. vanishing: gradients of almost nothing, or weights that stand still.
constant: the same loss again and again. worse: the evaluation rises. skipped: losses or gradients that are not finite.
A rule looks at many rows, so that the noise of small micro-batches is no alarm; a run that is well hears nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

BEFORE, NOW = 50, 5  # rows that a spike is measured against, and rows that must tell it
STILL = 10  # rows in a row of the same loss, of no gradient, or of weights that do not move
NOTHING = 1e-6  # a gradient norm below this moves nothing that lasts
LEARNED = 1e-3  # a loss below this may be constant: there is nothing left to learn
ASLEEP = 0.01  # of the highest learning rate: below it weights may stand still
ALONE, TWICE = 1.05, 1.01  # an evaluation is worse by so much once, or by so much twice in a row
SKIPS = 3


@dataclass(frozen=True)
class Advice:
    """kind: see the module. step: where it was seen. text: what is the matter; tip: what to try."""

    kind: str
    step: int
    text: str
    tip: str

    def __str__(self) -> str:
        return f"{self.text} {self.tip}"


class Watch:
    """Reads rows as they come, each in constant time. `found` holds what is the matter by now, one of a kind."""

    def __init__(self) -> None:
        self.found: dict[str, Advice] = {}
        self.losses: deque[float] = deque(maxlen=BEFORE + NOW)
        self.norms: deque[float] = deque(maxlen=STILL)
        self.moves: deque[float] = deque(maxlen=STILL)
        self.evals: list[tuple[int, float]] = []
        self.highest = 0.0  # learning rate
        self.told: set[str] = set()

    def see(self, row: Mapping[str, Any]) -> list[Advice]:
        """Take a row of metrics; returns what it shows for the first time in this run."""
        step = int(row.get("step", 0))
        if "eval_loss" in row:
            self._evaluation(step, row["eval_loss"])
        elif "skipped" in row:
            self._skipped(step, int(row["skipped"]))
        elif isinstance(row.get("loss"), (int, float)):
            self._step(step, row)
        new = [advice for kind, advice in self.found.items() if kind not in self.told]
        self.told |= set(self.found)
        return new

    def _add(self, kind: str, step: int, text: str, tip: str) -> None:
        self.found.setdefault(kind, Advice(kind, step, text, tip))

    def _step(self, step: int, row: Mapping[str, Any]) -> None:
        lr = float(row.get("lr") or 0.0)
        self.highest = max(self.highest, lr)
        self.losses.append(float(row["loss"]))
        self.norms.append(float(row.get("grad_norm", math.inf)))
        awake = lr > ASLEEP * self.highest
        self.moves.append(float(row.get("moved", math.inf)) if awake else math.inf)
        self._spike(step)
        if min(list(self.losses)[-STILL:]) > LEARNED:
            self._vanishing(step)
            self._constant(step)

    def _spike(self, step: int) -> None:
        losses = list(self.losses)
        before, now = losses[:-NOW], losses[-NOW:]
        if len(before) < BEFORE // 2:
            return
        usual, height = fmean(before), fmean(now)
        if height > max(1.5 * usual, max(before)) and height > usual + 4 * pstdev(before, usual):
            self._add(
                "spike", step, f"The loss rose from {usual:.3g} to {max(now):.3g} near step {step}.",
                "Try half the train.lr or a longer train.warmup, keep train.clip at 1, and look at the records there.",
            )  # fmt: skip

    def _vanishing(self, step: int) -> None:
        if len(self.norms) == STILL and max(self.norms) < NOTHING:
            self._add(
                "vanishing", step, f"The gradients are almost nothing (norm {max(self.norms):.1e} at step {step}).",
                "Try dtype bfloat16 or float32 where it is float16; look whether the records have answers to learn.",
            )  # fmt: skip
        elif len(self.moves) == STILL and max(self.moves) == 0:
            self._add(
                "vanishing", step, f"The adapter's weights have not changed in {STILL} rows up to step {step}.",
                "Their updates are lost in rounding: try a higher train.lr, or train.master_weights true.",
            )  # fmt: skip

    def _constant(self, step: int) -> None:
        last = list(self.losses)[-STILL:]
        if len(last) == STILL and max(last) - min(last) <= 1e-6 * max(last) and "vanishing" not in self.found:
            self._add(
                "constant", step, f"The loss has been {last[-1]:.4g} for {STILL} rows up to step {step}.",
                "Look at the data (are all records the same?), and try a higher train.lr.",
            )  # fmt: skip

    def _evaluation(self, step: int, loss: float | None) -> None:
        value = math.inf if loss is None else float(loss)
        self.evals.append((step, value))
        at, best = min(self.evals, key=lambda pair: pair[1])
        if at == step:
            self.found.pop("worse", None)
            return
        before = self.evals[-2][1]
        if not (value > ALONE * best or min(value, before) > TWICE * best):
            return
        now = "no number" if math.isinf(value) else f"{value:.4g}"
        if at == 0:
            text = f"The evaluation loss is worse than before training: {best:.4g} then, {now} at step {step}."
            tip = "Try a lower train.lr; look whether data.eval is of the same kind as data.train."
        else:
            text = f"The evaluation loss was best at step {at} ({best:.4g}) and is {now} at step {step}."
            tip = "The records are being learned by heart: try fewer steps, a lower train.lr, or more data."
        self.found["worse"] = Advice("worse", step, text, tip)

    def _skipped(self, step: int, count: int) -> None:
        if count >= SKIPS:
            self.found["skipped"] = Advice(
                "skipped", step, f"{count} steps up to step {step} changed nothing: loss or gradient was not finite.",
                "Try a lower train.lr, a longer train.warmup, or dtype bfloat16.",
            )  # fmt: skip


def advise(rows: Iterable[Mapping[str, Any]]) -> list[Advice]:
    """What is the matter with a run by its last row; empty where nothing is."""
    watch = Watch()
    for row in rows:
        watch.see(row)
    return list(watch.found.values())
