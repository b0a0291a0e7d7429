"""Optimizers: each rule equals an implementation that is not ours, loses no small update, and does the same wherever
its states wait and whenever it runs; a step that is not finite is skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TransformersAdafactor

from qtune.adapters import AdapterSpec, adapt
from qtune.errors import QtuneError
from qtune.memory import HOST, place_of
from qtune.model import load
from qtune.optim import Optimizer, optimizer_of, rules
from qtune.optim.early import Early
from qtune.optim.update import layer_of
from qtune.quant import NF4
from qtune.recipe import Recipe
from qtune.screen import Screen
from qtune.sections import MemoryKeys, TrainKeys
from qtune.step import LanguageModel, NonFinite, TrainStep
from qtune.trainer import train


def weights(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    """Two numbered layers, and what belongs to none."""
    torch.manual_seed(5)
    shapes = {
        "layers.0.a": (64, 80),
        "layers.0.b": (80, 8),
        "layers.1.a": (64, 80),
        "layers.1.m": (80,),
        "head": (16, 8),
    }
    return [(name, nn.Parameter((torch.randn(shape) * 0.1).to(dtype))) for name, shape in shapes.items()]


def gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    for index, (_, parameter) in enumerate(named):
        generator = torch.Generator().manual_seed(100 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 1e-3


def run(make: Callable[[list[tuple[str, nn.Parameter]]], Any], steps: int = 6, **like: Any) -> list[Tensor]:
    named = weights(**like)
    update = make(named)
    for step in range(steps):
        gradients(named, step)
        update()
    return [parameter.detach() for _, parameter in named]


def ours(rule: str, **options: Any) -> Callable[[list[tuple[str, nn.Parameter]]], Any]:
    def make(named: list[tuple[str, nn.Parameter]]) -> Any:
        optimizer = Optimizer(named, rule, **{"lr": 1e-2, "weight_decay": 0.1} | options)
        return lambda: optimizer.step(0.5)

    return make


def theirs(kind: Any, **options: Any) -> Callable[[list[tuple[str, nn.Parameter]]], Any]:
    def make(named: list[tuple[str, nn.Parameter]]) -> Any:
        groups = [
            {"params": [p for _, p in named if (p.dim() > 1) == m], "weight_decay": 0.1 * m} for m in (True, False)
        ]
        return kind(groups, lr=5e-3, **options).step

    return make


# ---- each rule is the published one


def test_lion_equals_bitsandbytes_and_the_formula() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    got = run(ours("lion"))
    for a, b in zip(got, run(theirs(bitsandbytes.optim.Lion, betas=(0.9, 0.99))), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)
    named = weights()
    exact, momentum = [p.detach().double() for _, p in named], [0.0 * p.detach().double() for _, p in named]
    for step in range(6):
        gradients(named, step)
        for p, m, (_, parameter) in zip(exact, momentum, named, strict=True):
            g = parameter.grad.double()
            p.mul_(1 - 5e-3 * 0.1 * (p.dim() > 1)).sub_(5e-3 * torch.sign(0.9 * m + 0.1 * g))
            m.mul_(0.99).add_(0.01 * g)
    for a, p in zip(got, exact, strict=True):
        assert torch.allclose(a.double(), p, rtol=0, atol=1e-6)


def test_adafactor_equals_transformers() -> None:
    reference = theirs(TransformersAdafactor, scale_parameter=False, relative_step=False)
    for a, b in zip(run(ours("adafactor")), run(reference), strict=True):
        assert (a - b).abs().max() < 2e-6


def test_betas_of_a_recipe_reach_the_rule() -> None:
    def betas(**keys: Any) -> tuple[float, float]:
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(2, 2))
        return optimizer_of(model, TrainKeys(**keys)).buckets["0"].inner[0].param_groups[0]["betas"]

    assert betas() == (0.9, 0.999) and betas(optimizer="lion") == (0.9, 0.99)
    assert betas(optimizer="lion", betas=(0.5, 0.6)) == (0.5, 0.6)


# ---- no small update is lost


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_a_thousand_updates_of_a_ten_thousandth_do_not_vanish(rule: str, dtype: torch.dtype) -> None:
    """Each is below half a step of bf16 (and of fp16)."""
    weight, small = (nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((64, 65), (8, 8)))
    optimizer = Optimizer([("w", weight), ("s", small)], rule, lr=1e-4)
    for _ in range(1000):
        weight.grad, small.grad = torch.ones_like(weight), torch.ones_like(small)
        optimizer.step(1.0)
    for parameter in (weight, small):
        moved = float((1 - parameter.detach().float()).mean())
        assert moved == pytest.approx(0.1, rel=0.02)


# ---- the same bits wherever the states wait


@pytest.mark.parametrize("rule", rules.RULES)
def test_parts_that_are_updated_one_after_the_other_change_no_bit(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(ours(rule), dtype=torch.bfloat16)
    monkeypatch.setattr("qtune.optim.update.TOGETHER", 5500)
    assert len(Optimizer(weights(), rule, lr=1.0).buckets) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole, run(ours(rule), dtype=torch.bfloat16), strict=True))


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_that_wait_on_the_host_change_no_bit(rule: str, dtype: torch.dtype) -> None:
    stay, wait = (run(ours(rule, host=host), dtype=dtype) for host in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(stay, wait, strict=True))


@pytest.mark.parametrize("rule", rules.RULES)
def test_between_updates_nothing_but_weights_is_off_the_host(rule: str) -> None:
    named = weights(torch.bfloat16)
    optimizer = Optimizer(named, rule, lr=1e-3, host=True)
    assert list(optimizer.buckets) == ["layers.0", "layers.1", ""]
    for step in range(2):
        for bucket in optimizer.buckets.values():
            assert all(place_of(wide) == HOST for parameter, wide in bucket.pairs if wide is not parameter)
            states = [t for one in bucket.inner for kept in one.state.values() for t in kept.values()]
            large = [t for t in states if isinstance(t, Tensor) and t.numel() > 1]
            assert all(place_of(t) == HOST for t in large) and bool(large) == bool(step)
        gradients(named, step)
        optimizer.step(1.0)


def test_only_cuda_has_memory_of_its_own() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16, device="meta"))
    for device, host in (("cuda", True), ("cpu", False), ("mps", False)):
        assert optimizer_of(model, TrainKeys(), MemoryKeys(optimizer="host"), torch.device(device)).host == host
    assert not optimizer_of(model, TrainKeys(), MemoryKeys(optimizer="host")).host


# ---- the update in the backward


def test_layers_by_their_names() -> None:
    assert layer_of("model.layers.13.mlp.experts.4.up_proj.adapter.A") == "model.layers.13"
    assert layer_of("transformer.h.0.attn.c_attn.adapter.B") == "transformer.h.0"
    assert layer_of("lm_head.adapter.A") == layer_of("adapter_shared.A1.b") == ""


BATCH = tiny.ids(20)


def adapted(
    folder: Path, keys: TrainKeys, method: str = "lora", dtype: torch.dtype = torch.float32, **memory: Any
) -> TrainStep:
    if not folder.exists():
        runs_helper.write_model(folder)
    model = load(folder, NF4(block=32), dtype=dtype)
    adapt(model, AdapterSpec(method, (), {"rank": 4} if method == "lora" else {}))
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1)
    language = LanguageModel(model)
    language.arrange(keys, MemoryKeys(**memory), Path("."))
    model.train()
    return TrainStep(language, optimizer_of(model, keys), clip=keys.clip)


def batch() -> Any:
    return type("B", (), {"input_ids": BATCH, "attention_mask": torch.ones_like(BATCH), "labels": BATCH.clone()})()


def cases() -> Iterator[Any]:
    for rule in rules.RULES:
        yield rule, "lora", True, torch.bfloat16
    yield "adamw", "dora", False, torch.float32
    yield "adamw", "vera", True, torch.float32


@pytest.mark.parametrize(("rule", "method", "checkpointing", "dtype"), list(cases()))
def test_an_update_in_the_backward_changes_no_bit(
    rule: str, method: str, checkpointing: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    results = []
    for early in (False, True):
        keys = TrainKeys(optimizer=rule, clip=None, checkpointing=checkpointing, update_in_backward=early, lr=1e-3)
        # in tiles, a layer's gradients come in parts
        step = adapted(tmp_path / "m", keys, method, dtype, mlp_tile=8 if rule == "lion" else None)
        assert step.optimizer.early == early and len(step.optimizer.buckets) == (2 if early else 1)
        done = [step([batch()], n, 3, 1.0) for n in (1, 2, 3)]
        results.append((done, [p.detach() for p in step.optimizer.parameters]))
    (plain, stay), (early, moved) = results
    assert [r.loss for r in plain] == [r.loss for r in early]
    close = 1e-5 if dtype == torch.float32 else 1e-2  # norms of norms in bf16
    assert [r.grad_norm for r in early] == pytest.approx([r.grad_norm for r in plain], rel=close)
    assert all(torch.equal(a, b) for a, b in zip(stay, moved, strict=True))


def test_no_more_than_a_layer_s_gradients_are_there(tmp_path: Path) -> None:
    most = {}
    for early in (False, True):
        step = adapted(tmp_path / "m", TrainKeys(clip=None, update_in_backward=early))
        seen: list[int] = []

        def count(_: Tensor, parameters: list[nn.Parameter] = step.optimizer.parameters, to: list[int] = seen) -> None:
            to.append(sum(p.grad is not None for p in parameters))

        for parameter in step.optimizer.parameters:
            parameter.register_post_accumulate_grad_hook(count)
        step([batch()], 1, 1, 1.0)
        most[early] = max(seen)
    assert most[False] == 28 and most[True] == 14


def test_what_layers_share_waits_for_the_end_of_the_backward() -> None:
    """A parameter under two layers' names gets its gradient in parts, as recomputed layers give it."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(3))
    shared = nn.Parameter(torch.ones(3))
    for layer in model.layers:
        layer.own, layer.shared = nn.Parameter(torch.ones(3)), shared
    optimizer = optimizer_of(model, TrainKeys(clip=None, update_in_backward=True, lr=0.1))
    optimizer.begin(1.0)
    for layer in reversed(model.layers):
        (layer.own * layer.shared).sum().backward()
    assert torch.equal(shared.grad, torch.full((3,), 3.0)) and torch.equal(shared, torch.ones(3))
    assert optimizer.norm(math.inf) == pytest.approx(6)
    optimizer.step(1.0)
    assert shared.grad is None and torch.allclose(shared, torch.full((3,), 0.9))


