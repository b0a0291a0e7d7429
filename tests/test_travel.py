"""Every way in and out, for models that are built otherwise than a plain Llama: experts of a mixture, a tied head,
tokens that the recipe added. Each way computes what was trained, or is refused by name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import runs_helper
import tiny
import torch
from test_gguf_out import byte_level
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qtune.adapter_export import export_gguf, export_lora, export_peft
from qtune.adapters.sites import enable_adapters
from qtune.cli import main
from qtune.combining.combine import Asked, combine
from qtune.errors import QtuneError
from qtune.export import merge, merged_entries, write_merged
from qtune.gguf import write
from qtune.gguf_merge import UNSAID, merge_gguf
from qtune.model import load
from qtune.model.gguf_out import header, tensors
from qtune.model.source import open_source, read_gguf
from qtune.packed_merge import merge_packed
from qtune.quant import Dense
from qtune.runs import Run, open_base, open_run, quantize
from qtune.screen import Screen
from qtune.trainer import train

F32, QUIET = torch.float32, Screen(quiet=True)
EXPERTS = "all-linear,*.experts.*"
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # transformers reads it in a GGUF file
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixture": ("qwen3-moe", {}),
    "mixture, experts adapted": ("qwen3-moe", {"adapter__targets": EXPERTS}),
    "mixture published fused": ("granitemoe", {"adapter__targets": EXPERTS}),
    "tied": ("qwen2", {}),
    "tied, head adapted": ("qwen2", {"adapter__targets": "all-linear,lm_head", "scheme__embeddings": "int8"}),
    "added tokens": ("llama", {"tokens__add": ["<tool>", "<call>"]}),
    "added tokens, tied": ("qwen2", {"tokens__add": ["<tool>", "<call>"]}),
    "added tokens, mixture": ("qwen3-moe", {"tokens__add": ["<tool>"], "adapter__targets": EXPERTS}),
}

FAST = ("mixture, experts adapted", "tied, head adapted", "added tokens, tied")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> the folder of a run of three steps, trained once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            root, (family, keys) = tmp_path_factory.mktemp("kind"), KINDS[kind]
            tiny.saved(family, root / "model", **(PLAIN_ROPE if family == "llama" else {}))
            byte_level(root / "model")
            recipe = runs_helper.recipe(root, family, **{"train__steps": 3, "train__lr": 3e-2} | keys)
            made[kind] = train(recipe, overwrite=True).folder
        return made[kind]

    return folder


def text(run: Run) -> Tensor:
    """Two rows of ids, new tokens among them."""
    ids = tiny.ids()
    if added := run.recipe.tokens.add:
        ids[:, ::5] = torch.tensor(run.tokenizer.convert_tokens_to_ids(list(added)))[0]
    return ids


def logits(run: Run, model: Any = None) -> Tensor:
    return tiny.logits(run.model if model is None else model, text(run))


def unpacked(run: Run, folder: Path) -> Any:
    """The base without adapter and new tokens, as plain transformers loads it, with the weights that packing left."""
    base = open_base(run.folder, QUIET)
    write_merged(base.model, folder, F32, QUIET)
    shutil.copyfile(Path(run.recipe.model) / "config.json", folder / "config.json")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=F32)
    return model


# ---- the ways: each returns what the other side computes, and what it should


def as_peft(run: Run, out: Path, how: Callable[..., Any] = export_peft) -> tuple[Tensor, Tensor]:
    how(run, out / "adapter", QUIET)
    base = unpacked(run, out / "base")
    if run.recipe.tokens.add:
        base.resize_token_embeddings(len(run.tokenizer), mean_resizing=False)
    return logits(run, peft.PeftModel.from_pretrained(base, out / "adapter").eval()), want_of(run)


def want_of(run: Run) -> Tensor:
    """What was trained, by the run opened anew (an export may have changed the model that it was given)."""
    return logits(open_run(run.folder, QUIET))


def as_lora(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    return as_peft(run, out, export_lora)


def as_gguf_adapter(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    """The adapter added to the base's tensors of the same names is the merged file."""
    out.mkdir()
    export_gguf(run, out / "adapter.gguf", QUIET)
    merge_gguf(open_run(run.folder, QUIET), out / "merged.gguf", "f32", screen=QUIET)
    base = open_base(run.folder, QUIET)
    source = open_source(run.recipe.model)
    made = tensors(base.model, source, merged_entries(base.model, F32))
    write(out / "base.gguf", header(base.model, source, base.tokenizer, "base", "f32"), made, "f32")
    plain, merged, adapter = (
        {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(out / f"{name}.gguf").tensors}
        for name in ("base", "merged", "adapter")
    )
    alpha = gguf.GGUFReader(out / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    for name in [name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")]:
        A, B = adapter.pop(f"{name}.lora_a"), adapter.pop(f"{name}.lora_b")
        plain[name] = plain[name] + alpha / len(A) * B @ A
    assert not adapter and plain.keys() == merged.keys()
    return torch.cat([plain[n].flatten() for n in merged]), torch.cat([merged[n].flatten() for n in merged])


def merged_plain(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    want = logits(run)
    report = merge(run, out, dtype="float32")
    assert report.verification.passed
    return logits(run, AutoModelForCausalLM.from_pretrained(out, dtype=F32)), want


def merged_gguf(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    want, file = logits(run), out.with_suffix(".gguf")
    assert merge_gguf(run, file, "f32", screen=QUIET).verification.passed
    if run.model.config.model_type != "qwen3_moe":
        return logits(run, AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=file.name, dtype=F32)), want
    source = read_gguf(file)
    for key in UNSAID:  # of which transformers does not read all of the header
        if hasattr(run.model.config, key):
            setattr(source.config, key, getattr(run.model.config, key))
    return logits(run, load(source, Dense("float32"), dtype=F32)), want


def kept(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    """Packed again: what is in memory afterwards is in the file, and near what was trained."""
    want = logits(run)
    report = merge_packed(run, out, "int8", screen=QUIET)
    assert report.verification.passed and report.kept is not None and report.kept["kl"] < report.kept["kl_base"]
    assert 0 < (logits(run) - want).abs().max() < 0.1 * want.abs().max()
    return logits(run, load(out, None, dtype=F32)), logits(run)


def packed(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    """`qtune quantize`, which has no adapter."""
    quantize(run.recipe, out, screen=QUIET)
    enable_adapters(run.model, False)
    ours = load(out, None, dtype=F32)
    return tiny.logits(ours), tiny.logits(open_base(run.folder, QUIET).model)


def from_bitsandbytes(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    """What transformers packed is trained on and merged."""
    model = AutoModelForCausalLM.from_pretrained(
        run.recipe.model, device_map="cpu", dtype=F32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )  # fmt: skip
    model.save_pretrained(out / "packed")
    byte_level(out / "packed")
    scheme = {"name": "nf4", "double": False}
    recipe = run.recipe.with_({"model": str(out / "packed"), "scheme": scheme, "output": str(out / "run")})
    again = open_run(train(recipe).folder, QUIET)
    return merged_plain(again, out / "merged")


def imported(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    export_peft(run, out / "adapter", QUIET)
    keys = ["dtype=float32", "scheme.block=32"]
    keys += [f"scheme.embeddings={run.recipe.embeddings.name}"] if run.recipe.embeddings else []
    assert main(["import", str(out / "adapter"), "--out", str(out / "run"), *keys, "--json"]) == 0
    return logits(open_run(out / "run", QUIET)), want_of(run)


def combined(run: Run, out: Path) -> tuple[Tensor, Tensor]:
    """Half of it and half of it is it."""
    shutil.copytree(run.folder, out / "twin")
    combine([run.folder, out / "twin"], out / "both", Asked("concat"), screen=QUIET)
    return logits(open_run(out / "both", QUIET)), want_of(run)


WAYS: dict[str, Callable[[Run, Path], tuple[Tensor, Tensor]]] = {
    "export": as_peft, "export --as lora": as_lora, "export --as gguf": as_gguf_adapter, "merge": merged_plain,
    "merge --gguf": merged_gguf, "merge --keep": kept, "quantize": packed, "bitsandbytes in": from_bitsandbytes,
    "import": imported, "combine": combined,
}  # fmt: skip
ADAPTED = ("mixture, experts adapted", "mixture published fused", "added tokens, mixture")
ADDED = ("added tokens", "added tokens, tied", "added tokens, mixture")
REFUSED = {
    **{
        (way, kind): ("Q806", "PEFT has no adapter for one expert's matrix, only for fused ones as a whole")
        for way in ("export", "export --as lora", "import") for kind in ADAPTED
    },
    **{("export --as gguf", kind): ("Q812", "an adapter of llama.cpp has no rows of tokens: merge") for kind in ADDED},
    ("export --as gguf", "mixture, experts adapted"): ("Q812", "no adapter for model.layers.0.mlp.experts.0.gate_up"),
    ("export --as gguf", "mixture published fused"): ("Q812", "a model of type 'granitemoe' is not known here; known:"),
    ("export --as gguf", "tied, head adapted"): ("Q812", "llama.cpp has no adapter for lm_head: merge"),
    ("merge --gguf", "mixture published fused"): ("Q813", "'granitemoe' cannot be written as GGUF; legal:"),
    **{("merge --keep", kind): ("Q801", "tokens with rows of their own (<tool>") for kind in ADDED},
    ("bitsandbytes in", "tied, head adapted"): ("Q109", "'lm_head' match no packed linear layer; legal: all-linear"),
    **{("combine", kind): ("Q419", "have rows of tokens of their own, which are no deltas") for kind in ADDED},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
@pytest.mark.parametrize("way", WAYS)
def test_computes_what_was_trained_or_is_refused(way: str, kind: str, runs: Any, tmp_path: Path) -> None:
    run = open_run(runs(kind), QUIET)
    if (way, kind) in REFUSED:
        code, words = REFUSED[way, kind]
        with pytest.raises(QtuneError, match=re.escape(words)) as told:
            WAYS[way](run, tmp_path / "out")
        assert told.value.code == code
        return
    got, want = WAYS[way](run, tmp_path / "out")
    assert got.shape == want.shape and float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
