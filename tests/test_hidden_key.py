"""Keys and hidden values that are left out by chance: what is computed, where, when, by which draws, at what bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_drop_backward import arranged
from test_low_memory import adapted, batch, same, stepped
from test_packing import LENGTHS, REFUSED, examples
from test_planner_trace import CPU, GPU, bytes_in_order, made
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from qtune.adapters import AdapterSpec, adapt
from qtune.batches import Batch, collate
from qtune.errors import QtuneError
from qtune.loss import LossOptions, cross_entropy_sum, loss_options
from qtune.model import apart, dropping, fused, load
from qtune.model.layerwise import decoder_layers
from qtune.model.skeleton import build
from qtune.planner.plan import plan_recipe
from qtune.planner.step_trace import MetaBatch, planned_trace, step_trace
from qtune.quant import scheme_from
from qtune.recipe import Recipe
from qtune.sections import MemoryKeys, TrainKeys
from qtune.step import LanguageModel

BOTH = {"drop_keys": 0.2, "drop_hidden": 0.1}
ALL_KEYS = 1 - 1e-9  # every key is dropped, and so none


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.saved("llama", tmp_path, num_hidden_layers=5)
    return tmp_path


# ---- the two dropouts


def by_a_mask(q: Tensor, k: Tensor, v: Tensor, dropped: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The paper's equation: -inf before the softmax, but for a query that would see nothing."""
    k, v, dropped = (x.repeat_interleave(2, 1) for x in (k, v, dropped))
    gone = dropped[:, :, None] & seen
    gone &= (seen & ~gone).any(-1, keepdim=True)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen | gone, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("inner", apart.INNER)
@pytest.mark.parametrize("chance", [0.1, 0.7])
@pytest.mark.parametrize(("scaling", "window"), [(None, None), (0.3, None), (1 / 128, 7)])
def test_dropped_keys_are_those_of_a_mask(inner: str, chance: float, scaling: float | None, window: int | None) -> None:
    """In float64, with two heads that share each key, causal or in a window."""
    AttentionInterface.register(fused.ATTENTION, fused._attention)
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    setattr(module, dropping.KEYS, chance)
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, heads, 24, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    back = torch.arange(24)[:, None] - torch.arange(24)
    seen = (back >= 0) & (back < (window or 24))
    torch.manual_seed(4)
    dropped = torch.zeros(2, 2, 24, dtype=torch.float64).bernoulli_(chance).bool()
    torch.manual_seed(4)
    mask = None if window is None else seen[None, None]
    out, _ = dropping._dropped(inner, module, q, k, v, mask, scaling=scaling)
    want = by_a_mask(q, k, v, dropped, seen, scaling or 0.25)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    grads, wanted = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (out, want))
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8)
    alone = (dropped[:, :, None] | ~seen).all(-1)
    assert dropped.any() and (alone.any() or chance < 0.5), "some query sees dropped keys alone"


def test_hidden_values_are_those_of_a_dropout() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 500, 64, requires_grad=True)
    module = nn.Module()
    y, rest = dropping._cut(0.2, module, (), (x * 2, "rest"))
    kept = y != 0
    assert rest == "rest" and kept.float().mean().item() == pytest.approx(0.8, abs=0.01)
    torch.testing.assert_close(y, x * 2 * kept / 0.8)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * kept / 0.8)
    assert dropping._cut(0.2, module.eval(), (), x) is None


# ---- where and when