def test_a_gradient_in_parts_between_other_layers_is_refused() -> None:
    named = weights()
    optimizer = Early(named, lr=1e-3)
    optimizer.begin(1.0)
    a, b = dict(named)["layers.1.a"], dict(named)["layers.0.a"]
    a.sum().backward()
    b.sum().backward()
    with pytest.raises(QtuneError, match=r"layers\.1\.a came in parts.*train\.update_in_backward to false"):
        a.sum().backward()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_gradient_that_is_not_finite_stops_the_updates_below(layer: int, tmp_path: Path) -> None:
    step = adapted(tmp_path / "m", TrainKeys(clip=None, update_in_backward=True))
    names = {name: p for name, p in step.model.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in names.items()}
    at = f"model.layers.{layer}.mlp.up_proj.adapter.B"
    bad = names[at]
    handle = bad.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFinite, match="step 1: loss is [0-9.]+, gradient norm is nan"):
        step([batch()], 1, 2, 1.0)
    for name, p in names.items():
        assert torch.equal(p, before[name]) == (layer_of(name) <= layer_of(at)), name
        assert p.grad is None and p.isfinite().all()
    handle.remove()
    step([batch()], 2, 2, 1.0)
    assert not any(torch.equal(p, before[name]) for name, p in names.items())


def test_a_loss_that_is_not_finite_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = adapted(tmp_path / "m", TrainKeys(clip=None, update_in_backward=True))
    before = [p.detach().clone() for p in step.optimizer.parameters]
    real = LanguageModel.loss_sum
    monkeypatch.setattr(LanguageModel, "loss_sum", lambda self, b: real(self, b) + math.inf)  # its gradient is finite
    with pytest.raises(NonFinite, match="loss is inf"):
        step([batch()], 1, 1, 1.0)
    assert all(torch.equal(a, p) for a, p in zip(before, step.optimizer.parameters, strict=True))


