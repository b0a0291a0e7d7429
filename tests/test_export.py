"""Merge and its verification: transformers computes what was trained, and a wrong checkpoint is caught."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qtune import export
from qtune.adapters import METHODS, Adapted, adapted_sites
from qtune.data import load_source
from qtune.errors import QtuneError
from qtune.export import merge, merged_entries
from qtune.runs import Run, open_run
from qtune.screen import Screen
from qtune.trainer import train
from qtune.verify import check_layers
from qtune.version import version

QUIET = Screen(quiet=True)


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers picks a family's own tokenizer class by the config, which cannot read our one-word vocabulary."""
    monkeypatch.setattr("qtune.runs.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Equal but for fp32 sums in another order: a delta that got lost differs by a hundred times more."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def tokens_of(run: Run) -> str:
    """sha256 over the training examples: how many tokens, their ids (int32), and a byte each for those trained."""
    keys, whole = run.recipe.data, hashlib.sha256()
    assert keys.train is not None
    for example in load_source(keys.train, run.tokenizer, keys, seed=run.recipe.train.seed)[0]:
        count, ids = len(example.input_ids), list(example.input_ids)
        whole.update(struct.pack(f"<Q{count}i{count}B", count, *ids, *example.trained))
    return whole.hexdigest()


def finished(root: Path, family: str = "llama", **changes: Any) -> Run:
    """A trained run, opened."""
    recipe = runs_helper.recipe(root, family, **{"train__steps": 4, "train__lr": 3e-2} | changes)
    return open_run(train(recipe, overwrite=True).folder, QUIET)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run of a Llama in a dtype of compute, trained once and opened anew each time; tests must not write into it."""

    @cache
    def folder(dtype: str) -> Path:
        return finished(tmp_path_factory.mktemp(dtype), dtype=dtype).folder

    return lambda dtype: open_run(folder(dtype), QUIET)


def families() -> list[Any]:
    """Every family on one scheme; on the other it is slow."""
    return [
        pytest.param(family, scheme, marks=[pytest.mark.slow] if (place + (scheme == "nf4")) % 2 else [])
        for place, family in enumerate(tiny.DENSE)
        for scheme in ("nf4", "int8")
    ]


@pytest.mark.parametrize(("family", "scheme"), families())
def test_transformers_computes_what_was_trained(family: str, scheme: str, tmp_path: Path) -> None:
    run = finished(tmp_path, family, scheme=scheme)
    trained, base = tiny.logits(run.model), None
    for site in adapted_sites(run.model).values():
        site.enabled = False
    base = tiny.logits(run.model)
    for site in adapted_sites(run.model).values():
        site.enabled = True
    report = merge(run, tmp_path / "merged", dtype="float32")
    merged = tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert report.verification.passed and report.verification.layers == len(adapted_sites(run.model))
    assert (trained - base).abs().max() > 0.05, "the adapter does something"
    assert same(merged, trained)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_merges_or_says_why_not(method: str, tmp_path: Path) -> None:
    run = finished(tmp_path, adapter=method, train__steps=2, calibrate__length=16, **runs_helper.other_scheme(method))
    trained = tiny.logits(run.model)
    if not METHODS[method].mergeable:
        with pytest.raises(QtuneError, match="no weight does the same"):
            merge(run, tmp_path / "merged")
        return
    report = merge(run, tmp_path / "merged", dtype="float32")
    assert report.verification.passed
    merged = tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert same(merged, trained, 5e-4)  # two steps at this rate leave large deltas of some methods, which round more


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_dtypes(dtype: str, compute: str, tmp_path: Path, opened: Callable[[str], Run]) -> None:
    run = opened(compute)
    report = merge(run, tmp_path / "merged", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert report.verification.passed and report.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_folder_is_complete(tmp_path: Path, opened: Callable[[str], Run]) -> None:
    run = opened("float32")
    merge(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "LICENSE").read_text() == "Licence of the base\n"
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "LICENSE" in card and "computes what was trained" in card and "nf4(block=32" in card
    assert f"- training data, sha256 of its tokens: {tokens_of(run)}" in card and f"qtune {version()}" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w1 w2")["input_ids"] == [5, 6]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not list(tmp_path.glob("*.unverified"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", [None, "int8"])
def test_ties_and_packed_embeddings(tied: bool, embeddings: str | None, tmp_path: Path) -> None:
    runs_helper.write_model(tmp_path / "model", "llama", tie_word_embeddings=tied)
    run = finished(tmp_path, scheme__embeddings=embeddings)
    trained = tiny.logits(run.model)
    merge(run, tmp_path / "merged", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert same(tiny.logits(model), trained)


def test_an_adapted_head_is_untied(tmp_path: Path) -> None:
    run = finished(tmp_path, "llama-tied", scheme__embeddings="int8", adapter__targets="all-linear,lm_head")
    assert isinstance(run.model.lm_head, Adapted)
    trained = tiny.logits(run.model)
    merge(run, tmp_path / "merged", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert same(tiny.logits(model), trained)


def test_keep_base_original(tmp_path: Path, opened: Callable[[str], Run]) -> None:
    run = opened("float32")
    trained = tiny.logits(run.model)
    report = merge(run, tmp_path / "merged", dtype="float32", keep_base="original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(run.folder.parent / "model")
    site = next(iter(adapted_sites(run.model)))
    delta = adapted_sites(run.model)[site].merged()[0] - adapted_sites(run.model)[site].base.dequantize()
    assert torch.allclose(model.get_submodule(site).weight - plain.get_submodule(site).weight, delta, atol=1e-6)
    assert report.verification.passed and report.base_kl is not None and report.base_kl > 0
    assert not torch.allclose(tiny.logits(model), trained, atol=1e-2), "it is another function than was trained"


# ---- what must not pass ----


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change one merged weight on its way to the file."""
    real = merged_entries

    def changed(model: Any, dtype: torch.dtype) -> Any:
        for entry in real(model, dtype):
            if entry.name.endswith("layers.1.self_attn.q_proj.weight"):
                old = entry.tensor
                entry = type(entry)(entry.name, entry.dtype, entry.shape, lambda old=old: change(old()))
            yield entry

    monkeypatch.setattr(export, "merged_entries", changed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_wrong_weight_fails_and_stays_for_inspection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, opened: Callable[[str], Run]
) -> None:
    run = opened("bfloat16")
    spoil(monkeypatch, lambda w: w * 1.01)
    with pytest.raises(QtuneError, match=r"failed its verification[\s\S]*q_proj"):
        merge(run, tmp_path / "merged", dtype=dtype)
    assert not (tmp_path / "merged").exists() and (tmp_path / "merged.unverified" / "config.json").exists()


def test_a_lost_delta_fails(tmp_path: Path, opened: Callable[[str], Run]) -> None:
    """A delta of about 1 % of W that did not arrive is beyond bf16 rounding."""
    run = opened("bfloat16")
    for site in adapted_sites(run.model).values():
        weight, delta = site.base.dequantize(), site.merged()[0] - site.base.dequantize()
        site.adapter.scale *= float(0.01 * weight.norm() / delta.norm())
    merge(run, tmp_path / "merged")
    assert check_layers(adapted_sites(run.model), tmp_path / "merged", torch.bfloat16)[0] <= 1
    for site in adapted_sites(run.model).values():
        site.adapter.scale = 0.0
    merge(run, tmp_path / "plain")
    run = opened("bfloat16")
    for site in adapted_sites(run.model).values():
        weight, delta = site.base.dequantize(), site.merged()[0] - site.base.dequantize()
        site.adapter.scale *= float(0.01 * weight.norm() / delta.norm())
    assert check_layers(adapted_sites(run.model), tmp_path / "plain", torch.bfloat16)[0] > 1


def test_nan_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[str], Run]) -> None:
    run = opened("float32")
    spoil(monkeypatch, lambda w: w * float("nan"))
    with pytest.raises(QtuneError, match="failed its verification"):
        merge(run, tmp_path / "merged")


