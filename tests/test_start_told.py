"""What a user is told of starts and chosen codes: files of a run, text that is not read, bases that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs_helper
from transformers import PreTrainedTokenizerFast

from qtune.cli import main
from qtune.errors import QtuneError
from qtune.recipe import Recipe
from qtune.runs import open_run
from qtune.screen import Screen
from qtune.trainer import train

QUIET = Screen(quiet=True)
PISSA = {"method": "pissa", "rank": 4}


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers picks a family's own tokenizer class by the config, which cannot read our one-word vocabulary."""
    monkeypatch.setattr("qtune.runs.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)


@pytest.fixture(scope="module")
def pissa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose base's codes are its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtune.runs.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
        return train(runs_helper.recipe(tmp_path_factory.mktemp("pissa"), adapter=PISSA, train__steps=1)).folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints, both streams."""

    def run(*argv: object, code: int = 0) -> str:
        assert main([str(a) for a in argv]) == code
        told = capsys.readouterr()
        return told.out + told.err

    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": "int8"}, r"scheme is int8.*, there nf4\(block=32.*give the recipe the same"),
        ({"calibrate.codes": "gptq"}, r"calibrate\.codes is gptq, there nearest"),
    ],
    ids=["scheme", "codes"],
)
def test_a_start_from_a_run_on_another_base_is_told_before_loading(
    changes: dict[str, Any], words: str, pissa: Path, tmp_path: Path
) -> None:
    recipe = Recipe.load(pissa / "recipe.yaml", {"output": str(tmp_path / "next"), **changes})
    with pytest.raises(QtuneError, match=words):
        train(recipe, start_from=pissa)
    assert not (tmp_path / "next").exists()


def test_first_values_of_another_run_are_told_by_their_file(pissa: Path, tmp_path: Path) -> None:
    from qtune.adapter_export import export_peft

    folder = shutil.copytree(pissa, tmp_path / "run")
    other = train(runs_helper.recipe(tmp_path, adapter=PISSA | {"rank": 3}, train__steps=1, output=str(tmp_path / "o")))
    shutil.copyfile(other.folder / "start.safetensors", folder / "start.safetensors")
    info = json.loads((folder / "adapter.json").read_text())
    info["first"] = json.loads((other.folder / "adapter.json").read_text())["first"]
    (folder / "adapter.json").write_text(json.dumps(info))
    with pytest.raises(QtuneError, match=r"start\.safetensors does not fit.*\(3, 64\).* in start\.safetensors, the"):
        export_peft(open_run(folder, QUIET), tmp_path / "out", QUIET)
    (folder / "start.safetensors").unlink()
    with pytest.raises(QtuneError, match=r"start\.safetensors, which holds the adapter's first values"):
        export_peft(open_run(folder, QUIET), tmp_path / "out", QUIET)


def test_train_names_every_file_that_it_left(pissa: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    told = said("train", pissa / "recipe.yaml", f"output={tmp_path / 'next'}")
    line = next(line for line in told.splitlines() if " holds recipe.yaml" in line)
    assert all(path.name in line for path in (tmp_path / "next").iterdir() if path.is_file())
    assert "base.safetensors" in line and "start.safetensors" in line


def test_text_is_told_as_it_is_taken(tmp_path: Path, said: Callable[..., str]) -> None:
    (tmp_path / "recipe.yaml").write_text(runs_helper.recipe(tmp_path, train__steps=1).to_yaml())
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 40}" for i in range(400)))
    common = ("train", tmp_path / "recipe.yaml", "--overwrite", f"calibrate.data={tmp_path / 'text.txt'}")
    assert "text.txt is not read" in said(*common)
    text = ("calibrate.codes=gptq", "calibrate.length=256")
    assert "1 window of 256 tokens of text.txt, all that there is (calibrate.samples is 64)" in said(*common, *text)
    full = said(*common, "calibrate.codes=gptq", "calibrate.length=16", "calibrate.samples=8")
    assert "8 windows of 16 tokens of text.txt\n" in full


def test_quantize_speaks_of_its_own_options(tmp_path: Path, said: Callable[..., str]) -> None:
    model, text, out = runs_helper.write_model(tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(f"w{i % 40}" for i in range(400)))
    assert "give --data FILE" in said("quantize", model, "--codes", "gptq", "--out", out, code=1)
    assert "unknown --codes 'gtq'" in said("quantize", model, "--codes", "gtq", "--out", out, code=1)
    chosen = ("quantize", model, "--scheme", "int3", "group=32", "--codes", "gptq", "--data", text, "--out", out)
    assert "smaller calibrate.length" in said(*chosen, code=1)
    assert "windows of 16 tokens" in said(*chosen, "calibrate.length=16")


def test_what_makes_no_sense_on_a_scheme_is_a_fault_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(QtuneError, match=r"(?s)2 faults.*method is loftq, scheme is dense.*codes is gptq: .*no codes"):
        runs_helper.recipe(tmp_path, scheme="dense", adapter="loftq", calibrate__codes="gptq")


def test_export_refuses_a_base_that_is_none_before_loading(
    pissa: Path, tmp_path: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.runs.open_run", lambda *_, **__: pytest.fail("the model was loaded"))
    told = said("export", pissa, "--out", tmp_path / "out", "--keep-base", "packed", code=1)
    assert "unknown --keep-base 'packed'; legal: original, trained" in told


def test_schemes_tell_how_several_go_together(said: Callable[..., str]) -> None:
    assert "{bits: 2.5, high: nf4, low: nf2}" in said("schemes").replace("\n", " ")


def test_an_adapter_that_makes_up_for_int3_leaves_for_the_original_weights(
    tmp_path: Path, said: Callable[..., str]
) -> None:
    """Nobody else has int3: put on the original weights as it is, its start would count twice."""
    loftq = {"adapter": {"method": "loftq", "rank": 4}, "train__steps": 1, "scheme": {"name": "int3", "group": 32}}
    folder = train(runs_helper.recipe(tmp_path, **loftq)).folder
    assert "goes on the original weights" in said("export", folder, "--out", tmp_path / "a")
    asked = said("export", folder, "--out", tmp_path / "b", "--keep-base", "trained")
    assert "goes on the base that it was trained on" in asked and "int3(group=32)" in asked
    plain = train(runs_helper.recipe(tmp_path, train__steps=1, scheme="int3", output=str(tmp_path / "lora"))).folder
    assert "that it was trained on" in said("export", plain, "--out", tmp_path / "c")
