"""Packed experts against transformers' own fused ones: tiny random mixtures, saved as transformers saves them."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import safetensors.torch
import tiny
import torch
from test_model import dequantized
from test_planner_trace import bytes_in_order
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtune.adapter_export import export_peft
from qtune.adapters import AdapterSpec, adapt, adapted_sites, find_sites
from qtune.batches import Batch
from qtune.checkpoint import Safetensors
from qtune.errors import QtuneError
from qtune.export import merge
from qtune.model import load, save_quantized
from qtune.model.experts import Experts, experts_of, split
from qtune.model.names import plan
from qtune.model.skeleton import build, empty
from qtune.model.source import open_source
from qtune.planner.devices import find_device
from qtune.planner.plan import plan_recipe
from qtune.planner.step_trace import MetaBatch, step_trace
from qtune.quant import INT8, NF4, Dense, QuantLinear, Scheme
from qtune.recipe import Recipe
from qtune.runs import open_run
from qtune.screen import Screen
from qtune.sections import TrainKeys
from qtune.starting import start
from qtune.trainer import train

CPU = find_device("cpu")
F32 = torch.float32
BOTH = ("all-linear", "*.experts.*")


def gradients(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits' gradients to the embedded tokens and to every router's weight, of a fixed random direction."""
    routers = [p for n, p in model.named_parameters() if n.endswith(".gate.weight")]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in routers:
        p.requires_grad_(True)
    x = model.get_input_embeddings()(tiny.ids()).detach().requires_grad_(True)
    out = model(inputs_embeds=x).logits
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    dx, *rest = torch.autograd.grad((out * direction).sum(), [x, *routers])
    return dx, rest


@pytest.mark.parametrize("family", tiny.ROUTED)
def test_experts_compute_what_transformers_computes(family: str, tmp_path: Path) -> None:
    theirs = tiny.saved(family, tmp_path)
    ours = load(tmp_path, Dense("float32"), dtype=F32)
    routed = {n: m for n, m in ours.named_modules() if isinstance(m, QuantLinear) and m.routed}
    fused = [p for p in theirs.parameters() if p.dim() == 3]
    assert sum(len(p) for p in fused) == len(routed) > 0 and not any(p.dim() == 3 for p in ours.parameters())
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), rtol=1e-5, atol=2e-6)
    (dx, routers), (want, wanted) = gradients(ours), gradients(theirs)
    torch.testing.assert_close(dx, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert bool(wanted) == (family != "granitemoe"), "whose routers are linear layers, packed like any other"
    for got, expected in zip(routers, wanted, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", [NF4(), INT8()], ids=str)
@pytest.mark.parametrize("family", ["qwen3-moe", "granitemoe"])
def test_packed_experts_are_those_of_the_scheme(family: str, scheme: Scheme, tmp_path: Path) -> None:
    theirs = tiny.saved(family, tmp_path)
    ours = load(tmp_path, scheme, dtype=F32)
    assert not ours.qtune.notes
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(dequantized(theirs, scheme)), rtol=1e-4, atol=1e-5)


def test_no_token_one_expert_and_places_beyond_the_last() -> None:
    """Experts without tokens are skipped; index E, which transformers uses for experts of another machine, counts for
    none."""
    experts = next(iter(experts_of(empty(tiny.model("mixtral").config, F32)).values()))
    for layer in experts.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape) * 0.1)
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    only: Any = experts.get_submodule("3")
    want = weights[:, :1] * only["down_proj"](experts.gate(only["gate_up_proj"](x)))
    got = experts(x, torch.tensor([[3, 4]]).expand(5, 2), weights)
    torch.testing.assert_close(got, want)
    assert experts(x[:0], torch.zeros(0, 2, dtype=torch.int64), weights[:0]).shape == (0, 64)


def test_a_class_that_computes_more_stays_dense_and_is_named(tmp_path: Path) -> None:
    theirs = tiny.saved("gpt-oss", tmp_path)
    with pytest.warns(UserWarning, match=r"4 fused expert weights of GptOssExperts.*stay dense"):
        ours = load(tmp_path, INT8(), dtype=F32)
    assert any("GptOssExperts" in note for note in ours.qtune.notes)
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(dequantized(theirs, INT8())), rtol=1e-4, atol=1e-5)