def test_overflow_names_layer_and_way_out(tmp_path: Path, opened: Callable[[str], Run]) -> None:
    run = opened("float32")
    next(iter(adapted_sites(run.model).values())).adapter.B.data.fill_(1e6)
    with pytest.raises(
        QtuneError, match=r"q_proj.weight: merged values overflow torch.float16; merge with --dtype bfloat16"
    ):
        merge(run, tmp_path / "merged", dtype="float16")


def test_wrong_options_and_folders(tmp_path: Path, opened: Callable[[str], Run]) -> None:
    run = opened("float32")
    with pytest.raises(QtuneError, match=r"unknown dtype 'int8'; legal: bfloat16.*unknown --keep-base 'x'"):
        merge(run, tmp_path / "merged", dtype="int8", keep_base="x")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(QtuneError, match="exists and is not a checkpoint"):
            merge(run, precious, overwrite=overwrite)
    assert (precious / "thesis.txt").read_text() == "mine"
    merge(run, tmp_path / "merged")
    with pytest.raises(QtuneError, match="already holds a checkpoint"):
        merge(run, tmp_path / "merged")
    merge(run, tmp_path / "merged", overwrite=True)


def test_a_run_on_another_base_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    shutil.rmtree(tmp_path / "model")
    tiny.saved("llama", tmp_path / "model", initializer_range=0.2)
    tiny.words(tmp_path / "model")
    with pytest.raises(QtuneError, match="does not fit this model"):
        open_run(tmp_path / "run", QUIET)
