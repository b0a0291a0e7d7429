"""Runs where things go wrong or lie elsewhere: other folders, other bases, Ctrl-C, full disks, odd prompts."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from qtune import demo, doctor, evaluate, export, loop, runs, trainer
from qtune.batches import collate
from qtune.cli import main
from qtune.data import Example
from qtune.errors import QtuneError
from qtune.evaluate import EvalResult
from qtune.loss import CHUNK_ELEMENTS
from qtune.model import load
from qtune.quant import Dense
from qtune.recipe import Recipe
from qtune.runs import load_base, open_run, pick_device
from qtune.screen import Screen
from qtune.step import LanguageModel
from qtune.trainer import Trainer, tell_rows, train

QUIET = Screen(quiet=True)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a short run."""
    return train(runs_helper.recipe(tmp_path, train__steps=2)).folder


def as_json(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main([*map(str, argv)]) == 1
    return " ".join(capsys.readouterr().err.split())


# ---- where a run lies and what it says of itself ----


def test_a_run_with_relative_paths_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_helper.recipe(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"model": "model", "data__train": "task0.jsonl", "data__eval": "task1.jsonl", "output": "run"}
    train(runs_helper.recipe(tmp_path, train__steps=1, **names))
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = open_run(tmp_path / "run", QUIET)
    assert export.prompts_of(run) != [list(run.tokenizer(text)["input_ids"]) for text in export.TEXTS]
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").output == str(tmp_path / "run")


def test_a_base_that_is_gone_is_told_with_the_way_out(finished: Path) -> None:
    shutil.rmtree(finished.parent / "model")
    with pytest.raises(QtuneError, match=r"there is no .*model; put it back, or set `model` in .*recipe.yaml"):
        open_run(finished, QUIET)


def test_a_start_from_another_kind_of_adapter_is_refused(finished: Path, tmp_path: Path) -> None:
    recipe = runs_helper.recipe(tmp_path, adapter__rank=8, output=str(tmp_path / "two"))
    with pytest.raises(QtuneError, match="rank is 8, there 4"):
        train(recipe, start_from=finished)
    with pytest.raises(QtuneError, match="both the run to start from and the output"):
        train(runs_helper.recipe(tmp_path), start_from=finished, overwrite=True)
    assert (finished / "adapter.safetensors").exists() and not (tmp_path / "two").exists()


def test_an_overwritten_run_never_pairs_the_old_adapter_with_the_new_recipe(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        train(runs_helper.recipe(tmp_path, adapter__rank=8), overwrite=True)
    assert sorted(p.name for p in finished.iterdir()) == ["recipe.yaml", "run.json"]


def test_a_bad_record_and_a_folder_without_a_model_are_told_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.runs.load", lambda *args, **options: pytest.fail("the model was loaded"))
    recipe = runs_helper.recipe(tmp_path)
    (tmp_path / "task0.jsonl").write_text('{"prompt": "w1"}\n')
    with pytest.raises(QtuneError, match="line 1: has 'prompt' but no 'completion'"):
        train(recipe)
    with pytest.raises(QtuneError, match="has no config.json, so it is no checkpoint folder"):
        train(replace(recipe, model=str(tmp_path)))


def test_a_folder_that_cannot_be_written_is_told_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qtune.runs.load", lambda *args, **options: pytest.fail("the model was loaded"))
    recipe = runs_helper.recipe(tmp_path)
    told = f"cannot write to the folder {recipe.data.train}/x: Not a directory"
    with pytest.raises(QtuneError, match=told):
        train(replace(recipe, output=f"{recipe.data.train}/x"))
    assert told in error_of(capsys, "quantize", recipe.model, "--out", f"{recipe.data.train}/x")


def test_records_without_the_chat_template_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs_helper.recipe(tmp_path, train__steps=1)
    note = "note: prompt records are learned as they stand, without the chat template"
    train(recipe, screen=Screen())
    assert capsys.readouterr().out.count(note) == 1
    for path in Path(recipe.model).glob("chat_template*"):
        path.unlink()
    train(recipe, screen=Screen(), overwrite=True)
    assert note not in capsys.readouterr().out


def test_float16_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(runs_helper.recipe(tmp_path, dtype="float16", train__steps=1), screen=Screen())
    assert "float16 trains without loss scaling" in capsys.readouterr().out


def test_notes_of_loading_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noted(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        model.qtune.notes.append("these two differ in the file")
        return model

    monkeypatch.setattr("qtune.runs.load", noted)
    load_base(runs_helper.recipe(tmp_path), Screen())
    assert "note: these two differ in the file" in capsys.readouterr().out


def test_unknown_device_is_told() -> None:
    for name in ("gpu", "cuda:x", "cuda:99"):
        with pytest.raises(QtuneError, match=f"device '{name}' is not there"):
            pick_device(name)


# ---- training ----


def test_a_full_disk_names_the_file_and_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter(range(4))

    def full(*args: Any, **options: Any) -> Any:
        if next(rows, None) is None:
            raise OSError(28, "No space left on device")
        return open(*args, **options)

    monkeypatch.setattr(loop, "open", full, raising=False)
    with pytest.raises(QtuneError, match=r"metrics.jsonl: No space left on device; .* holds the adapter of step 3"):
        train(runs_helper.recipe(tmp_path))


@pytest.mark.parametrize("at", ["step 4", "after training"])
def test_ctrl_c_in_an_evaluation_stops_it_and_keeps_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    real, seen = Trainer._evaluate, []

    def pressing(self: Trainer, step: int, label: str, *rest: Any) -> EvalResult:
        if label != at:
            return real(self, step, label, *rest)

        def press(*args: object) -> torch.Tensor:
            seen.append(label)
            os.kill(os.getpid(), signal.SIGINT)
            return torch.zeros(())

        with monkeypatch.context() as patch:
            patch.setattr(
                evaluate, "_evaluate_choice", lambda m, e, a, n, d, advance: [(press(), advance(1)) for _ in e]
            )
            return real(self, step, label, *rest)

    monkeypatch.setattr(Trainer, "_evaluate", pressing)
    result = train(runs_helper.recipe(tmp_path, train__eval_every=4))
    assert seen == [at], "the rest of the evaluation is not waited for"
    assert result.interrupted and result.after is None
    assert json.loads((tmp_path / "run" / "adapter.json").read_text())["base"]["step"] == result.steps
    assert result.steps == (4 if at == "step 4" else 8)


def test_padding_is_told_where_there_is_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs_helper.recipe(tmp_path)
    examples = [Example(array("i", range(n)), b"\1" * n, "w") for n in (3, 9, 4, 8)]
    for rows in (1, 2):
        changed = recipe.with_({"train.micro_batch": rows, "train.micro_tokens": None})
        tell_rows(changed, examples, "text", None, Screen())
        assert ("padding" in capsys.readouterr().out) == (rows > 1)


def test_padding_is_not_counted_as_tokens(tmp_path: Path) -> None:
    recipe = runs_helper.recipe(tmp_path, train__steps=None, train__epochs=1, data__eval=None)
    words = sum(len(json.loads(row)["prompt"].split()) for row in Path(recipe.data.train).read_text().splitlines())
    assert train(recipe).tokens == words + 2 * 24, "the words of each prompt, the answer and its end"


def test_lora_plus_reaches_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Trainer] = []
    monkeypatch.setattr(Trainer, "run", lambda self: made.append(self) or trainer.TrainResult(self.folder))
    train(runs_helper.recipe(tmp_path, adapter__plus=16))
    inner = made[0].train_step.optimizer.buckets["0"].inner[0]
    groups = {g["scale"]: {p.shape[-1] for p in g["params"]} for g in inner.param_groups}
    assert groups[16.0] == {4} and 4 not in groups[1.0], "B [out, rank] learns faster, A does not"


# ---- evaluation ----


def test_metrics_are_legal_json() -> None:
    strict = {"allow_nan": False}
    assert json.loads(json.dumps(EvalResult(800.0, 1, 1).to_dict(), **strict))["perplexity"] is None
    assert json.loads(json.dumps(EvalResult(math.nan, 1, 1).to_dict(), **strict))["eval_loss"] is None


def test_long_choices_never_hold_all_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language = LanguageModel(load(runs_helper.write_model(tmp_path / "m"), Dense("float32"), dtype=torch.float32))
    ids = tiny.ids(24)
    batch = collate([Example(row.tolist(), bytes(2) + b"\x01" * 22, "") for row in ids])
    whole = evaluate._log_likelihood(language, batch)
    rows = []
    language.head.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    monkeypatch.setattr("qtune.loss.CHUNK_ELEMENTS", 1)
    assert torch.allclose(evaluate._log_likelihood(language, batch), whole, atol=1e-4) and max(rows) == 16
    assert CHUNK_ELEMENTS > 1


def test_a_batch_of_none_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for batch in (0, -1):
        assert f"--batch is {batch}; legal: 1 or more" in error_of(capsys, "eval", finished, "--batch", batch)


# ---- chat ----


def test_a_conversation_is_one_json_value(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w20\nw2\n"))
    told = as_json(capsys, "chat", finished, "--max-new-tokens", 2)
    assert [turn["prompt"] for turn in told] == ["w1 w20", "w2"] and all("answer" in turn for turn in told)


def test_chat_takes_the_template_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}w90 {{ m['content'] }} {% endfor %}w91 ")
    folder = train(runs_helper.recipe(tmp_path, train__steps=1, data__template=str(template))).folder
    seen: list[list[int]] = []
    monkeypatch.setattr("qtune.chat.generate", lambda m, t, ids, **options: seen.append(ids) or "")
    main(["chat", str(folder), "--prompt", "w1"])
    assert seen == [[94, 5, 95]]


def test_chat_keeps_a_packed_folder_as_it_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = runs_helper.write_model(tmp_path / "model")
    for name, scheme in (("nf4", "block=32"), ("int8", None)):
        out = tmp_path / name
        capsys.readouterr()
        assert main(["quantize", str(model), "--scheme", name, *filter(None, [scheme]), "--out", str(out)]) == 0
        assert f"name: {name}" in capsys.readouterr().out, "the recipe's words for it"
        assert (out / "LICENSE").is_file()
        assert as_json(capsys, "chat", out, "--prompt", "w1", "--max-new-tokens", 1)["prompt"] == "w1"


def test_what_chat_cannot_do_is_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a run, whose base is stored" in error_of(capsys, "chat", finished, "--scheme", "int8", "--prompt", "w1")
    assert "the prompt is empty" in error_of(capsys, "chat", finished, "--prompt", "")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(finished.parent / "model")
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    tokenizer.save_pretrained(finished.parent / "model")
    assert "refuses the conversation: no system role" in error_of(capsys, "chat", finished, "--prompt", "w1")


# ---- merge ----


def test_a_failed_merge_leaves_nothing_behind(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(finished, QUIET)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.tokenizer, "save_pretrained", full)
    with pytest.raises(QtuneError, match=r"cannot write .*merged.unverified: .*No space left on device"):
        export.merge(run, finished / "merged")
    assert not list(finished.glob("merged*"))


def test_the_base_itself_is_never_overwritten(finished: Path) -> None:
    with pytest.raises(QtuneError, match="holds the base model of this run"):
        export.merge(open_run(finished, QUIET), finished.parent / "model", overwrite=True)


def test_a_merge_keeps_a_generation_config_that_transformers_would_not_write(finished: Path) -> None:
    run = open_run(finished, QUIET)
    run.model.generation_config.temperature = 0.7  # without do_sample: many published models say so
    export.merge(run, finished / "merged")
    assert json.loads((finished / "merged" / "generation_config.json").read_text())["temperature"] == 0.7


def test_nested_configs_say_the_same_dtype(finished: Path, tmp_path: Path) -> None:
    run = open_run(finished, QUIET)
    nested = run.model.config.to_dict() | {"text_config": {"dtype": "float32", "hidden_size": 64}}
    run.model.config.to_dict = lambda: nested
    (tmp_path / "out").mkdir()
    export._write_companions(run, run.model, tmp_path / "out", "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


def test_the_licence_of_a_hub_model_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "LICENSE.md").write_text("words")
    monkeypatch.setattr(runs, "open_source", lambda model: type("Source", (), {"path": tmp_path}))
    assert [path.name for path in runs.licences("owner/name")] == ["LICENSE.md"]


def test_a_card_names_no_folder_of_this_machine(finished: Path) -> None:
    export.merge(open_run(finished, QUIET), finished / "merged")
    assert str(finished.parent) not in (finished / "merged" / "README.md").read_text()


def test_prompts_of_a_large_file_do_not_tokenize_all_of_it(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, counts = open_run(finished, QUIET), []
    real = export.tokenize
    monkeypatch.setattr(export, "tokenize", lambda r, *a, **o: counts.append(len(r)) or real(r, *a, **o))
    assert len(export.prompts_of(run)) == export.PROMPTS == counts[0]
    broken = replace(run.recipe.data, eval=str(finished / "recipe.yaml"), train=None)
    run.recipe = replace(run.recipe, data=broken)
    assert len(export.prompts_of(run)) == len(export.TEXTS), "data that changed since is no fault of the merge"


# ---- the command line and the demo ----


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory; lower train.micro_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "lower train.micro_batch"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_full_machine_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    (tmp_path / "r.yaml").write_text(runs_helper.recipe(tmp_path).to_yaml())
    monkeypatch.setattr("qtune.trainer.train", fail)
    told = error_of(capsys, "train", tmp_path / "r.yaml")
    assert words in told and "not foreseen" not in told


def test_an_interrupted_run_says_a_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(runs_helper.recipe(tmp_path, train__steps=1).to_yaml())
    monkeypatch.setattr(Trainer, "_loop", lambda self, result, stop: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "r.yaml"), "adapter.rank=2", f"output={tmp_path}/one"])
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("go on"))
    monkeypatch.undo()
    assert main(line.partition("qtune ")[2].split()) == 0
    assert Recipe.load(tmp_path / "one" / "recipe.yaml").adapter.options["rank"] == 2
    assert json.loads((tmp_path / "one" / "adapter.json").read_text())["base"]["step"] == 1


def test_the_demo_takes_any_folder_name(tmp_path: Path) -> None:
    folder = tmp_path / "a, b: #c 'd"
    folder.mkdir()
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("{}")
    (folder / "recipe.yaml").write_text(demo.RECIPE.format(folder=json.dumps(str(folder))[1:-1]))
    recipe = Recipe.load(folder / "recipe.yaml")
    assert recipe.output == f"{folder}/run" and recipe.data.train == f"{folder}/train.jsonl"


def test_the_doctor_does_not_count_emulated_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = type("GPU", (), {"name": "T4", "total_memory": 16 << 30, "major": 7, "minor": 5})
    for name, value in (("is_available", True), ("device_count", 1), ("is_bf16_supported", True)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *a, value=value: value)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: gpu)
    assert "no fast bf16" in doctor._cuda()
