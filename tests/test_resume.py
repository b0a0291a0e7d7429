"""Going on from a checkpoint: to the very bits of a run that was never stopped, whatever stopped it and when."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import torch
from torch import nn

from qtune import state
from qtune.adapters.files import is_whole_pair
from qtune.batches import Capacity, stream
from qtune.cli import main
from qtune.data import Example
from qtune.errors import QtuneError
from qtune.loop import Trainer
from qtune.optim import Optimizer
from qtune.optim.early import Early
from qtune.recipe import Recipe
from qtune.runs import METRICS, open_run
from qtune.screen import Screen, deferred_interrupt
from qtune.state import folder_of, newest, steps_in
from qtune.step import TrainStep
from qtune.trainer import TrainResult, train

QUIET = Screen(quiet=True)
MEASURED = ("seconds", "tokens_per_s", "memory", "memory_peak", "moved")  # moved: since the line before


class Killed(BaseException):
    """Stands for the end of the process."""


def stopped(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Train, and be stopped in the middle of `step`."""
    real = TrainStep.__call__

    def dying(self: TrainStep, batches: Any, now: int, *rest: Any) -> Any:
        if now == step:
            raise Killed
        return real(self, batches, now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", dying)
        with pytest.raises(Killed):
            train(recipe, **options)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of the steps themselves."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows(run)]


def same_run(one: TrainResult, two: TrainResult) -> None:
    """Losses, metrics and the adapter of two runs are equal bit for bit."""
    assert two.losses == one.losses
    assert (two.steps, two.tokens, two.skipped, two.before, two.after) == (
        one.steps, one.tokens, one.skipped, one.before, one.after,
    )  # fmt: skip
    assert untimed(two.folder) == untimed(one.folder)
    contents = [(run.folder / "adapter.safetensors").read_bytes() for run in (one, two)]
    assert contents[0] == contents[1]


# ---- bit-equal

FEW = {"train__steps": 7, "train__save_every": 2}
BF16 = {"dtype": "bfloat16", "train__micro_batch": 2, "data__eval": None}
TOKENS = {"train__micro_batch": None, "train__micro_tokens": 40, "data__eval": None}
STREAMED = BF16 | {"memory__weights": "disk"}
CASES = {
    "lora": {"adapter__dropout": 0.1, "train__eval_every": 3, "train__accumulate": 2},
    "rows": BF16 | {"tokens__add": ["w1 w1"], "tokens__train": ["w5", "w6"]},
    "adamw8": STREAMED | TOKENS | {"train__optimizer": "adamw8", "small": 64},
}
MORE = {
    "tokens": TOKENS | {"train__log_every": 3},
    "streamed": STREAMED | {"train__optimizer": "lion"},
    "dora": BF16 | {"adapter": {"method": "dora", "rank": 4, "dropout": 0.2}},
    "vera": BF16 | {"adapter": {"method": "vera", "rank": 16}, "train__optimizer": "adafactor"},
    "vblora": STREAMED | {"adapter": {"method": "vblora", "rank": 2, "length": 32}, "train__accumulate": 2},
    "lora-fa": BF16 | {"adapter": {"method": "lora", "rank": 4, "freeze_a": True}, "train__optimizer": "adamw8"},
    "pissa": BF16 | {"adapter": {"method": "pissa", "rank": 4}},
    "early": {"train__update_in_backward": True, "train__clip": None, "train__optimizer": "adamw8", "small": 64},
    "early-bf16": BF16 | {"train__update_in_backward": True, "train__clip": None, "train__optimizer": "adafactor"},
    "no-masters": BF16 | {"train__master_weights": False, "train__optimizer": "lion"},
    "gptq": {"calibrate__codes": "gptq", "calibrate__length": 32, "calibrate__samples": 8, "scheme": "int3"},
    "mixture": {"family": "mixtral", "adapter": {"method": "lora", "rank": 2, "targets": ["*.experts.*"]}},
    "dropped layers": {"train__drop_backward": 0.5},
    "hidden key": {"train__drop_keys": 0.2, "train__drop_hidden": 0.1, "train__consistency": 0.5},
    "skipping": {"poison": True, "train__max_skipped": 3},
    "packing": {"train__packing": True, "train__micro_batch": None, "train__micro_tokens": 60},
    "adamw": BF16 | {"train__epochs": 1.5, "train__steps": None, "train__accumulate": 3},
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_stopped_run_goes_on_to_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = FEW | (CASES | MORE)[name]
    monkeypatch.setattr("qtune.optim.rules.SMALL", changes.pop("small", 4096))
    if changes.pop("poison", False):
        poison(monkeypatch, 3, 4, 5)
    plain = train(runs_helper.recipe(tmp_path, **changes, output=str(tmp_path / "plain")))
    recipe = runs_helper.recipe(tmp_path, **changes)
    at = (plain.steps - 1) // 2 * 2  # the step before it is done and told, and comes again
    stopped(recipe, at, monkeypatch)
    torch.manual_seed(99)
    again = train(recipe, resume=True)
    assert newest(recipe_folder(recipe), print).step == plain.steps
    same_run(plain, again)


def recipe_folder(recipe: Recipe) -> Path:
    return Path(recipe.output or "")


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The gradients of these steps are not finite."""
    real = TrainStep.update

    def update(self: TrainStep, total: float, step: int, *rest: Any) -> float:
        return real(self, float("nan") if step in steps else total, step, *rest)

    monkeypatch.setattr(TrainStep, "update", update)


# ---- killed


def kill(tmp_path: Path, moments: list[str], **changes: Any) -> list[dict[str, Any]]:
    """Train in children that are killed at these moments, and to the end; the losses are those of a run that was not.
    Returns what each one left."""
    plain = train(runs_helper.recipe(tmp_path, **changes, output=str(tmp_path / "plain")))
    recipe = runs_helper.recipe(tmp_path, **changes)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, str(Path(__file__).parent / "kill_helper.py"), str(tmp_path / "r.yaml"), *moments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *found, losses = json.loads(done.stdout.splitlines()[-1])
    assert losses == plain.losses
    run = recipe_folder(recipe)
    assert untimed(run) == untimed(plain.folder)
    assert (run / "adapter.safetensors").read_bytes() == (plain.folder / "adapter.safetensors").read_bytes()
    assert not list(run.rglob("*.partial")) and is_whole_pair(run)
    for before, after in zip(found, found[1:], strict=False):
        assert not after["damaged"] and (after["newest"] or 0) >= (before["newest"] or 0), "a checkpoint was lost"
        assert after["pair"] or after["newest"] is None
    return found


def test_killed_in_a_write_and_between_two(tmp_path: Path) -> None:
    """Before the second checkpoint has its name, and between the two files of the adapter."""
    found = kill(tmp_path, ["rename:2", "replace@adapter.json:3"], train__steps=6, train__save_every=2, data__eval=None)
    assert [one["killed"] for one in found] == [True, True, False], found
    assert [one["newest"] for one in found] == [2, 4, 6], found
    assert [bool(one["note"]) for one in found] == [False, True, False], found


@pytest.mark.slow
def test_killed_in_the_first_write_and_when_all_is_done(tmp_path: Path) -> None:
    """Before the first checkpoint has its name; then while an old one is removed, behind the last step."""
    found = kill(tmp_path, ["rename:1", "rmdir@step-2:1"], train__steps=6, train__save_every=2, data__eval=None)
    assert [(one["killed"], one["newest"]) for one in found] == [(True, None), (True, 6), (False, 6)], found
    assert found[-1]["steps"] == [4, 6] and not (tmp_path / "run" / "checkpoints" / "step-2").exists()


@pytest.mark.slow
def test_killed_at_thirty_moments(tmp_path: Path) -> None:
    draw = random.Random(7)
    moments = [f"any:{draw.randint(5, 130)}" for _ in range(15)]
    moments += [f"time:{draw.uniform(0.05, 3):.2f}" for _ in range(15)]
    draw.shuffle(moments)
    # so many steps that a fast machine, too, has some left at the last of them
    changes = {"train__steps": 300, "train__save_every": 1, "adapter__dropout": 0.1, "dtype": "bfloat16"}
    found = kill(tmp_path, moments, **changes, data__eval=None, train__optimizer="adamw8")
    assert sum(one["killed"] for one in found) > 20


# ---- damaged, other, and none


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """A run that was stopped in step 6, with checkpoints of steps 2 and 4; and one that was not."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        stopped(small(root), 6, patch)
    return root / "run", train(small(root, output=str(root / "plain")))


@pytest.fixture
def run(made: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    """The stopped run, as a copy."""
    return Path(shutil.copytree(made[0], tmp_path / "run"))


@pytest.fixture
def plain(made: tuple[Path, TrainResult]) -> TrainResult:
    """The run that was not stopped."""
    return made[1]


def small(root: Path, **changes: Any) -> Recipe:
    few = {"train__steps": 6, "train__save_every": 2, "data__eval": None, "adapter__targets": ["q_proj"]}
    return runs_helper.recipe(root, **few | changes)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda folder: os.truncate(folder / "state.safetensors", 100),
    "flipped": lambda folder: flip(folder / "adapter.safetensors"),
    "garbled": lambda folder: (folder / "state.json").write_text('{"format": 1, "step": 4'),
    "changed": lambda folder: change(folder / "state.json"),
    "another format": lambda folder: (folder / "state.json").write_text('{"format": 9}'),
    "half of it": lambda folder: (folder / "state.json").write_text('{"format": 1, "step": 4, "files": {}}'),
    "no adapter": lambda folder: (folder / "adapter.json").unlink(),
}


def change(path: Path) -> None:
    path.write_text(path.read_text().replace('"tokens": ', '"tokens": 1'))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_an_older_one_taken(run: Path, damage: str) -> None:
    DAMAGES[damage](folder_of(run, 4))
    told: list[str] = []
    saved = newest(run, told.append)
    assert saved is not None and saved.step == 2 and len(told) == 1
    assert "step-4" in told[0] and "checkpoint of step 2 is whole, and is taken in its place" in told[0]
    DAMAGES[damage](folder_of(run, 2))
    with pytest.raises(QtuneError, match="holds no checkpoint that is whole: .*step-4.*step-2"):
        newest(run, told.append)


def test_a_checkpoint_by_another_name_is_none(run: Path) -> None:
    folder_of(run, 4).rename(folder_of(run, 9))
    told: list[str] = []
    saved = newest(run, told.append)
    assert saved is not None and saved.step == 2 and "step-9 is the checkpoint of step 4" in told[0]


def test_going_on_behind_a_damaged_one_sets_it_aside(run: Path, plain: TrainResult, tmp_path: Path) -> None:
    DAMAGES["flipped"](folder_of(run, 4))
    assert train(small(tmp_path), resume=True).losses == plain.losses
    assert steps_in(run) == [4, 6] and (run / "checkpoints" / "step-4.damaged" / "adapter.safetensors").is_file()


def test_what_was_measured_behind_the_checkpoint_goes(run: Path) -> None:
    with open(run / METRICS, "a") as file:
        file.write('not json\n{"step": "4"}\n{"step": 5, "lo')
    assert (
        [row["step"] for row in state.read_metrics(run / METRICS, 4)] == [1, 2, 3, 4] == [r["step"] for r in rows(run)]
    )
    before = (run / METRICS).stat().st_ino
    state.read_metrics(run / METRICS, 4)
    assert (run / METRICS).stat().st_ino == before, "a file that is right is not written again"
    assert state.read_metrics(run / "none.jsonl", 4) == []


OTHER = {
    "adapter__rank": (8, "adapter.rank is 8, there 4"),
    "scheme": ("int8", "scheme.name is int8, there nf4"),
    "train__lr": (0.5, "train.lr is 0.5, there 0.01"),
    "train__optimizer": ("lion", "train.optimizer is lion, there adamw"),
    "train__micro_batch": (3, "train.micro_batch is 3, there 4"),
    "dtype": ("bfloat16", "dtype is bfloat16, there float32"),
    "model": ("org/other", "model is org/other, there "),
}


@pytest.mark.parametrize("key", OTHER)
def test_another_recipe_is_refused_with_what_differs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("qtune.trainer._train", lambda *args: pytest.fail("it went on"))
    with pytest.raises(QtuneError, match="it is of another run:\n(.|\n)*--from RUN") as error:
        train(small(tmp_path, **{key: OTHER[key][0]}), resume=True)
    assert OTHER[key][1] in str(error.value)


def test_all_differences_come_at_once(run: Path, tmp_path: Path) -> None:
    with pytest.raises(QtuneError) as error:
        train(small(tmp_path, train__seed=3, train__clip=None, adapter__alpha=1), resume=True)
    assert all(key in str(error.value) for key in ("train.seed is 3", "train.clip is None", "adapter.alpha is 1"))


def test_other_data_and_another_base_are_refused(run: Path, tmp_path: Path) -> None:
    runs_helper.write_model(tmp_path / "other", initializer_range=0.2)
    with pytest.raises(QtuneError, match="model is .*other, there .*model: not the same weights"):
        train(small(tmp_path, model=str(tmp_path / "other")), resume=True)
    task = tmp_path / "task0.jsonl"
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copyfile(task, moved)
    assert train(replaced(small(tmp_path), moved), resume=True).steps == 6, "the same examples may lie elsewhere"
    moved.write_text(moved.read_text().replace("w12", "w13"))
    with pytest.raises(QtuneError, match="the training examples are others .*the files have changed"):
        train(replaced(small(tmp_path), moved), resume=True)


def replaced(recipe: Recipe, data: Path) -> Recipe:
    return recipe.with_({"data.train": str(data)})


def test_what_may_change_may_change(run: Path, plain: TrainResult, tmp_path: Path) -> None:
    """The folder moved, the base moved, and everything that no loss depends on."""
    run.rename(tmp_path / "moved")
    runs_helper.write_model(tmp_path / "base")
    changes = ["train.log_every=2", "train.save_every=1", "train.keep=3", "train.checkpointing=false", "device=cpu"]
    argv = ["train", str(tmp_path / "moved"), "--resume", f"model={tmp_path / 'base'}", *changes]
    assert main(argv) == 0
    assert [r["loss"] for r in rows(tmp_path / "moved")] == [plain.losses[i] for i in (0, 1, 2, 3, 5)]
    assert steps_in(tmp_path / "moved") == [4, 5, 6] and not (tmp_path / "run").exists()
    assert Recipe.load(tmp_path / "moved" / "recipe.yaml").output == str(tmp_path / "moved")


@pytest.mark.slow
def test_more_steps_are_legal_where_they_change_nothing_that_is_done(run: Path, tmp_path: Path) -> None:
    cosine = run.rename(tmp_path / "cosine")
    flat = {"train__schedule": "constant", "train__warmup": 2.0}
    train(small(tmp_path, **flat, train__steps=4))
    plain = train(small(tmp_path, **flat, output=str(tmp_path / "plain")))
    assert train(small(tmp_path, **flat), resume=True).losses == plain.losses
    with pytest.raises(QtuneError, match="the run ends after 3 steps, and 6 are done"):
        train(small(tmp_path, **flat, train__steps=3), resume=True)
    with pytest.raises(QtuneError, match="has 9 steps, there 6: with schedule cosine .* other learning rates"):
        train(small(tmp_path, output=str(cosine), train__steps=9), resume=True)


def test_nothing_saved_yet_begins_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(small(tmp_path), 1, monkeypatch, resume=True)
    assert train(small(tmp_path), resume=True).steps == 6
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(QtuneError, match="holds an adapter, but no checkpoint to go on from"):
        train(small(tmp_path), resume=True)


def test_a_run_that_is_done_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small(tmp_path, data__eval=runs_helper.write_task(tmp_path, 12, seed=1).as_posix())
    first = train(recipe)
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    (first.folder / "merged").mkdir()  # of this very run
    again = train(recipe, screen=Screen(), resume=True)
    assert "merge anew" not in capsys.readouterr().out
    same_run(first, again)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_is_not_trained_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        QtuneError, match=r"already holds a trained adapter.*go on with it \(qtune train .* --resume\), or give --over"
    ):
        train(small(tmp_path))
    for path in (run / "adapter.safetensors", run / "adapter.json"):
        path.unlink()
    with pytest.raises(QtuneError, match="already holds"):
        train(small(tmp_path))
    with pytest.raises(QtuneError, match="give one of --resume, --overwrite"):
        train(small(tmp_path), resume=True, overwrite=True)
    assert main(["train", str(run)]) == 1 and "is a run: go on with it by --resume" in flat(capsys)
    assert main(["train", str(tmp_path), "--resume"]) == 1 and "is a folder without a recipe.yaml" in flat(capsys)


def flat(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_start_anew_leaves_nothing_of_the_run_before(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / ".step-9.1.partial").mkdir()
    train(small(tmp_path, train__steps=1, adapter__rank=2), overwrite=True)
    assert steps_in(run) == [1] and [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]


# ---- the pair of adapter files, and what is kept


def test_a_mixed_pair_is_taken_from_a_checkpoint(run: Path, tmp_path: Path) -> None:
    own = (run / "adapter.safetensors").read_bytes()
    shutil.copyfile(folder_of(run, 2) / "adapter.json", run / "adapter.json")
    assert not is_whole_pair(run)
    opened = open_run(run, QUIET)
    assert opened.adapter == folder_of(run, 4), "the tensors are those of step 4"
    (run / "adapter.json").unlink()
    assert open_run(run, QUIET).adapter == folder_of(run, 4)
    train(small(tmp_path), resume=True)
    assert is_whole_pair(run) and (run / "adapter.safetensors").read_bytes() != own


def test_a_checkpoint_serves_as_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_run(folder_of(run, 2), QUIET)
    assert (opened.folder, opened.adapter) == (run, folder_of(run, 2))
    assert main(["chat", str(folder_of(run, 2)), "--prompt", "w1", "--max-new-tokens", "1"]) == 0


def test_the_newest_stay(plain: TrainResult, tmp_path: Path) -> None:
    assert steps_in(plain.folder) == [4, 6], "of 2, 4 and 6"
    assert steps_in(train(small(tmp_path, train__save_every=1, train__keep=4)).folder) == [3, 4, 5, 6]
    precious = folder_of(tmp_path / "run", 3) / "notes.txt"
    precious.write_text("mine")
    state.clear(tmp_path / "run")
    assert precious.read_text() == "mine" and steps_in(tmp_path / "run") == []


def test_the_best_becomes_the_runs_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loss of evaluations that this test chooses; also when the run is stopped on the way."""
    losses = {2: 3.0, 3: 1.0, 4: 2.0, 5: 1.5, 6: 1.2}
    real = Trainer._evaluate

    def chosen(self: Trainer, step: int, *rest: Any) -> Any:
        found = real(self, step, *rest)
        return replace(found, loss=losses.get(step, 9.0))

    monkeypatch.setattr(Trainer, "_evaluate", chosen)
    log = Trainer._log
    monkeypatch.setattr(Trainer, "_log", lambda self, step, row: log(
        self, step, row | ({"eval_loss": losses.get(step, 9.0)} if "eval_loss" in row else {})
    ))  # fmt: skip
    task = str(runs_helper.write_task(tmp_path, 6, seed=1))
    keys = {"train__eval_every": 1, "train__keep_best": True, "train__keep": 1, "data__eval": task}
    stopped(small(tmp_path, **keys), 5, monkeypatch)
    assert steps_in(tmp_path / "run") == [3, 4]
    result = train(small(tmp_path, **keys), resume=True)
    assert result.best == 3 and steps_in(result.folder) == [3, 6]
    assert json.loads((result.folder / "adapter.json").read_text())["base"]["step"] == 3
    best = folder_of(result.folder, 3) / "adapter.safetensors"
    assert (result.folder / "adapter.safetensors").read_bytes() == best.read_bytes()
    Path(task).write_text(Path(task).read_text().replace("w2 ", "w3 "))
    with pytest.raises(QtuneError, match="the held-out examples, by which train.keep_best compares, are others"):
        train(Recipe.load(result.folder / "recipe.yaml"), resume=True)


# ---- asked to stop


@pytest.mark.parametrize(
    ("number", "times"),
    [(signal.SIGTERM, 3), (signal.SIGHUP, 1), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow)],
)
def test_signals_save_and_say_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, times: int
) -> None:
    press(monkeypatch, *[number] * times)
    (tmp_path / "r.yaml").write_text(small(tmp_path).to_yaml())
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "r.yaml")])
    told = capsys.readouterr()
    assert f"go on:  qtune train {tmp_path}/run --resume" in told.out and "stopping after this step" in told.err
    assert steps_in(tmp_path / "run") == [2, 3] and signal.getsignal(number) == signal.SIG_DFL


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_interrupt() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


HOLDS = """
import sys
from pathlib import Path
from qtune.safe_io import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_trained_into_by_one(tmp_path: Path) -> None:
    """Also asked by a dry run; a process that was killed holds nothing."""
    recipe = small(tmp_path)
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(QtuneError, match="is being written to by another run"):
            train(recipe)
        (tmp_path / "r.yaml").write_text(recipe.to_yaml())
        assert main(["train", "--dry-run", str(tmp_path / "r.yaml")]) == 1
        other.kill()
    assert not list((tmp_path / "run").iterdir())
    assert train(recipe).steps == 6


def press(monkeypatch: pytest.MonkeyPatch, *signals: int) -> None:
    """These signals come in step 3."""
    real = TrainStep.__call__

    def pressed(self: TrainStep, batches: Any, now: int, *rest: Any) -> Any:
        for number in signals if now == 3 else ():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return real(self, batches, now, *rest)

    monkeypatch.setattr(TrainStep, "__call__", pressed)


def test_a_second_ctrl_c_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    press(monkeypatch, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(small(tmp_path), screen=Screen())
    assert steps_in(tmp_path / "run") == [2]
    assert f"safe: the checkpoint of step 2. Go on from there:  qtune train {tmp_path}/run" in capsys.readouterr().out


# ---- disks


def test_a_disk_that_fills_up_costs_no_checkpoint(
    run: Path, plain: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    real, save = os.fsync, Trainer._save
    for allowed in (0, 5):  # calls before the disk is full: it is so in the adapter's file, or in the state's

        def full(handle: int, left: list[int] = [allowed]) -> None:  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        def saving(self: Trainer, *rest: Any, full: Any = full) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                save(self, *rest)

        monkeypatch.setattr(Trainer, "_save", saving)
        with pytest.raises(QtuneError, match="No space left on device") as error:
            train(small(tmp_path), resume=True)
        assert "cannot write the checkpoint of step 6 to" in str(error.value)
        assert "adapter.safetensors holds the adapter of step 4" in str(error.value)
        assert steps_in(run) == [2, 4]
        assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == there
        assert not list(run.rglob("*.partial"))
    monkeypatch.setattr(Trainer, "_save", save)
    assert train(small(tmp_path), resume=True).losses == plain.losses


def test_too_little_room_is_told_before_training(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it trained"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    with pytest.raises(QtuneError, match=r"has room for 4.9 KiB, and .* takes .*: 3 checkpoints .* Lower train.keep"):
        train(small(tmp_path, output=str(tmp_path / "new" / "run")))
    assert not (tmp_path / "new").exists(), "a train that was refused leaves no folder"
    with pytest.raises(QtuneError, match="has room for"):
        train(small(tmp_path, adapter__rank=16), overwrite=True)
    assert steps_in(run) == [2, 4], "nor does it remove the run before"


@pytest.mark.slow
def test_what_a_checkpoint_takes_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(state.Checkpoints, "check_room", lambda self, *nbytes: asked.append(sum(nbytes[:2])))
    for rule in ("adamw", "adamw8", "lion", "adafactor"):
        monkeypatch.setattr("qtune.optim.rules.SMALL", 64)
        recipe = small(tmp_path, train__optimizer=rule, dtype="bfloat16", train__steps=1)
        folder = folder_of(train(recipe, overwrite=True).folder, 1)
        tensors = sum(
            t.nbytes for n, t in newest(tmp_path / "run", print).tensors().items() if n.startswith("optimizer/")
        )
        adapter = (folder / "adapter.safetensors").stat().st_size
        assert 0 <= tensors + adapter - asked[-1] < 4096, rule


def test_a_refused_train_leaves_no_empty_folder(tmp_path: Path) -> None:
    recipe = small(tmp_path, output=str(tmp_path / "new" / "deeper" / "run"))
    Path(recipe.data.train or "").write_text("not a record\n")
    with pytest.raises(QtuneError):
        train(recipe)
    assert not (tmp_path / "new").exists()


# ---- parts


@pytest.mark.parametrize("made", [Optimizer, Early])
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("rule", ["adamw", "adamw8", "lion", "adafactor"])
def test_an_optimizer_goes_on_from_its_state(
    rule: str, host: bool, made: type[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.optim.rules.SMALL", 64)

    def fresh(values: list[torch.Tensor]) -> tuple[list[nn.Parameter], Optimizer]:
        parameters = [nn.Parameter(value.clone()) for value in values]
        named = [(f"layers.{i}.w", parameter) for i, parameter in enumerate(parameters)]
        return parameters, made(named, rule, lr=1e-2, weight_decay=0.1, seed=5, host=host)

    def steps(parameters: list[nn.Parameter], optimizer: Optimizer, numbers: range) -> None:
        for number in numbers:
            for index, parameter in enumerate(parameters):
                if index != 2 or number > 2:  # the third gets no gradient before
                    parameter.grad = (
                        torch.sin(torch.arange(parameter.numel()) + number).view_as(parameter).to(parameter)
                    )
            optimizer.step(1.0)

    start = [torch.randn(16, 16, dtype=torch.bfloat16), torch.randn(9), torch.randn(8, 32)]
    one, plain = fresh(start)
    steps(one, plain, range(3))
    saved = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in plain.state().items()}
    two, other = fresh([parameter.detach() for parameter in one])
    other.restore(saved)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), "a restore moves no weight"
    for parameters, optimizer in ((one, plain), (two, other)):
        steps(parameters, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    name, value = next((n, v) for n, v in saved.items() if isinstance(v, torch.Tensor) and v.numel() > 1)
    for wrong, words in (
        ({n: v for n, v in saved.items() if n != name}, f"{name} is missing"),
        (saved | {name: value[:1]}, f"{name} is "),
        (saved | {"gone/m": value}, "gone/m is of no trained parameter"),
    ):
        with pytest.raises(QtuneError, match=f"the optimizer's states do not fit: .*{words}"):
            fresh(start)[1].restore(wrong)


@pytest.mark.parametrize("capacity", [Capacity(4), Capacity(30, True)])
def test_micro_batches_that_were_seen_are_not_made_again(capacity: Capacity, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    sizes = [draw.randint(2, 9) for _ in range(22)]
    examples = [Example(numbers(n, i), bytes(n), "") for i, n in enumerate(sizes)]
    whole = stream(examples, capacity, 3)
    first = [next(whole).input_ids for _ in range(25)]
    for skip in (0, 1, 5, 6, 13, 20):
        batch = next(stream(examples, capacity, 3, skip=skip)).input_ids
        assert torch.equal(batch, first[skip]), skip


def numbers(count: int, first: int) -> Any:
    from array import array

    return array("i", range(first, first + count))
