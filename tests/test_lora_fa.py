"""LoRA-FA (`freeze_a`): A frozen, x not kept; the laws of methods hold, and the update is that of PEFT's optimizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_laws import LAWS, OUT, Case, inputs, learned, plain, saved
from torch import nn

from qtune.adapters import METHODS, AdapterSpec, adapt, adapted_sites
from qtune.adapters.files import load_adapter, save_adapter
from qtune.batches import Batch
from qtune.model.skeleton import build
from qtune.optim import Optimizer
from qtune.planner.devices import find_device
from qtune.planner.step_trace import MetaBatch, step_trace
from qtune.quant import Dense, QuantLinear, scheme_from
from qtune.sections import TrainKeys
from qtune.starting import start

KIN = sorted(name for name, method in METHODS.items() if "freeze_a" in method.options())
TRUE_OF_A_FROZEN_A = [law for law in LAWS if law not in ("only_the_adapter_gets_gradients", "learns")]


def test_every_method_with_an_a_and_a_b_of_lora_has_it() -> None:
    assert {name for name, method in METHODS.items() if "plus" in method.options()} == set(KIN) >= {"lora", "pissa"}


@pytest.mark.parametrize("law", TRUE_OF_A_FROZEN_A)
def test_the_laws_of_methods_hold(law: str, tmp_path: Path) -> None:
    case = Case("lora", "nf4", tmp_path)
    case.options["freeze_a"] = True
    LAWS[law](case)


@pytest.mark.parametrize("method", KIN)
def test_only_b_learns_at_once_and_from_its_file(method: str, tmp_path: Path) -> None:
    case = Case(method, "nf4", tmp_path)
    case.options["freeze_a"] = True
    model = case.model()
    with torch.no_grad():
        for parameter in learned(model).values():
            parameter += 0.1
    model(inputs()).square().sum().backward()
    for site in adapted_sites(model).values():
        assert site.adapter.A.grad is None and not site.adapter.A.requires_grad
        assert site.adapter.B.grad.any()
    save_adapter(model, case.spec(), tmp_path / "run", {"model": "tiny"})
    other = plain(case, model)
    load_adapter(other, tmp_path / "run")
    assert torch.equal(other(inputs()), model(inputs()))
    assert learned(other).keys() == learned(model).keys()


def test_a_start_while_the_checkpoint_streams_in_leaves_a_frozen(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    for method in ("lora", "pissa"):
        model = start(tmp_path, scheme_from("nf4"), AdapterSpec(method, (), {"rank": 4, "freeze_a": True}))
        trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"B"}, method


def one(freeze_a: bool, dropout: float = 0.0) -> tuple[nn.Module, torch.Tensor]:
    base = QuantLinear(48, OUT, Dense("float32"), bias=False, dtype=torch.float32, name="layer")
    base.set_weight(torch.randn(OUT, 48))
    model = nn.Module()
    model.layer = base
    adapt(model, AdapterSpec("lora", (), {"rank": 4, "alpha": 6.0, "freeze_a": freeze_a, "dropout": dropout}))
    model.layer.adapter.B.data.normal_()
    return model.layer, torch.randn(7, 48)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_x_is_kept_for_the_gradient_of_a_only(dropout: float) -> None:
    for freeze_a in (False, True):
        site, x = one(freeze_a, dropout)
        x.requires_grad_()
        with saved() as kept:
            y = site(x)
        values = [t for t in kept if t.shape == x.shape and t.is_floating_point() and t.dtype == x.dtype]
        own = 1 if dropout else 0  # dropout's mask, which on a CPU is of floats
        assert len(values) == own + (not freeze_a)
        y.sum().backward()
        assert x.grad.any()


def test_gradients_are_those_of_lora() -> None:
    site, x = one(True)
    x.requires_grad_()
    site(x).square().sum().backward()
    A, B, W = (
        site.adapter.A.double(),
        site.adapter.B.detach().double().requires_grad_(),
        site.base.dequantize().double(),
    )
    wide = x.detach().double().requires_grad_()
    (wide @ W.T + 1.5 * wide @ A.T @ B.T).square().sum().backward()
    assert torch.allclose(site.adapter.B.grad.double(), B.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)


def test_updates_are_those_of_peft_s_optimizer() -> None:
    """Which multiplies B's gradient by (A A^T)^-1: with orthogonal rows of A a number, that AdamW does not see."""
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    site, x = one(True)
    A = site.adapter.A
    gram = A @ A.T
    assert torch.allclose(gram, torch.eye(4) / 3, atol=1e-6), "as long as Kaiming's rows"
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(48, OUT, bias=False))
    model[0].weight.data.copy_(site.base.dequantize())
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.0))
    layer = theirs.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(site.adapter.B)
    start_b = site.adapter.B.detach().clone()
    reference = optimizers.create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-2)
    optimizer = Optimizer([("B", site.adapter.B)], lr=1e-2)
    target = torch.randn(7, OUT)
    for _ in range(5):
        (site(x) - target).square().sum().backward()
        optimizer.step(1.0)
        (theirs(x) - target).square().sum().backward()
        reference.step()
        reference.zero_grad()
    got, want = site.adapter.B.detach() - start_b, layer.lora_B["default"].weight.detach() - start_b
    assert (got - want).norm() < 0.02 * want.norm(), "theirs multiplies in bf16"


def test_the_plan_shows_what_it_saves(tmp_path: Path) -> None:
    """Meta equals real, and without checkpointing the inputs of linear layers are gone."""
    tiny.saved("llama", tmp_path)
    peaks = {}
    for freeze_a in (False, True):
        spec = AdapterSpec("lora", (), {"freeze_a": freeze_a})
        real = start(tmp_path, scheme_from("nf4"), spec)
        planned = build(copy.deepcopy(real.config), scheme_from("nf4"))
        adapt(planned, spec)
        ids, cpu = torch.randint(0, real.config.vocab_size, (2, 40)), find_device("cpu")
        keys: dict[str, Any] = {"keys": TrainKeys(checkpointing=False), "device": cpu}
        want, _ = step_trace(real, batches=[Batch(ids, torch.ones_like(ids), ids.clone())], **keys)
        got, _ = step_trace(planned, batches=[MetaBatch.of(2, 40)], **keys)
        assert got.peak() == want.peak()
        peaks[freeze_a] = got.peak()[0]
    # of each layer: the norms' results (before q, k, v and before gate, up), attention's result, the MLP's inner
    kept = 2 * 2 * 40 * (64 + 64 + 96) * real.config.num_hidden_layers
    assert peaks[False] - peaks[True] > kept
