"""PEFT export against the real PEFT: the same adapter on the same transformers model gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_kit import FP32, base_of, ids, packed, tiny
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qtune.adapters import METHODS, AdapterSpec, Source, adapt, adapted_sites
from qtune.errors import QtuneError
from qtune.peft import suffixes, to_peft
from qtune.quant import QuantLinear, Scheme, scheme_from

EXPORTED = sorted(name for name, method in METHODS.items() if method.peft is not None)
ATTENTION = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("attn.c_attn", "mlp.c_proj")}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"rank": 4, "alpha": 12.0, "freeze_a": True},
        {"rank": 4, "alpha": 6.0, "rslora": True, "dropout": 0.1, "plus": 4.0},
    ],
    "dora": [{"rank": 4, "alpha": 12.0}, {"rank": 8, "rslora": True}],
    "ia3": [{}, {"feedforward": ("v_proj", "attn.c_attn")}],
    "miss": [{"rank": 6}, {"rank": 8, "dropout": 0.1}],
    "loretta": [{"rank": 4, "tensor_rank": 3, "alpha": 6.0}],
    "vblora": [{"rank": 3, "length": 16, "vectors": 20}, {"length": 8, "vectors": 13, "topk": 3, "dropout": 0.1}],
}


def adapted(family: str, spec: AdapterSpec, scheme: Scheme = FP32) -> PreTrainedModel:
    """Far from its start. A method that makes no sense on a dense base goes on a packed one."""
    if METHODS[spec.method].refuses(scheme, spec.resolved()):
        scheme = scheme_from("nf4")
    model, before = packed(tiny(family), scheme), dict(tiny(family).named_parameters())
    sources = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = before[f"{name}.weight"].detach()
            sources[name] = Source(weight.T if module.conv1d else weight, torch.eye(module.in_features))
    with pytest.MonkeyPatch.context() as patch:  # how near a start must be is not what is tested here
        patch.setattr(METHODS[spec.method], "bound", None)
        adapt(model, spec, sources)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    return model.eval()


def cells() -> list[Any]:
    return [
        pytest.param(method, family, options, id=f"{method}-{family}-{number}")
        for method in EXPORTED
        for family in ("llama", "gpt2")
        if family == "llama" or METHODS[method].peft.conv1d
        for number, options in enumerate(OPTIONS.get(method, [{"rank": 4}]))
    ]


@torch.no_grad()
@pytest.mark.parametrize(("method", "family", "options"), cells())
def test_peft_computes_the_same(method: str, family: str, options: dict[str, Any], tmp_path: Path) -> None:
    spec = AdapterSpec(method, ATTENTION[family], options)
    ours = adapted(family, spec)
    to_peft(ours, spec, tmp_path, "someone/tiny")
    base = base_of(ours, family)
    plain = base(ids()).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    logits = theirs(ids()).logits
    torch.testing.assert_close(ours(ids()).logits, logits, rtol=0, atol=1e-5)
    assert (logits - plain).abs().max() > 1e-2, "the adapter changes nothing"
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert len(layers) == len(adapted_sites(ours))
    assert theirs.peft_config["default"].base_model_name_or_path == "someone/tiny"


@torch.no_grad()
@pytest.mark.parametrize(("method", "family", "options"), cells())
def test_peft_merges_to_the_same(method: str, family: str, options: dict[str, Any], tmp_path: Path) -> None:
    spec = AdapterSpec(method, ATTENTION[family], options)
    ours = adapted(family, spec)
    to_peft(ours, spec, tmp_path, "someone/tiny")
    merged = peft.PeftModel.from_pretrained(base_of(ours, family), tmp_path).merge_and_unload()
    for name, site in adapted_sites(ours).items():
        weight, bias = site.merged()
        theirs = merged.get_submodule(name)
        torch.testing.assert_close(weight.T if site.base.conv1d else weight, theirs.weight, rtol=1e-5, atol=1e-6)
        if bias is not None:
            torch.testing.assert_close(bias, theirs.bias, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", EXPORTED)
def test_peft_computes_the_same_on_the_weights_of_a_quantized_base(method: str, tmp_path: Path) -> None:
    spec = AdapterSpec(method, ATTENTION["llama"], OPTIONS.get(method, [{"rank": 4}])[0])
    ours = adapted("llama", spec, scheme_from("nf4"))
    to_peft(ours, spec, tmp_path, "someone/tiny")
    theirs = peft.PeftModel.from_pretrained(base_of(ours, "llama"), tmp_path).eval()
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", EXPORTED)
def test_every_written_tensor_is_read(method: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """PEFT loads with strict=False, so a wrong name would pass in silence: what PEFT writes must have our names."""
    spec = AdapterSpec(method, ATTENTION["llama"], OPTIONS.get(method, [{"rank": 4}])[0])
    to_peft(adapted("llama", spec), spec, tmp_path / "ours", "someone/tiny")
    model = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    unknown = json.loads((tmp_path / "ours" / "adapter_config.json").read_text()).keys()
    unknown -= json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()).keys()
    assert not unknown, f"PEFT's config has no {unknown}"
    assert not [
        str(w.message) for w in recwarn if "peft" in w.filename and "Could not find a config" not in str(w.message)
    ]


def test_an_adapter_over_all_layers_has_short_targets(tmp_path: Path) -> None:
    spec = AdapterSpec("lora", ("all-linear",), {"rank": 2})
    to_peft(adapted("llama", spec), spec, tmp_path, "someone/tiny")
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def test_suffixes_match_the_sites_and_nothing_else() -> None:
    names = ["h.0.attn.proj", "h.0.mlp.proj", "h.1.attn.proj", "h.1.mlp.proj", "h.1.mlp.up_proj", "h.11.attn.proj", "h"]
    assert suffixes(["h.0.mlp.proj", "h.1.mlp.proj"], names) == ["mlp.proj"]
    assert suffixes(["h.1.attn.proj"], names) == ["h.1.attn.proj"]
    assert suffixes(["h.1.mlp.up_proj"], names) == ["up_proj"]


def test_methods_without_a_form_name_those_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AdapterSpec("lora", ("q_proj",), {})
    model = adapted("llama", spec)
    monkeypatch.setattr(METHODS["lora"], "peft", None)
    others = ", ".join(sorted(name for name in METHODS if METHODS[name].peft is not None))
    assert "dora, " in others and "lora" not in others.split(", ")
    with pytest.raises(QtuneError, match=f"no form for an adapter of method lora; it has one for {others}: merge"):
        to_peft(model, spec, tmp_path, "someone/tiny")
    assert not list(tmp_path.iterdir())


def test_hra_on_conv1d_is_refused(tmp_path: Path) -> None:
    spec = AdapterSpec("hra", ("attn.c_attn",), {})
    with pytest.raises(QtuneError, match=r"HRA takes no Conv1D layers.*h\.0\.attn\.c_attn"):
        to_peft(adapted("gpt2", spec), spec, tmp_path, "someone/tiny")


def test_a_model_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QtuneError, match="carries no adapter"):
        to_peft(packed(tiny("llama")), AdapterSpec("lora"), tmp_path, "someone/tiny")
