"""`qtune init` and `qtune train --dry-run`: from a model and a file to a recipe that trains, and everything looked at
before."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny

from qtune.cli import main
from qtune.keys import dotted
from qtune.planner.devices import find_device
from qtune.recipe import Recipe
from qtune.yaml_text import load_yaml

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """stdout and stderr of a command, in a folder with a tiny model and a task."""
    runs_helper.write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def go(*argv: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == code
        out = capsys.readouterr()
        return out.out, out.err

    return go


def task(folder: Path, count: int, longest: int = 9) -> str:
    """Distinct records of up to so many words."""
    draw = random.Random(0)
    rows = [
        {"prompt": " ".join(f"w{draw.randint(10, 99)}" for _ in range(draw.randint(1, longest))) + " ",
         "completion": f"w{number % 100} w{number // 100}"} for number in range(count)
    ]  # fmt: skip
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "task.jsonl"


def values(text: str) -> dict[str, Any]:
    faults: list[str] = []
    found = dotted(load_yaml(text, faults))
    assert not faults
    return found


def test_a_recipe_that_trains_just_so(run: Run, tmp_path: Path) -> None:
    data = task(tmp_path, 120)
    out, _ = run("init", "--model", "model", "--data", data, "--yes")
    for word in ("Fits", "a step", "wrote recipe.yaml", "qtune data recipe.yaml", "qtune train recipe.yaml"):
        assert word in out, word
    text = (tmp_path / "recipe.yaml").read_text()
    found = values(text)
    assert found["scheme.name"] == "nf4" and found["scheme.double"] and found["adapter.rank"] == 16
    assert found["train.packing"] and found["data.split"] == 0.05 and found["train.epochs"] == 3
    assert "# 6 examples are held out" in text and "% of a micro-batch would be padding" in text
    quiet = ("train.steps=2", "train.samples=0", "train.report=false")
    out, _ = run("train", "recipe.yaml", *quiet, "--dry-run")
    assert not (tmp_path / "runs").exists(), "nothing is left behind"
    assert [line.split()[1] for line in out.splitlines() if line.startswith("✓")] == [
        "recipe", "device", "output", "model", "data", "plan", "load", "disk", "step",
    ]  # fmt: skip
    assert "114 examples" in out and "⟦" in out and "the whole run: 2 steps" in out
    run("train", "recipe.yaml", *quiet)
    assert (tmp_path / found["output"] / "adapter.safetensors").is_file()


def test_every_value_is_legal_and_says_why_and_nothing_is_replaced_without_force(run: Run, tmp_path: Path) -> None:
    (tmp_path / "my recipe.yaml").write_text("mine")
    given = ("--model", "model", "--data", task(tmp_path, 40), "--yes", "--budget", "2GB", "--out", "my recipe.yaml")
    assert "my recipe.yaml is there already" in run("init", *given, code=1)[1]
    assert (tmp_path / "my recipe.yaml").read_text() == "mine"
    run("init", *given, "--force")
    text = (tmp_path / "my recipe.yaml").read_text()
    recipe = Recipe.load(tmp_path / "my recipe.yaml")
    assert recipe.budget == "2GB" and recipe.train.epochs == 3
    assert recipe.data.split is None, "40 are too few to hold some out"
    rows = [line for line in text.splitlines() if ": " in line and not line.startswith("#")]
    bare = [line.split(":")[0].strip() for line in rows if "  # " not in line]
    assert bare == ["seed"], "a value without a reason"


def test_what_is_missing_is_named_where_nobody_can_be_asked(run: Run, tmp_path: Path) -> None:
    err = run("init", code=1)[1]
    assert all(word in err for word in ("no terminal", "--model", "--data", "--device or --budget", "--yes"))
    err = run("init", "--yes", "--data", task(tmp_path, 8), code=1)[1]
    assert "give --model" in err and "--device" not in err


def test_faults_of_flags_come_at_once(run: Run, tmp_path: Path) -> None:
    given = ("--model", "no/such/model", "--data", "none.jsonl", "--device", "rtx1", "--budget", "8")
    err = run("init", *given, code=1)[1]
    assert "4 faults" in err and all(word in err for word in ("no/such/model", "none.jsonl", "rtx1", "no unit"))
    err = run("init", "--model", "llama-3.1-8b", "--data", task(tmp_path, 8), "--yes", code=1)[1]
    assert "can be planned" in err and "meta-llama" in err


def test_a_model_that_cannot_be_reached(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", away)
    data = task(tmp_path, 8)
    err = run("init", "--model", "Qwen/Qwen2.5-0.5B", "--data", data, "--yes", code=1)[1]
    assert "could not be fetched" in err and "no network" in err and not (tmp_path / "recipe.yaml").exists()


def test_questions_are_asked_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"\nnowhere\nmodel\n{task(tmp_path, 8)}\nrtx409\n\n"))
    out, _ = run("init")
    assert "no file or folder 'nowhere'" in out and "unknown device 'rtx409'" in out and "this machine" in out
    assert Recipe.load(tmp_path / "recipe.yaml").device == "auto"
    monkeypatch.setattr("sys.stdin", Terminal("model\n"))
    assert "no answer to: Data" in run("init", "--force", code=1)[1]


@pytest.mark.slow
def test_a_card_that_is_not_here_gets_a_smaller_micro_batch(run: Run, tmp_path: Path) -> None:
    tiny.saved("gpt2", tmp_path / "wide", n_positions=1024, vocab_size=131)
    tiny.words(tmp_path / "wide")
    data = task(tmp_path, 400, longest=900)
    given = ("init", "--model", "wide", "--data", data, "--device", "rtx4090", "--yes", "--force", "--budget")
    run(*given, "1GB")
    found = Recipe.load(tmp_path / "recipe.yaml")
    assert found.device == "cuda" and found.budget == "1GB"
    rows = (found.train.micro_batch or 0) * found.train.accumulate
    assert rows == 8 or found.train.packing, "the examples of a step are the same for every device"
    err = run(*given, "300MB", code=1)[1]
    assert "cannot be trained in" in err and find_device("rtx4090").name in err


# ---- --dry-run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(runs_helper.recipe(tmp_path, train__steps=4).to_yaml())
    return path


def test_dry_run_tells_of_tokens_that_the_data_lacks(run: Run, recipe: Path) -> None:
    told = run("train", recipe, "--dry-run", "tokens.add=[<tool>]", "device=cuda:7", code=1)
    assert "note: no training example holds <tool>" in told[0]


def test_dry_run_tells_all_faults(run: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    err = run("train", recipe, "--dry-run", "data.train=bad.jsonl", "device=cuda:7", code=1)[1]
    assert "3 of 5 checks found a fault" in err
    assert all(word in err for word in ("device: ", "output: ", "data: "))


@pytest.mark.slow
def test_dry_run_holds_the_plan_to_the_budget(run: Run, recipe: Path) -> None:
    err = run("train", recipe, "--dry-run", "budget=300MB", code=1)[1]
    assert "plan: the plan's peak is" in err and "beyond the budget" in err


def test_dry_run_leaves_a_run_as_it_is(run: Run, recipe: Path, tmp_path: Path) -> None:
    run("train", recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "already holds a trained adapter" in run("train", recipe, "--dry-run", code=1)[1]
    out, told = run("train", recipe, "--dry-run", "--overwrite", "--json")
    assert "and replaces the run in it" in told and "nothing was written" in told
    value = json.loads(out)
    assert value["steps"] == 4 and value["seconds"] > 0 and len(value["checks"]) == 9
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert "give one of them" in run("train", tmp_path / "run", "--dry-run", "--resume", code=1)[1]


def test_dry_run_tells_a_full_disk(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, used=9, free=1))
    err = run("train", recipe, "--dry-run", code=1)[1]
    assert "disk: " in err and "has room for" in err and "1 of 9 checks" in err