def test_gradients_alone_update_nothing(tmp_path: Path) -> None:
    step = adapted(tmp_path / "m", TrainKeys(clip=None, update_in_backward=True))
    before = [p.detach().clone() for p in step.optimizer.parameters]
    step.gradients([batch()])
    assert all(p.grad is not None for p in step.optimizer.parameters)
    assert all(torch.equal(a, p) for a, p in zip(before, step.optimizer.parameters, strict=True))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("train.accumulate=4", r"train.accumulate is 4 with train.update_in_backward.*legal: 1"),
        ("train.clip=0.5", r"train.clip is 0.5 with train.update_in_backward.*legal: null"),
        ("train.betas=[0.9, 0.99]", r"train.betas is \[0.9, 0.99\], which adafactor has not; legal: null"),
    ],
)
def test_what_does_not_go_together_is_told(given: str, fault: str) -> None:
    keys = {"model": "x", "train": {"update_in_backward": True, "clip": None, "optimizer": "adafactor"}}
    assert Recipe.load(keys, training=False).train.update_in_backward
    with pytest.raises(QtuneError, match=fault):
        Recipe.load(keys, [given], training=False)


# ---- steps that are skipped


def poisoned(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """The loss of these forward passes in training, counted from 1, is NaN."""
    real, calls = LanguageModel.loss_sum, iter(range(1, 1000))
    monkeypatch.setattr(
        LanguageModel,
        "loss_sum",
        lambda self, b: real(self, b) * (math.nan if self.model.training and next(calls) in bad else 1.0),
    )


def test_a_step_that_is_not_finite_is_skipped_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(runs_helper.recipe(tmp_path, train__lr=1e-3, output=str(tmp_path / "plain")))
    poisoned(monkeypatch, 3, 6, 7)
    result = train(runs_helper.recipe(tmp_path, train__lr=1e-3, train__max_skipped=2), screen=Screen())
    told = capsys.readouterr().out
    assert told.count("the step is skipped") == 1 and "step 3: loss is nan" in told and "3 skipped" in told
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["skipped"]) for r in rows if "skipped" in r] == [(3, 1), (6, 2), (7, 3)]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 4, 5, 8]
    assert (result.steps, result.skipped, len(result.losses)) == (8, 3, 5)
    rates = {r["step"]: r["lr"] for r in rows if "lr" in r}
    again = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert rates == {r["step"]: r["lr"] for r in again if "lr" in r}, "a skipped step is a step of the schedule"
    assert result.losses[:2] == plain.losses[:2] and result.losses[2:] != plain.losses[3:5]


@pytest.mark.parametrize(("most", "stops"), [(0, 2), (2, 4)])
def test_too_many_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, stops: int) -> None:
    poisoned(monkeypatch, *range(2, 20))
    with pytest.raises(NonFinite, match=f"step {stops}: loss is nan.*holds the adapter of step 1"):
        train(runs_helper.recipe(tmp_path, train__max_skipped=most, train__save_every=1, data__eval=None))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["lion", "adafactor"])
def test_a_recipe_learns_by_it(rule: str, tmp_path: Path) -> None:
    result = train(runs_helper.recipe(tmp_path, train__steps=40, train__optimizer=rule, train__lr=1e-2))
    assert result.after.accuracy == 1.0 and result.after.loss < result.before.loss
