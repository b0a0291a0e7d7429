"""LoRA-drop: what the trial sees, who keeps its factors, who shares, and that a run goes on from any point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_adaptive import Training
from test_laws import learned
from test_peft import ATTENTION, adapted, base_of, ids
from torch import Tensor, nn
from torch.nn import functional as F

from qtune.adapters import AdapterSpec, adapt, adapted_sites
from qtune.adapters.files import load_adapter, save_adapter
from qtune.adapters.loradrop import CHOSEN, LEAD, least
from qtune.optim import Optimizer
from qtune.peft import to_peft
from qtune.quant import NF4, QuantLinear

WIDTH, LAYERS, STEPS, TRIAL = 32, 5, 12, 4
SIZES = (1.0, 0.05, 0.5, 0.02, 0.03)  # of each layer's output: how much its adapter matters


class Layer(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.proj = QuantLinear(WIDTH, WIDTH, NF4(), bias=False, dtype=torch.float32, name=f"layers.{place}.proj")
        draw = torch.Generator().manual_seed(place)
        self.proj.set_weight(torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5)
        self.proj.own = False
        self.size = SIZES[place]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * torch.tanh(self.proj(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[Layer(place) for place in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def data(step: int) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, step: int) -> Tensor:
    return F.mse_loss(model(data(step)), torch.ones(16, WIDTH))


SPEC = AdapterSpec("loradrop", ("proj",), {"rank": 3, "trial": float(TRIAL), "share": 0.5})


def training(model: nn.Module | None = None) -> Training:
    if model is None:
        model = Stack()
        adapt(model, SPEC)
    return Training(model, "loradrop", STEPS, loss)


def test_the_choice_follows_the_outputs_of_the_trial() -> None:
    """Against the sums of the dense B A x of every step, in float64."""
    run = training()
    seen = dict.fromkeys(run.adapters, 0.0)

    def watch(name: str, one: Any) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if run.done < TRIAL and torch.is_grad_enabled():
                delta = one.scale * one.B.detach().double() @ one.A.detach().double()
                seen[name] += float((args[0].detach().double() @ delta.T).square().sum())

        return hook

    for name, site in adapted_sites(run.model).items():
        site.register_forward_pre_hook(watch(name, site.adapter))
    run.run(TRIAL - 1)
    assert set(run.ranks().values()) == {3}
    before = {name: one.B.clone() for name, one in run.adapters.items()}
    run.run(TRIAL)
    for name, one in run.adapters.items():
        assert float(one.seen) == pytest.approx(seen[name], rel=1e-4)
    total, kept, left = sum(seen.values()), set(), 0.5 * sum(seen.values())
    for name in sorted(seen, key=lambda n: -seen[n]):
        if left > 0:
            kept.add(name)
            left -= seen[name]
    dropped = [name for name in run.adapters if name not in kept]
    assert total > 0 and 2 <= len(dropped) < LAYERS
    lead, *others = dropped
    assert {name for name, rank in run.ranks().items() if rank == 0} == set(others)
    assert not run.adapters[lead].B.any(), "the shared pair begins anew"
    assert all(run.adapters[name].B.any() and not torch.equal(run.adapters[name].B, before[name]) for name in kept)
    run.run(STEPS)
    sites = adapted_sites(run.model)
    deltas = {name: site.merged()[0] - site.base.dequantize() for name, site in sites.items()}
    for name in others:
        torch.testing.assert_close(deltas[name], deltas[lead], rtol=0, atol=1e-6)
    assert deltas[lead].norm() > 0
    trained = sum(p.numel() for p in learned(run.model).values())
    assert trained == 3 * 2 * WIDTH * (len(kept) + 1)
    states = {name.rpartition("/")[0] for name in run.optimizer.state()}
    assert not any(name.startswith(other) for name in states for other in others)


def test_the_shared_pair_sums_the_gradients_of_its_layers() -> None:
    run = training()
    run.run(STEPS)
    sites = adapted_sites(run.model)
    lead = next(name for name, one in run.adapters.items() if len(one.role) == LEAD)
    loss(run.model, 1).backward()
    got = run.adapters[lead].B.grad.clone()
    exact = Stack().double()
    deltas = {}
    for name, site in sites.items():
        weight = site.merged()[0].double().requires_grad_()
        deltas[name] = weight
        exact.get_submodule(name).forward = lambda x, weight=weight: F.linear(x, weight)  # type: ignore[method-assign]
    F.mse_loss(exact(data(1).double()), torch.ones(16, WIDTH).double()).backward()
    users = [name for name, one in run.adapters.items() if name == lead or not len(one.A)]
    A = run.adapters[lead].A.detach().double()
    expected = sum(deltas[name].grad for name in users) @ A.T * run.adapters[lead].scale
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize("stop", [2, TRIAL, TRIAL + 3])
def test_a_resumed_run_goes_on_bit_for_bit(stop: int, tmp_path: Path) -> None:
    whole, first = training(), training()
    whole.run(STEPS)
    first.run(stop)
    save_adapter(first.model, SPEC, tmp_path, {"model": "stack"})
    state = {name: v.clone() if isinstance(v, Tensor) else v for name, v in first.optimizer.state().items()}
    model = Stack()
    load_adapter(model, tmp_path)
    again = training(model)
    again.optimizer = Optimizer(learned(model).items(), lr=0.02)
    again.optimizer.restore(state)
    again.done = stop
    again.run(STEPS)
    assert whole.losses[stop:] == again.losses
    assert torch.equal(whole.model(data(0)), again.model(data(0)))


def test_a_step_that_was_skipped_counts_for_nothing() -> None:
    run = training()
    run.run(TRIAL, skip=(TRIAL,))
    seen = {name: float(one.seen) for name, one in run.adapters.items()}
    assert set(run.ranks().values()) == {3} and all(seen.values())
    run.run(TRIAL + 1)
    assert {name: float(one.seen) for name, one in run.adapters.items()} == seen
    assert 0 in run.ranks().values(), "the next step that is made chooses"


@pytest.mark.parametrize(
    ("sums", "share", "dropped"),
    [
        ([4.0, 1.0, 3.0, 2.0], 0.7, [1, 3]),
        ([4.0, 1.0, 3.0, 2.0], 0.8, []),  # one alone keeps its own
        ([4.0, 1.0, 3.0, 2.0], 1.0, []),
        ([0.0, 0.0, 0.0], 0.5, []),
        ([5.0], 0.5, []),
    ],
)
def test_what_is_beyond_the_share(sums: list[float], share: float, dropped: list[int]) -> None:
    assert least(sums, share) == dropped


@torch.no_grad()
def test_peft_takes_it_as_a_lora(tmp_path: Path) -> None:
    spec = AdapterSpec("loradrop", ATTENTION["llama"], {"rank": 3, "alpha": 6.0})
    ours = adapted("llama", spec)
    alike = [site.adapter for name, site in adapted_sites(ours).items() if name.endswith("q_proj")]
    assert len(alike) == 2
    for site in adapted_sites(ours).values():
        site.adapter.B.copy_(0.3 * torch.randn(site.adapter.B.shape))
    for one, sizes in zip(alike, ({"role": LEAD}, {"role": CHOSEN, "rank": 0}), strict=True):
        one.resize(sizes)
        one.prepare(None)
    to_peft(ours, spec, tmp_path, "someone/tiny")
    theirs = peft.PeftModel.from_pretrained(base_of(ours, "llama"), tmp_path).eval()
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)
