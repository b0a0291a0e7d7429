"""Broken PEFT folders: each is refused with a code and what is wrong, without a traceback, and nothing is written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_malformed import NEST, Bench, bench, edit, elsewhere, header, put, refused, some, tensors

from qtune.cli import main

__all__ = ["bench", "elsewhere"]  # fixtures

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SITE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{SITE}.lora_A.weight", f"{SITE}.lora_B.weight"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folder(bench: Bench) -> Path:
    """The adapter of the bench's run as PEFT reads it."""
    out = bench.root / "peft"
    assert main(["export", str(bench.root / "run"), "--out", str(out), "--json"]) == 0
    return out


def config(**changes: Any) -> Damage:
    return lambda f: edit(f / CONFIG, **changes)


def text(old: str, new: str) -> Damage:
    def damage(f: Path) -> None:
        whole = (f / CONFIG).read_text()
        assert old in whole
        put(f / CONFIG, whole.replace(old, new, 1))

    return damage


def held(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    return lambda f: tensors(f / TENSORS, change)


def head(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda f: header(f / TENSORS, change)


def cut(nbytes: int) -> Damage:
    return lambda f: put(f / TENSORS, (f / TENSORS).read_bytes()[:nbytes])


def length(claimed: int) -> Damage:
    return lambda f: put(f / TENSORS, struct.pack("<Q", claimed) + (f / TENSORS).read_bytes()[8:])


def filled(name: str, value: float) -> Damage:
    return held(lambda t: t[name].view(-1)[3:4].fill_(value))


def pickled(f: Path) -> None:
    torch.save({A: torch.zeros(4, 64)}, f / "adapter_model.bin")
    (f / TENSORS).unlink()


def renamed(old: str, new: str) -> Damage:
    return held(lambda t: t.update({new: t.pop(old)}))


CASES: dict[str, tuple[Damage, str]] = {
    "config missing": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "config empty": (lambda f: put(f / CONFIG, ""), CONFIG),
    "config binary": (lambda f: put(f / CONFIG, bytes(range(256))), CONFIG),
    "config cut off": (lambda f: put(f / CONFIG, (f / CONFIG).read_text()[:120]), CONFIG),
    "config a list": (lambda f: put(f / CONFIG, "[1]"), CONFIG),
    "config a folder": (lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()), CONFIG),
    "config deep": (lambda f: put(f / CONFIG, NEST), CONFIG),
    "type absent": (config(peft_type=...), "peft_type is None"),
    "type a mapping": (config(peft_type={"a": 1}), "peft_type"),
    "type of prompts": (config(peft_type="PROMPT_TUNING"), "PROMPT_TUNING"),
    "rank absent": (config(r=...), "r is None"),
    "rank text": (config(r="4"), "r is '4'"),
    "rank true": (config(r=True), "r is True"),
    "rank a fraction": (config(r=4.5), "r is 4.5"),
    "rank zero": (config(r=0), "rank"),
    "rank negative": (config(r=-4), "rank"),
    "rank huge": (config(r=10**30), "r is 1000"),
    "rank of another size": (config(r=5), "the rank 5"),
    "alpha absent": (config(lora_alpha=...), "lora_alpha is None"),
    "alpha nan": (text('"lora_alpha": 32.0', '"lora_alpha": NaN'), "lora_alpha is nan"),
    "alpha zero": (config(lora_alpha=0), "adapter.alpha"),
    "alpha a list": (config(lora_alpha=[32]), "lora_alpha is [32]"),
    "dropout one": (config(lora_dropout=1.0), "adapter.dropout"),
    "rslora text": (config(use_rslora="yes"), "use_rslora is 'yes'"),
    "dora without magnitudes": (config(use_dora=True), "lora_magnitude_vector"),
    "patterns a list": (config(rank_pattern=[4]), "rank_pattern is [4]"),
    "pattern no expression": (config(rank_pattern={"q_proj(": 8}), "rank_pattern"),
    "pattern of text": (config(alpha_pattern={"q_proj": "8"}), "alpha_pattern"),
    "pattern against tensors": (config(rank_pattern={"q_proj": 8}), "the rank 8"),
    "targets absent": (config(target_modules=...), "target_modules leaves it out"),
    "targets a number": (config(target_modules=7), "target_modules is 7"),
    "targets of numbers": (config(target_modules=[1, 2]), "target_modules is [1, 2]"),
    "targets no expression": (config(target_modules="(q_proj"), "target_modules"),
    "targets fewer": (config(target_modules=["q_proj"]), "leaves it out"),
    "targets more": (config(target_modules=".*(_proj|lm_head)"), "lm_head"),
    "layers text": (config(layers_to_transform="0"), "layers_to_transform"),
    "layers other": (config(layers_to_transform=[0]), "leaves it out"),
    "whole modules": (config(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (config(bias="all"), "bias"),
    "a start that moved the base": (config(init_lora_weights="olora"), "init_lora_weights"),
    "tokens without rows": (config(trainable_token_indices=[5]), "trainable_token_indices"),
    "tokens of text": (config(trainable_token_indices=["a"]), "trainable_token_indices"),
    "weights missing": (lambda f: (f / TENSORS).unlink(), TENSORS),
    "weights a pickle": (pickled, "save it again"),
    "weights empty": (cut(0), TENSORS),
    "weights cut off": (cut(5000), "truncated"),
    "header beyond the file": (length(1 << 40), "truncated"),
    "header longer than the format allows": (length((1 << 63) - 1), "truncated"),
    "header no json": (lambda f: put(f / TENSORS, struct.pack("<Q", 4) + b"abcd"), TENSORS),
    "offsets that leave the file": (head(lambda h: h[A].update(data_offsets=[0, 1 << 40])), A),
    "offsets of another size": (head(lambda h: h[A].update(shape=[4, 65])), A),
    "a dtype that is none": (head(lambda h: h[A].update(dtype="F5")), A),
    "a name that leaves the model": (renamed(A, "../../etc/passwd.lora_A.weight"), "passwd"),
    "a name of another model": (renamed(A, A.replace("model.layers.0", "transformer.h.0")), "lacks"),
    "a tensor missing": (held(lambda t: t.pop(B)), B.removeprefix("base_model.model.")),
    "a tensor too many": (held(lambda t: t.update({f"{SITE}.lora_C.weight": torch.zeros(4)})), "lora_C"),
    "a bias": (held(lambda t: t.update({f"{SITE}.lora_B.bias": torch.zeros(64)})), "lora_B.bias"),
    "no tensors": (held(lambda t: t.clear()), TENSORS),
    "not a number": (filled(A, float("nan")), A),
    "infinite": (filled(B, float("inf")), B),
    "whole numbers": (held(lambda t: t.update({A: t[A].to(torch.int32)})), A),
    "A of other inputs": (held(lambda t: t.update({A: torch.ones(4, 65)})), "(4, 65)"),
    "B turned": (held(lambda t: t.update({B: t[B].T.contiguous()})), "(4, 64)"),
    "one dimension": (held(lambda t: t.update({A: torch.ones(256)})), "(256,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", some(CASES, 4))
def test_peft_folders(
    name: str, bench: Bench, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = CASES[name]
    broken = Path(shutil.copytree(folder, tmp_path / "peft"))
    damage(broken)
    argv = ["import", str(broken), "--base", str(bench.root / "model"), "--out", str(tmp_path / "new"), "dtype=float32"]
    refused(bench, tmp_path, argv, words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft"], "something was written"


@pytest.mark.parametrize(("argv", "words"), [
    (["import", "{peft}", "--base", "no/such-model", "--out", "new"], "no/such-model"),
    (["import", "nowhere", "--base", "{model}", "--out", "new"], "nowhere"),
    (["import", "{peft}", "--base", "{model}", "--out", "peft"], "choose another"),
    (["import", "{peft}", "--base", "{model}", "--out", "new", "adapter.rank=8"], "adapter.rank=8"),
    (["import", "{peft}", "--base", "{model}", "--out", "new", "--scheme", "nf5"], "nf5"),
    (["import", "{peft}", "--base", "{model}", "--out", "/proc/new"], "/proc"),
])  # fmt: skip
def test_wrong_uses(
    argv: list[str], words: str, bench: Bench, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "peft")
    places = {"{peft}": str(tmp_path / "peft"), "{model}": str(bench.root / "model")}
    refused(bench, tmp_path, [places.get(word, word) for word in argv], words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft"], "something was written"


def test_a_base_of_other_sizes(bench: Bench, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runs_helper

    other = runs_helper.write_model(tmp_path / "other", "qwen3")
    argv = ["import", str(folder), "--base", str(other), "--out", str(tmp_path / "new")]
    refused(bench, tmp_path, argv, "the layer needs", capsys)
    assert json.loads((folder / CONFIG).read_text()) and not (tmp_path / "new").exists()