def test_another_gate_or_a_bent_forward_is_noticed() -> None:
    model = tiny.model("mixtral")

    class Bent(type(model.model.layers[0].mlp.experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) * 1.01

    own = model.model.layers[0].mlp.experts
    model.model.layers[1].mlp.experts.__class__ = Bent
    own._apply_gate = None  # a module's own attribute counts, too, if the class' code asks for it
    split(model)
    assert list(experts_of(model)) == ["model.layers.0.mlp.experts"]


@pytest.mark.parametrize("family", tiny.ROUTED)
def test_each_expert_is_read_alone(family: str, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path)
    source = open_source(tmp_path)
    pieces = plan(source, empty(source.config, F32)).pieces
    routed = [piece for piece in pieces if ".experts." in next(iter(piece.targets))]
    assert routed and all(len(piece.targets) == 1 for piece in routed)
    for piece in routed[:4]:
        ((name, shape),) = piece.targets.items()
        assert len(shape) == 2 and piece.read()[name].shape == shape


def test_faults_of_experts_are_named(tmp_path: Path) -> None:
    tiny.saved("qwen3-moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    first, second = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
    del tensors[f"{first}.1.gate_proj.weight"], tensors[f"{second}.2.down_proj.weight"]
    tensors[f"{second}.4.down_proj.weight"] = tensors[f"{second}.3.down_proj.weight"] * 2
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(QtuneError) as caught:
        load(tmp_path, NF4())
    text = str(caught.value)
    assert f"2 missing tensors: {first}.1.gate_up_proj.weight, {second}.2.down_proj.weight" in text
    assert f"1 extra tensors: {second}.4.down_proj.weight" in text
    assert f"{first}.1.gate_up_proj.weight cannot be made of {first}.1.up_proj.weight: " in text


# ---- files


@pytest.mark.parametrize("family", ["qwen3-moe", "granitemoe"])
def test_packed_experts_are_read_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path / "original")
    first = load(tmp_path / "original", NF4(), dtype=F32)
    save_quantized(first, None, tmp_path / "packed")
    assert (tmp_path / "packed" / "qtune.safetensors").is_file(), "transformers' bitsandbytes loader has no experts"
    again = load(tmp_path / "packed", None, dtype=F32)
    assert again.qtune.scheme == NF4()
    for (name, one), (other_name, other) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name and torch.equal(one, other)


@pytest.mark.parametrize("family", tiny.ROUTED)
def test_dense_experts_are_written_as_transformers_writes_them(family: str, tmp_path: Path) -> None:
    theirs = tiny.saved(family, tmp_path / "original")
    save_quantized(load(tmp_path / "original", Dense("float32"), dtype=F32), None, tmp_path / "again")
    one, other = Safetensors(tmp_path / "original"), Safetensors(tmp_path / "again")
    assert one.entries == other.entries
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.entries)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(tiny.logits(again), tiny.logits(theirs))


# ---- adapters


