"""A run, its merged checkpoint and its PEFT adapter generate the same greedy tokens in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import runs_helper
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qtune.adapter_export import export_peft
from qtune.adapters.sites import enable_adapters
from qtune.demo import fetch
from qtune.export import merge, write_merged
from qtune.runs import open_base, open_run
from qtune.screen import Screen
from qtune.trainer import train

QUIET = Screen(quiet=True)
TIE = 1e-4  # nats: below it, sums of fp32 in another order may choose another token


@pytest.fixture
def serving(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = script("serving")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "serving.jsonl")
    return module


def alike(found: dict[str, Any], prompts: int) -> None:
    """The same tokens, but for ties."""
    assert found["moved"] < 1e-3
    assert all(difference["gap"] is not None and difference["gap"] < TIE for difference in found["differences"])
    assert found["equal"] >= prompts - 1


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_the_same_tokens(family: str, serving: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.runs.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    run = open_run(train(runs_helper.recipe(tmp_path, family, train__lr=5e-2)).folder, QUIET)
    drawn = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 131, (4 + n % 5,), generator=drawn).tolist() for n in range(20)]
    ours = serving.greedy(run.model.eval(), prompts, 8)
    enable_adapters(run.model, False)
    assert serving.compared(ours, serving.greedy(run.model, prompts, 8))["equal"] < 10, "the adapter does something"
    enable_adapters(run.model, True)
    merge(run, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    alike(serving.compared(ours, serving.greedy(merged.eval(), prompts, 8)), 20)
    export_peft(run, tmp_path / "adapter", QUIET)
    write_merged(open_base(run.folder, QUIET).model, tmp_path / "base", torch.float32, QUIET)
    (tmp_path / "base" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    alike(serving.compared(ours, serving.greedy(adapted.eval(), prompts, 8)), 20)


def test_differences_are_told(serving: ModuleType) -> None:
    ours = [[[(5, -0.5), (6, -1.0)], [(7, -0.25), (8, -0.75)]], [[(5, -0.5), (6, -1.0)], [(7, -0.25), (8, -0.75)]]]
    theirs = [[[(5, -0.5), (6, -1.25)], [(8, -0.5), (7, -0.625)]], ours[1]]
    assert serving.compared(ours, theirs) == {
        "equal": 1, "same_tokens": 3, "moved": 0.375,
        "differences": [{"prompt": 0, "at": 1, "gap": 0.5, "their_gap": 0.125}],
    }  # fmt: skip


@pytest.mark.slow
def test_a_real_model(serving: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2, from what the commands write, in processes that import no qtune."""
    from cells import Rows, prepare

    for name, value in (("STEPS", 4), ("RATE", 4e-3), ("NEW", 12)):
        monkeypatch.setattr(serving, name, value)
    fetch(tmp_path / "demo", QUIET)
    prepare(tmp_path / "demo")
    (tmp_path / "scratch").mkdir()
    book = Rows(serving.RESULTS, "test", same_code=False)
    work = serving.Work(book, tmp_path / "demo", tmp_path / "scratch", None, smoke=False)
    assert len(work.prompts) == 20
    assert serving.compared(work.own("lora"), work.own("lora", adapter=False))["equal"] < 10
    for case in serving.CASES:
        if case.run == "lora" and case.kind != "llama.cpp" and case.dtype == "float32" and "bfloat16" not in case.model:
            alike(work.measured(case), 20)