@pytest.mark.parametrize("keys", [{"drop_keys": 0.5}, {"drop_hidden": 0.5}])
def test_the_upper_half_drops_in_training_alone(folder: Path, keys: dict[str, float]) -> None:
    model = adapted(folder, torch.float32)
    language, seen = LanguageModel(model), {}
    for index, layer in enumerate(decoder_layers(model)[1]):
        layer.register_forward_hook(lambda _, args, y, index=index: seen.setdefault(index, []).append(y))
    language.arrange(TrainKeys(checkpointing=False, **keys), MemoryKeys(), folder)
    with torch.no_grad():
        for mode in (False, True, True):
            model.train(mode)
            language.hidden(batch().input_ids, batch().attention_mask)
    for index, (plain, one, two) in seen.items():
        assert torch.equal(plain, one) == torch.equal(one, two) == (index < 2), index
    language.restore()
    left = [m for m in model.modules() if dropping.KEYS in vars(m) or dropping.HIDDEN in vars(m)]
    assert not left and same(
        stepped(model, arranged(folder)), stepped(adapted(folder, torch.float32), arranged(folder))
    )


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_architecture_drops_or_is_refused_by_name(family: str, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path)
    refused = {"drop_keys": family in REFUSED, "drop_hidden": family == "opt"}
    for key, no in refused.items():
        language = LanguageModel(load(tmp_path, scheme_from("int8"), dtype=torch.float32))
        language.choose_attention(24, dropped=True)
        if no:
            with pytest.raises(QtuneError, match=rf"train.{key}.*legal: 0") as error:
                language.arrange(TrainKeys(**{key: 0.5}), MemoryKeys(), tmp_path)
            assert error.value.code == "Q430"
            continue
        plain = language.logits(batch().input_ids, batch().attention_mask)
        dropping.begin(language.model, *(0.5 * (name == key) for name in refused))
        for module in language.model.modules():  # GPT-2 and OPT have dropout of their own
            module.train(not isinstance(module, nn.Dropout))
        assert not torch.allclose(language.logits(batch().input_ids, batch().attention_mask), plain, atol=1e-2)


