"""Merged GGUF files: transformers and our own reader load them, and they compute what was trained; what cannot be said
is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import runs_helper
import tiny
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from qtune.cli import main
from qtune.errors import QtuneError
from qtune.gguf import GGUF
from qtune.gguf_merge import merge_gguf
from qtune.model import gguf_out, load, load_tokenizer
from qtune.quant import Dense
from qtune.runs import Run, open_run
from qtune.screen import Screen
from qtune.trainer import train

F32 = torch.float32
QUIET = Screen(quiet=True)


def byte_level(folder: Path, cut: Any = None) -> Any:
    """A byte-level BPE tokenizer of tiny.VOCAB tokens with a chat template, written to `folder`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", "<|endoftext|>", "Ġw", *(letter for letter in letters if letter in "Ġw0123456789")]
    words += [f"<|{i}|>" for i in range(tiny.VOCAB - len(words))]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocabulary, [("Ġ", "w")]))
    inner.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(word, special=True) for word in ("<pad>", "<s>", "</s>")])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def finished(root: Path, family: str, changes: dict[str, Any] | None = None, **keys: Any) -> Run:
    model = root / "model"
    tiny.saved(family, model, **(changes or {}))
    byte_level(model)
    recipe = runs_helper.recipe(root, family, train__steps=3, **keys)
    return open_run(train(recipe, overwrite=True).folder, QUIET)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"adapter.targets": "all-linear,lm_head", "scheme.embeddings": "int8"}),
    "llama-tied": ("llama-tied", {"attention_bias": False, "head_dim": 16}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3-moe": ("qwen3-moe", {}, {"adapter.targets": "all-linear,*.experts.*"}),
    "new tokens": ("qwen2", {}, {"tokens.add": ["<tool>", "<call>"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_computes_what_was_trained(case: str, tmp_path: Path) -> None:
    family, changes, keys = CASES[case]
    run = finished(tmp_path, family, changes, **{key.replace(".", "__"): value for key, value in keys.items()})
    want = tiny.logits(run.model)
    report = merge_gguf(run, tmp_path / "out.gguf", "bf16", screen=QUIET)
    assert report.verification.passed and not list(tmp_path.glob("*.unverified"))
    assert report.verification.layers > 0 and report.verification.kl_max < 1e-2
    found = GGUF(tmp_path / "out.gguf")
    kinds = {entry.kind for name, entry in found.tensors.items() if len(entry.shape) > 1}
    assert kinds == {int(gguf.GGMLQuantizationType.BF16)}
    assert ("output.weight" in found.tensors) == (not run.model.config.tie_word_embeddings)
    if family not in ("llama", "qwen3", "qwen3-moe"):  # of which transformers does not read all of the header
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=F32)
        assert (tiny.logits(theirs) - want).abs().max() < 0.05 * want.abs().max()
        text = "w1 w20 w7"
        tokenizer = load_tokenizer(tmp_path / "out.gguf")
        assert tokenizer(text)["input_ids"] == run.tokenizer(text)["input_ids"]
        assert tokenizer.chat_template == run.tokenizer.chat_template
    if case == "new tokens":
        tokens = found.header()["tokenizer.ggml.tokens"].value
        assert tokens[-2:] == ["<tool>", "<call>"] and found.tensors["token_embd.weight"].shape[0] == len(tokens)
    if family == "llama":  # llama3's rope: the factors are transformers' own
        rope = run.model.model.rotary_emb
        plain = 5e5 ** (-torch.arange(8, dtype=F32) / 8)
        torch.testing.assert_close(found.read("rope_freqs.weight"), plain / rope.inv_freq)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_types(kind: str, tmp_path: Path) -> None:
    run = finished(tmp_path, "qwen2")
    report = merge_gguf(run, tmp_path / "out.gguf", kind, screen=QUIET)
    assert report.verification.kl_max < {"f32": 1e-6, "f16": 1e-5, "q8_0": 1e-2}[kind]
    found = {e.kind for e in GGUF(tmp_path / "out.gguf").tensors.values() if len(e.shape) > 1}
    assert found == {int(gguf.GGMLQuantizationType[kind.upper()])}
    with pytest.raises(QtuneError, match="exists already"):
        merge_gguf(run, tmp_path / "out.gguf", kind, screen=QUIET)


def test_a_base_that_is_a_gguf_file_keeps_its_header(tmp_path: Path) -> None:
    """Once merged, the file is the base of a run, which is merged again."""
    first = finished(tmp_path / "one", "qwen2", tokens__add=["<tool>"])
    merge_gguf(first, tmp_path / "base.gguf", "f16", screen=QUIET)
    model = str(tmp_path / "base.gguf")
    recipe = runs_helper.recipe(tmp_path / "two", "qwen2", train__steps=2, model=model)
    second = open_run(train(recipe, overwrite=True).folder, QUIET)
    want = tiny.logits(second.model)
    merge_gguf(second, tmp_path / "again.gguf", "f16", screen=QUIET)
    mine, base = (GGUF(tmp_path / name).header() for name in ("again.gguf", "base.gguf"))
    changed = {key for key in mine if mine[key] != base[key]}
    assert mine.keys() == base.keys() and changed <= {"general.name"}
    again = load(tmp_path / "again.gguf", Dense("float32"), dtype=F32)
    assert (tiny.logits(again) - want).abs().max() < 0.02 * want.abs().max()


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral", "phi3"])
def test_other_architectures_are_refused_by_name(family: str) -> None:
    config = tiny.model(family).config
    with pytest.raises(QtuneError, match=r"cannot be written as GGUF; legal: llama, mistral.*convert_hf_to_gguf"):
        gguf_out.architecture_of(config)


def test_what_a_configuration_cannot_say() -> None:
    for family, words in (("llama-tied", "attention_bias: true"), ("mistral", "sliding_window: 8")):
        config = tiny.model(family).config
        with pytest.raises(QtuneError, match=words):
            gguf_out.architecture_of(config)
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    config = tiny.model("qwen2", rope_parameters=rope).config
    with pytest.raises(QtuneError, match="rope_type: linear"):
        gguf_out.architecture_of(config)


@pytest.mark.parametrize("name", ["smollm", "qwen2", "llama-bpe", ""])
def test_names_of_how_words_are_cut(name: str, tmp_path: Path) -> None:
    patterns = {pre: pattern for pattern, pre in gguf_out.SPLITS.items()} | {"": "[a-z]+"}
    split = lambda pattern: pre_tokenizers.Sequence([  # noqa: E731
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    cut = pre_tokenizers.Sequence(digits) if name == "smollm" else split(patterns[name])
    tokenizer = byte_level(tmp_path, cut)
    if name:
        assert gguf_out._tokenizer(tokenizer, tiny.VOCAB)["tokenizer.ggml.pre"].value == name
    else:
        with pytest.raises(QtuneError, match="how this tokenizer cuts words"):
            gguf_out._tokenizer(tokenizer, tiny.VOCAB)


def test_a_tokenizer_of_words_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.words(tmp_path)
    with pytest.raises(QtuneError, match="a WordLevel tokenizer"):
        gguf_out._tokenizer(tokenizer, tiny.VOCAB)


def test_what_is_lost_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path, "qwen2")
    monkeypatch.setattr("qtune.model.gguf_out._blocks", lambda members, heads, numbered: [members[0].tensor() * 1.1])
    with pytest.raises(QtuneError, match="failed its verification"):
        merge_gguf(run, tmp_path / "out.gguf", "f16", screen=QUIET)
    assert not (tmp_path / "out.gguf").exists() and (tmp_path / "out.gguf.unverified").is_file()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path, "qwen2")
    given = ["merge", str(run.folder), "--gguf", "q8_0"]
    assert main([*given, "--dtype", "float32"]) == 1
    assert "--dtype and --gguf do not go together" in capsys.readouterr().err
    assert main([*given, "--out", str(tmp_path / "x")]) == 1 and ".gguf" in capsys.readouterr().err
    assert main(given) == 0 and (run.folder / "merged.gguf").is_file()
    assert "llama.cpp" in capsys.readouterr().out