def test_all_linear_leaves_experts_out(tmp_path: Path) -> None:
    tiny.saved("qwen3-moe", tmp_path)
    model = load(tmp_path, NF4(), dtype=F32)
    assert {name.rpartition(".")[2] for name in find_sites(model, ["all-linear"])} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert len(find_sites(model, BOTH)) == 8 + 2 * 4 * 2
    assert len(find_sites(model, ["*.experts.*.down_proj"])) == 8


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        pytest.param("qwen3-moe", "all-linear", marks=pytest.mark.slow),
        ("mixtral", BOTH),
        pytest.param("granitemoe", BOTH, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_experts_is_merged_and_verified(family: str, targets: Any, tmp_path: Path) -> None:
    adapter = {"method": "lora", "rank": 4, "targets": list(targets) if targets is BOTH else targets}
    recipe = runs_helper.recipe(tmp_path, family, adapter=adapter, train__steps=4, train__lr=3e-2)
    run = open_run(train(recipe, overwrite=True).folder, Screen(quiet=True))
    sites = adapted_sites(run.model)
    assert any(site.base.routed for site in sites.values()) == (targets is BOTH)
    trained = tiny.logits(run.model)
    report = merge(run, tmp_path / "merged", dtype="float32")
    assert report.verification.passed and report.verification.layers == len(sites)
    assert Safetensors(tmp_path / "merged").entries == Safetensors(tmp_path / "model").entries
    merged = tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    for site in sites.values():
        site.enabled = False
    assert (tiny.logits(run.model) - trained).abs().max() > 0.01
    if targets is BOTH:
        with pytest.raises(QtuneError, match=r"experts.*merge instead"):
            export_peft(run, tmp_path / "peft", Screen(quiet=True))


def test_gradients_of_adapters_on_experts_are_peft_s_formula(tmp_path: Path) -> None:
    """Those of autograd through the whole fused weight, W + s B A, of transformers' own module."""
    theirs = tiny.saved("mixtral", tmp_path)
    ours = load(tmp_path, Dense("float32"), dtype=F32)
    sites = adapt(ours, AdapterSpec("lora", ("*.experts.*.gate_up_proj",), {"rank": 2, "alpha": 2}))
    site: Any = sites["model.layers.1.mlp.experts.2.gate_up_proj"]
    adapter = site.adapter
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    ours(input_ids=tiny.ids()).logits.square().sum().backward()
    A, B = (p.detach().clone().requires_grad_(True) for p in (adapter.A, adapter.B))
    experts: Any = theirs.model.layers[1].mlp.experts
    fused = experts.gate_up_proj.detach()
    del experts.gate_up_proj
    delta = torch.zeros_like(fused).index_put((torch.tensor(2),), B @ A)
    experts.gate_up_proj = fused + delta
    theirs(input_ids=tiny.ids()).logits.square().sum().backward()
    for got, want in ((adapter.A.grad, A.grad), (adapter.B.grad, B.grad)):
        assert want is not None and want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_a_model_with_experts_is_copied() -> None:
    model = empty(tiny.model("qwen3-moe").config, F32)
    assert list(experts_of(copy.deepcopy(model))) == list(experts_of(model))
    assert isinstance(next(iter(experts_of(model).values())), Experts)


# ---- the plan


def balanced(model: Any) -> None:
    """Routers that send every token in turn, so that a real step does what a plan takes."""
    for name, experts in experts_of(model).items():
        gate: Any = model.get_submodule(name.rpartition(".")[0]).gate

        def routed(module: Any, args: Any, found: Any, count: int = experts.count) -> Any:
            logits, weights, index = found
            return logits, weights, torch.arange(index.numel(), device=index.device).view(index.shape) % count

        gate.register_forward_hook(routed)


@pytest.mark.parametrize(
    ("targets", "checkpointing"),
    [(BOTH, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((("all-linear",), True), (BOTH, False)))],
)
def test_the_trace_on_meta_is_that_of_the_real_step(targets: Any, checkpointing: bool, tmp_path: Path) -> None:
    tiny.saved("qwen3-moe", tmp_path)
    real, keys = load(tmp_path, NF4()), TrainKeys(checkpointing=checkpointing)
    planned = build(copy.deepcopy(real.config), NF4())
    for model in (real, planned):
        adapt(model, AdapterSpec("lora", targets))
        balanced(model)
    ids = torch.randint(0, real.config.vocab_size, (2, 41))  # 164 places for 4 experts
    want, _ = step_trace(real, keys, [Batch(ids, torch.ones_like(ids), ids.clone())], CPU)
    got, _ = step_trace(planned, keys, [MetaBatch.of(2, 41)], CPU)
    assert got.peak() == want.peak()
    assert Counter(bytes_in_order(got)) == Counter(bytes_in_order(want))
    assert len(got.events) > 500


def test_a_plan_packs_experts_and_says_how_tokens_are_spread() -> None:
    tree = {"model": "mixtral-8x7b", "scheme": "nf4", "adapter": {"method": "lora", "rank": 16}}
    recipe = Recipe.load(tree, {"data.max_length": 64, "train.micro_batch": 1}, training=False)
    plan = plan_recipe(recipe, find_device("rtx4090"))
    assert plan.groups["weights"] < 26e9, "47 billion weights, of which 0.26 are tables"
    assert any("spread evenly over the experts" in note for note in plan.notes)


# ---- codes from text


def test_an_expert_that_little_text_reaches_keeps_nearest_codes_and_is_named(tmp_path: Path) -> None:
    tiny.saved("qwen3-moe", tmp_path)
    text = torch.randint(3, tiny.VOCAB, (4, 32), generator=torch.Generator().manual_seed(2))  # 64 places an expert
    spec = AdapterSpec("lora", ("q_proj",), {"rank": 4})
    model = start(tmp_path, NF4(block=32), spec, windows=text, codes="gptq", dtype=F32)
    nearest = [m.name for m in model.modules() if isinstance(m, QuantLinear) and not m.own]
    assert 0 < len(nearest) < 16 and all(".experts." in name for name in nearest)
    (note,) = model.qtune.notes
    assert f"codes are nearest, not gptq, in {len(nearest)} expert weights" in note and nearest[0] in note
    corda = AdapterSpec("corda", ("*.experts.*",), {"rank": 4})
    with pytest.raises(QtuneError, match=r"experts.*tokens of the calibration text to this expert, and method corda"):
        start(tmp_path, NF4(block=32), corda, windows=text, dtype=F32)