@pytest.mark.parametrize("packed", [True, False])
def test_packed_rows_and_paddings_drop_as_well(folder: Path, packed: bool) -> None:
    """Where all keys are dropped none is: the same loss, through all that is made of the keys."""
    losses = []
    for chance in (0.0, ALL_KEYS, 0.3):
        language = LanguageModel(adapted(folder, torch.float32))
        language.choose_attention(max(LENGTHS), packed=packed, dropped=True)
        language.arrange(TrainKeys(drop_keys=chance), MemoryKeys(), folder)
        losses.append(language.loss_sum(collate(examples(), packed)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] != pytest.approx(losses[0], rel=1e-4)


def test_recomputed_layers_draw_the_same(folder: Path) -> None:
    keys = BOTH | {"consistency": 0.5}

    def step(memory: MemoryKeys, **more: Any) -> Any:
        model = adapted(folder, torch.float32)

        def arrange(language: LanguageModel) -> None:
            language.loss = loss_options(TrainKeys(**keys), memory, "cpu")
            language.arrange(TrainKeys(**keys, **more), memory, folder)

        return stepped(model, arrange)

    kept = step(MemoryKeys(), checkpointing=False)
    assert same(step(MemoryKeys()), kept)
    tiles = step(MemoryKeys(mlp_tile=7))
    assert tiles[0] == pytest.approx(kept[0], rel=1e-6)
    for name, grad in kept[1].items():
        torch.testing.assert_close(tiles[1][name], grad, rtol=1e-3, atol=1e-5)


# ---- the divergence


@pytest.mark.parametrize("tile", [1, 1 << 20])
def test_the_divergence_equals_float64(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.loss.TILE_ELEMENTS", tile)
    head, hidden = nn.Linear(24, 37, bias=False), torch.randn(3, 20, 24, requires_grad=True)
    other, labels = hidden.detach() + 0.3 * torch.randn(3, 20, 24), torch.randint(0, 37, (3, 20))
    labels[1, 4:9] = -100
    options = LossOptions(7, 0.1, 1e-3, consistency=0.7)
    got = cross_entropy_sum(hidden, labels, head, 37, lambda z: torch.tanh(z / 3) * 3, options, other)
    got.backward()
    wide, weight = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    trained = labels[:, 1:].reshape(-1) != -100
    z, w = (
        (torch.tanh(x[:, :-1] @ weight.T / 3) * 3).reshape(-1, 37)[trained] for x in (wide, other.double())
    )  # fmt: skip
    expected = F.cross_entropy(z, labels[:, 1:].reshape(-1)[trained], reduction="sum", label_smoothing=0.1)
    expected = expected + 1e-3 * z.logsumexp(1).square().sum()
    p, q = z.log_softmax(1), w.detach().log_softmax(1)
    both = [F.kl_div(a, b, reduction="sum", log_target=True) for a, b in ((p, q), (q, p))]
    expected = expected + 0.7 * sum(both) / 2
    expected.backward()
    assert torch.allclose(got.double(), expected, rtol=1e-6)
    assert torch.allclose(hidden.grad.double(), wide.grad, atol=1e-5)
    assert torch.allclose(head.weight.grad.double(), weight.grad, atol=1e-4), "a trained head learns from one pass"


def test_a_second_pass_drops_anew_and_is_not_differentiated(folder: Path) -> None:
    model = adapted(folder, torch.float32)
    language = LanguageModel(model, LossOptions(consistency=2.0))
    language.arrange(TrainKeys(**BOTH), MemoryKeys(), folder)
    torch.manual_seed(7)
    got = language.loss_sum(batch())
    torch.manual_seed(7)
    with torch.no_grad():
        other = language.hidden(batch().input_ids, batch().attention_mask)
    language.loss = LossOptions()
    mine = language.loss_sum(batch())
    assert got.item() > mine.item(), "the divergence of two passes with other draws"
    torch.manual_seed(7)
    again = language.hidden(batch().input_ids, batch().attention_mask)
    assert torch.equal(again, other) and not other.requires_grad
    with torch.no_grad():
        language.loss = LossOptions(consistency=2.0)
        plain = language.loss_sum(batch(), plain=True)
    assert torch.isfinite(plain)


def test_a_divergence_without_draws_is_refused() -> None:
    with pytest.raises(QtuneError, match=r"train.consistency is 1, but both passes would be the same; legal: 0, or"):
        Recipe.load({"model": "x"}, ["train.consistency=1"], training=False)


# ---- the plan


@pytest.mark.parametrize("keys", [BOTH, BOTH | {"consistency": 1.0, "checkpointing": False, "accumulate": 2}])
def test_the_plan_is_the_real_step(folder: Path, keys: dict[str, Any]) -> None:
    train, spec = TrainKeys(**keys), AdapterSpec("lora")
    real = load(folder, scheme_from("nf4"))
    planned = build(copy.deepcopy(real.config), scheme_from("nf4"))
    for model in (real, planned):
        adapt(model, spec)
    ids = torch.randint(0, tiny.VOCAB, (2, 40))
    batches = [Batch(ids, torch.ones_like(ids), ids.clone())] * train.accumulate
    want, _ = step_trace(real, train, batches, CPU)
    got, _ = step_trace(planned, train, [MetaBatch.of(2, 40)] * train.accumulate, CPU)
    assert bytes_in_order(got) == bytes_in_order(want)


@pytest.mark.parametrize("keys", [{"checkpointing": False}, {"consistency": 1.0, "accumulate": 2}])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_few_layers_extended_are_all_of_them(keys: dict[str, Any], device: Any) -> None:
    """The lower half's layers are not like the upper half's."""
    train = TrainKeys(**BOTH, **keys)
    extended, _ = planned_trace(lambda: made(layers=7), train, MetaBatch.of(2, 48), device)
    whole = made(layers=7)
    traced, _ = step_trace(whole, train, [MetaBatch.of(2, 48)] * train.accumulate, device)
    assert extended.peak()[0] == traced.peak()[0]
    plain, _ = planned_trace(
        lambda: made(layers=7), TrainKeys(**keys | {"consistency": 0.0}), MetaBatch.of(2, 48), device
    )
    assert extended.peak()[0] > plain.peak()[0]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_second_pass_takes_its_time(folder: Path, accumulate: int) -> None:
    """With checkpointing a step is two forward passes and a backward of about two; one more is a fourth."""
    tree = {"model": str(folder), "data": {"max_length": 64}}
    given = [f"train.accumulate={accumulate}", "train.drop_hidden=0.1"]
    plain, both = (
        plan_recipe(Recipe.load(tree, [*given, *more], training=False), GPU).speed.seconds
        for more in ([], ["train.consistency=1"])
    )
    assert 1.1 * plain < both < 1.5 * plain


def test_mlps_side_by_side_are_refused(folder: Path) -> None:
    """One alone would be cut: a shared MLP, or Gemma 4's experts."""
    model = adapted(folder, torch.float32)
    decoder_layers(model)[1][-1].shared_mlp = nn.Linear(4, 4)
    with pytest.raises(QtuneError, match=r"has no MLP that qtune knows in its layers, but several side by side; leg"):
        LanguageModel(model).arrange(TrainKeys(drop_hidden=0.5), MemoryKeys(), folder)
