"""Advice on made-up curves: each fault is told, once and in time; curves that are well hear nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from qtune.report.advice import STILL, Watch, advise

Row = dict[str, Any]


def steps(count: int, loss: Callable[[int], float], **columns: Callable[[int], float]) -> list[Row]:
    """Rows of `count` training steps from functions of the step."""
    rest = {"lr": lambda step: 1e-4, "grad_norm": lambda step: 1.0, "moved": lambda step: 1e-4} | columns
    return [{"step": s, "loss": loss(s), **{name: f(s) for name, f in rest.items()}} for s in range(1, count + 1)]


def evals(**losses: float | None) -> list[Row]:
    """Rows of evaluations: s10=0.5 at step 10."""
    return [{"step": int(step[1:]), "eval_loss": loss} for step, loss in losses.items()]


def noisy(seed: int, start: float, end: float, noise: float) -> Callable[[int], float]:
    """A loss that falls, with the lognormal noise of small micro-batches."""
    draw = random.Random(seed)
    return lambda step: (end + (start - end) * math.exp(-step / 40)) * math.exp(draw.gauss(0, noise))


SICK: dict[str, tuple[str, list[Row], str]] = {
    "one high loss": ("spike", steps(120, lambda s: 12.0 if s == 100 else 1.2 + 0.1 * (s % 3)), "from 1.3 to 12 near"),
    "it stays high": ("spike", steps(120, lambda s: (4.0 if s >= 100 else 1.2) + 0.1 * (s % 3)), "near step 10"),
    "no gradients": ("vanishing", steps(20, lambda s: 2 - s / 99, grad_norm=lambda s: 1e-9), "norm 1.0e-09 at step 10"),
    "weights stand still": ("vanishing", steps(20, lambda s: 2 - s / 99, moved=lambda s: 0.0), "have not changed"),
    "the same loss": ("constant", steps(20, lambda s: 2.5), "has been 2.5 for 10 rows up to step 10"),
    "worse than before": ("worse", evals(s0=1.0, s50=1.2), "worse than before training: 1 then, 1.2 at step 50"),
    "worse twice": ("worse", evals(s0=3.0, s10=1.0, s20=1.02, s30=1.03), "best at step 10 (1) and is 1.03 at step 30"),
    "no number": ("worse", evals(s0=3.0, s10=None), "no number at step 10"),
    "skipped": ("skipped", [{"step": s, "skipped": s, "why": "loss is nan", "lr": 1e-4} for s in (1, 2, 3)], "3 steps"),
}  # fmt: skip

WELL: dict[str, list[Row]] = {
    "it falls": steps(300, noisy(0, 8.0, 0.2, 0.1)),
    "small micro-batches": steps(1000, noisy(1, 3.0, 0.3, 0.6)),
    "already good": steps(500, noisy(2, 1.2, 1.1, 0.25)),
    "learned by heart": steps(60, lambda s: max(1e-5, 2.0 * 0.7**s), grad_norm=lambda s: max(1e-8, 0.7**s)),
    "few rows": steps(5, lambda s: 2.5, grad_norm=lambda s: 0.0),
    "asleep at the end": steps(
        100, noisy(3, 3.0, 1.0, 0.1), lr=lambda s: 1e-4 if s < 80 else 1e-8, moved=lambda s: 1e-4 if s < 80 else 0.0
    ),
    "the eval falls": evals(s0=3.0, s10=1.0, s20=0.9, s30=0.91, s40=0.85),
    "worse, then best again": evals(s0=3.0, s10=1.0, s20=1.2, s30=0.9),
    "one step skipped": [{"step": 1, "skipped": 1, "why": "loss is nan", "lr": 1e-4}, *steps(30, noisy(4, 3, 1, 0.1))],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("name", SICK)
def test_a_fault_is_told_with_what_to_try(name: str) -> None:
    kind, rows, words = SICK[name]
    told = advise(rows)
    assert [advice.kind for advice in told] == [kind]
    assert words in told[0].text and told[0].tip and told[0].step


@pytest.mark.parametrize("name", WELL)
def test_a_run_that_is_well_hears_nothing(name: str) -> None:
    assert advise(WELL[name]) == []


@pytest.mark.parametrize("name", SICK)
def test_while_it_runs_each_kind_is_told_once_and_soon(name: str) -> None:
    kind, rows, _ = SICK[name]
    watch = Watch()
    told = [(row["step"], advice.kind) for row in rows for advice in watch.see(row)]
    assert [k for _, k in told] == [kind]
    if kind in ("vanishing", "constant"):
        assert told[0][0] == STILL


def test_noise_is_no_alarm_over_many_seeds() -> None:
    """A rule that cries once in a hundred runs is not read."""
    assert not [seed for seed in range(40) if advise(steps(400, noisy(seed, 3.0, 0.5, 0.5)))]


def test_several_faults_are_all_told() -> None:
    rows = [*SICK["one high loss"][1], *evals(s0=1.0, s120=2.0)]
    assert {advice.kind for advice in advise(rows)} == {"spike", "worse"}
