"""The command line as a user meets it: outputs, exit codes, errors in one paragraph, JSON for programs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qtune import backend
from qtune.cli import build_parser, main
from qtune.demo import write_task
from qtune.model import load
from qtune.quant import NF4
from qtune.recipe import Recipe

COMMANDS = [
    "chat", "combine", "compare", "completion", "data", "demo", "doctor", "eval", "explain", "export", "import",
    "init", "inspect", "keys", "merge", "methods", "mix", "plan", "quantize", "report", "schemes", "train",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file with a finished run beside it, made by `qtune train`."""
    root = tmp_path_factory.mktemp("a folder with spaces")
    (root / "recipe.yaml").write_text(runs_helper.recipe(root).to_yaml())
    assert main(["train", str(root / "recipe.yaml"), "train.steps=40"]) == 0
    return root


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that must end with `code`."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == code
    out = capsys.readouterr()
    return out.out, out.err


def as_json(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    return json.loads(run(capsys, *argv, "--json")[0])


def test_the_list_of_commands_is_frozen() -> None:
    choices = next(a.choices for a in build_parser()._actions if a.dest == "command")
    assert sorted(choices) == COMMANDS, "a new command is a promise: change this list with care"


def test_train_says_what_lies_where(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "train", root / "recipe.yaml", f"output={root}/other", "--overwrite", "train.steps=2")
    for word in (
        "first example",
        "⟦",
        "trained parameters",
        "eval  before training",
        "eval  after training",
        "adapter.safetensors",
        "qtune merge",
    ):
        assert word in out, word
    assert json.loads((root / "other" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_train_json_is_the_only_thing_on_stdout(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(capsys, "train", root / "recipe.yaml", f"output={root}/j", "train.steps=3")
    assert value["steps"] == 3 and value["before"]["eval_loss"] > 0 and not value["interrupted"]


def test_eval(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(capsys, "eval", root / "run", "--base")
    assert (
        value["adapter"]["accuracy"] > value["base"]["accuracy"] - 1e-9
        and value["adapter"]["eval_loss"] < value["base"]["eval_loss"]
    )
    trained = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row["eval_loss"] for row in trained if "eval_loss" in row][-1]
    assert value["adapter"]["eval_loss"] == pytest.approx(last, rel=1e-6)
    out, _ = run(capsys, "eval", root / "run", "--data", runs_helper.write_task(root, 6, seed=3))
    assert "accuracy" in out and "task3.jsonl" in out


def test_merge_prints_its_verification(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "merge", root / "run")
    assert "computes what was trained" in out and "KL(trained || written)" in out
    AutoModelForCausalLM.from_pretrained(root / "run" / "merged")
    value = as_json(capsys, "merge", root / "run", "--out", root / "again", "--dtype", "float32")
    assert value["passed"] and value["verification"]["layer_error"] <= 1
    assert "already holds a checkpoint" in run(capsys, "merge", root / "run", code=1)[1]


def test_export(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(capsys, "export", root / "run", "--out", root / "peft")
    assert value["format"] == "peft" and (root / "peft" / "adapter_config.json").is_file()


def test_chat_once_and_in_conversation(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = as_json(capsys, "chat", root / "run", "--prompt", "w1 w20", "--max-new-tokens", "3")
    assert value["prompt"] == "w1 w20" and isinstance(value["answer"], str)
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w20\n\n/new\n/help\nw2\n/exit\nw3\n"))
    out, err = run(capsys, "chat", root / "model", "--max-new-tokens", "2", "--json")
    assert [pair["prompt"] for pair in json.loads(out)] == ["w1 w20", "w2"] and err.count("/new starts over") == 2
    assert "must be 0 or more" in run(capsys, "chat", root / "run", "--temperature", "-1", code=1)[1]


def test_quantize_writes_what_loads_without_the_original(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(
        capsys, "quantize", root / "model", "--scheme", "nf4", "block=32", "double=false", "--out", root / "q"
    )
    assert value["scheme"] == {"name": "nf4", "block": 32, "double": False}
    direct = load(root / "model", NF4(block=32, double=False))
    again = load(root / "q", NF4(block=32, double=False))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(direct(ids).logits, again(ids).logits)
    assert (
        "block must be one of" in run(capsys, "quantize", root / "model", "block=33", "--out", root / "q2", code=1)[1]
    )


def test_listings(capsys: pytest.CaptureFixture[str]) -> None:
    methods = {row["method"]: row for row in as_json(capsys, "methods")}
    assert {"lora", "dora", "ia3", "vera", "hira", "hra"} <= set(methods)
    assert all(row["equation"] and row["options"] is not None for row in methods.values())
    assert all(re.search(r"arXiv|ICLR|OpenReview", row["source"]) for row in methods.values()), "a paper comes first"
    schemes = {row["scheme"]: row for row in as_json(capsys, "schemes")}
    assert schemes["nf4"]["bits_per_weight"] == 4.127 and schemes["int8"]["bits_per_weight"] == pytest.approx(8.008)
    keys = {row["name"]: row for row in as_json(capsys, "keys")}
    every = Recipe.keys()
    assert set(keys) == {row.name for row in every} and keys["train.lr"]["default"] == 2e-4
    out = run(capsys, "keys", "max_length")[0]
    assert "data.max_length" in out and "default: 512" in out and "whole number" in out and "train.lr  " not in out
    assert "unknown key 'learning'" in run(capsys, "keys", "learning", code=1)[1]
    lines = run(capsys, "methods")[0].splitlines()
    assert len(lines) == len(methods) + 1 and all(m["equation"] in lines[i] for i, m in enumerate(methods.values()))
    assert as_json(capsys, "methods", "qwha") == methods["qwha"] and "calibration text" in methods["qwha"]["needs"]
    told = " ".join(run(capsys, "methods", "vera")[0].split())
    assert methods["vera"]["needs"] == ["a module that all sites share"] and methods["vera"]["source"] in told
    assert "splitmix64" not in told and "d_initial=0.1" in told and "VERA" in told
    assert "did you mean 'vera'?" in run(capsys, "methods", "verra", code=1)[1]
    for command in ("methods", "schemes"):
        assert "nf4" in run(capsys, command)[0] or "lora" in run(capsys, command)[0]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    value = as_json(capsys, "doctor", "--no-timing")
    assert {"system", "cuda", "mps", "can do", "cpu kernels"} <= set(value["system"])
    assert any(row["op"] == "blockwise4_matmul" for row in value["kernels"])
    assert run(capsys, "doctor", "--markdown")[0].startswith("| op |")


def test_the_doctor_speaks_where_kernels_are_required_and_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("KERNELS", "require"), ("CACHE", str(tmp_path))):
        monkeypatch.setenv(f"QTUNE_{name}", value)
    monkeypatch.setenv("CXX", "/no/compiler")
    backend.reset()
    try:
        value = as_json(capsys, "doctor")
        assert "cpu" not in value["speed"], "the ops would raise"
        assert any(row["provider"] == "none" and "/no/compiler" in row["why"] for row in value["kernels"])
        assert "/no/compiler" in run(capsys, "doctor")[0].replace("\n", "")
    finally:
        monkeypatch.undo()
        backend.reset()


# ---- faults ----


def test_a_fault_is_one_paragraph_and_exit_1(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "train", root / "recipe.yaml", "scheme=nf5", "train.lr=-1", "trian.steps=3", code=1)
    assert "Traceback" not in err and err.startswith("error Q1")
    assert "nf5" in err and "train.lr" in err and "trian" in err, "all faults at once"
    assert "Traceback" in run(capsys, "train", root / "recipe.yaml", "scheme=nf5", "--debug", code=1)[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "no-such.yaml"], "no-such.yaml"),
        (["eval", "no-such-run"], "no-such-run is not a run: it lacks recipe.yaml and adapter.json"),
        (["merge", "no-such-run"], "is not a run"),
        (["chat", "no/such/model"], "no/such/model"),
    ],
)
def test_things_that_are_not_there_are_named(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = run(capsys, *argv, code=1)[1]
    assert words in err.replace("\n", " ") and "not foreseen" not in err and "Traceback" not in err


@pytest.mark.parametrize(
    "argv", [[], ["no-such-command"], ["merge"], ["train", "r.yaml", "--no-such-option"], ["eval", "r", "a=b"]]
)
def test_wrong_use_is_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2 and "usage: qtune" in capsys.readouterr().err


def test_without_a_command_all_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "Write a recipe that fits" in capsys.readouterr().err


def test_a_fault_is_wrapped_between_words_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    err = run(capsys, "keys", "nonsense", code=1)[1]
    assert len(err.splitlines()) == 1, "whole where a program reads it"
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    wrapped = re.sub(r"\x1b\[[0-9;]*m", "", run(capsys, "keys", "nonsense", code=1)[1]).splitlines()
    assert len(wrapped) > 9 and max(map(len, wrapped)) <= 40
    assert " ".join(line.strip() for line in wrapped).startswith(err.strip()), "no word is broken"


@pytest.mark.parametrize(("name", "kind"), [("x.gguf", "a model"), ("train.jsonl", "data")])
def test_what_is_no_recipe_is_told(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert f"{name} is {kind}, not a recipe" in run(capsys, "train", tmp_path / name, code=1)[1]
    told = "give it as --model" if kind == "a model" else "no text in UTF-8"
    assert told in run(capsys, "plan", tmp_path / name, code=1)[1]


def test_damaged_adapter_is_told(root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("recipe.yaml", "adapter.json"):
        (tmp_path / name).write_bytes((root / "run" / name).read_bytes())
    (tmp_path / "adapter.safetensors").write_bytes((root / "run" / "adapter.safetensors").read_bytes()[:-100])
    assert "cut off, or of another save" in run(capsys, "eval", tmp_path, code=1)[1]


def test_out_of_memory_says_what_to_lower(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("qtune.trainer.Trainer.run", full)
    err = run(capsys, "train", root / "recipe.yaml", f"output={root}/oom", code=1)[1]
    assert "Tried to allocate 2.00 GiB" in err and "lower train.micro_batch" in err


# ---- the demo's task ----


def test_the_demo_task_is_split_without_overlap(tmp_path: Path) -> None:
    lines = [
        json.dumps({"input": [{"role": "user", "content": f"headline {i % 2400}"}], "ideal": str(i % 2)})
        for i in range(2600)
    ]
    write_task(lines, tmp_path)
    rows = {
        n: [json.loads(line)["messages"][1]["content"] for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()]
        for n in ("train", "eval")
    }
    assert len(rows["train"]) == 2000 and len(rows["eval"]) == 250 and not set(rows["train"]) & set(rows["eval"])


def test_the_tokenizer_of_the_helper_is_the_one_that_was_written(root: Path) -> None:
    assert PreTrainedTokenizerFast.from_pretrained(root / "model")("w1")["input_ids"] == [5]
