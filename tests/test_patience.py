"""Early stopping: train.patience evaluations without a lower loss end the run; also one that was stopped on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs_helper
from test_resume import same_run, small, stopped

from qtune import loop
from qtune.loop import Trainer
from qtune.report import facts
from qtune.report.read import read_run
from qtune.screen import Screen
from qtune.state import steps_in
from qtune.trainer import train

LOSSES = {0: 5.0, 1: 4.0, 2: 3.0, 3: 3.0, 4: float("nan"), 5: 3.5, 6: 1.0, 7: 2.0, 8: 2.5, 9: 2.6}


@pytest.fixture(autouse=True)
def losses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations find what LOSSES says of their step. Returns the steps that were evaluated."""
    real, found, steps = Trainer._evaluate, loop.evaluate, list[int]()

    def at_step(self: Trainer, step: int, *rest: Any) -> Any:
        monkeypatch.setattr(loop, "evaluate", lambda *a, **k: (
            steps.append(step), replace(found(*a, **k), loss=LOSSES[step])
        )[1])  # fmt: skip
        return real(self, step, *rest)

    monkeypatch.setattr(Trainer, "_evaluate", at_step)
    return steps


def keys(root: Path, **changes: Any) -> dict[str, Any]:
    task = str(runs_helper.write_task(root, 4, seed=1))
    return {"data__eval": task, "train__steps": 9, "train__eval_every": 1, "train__patience": 3} | changes


def test_it_stops_once_no_evaluation_was_better_for_so_long(
    tmp_path: Path, losses: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(small(tmp_path, **keys(tmp_path)), screen=Screen())
    assert (result.steps, result.early, result.interrupted, len(result.losses)) == (5, True, False, 5)
    assert losses == [0, 1, 2, 3, 4, 5], "the last evaluation is not made twice"
    assert result.after is not None and result.after.loss == 3.5
    told = capsys.readouterr().out
    assert (
        "stopped at step 5 of 9: 3 evaluations in a row without a lower loss than the 3.0000 of step 2 (train.patience)"
        in told.replace("\n", " ")
    )
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["since_best"] for row in rows if "eval_loss" in row] == [0, 0, 0, 1, 2, 3]
    assert json.loads((result.folder / "run.json").read_text())["ended"]["early"] is True
    assert steps_in(result.folder)[-1] == 5
    assert facts.status(read_run(result.folder)).startswith("5 of 9 steps, stopped early, as the evaluation got no")


def test_a_stopped_run_counts_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(small(tmp_path, **keys(tmp_path, output=str(tmp_path / "plain"))))
    recipe = small(tmp_path, **keys(tmp_path))
    stopped(recipe, 5, monkeypatch)  # with an evaluation without improvement before and behind its checkpoint
    assert steps_in(tmp_path / "run") == [2, 4]
    again = train(recipe, resume=True)
    same_run(plain, again)
    assert again.early and again.steps == 5
    for _ in range(2):  # it is done, and stays so
        once_more = train(recipe, resume=True)
        same_run(plain, once_more)
        assert once_more.early


@pytest.mark.slow
def test_more_patience_goes_on(tmp_path: Path) -> None:
    recipe = small(tmp_path, **keys(tmp_path))
    assert train(recipe).steps == 5
    on = train(recipe.with_({"train.patience": 4}), resume=True)
    assert on.steps == 9 and not on.early, "step 6 was better, and only 3 came behind it"
    whole = train(small(tmp_path, **keys(tmp_path, train__patience=None, output=str(tmp_path / "whole"))))
    assert on.losses == whole.losses


def test_with_keep_best_the_best_is_the_runs_adapter(tmp_path: Path) -> None:
    result = train(small(tmp_path, **keys(tmp_path, train__keep_best=True, train__patience=1)))
    assert (result.steps, result.best, result.early) == (3, 2, True)
    assert json.loads((result.folder / "adapter.json").read_text())["base"]["step"] == 2
