"""Twins of transformers' norms, MLPs, rotary embeddings and attention: who gets one, and that it computes the same."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs_helper
import tiny
import torch
import transformers
from cpu_kernels import cpu_kernels
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from qtune import backend
from qtune.adapters import AdapterSpec, adapt
from qtune.memory.boundaries import Boundaries
from qtune.model import load
from qtune.model.fused import _norm, fuse, unfuse, use_own_attention
from qtune.quant import Dense
from qtune.step import LanguageModel

CPU = torch.device("cpu")

# family -> twins of its two layers; what is missing has code of its own that ours does not know
EXPECTED: dict[str, dict[str, int]] = {
    "llama": {"norm": 5, "mlp": 2, "rotary": 2},
    "llama-tied": {"norm": 5, "mlp": 2, "rotary": 2},
    "mistral": {"norm": 5, "mlp": 2, "rotary": 2},
    "qwen2": {"norm": 5, "mlp": 2, "rotary": 2},
    "qwen3": {"norm": 9, "mlp": 2, "rotary": 2},
    "gemma2": {"norm": 9, "rotary": 2},  # GeGLU
    "gemma3": {"norm": 13, "rotary": 2},
    "phi3": {"norm": 5, "rotary": 2},  # one projection for gate and up
    "gpt2": {},
    "opt": {},
}


def batch(padded: bool) -> Any:
    ids = tiny.ids(24)
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[1, 15:], labels[1, 15:] = 0, -100
    return SimpleNamespace(input_ids=ids, attention_mask=mask, labels=labels)


def adapted(folder: Path, dtype: torch.dtype) -> Any:
    """The model with LoRA whose B is not zero."""
    model = load(folder, Dense(str(dtype).removeprefix("torch.")), dtype=dtype)
    adapt(model, AdapterSpec("lora", (), {"rank": 4}))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def loss_and_gradients(model: Any, padded: bool, twins: bool) -> dict[str, torch.Tensor]:
    language = LanguageModel(model)
    if twins:
        language.choose_attention(1 << 20)
    else:
        unfuse(model)
    model.zero_grad()
    loss = language.loss_sum(batch(padded))
    loss.backward()
    gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach().double(), **gradients}


@pytest.mark.parametrize("family", EXPECTED)
def test_who_gets_a_twin(family: str) -> None:
    model = tiny.model(family)
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    assert fuse(model) == EXPECTED[family]
    assert fuse(model) == {}, "nothing is fused twice"
    assert list(model.state_dict()) == names
    assert all(isinstance(m, own) for m, own in zip(model.modules(), classes, strict=True))
    again = copy.deepcopy(model)
    assert [type(m) for m in again.modules()] == classes, "a copy has the library's classes"
    unfuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_a_whole_model_can_be_pickled() -> None:
    model = tiny.model("llama")
    expected = tiny.logits(model)
    fuse(model)
    again = pickle.loads(pickle.dumps(model))
    assert type(again.model.norm) is LlamaRMSNorm
    assert torch.equal(tiny.logits(again), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", EXPECTED)
def test_twins_compute_the_same(family: str, padded: bool, tmp_path: Path) -> None:
    """fp32: equal to rounding. bf16: about as far from fp32 as transformers' own code is."""
    folder = runs_helper.write_model(tmp_path / "m", family)
    exact, ours = (loss_and_gradients(adapted(folder, torch.float32), padded, twins) for twins in (False, True))
    assert ours["loss"] == pytest.approx(float(exact["loss"]), rel=1e-6)
    for name, value in exact.items():
        assert (ours[name] - value).abs().max() <= 2e-5 * value.abs().max(), name
    ours, theirs = (loss_and_gradients(adapted(folder, torch.bfloat16), padded, twins) for twins in (True, False))

    def error(found: dict[str, torch.Tensor]) -> float:
        parts = [(found[n] - v).norm() / v.norm() for n, v in exact.items() if n != "loss"]
        return float(torch.stack(parts).mean())

    assert error(ours) <= 1.5 * error(theirs)
    assert abs(ours["loss"] - exact["loss"]) <= 2 * abs(theirs["loss"] - exact["loss"]) + 2e-3 * exact["loss"]


def test_checkpointing_changes_no_bit_of_the_gradients(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(runs_helper.write_model(tmp_path / str(checkpointing)), torch.bfloat16)
        LanguageModel(model.train()).checkpointing(Boundaries() if checkpointing else None)
        found.append(loss_and_gradients(model, True, True))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_module_that_computes_something_else_keeps_its_code() -> None:
    class BiasedRMSNorm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1e-2

    class FixedRMSNorm(LlamaRMSNorm):
        """Reads its epsilon from elsewhere."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    class ScaledMLP(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    class TurnedAttention(LlamaAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    config = tiny.model("llama").config
    geglu = Gemma3MLP(tiny.model("gemma3").config)
    modules = nn.ModuleList((BiasedRMSNorm(8), FixedRMSNorm(8), ScaledMLP(config), TurnedAttention(config, 0), geglu))
    assert fuse(modules) == {}


def test_a_norm_made_without_its_weight_keeps_its_code() -> None:
    whole, bare = Gemma3nRMSNorm(8), Gemma3nRMSNorm(8, with_scale=False)
    x = torch.randn(3, 8)
    expected = bare(x)
    biased = LlamaRMSNorm(8)
    biased.bias = nn.Parameter(torch.ones(8))
    assert fuse(nn.ModuleList((whole, bare, biased))) == {"norm": 1}
    assert hasattr(whole, "unfused") and torch.equal(bare(x), expected)


@pytest.mark.parametrize("family", ["DeepseekV2Config", "DeepseekV3Config"])
def test_latent_attention_whose_values_are_narrower_than_its_keys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = getattr(transformers, family)(
        **tiny.LLAMA | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8},
        qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        n_group=1, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    expected = tiny.logits(model)
    fuse(model)
    monkeypatch.setattr(backend, "kernel", lambda name, device: None if name != "attention" else len)
    monkeypatch.setattr(backend, "simd", lambda module: "amx")
    assert use_own_attention(model, CPU)
    assert torch.allclose(tiny.logits(model), expected, rtol=1e-4, atol=1e-4)


def test_what_a_class_is_does_not_depend_on_the_default_device() -> None:
    _norm.cache_clear()
    with torch.device("meta"):
        assert fuse(LlamaRMSNorm(8)) == {"norm": 1}


def test_own_attention_under_autocast_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the values come out of a projection in bf16, but queries and keys are turned by angles in fp32."""
    cpu_kernels("attention")
    model = tiny.model("llama").float()
    exact = tiny.logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = tiny.logits(model)
        fuse(model)
        monkeypatch.setattr(backend, "simd", lambda module: "amx")
        assert use_own_attention(model, CPU)
        assert 0 < (tiny.logits(model) - exact).norm() < 1.2 * (theirs - exact).norm()


def test_own_attention_only_on_a_cpu_in_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr(backend, "kernel", lambda name, device: None)
    assert not use_own_attention(model, CPU)
    monkeypatch.setattr(backend, "kernel", lambda name, device: len)
    monkeypatch.setattr(backend, "simd", lambda module: "avx2")
    assert not use_own_attention(model, CPU), "torch's is as fast there"
    monkeypatch.setattr(backend, "simd", lambda module: "amx")
    eager = tiny.model("llama", attn_implementation="eager")
    eager.set_attn_implementation("eager")
    assert not use_own_attention(eager, CPU)
    assert use_own_attention(model, CPU) and model.config._attn_implementation == "qtune"
