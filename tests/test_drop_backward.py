"""Layers that are left out of a backward pass by chance: which gradients come out, what is kept, what a plan says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_laws import saved
from test_low_memory import adapted, batch, same, stepped
from test_planner_trace import CPU, assert_same, made
from torch import Tensor

from qtune.errors import QtuneError
from qtune.memory.boundaries import Boundaries
from qtune.memory.layers import Layers, layers_of, whole_backward
from qtune.model.layerwise import decoder_layers
from qtune.planner.step_trace import MetaBatch, planned_trace
from qtune.sections import MemoryKeys, TrainKeys
from qtune.step import LanguageModel

CHANCE = 0.5


def arranged(folder: Path, **keys: Any) -> Callable[[LanguageModel], object]:
    return lambda language: language.arrange(TrainKeys(**keys), MemoryKeys(), folder)


def drawn(layers: int, micro_batches: int = 2) -> list[list[bool]]:
    """Which layers are left out where no more than that is drawn; one stays."""
    torch.manual_seed(5)  # as `stepped` does
    found = []
    for _ in range(micro_batches):
        chances = torch.rand(layers)
        left = chances < CHANCE
        if left.all():
            left[chances.argmax()] = False
        found.append(left.tolist())
    return found


def by_autograd(language: LanguageModel) -> None:
    """The layers as torch differentiates them: x + (layer(x) - x) without the gradient of what is in brackets."""
    _, layers = decoder_layers(language.model)
    plan = drawn(len(layers))
    calls = [0] * len(layers)
    for place, layer in enumerate(layers):
        own = layer.forward

        def forward(x: Tensor, *args: Any, own: Any = own, place: int = place, **kwargs: Any) -> Any:
            out = own(x, *args, **kwargs)
            left, calls[place] = plan[calls[place]][place], calls[place] + 1
            return x + (out - x).detach() if left else out

        layer.forward = forward


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.saved("llama", tmp_path, num_hidden_layers=5)
    return tmp_path


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_those_of_the_layers_that_stay(folder: Path, checkpointing: bool) -> None:
    want = stepped(adapted(folder, torch.float32), by_autograd)
    got = stepped(adapted(folder, torch.float32), arranged(folder, checkpointing=checkpointing, drop_backward=CHANCE))
    assert any(map(any, drawn(5))) and got[0] == pytest.approx(want[0], rel=1e-6)
    assert got[1].keys() >= {name for name, grad in want[1].items() if grad.any()}
    for name, grad in want[1].items():
        if name in got[1]:
            torch.testing.assert_close(got[1][name], grad, rtol=1e-4, atol=1e-6)
        else:
            assert not grad.any(), name


def test_the_loss_is_that_of_the_whole_model(folder: Path) -> None:
    whole = stepped(adapted(folder), arranged(folder))
    left = stepped(adapted(folder), arranged(folder, drop_backward=CHANCE))
    assert left[0] == whole[0] and not same(left, whole)


def test_it_can_be_taken_back(folder: Path) -> None:
    model = adapted(folder)
    language = LanguageModel(model)
    language.arrange(TrainKeys(drop_backward=0.99), MemoryKeys(), folder)
    language.restore()
    assert same(stepped(model, arranged(folder)), stepped(adapted(folder), arranged(folder)))


def test_a_layer_left_out_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stay = sum(not left for left in drawn(5, 1)[0])
    kept: list[int] = []
    put = Boundaries.put
    monkeypatch.setattr(Boundaries, "put", lambda self, ctx, given: (kept.append(1), put(self, ctx, given))[1])
    model = adapted(folder)
    language = LanguageModel(model)
    language.arrange(TrainKeys(drop_backward=CHANCE), MemoryKeys(), folder)
    torch.manual_seed(5)
    language.loss_sum(batch())
    assert len(kept) == stay < 5

    def taken(chance: float) -> int:
        language.restore()
        language.arrange(TrainKeys(checkpointing=False, drop_backward=chance), MemoryKeys(), folder)
        torch.manual_seed(5)
        with saved() as tensors:
            language.loss_sum(batch())
        return sum(tensor.nbytes for tensor in {id(t): t for t in tensors}.values() if tensor.is_floating_point())

    assert taken(CHANCE) < taken(0.0)


def test_something_is_always_learned(folder: Path) -> None:
    """Where only some layers have adapters, one of those stays."""
    spec = {"targets": ["model.layers.1.*", "model.layers.3.*"]}
    for chance in (0.9, 0.999):
        gradients = stepped(adapted(folder, **spec), arranged(folder, drop_backward=chance))[1]
        assert any(grad.any() for grad in gradients.values())


def test_the_first_step_is_tried_whole(folder: Path) -> None:
    model = adapted(folder)
    language = LanguageModel(model)
    language.arrange(TrainKeys(drop_backward=0.99), MemoryKeys(), folder)
    with whole_backward(model):
        assert same(stepped(model, lambda language: None), stepped(adapted(folder), arranged(folder)))
    assert layers_of(model).drop == 0.99


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_plan_is_of_a_step_that_leaves_out_nothing(checkpointing: bool) -> None:
    def planned(chance: float) -> Any:
        keys = TrainKeys(checkpointing=checkpointing, drop_backward=chance)
        return planned_trace(lambda: made(layers=5), keys, MetaBatch.of(1, 48), CPU)[0]

    assert_same(planned(0.9), planned(0.0))


def test_methods_that_read_every_gradient_are_refused(folder: Path) -> None:
    with pytest.raises(QtuneError, match=r"train.drop_backward is 0.5, and adapter method adalora reads the gradients"):
        LanguageModel(adapted(folder, method="adalora")).arrange(TrainKeys(drop_backward=0.5), MemoryKeys(), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "gpt-oss"])
def test_every_family_adds_to_what_goes_into_its_layers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path)
    loss, gradients = stepped(adapted(tmp_path, dtype), arranged(tmp_path, drop_backward=0.3))
    assert loss > 0 and gradients


def test_each_layer_is_looked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where training is arranged anew."""
    seen: list[int] = []
    see = Layers._see
    monkeypatch.setattr(Layers, "_see", lambda self, index, *rest: (seen.append(index), see(self, index, *rest)))
    model = adapted(folder)
    for _ in range(2):
        stepped(model, arranged(folder, checkpointing=False, drop_backward=CHANCE))
        LanguageModel(model).restore()
    assert seen == [0, 1, 2, 3, 4]


def test_looking_at_the_layers_changes_no_draw(folder: Path) -> None:
    """The first pass, in which each layer is looked at, draws what the next does."""
    spec = {"dropout": 0.5}
    first = stepped(adapted(folder, **spec), arranged(folder, drop_backward=CHANCE))
    model = adapted(folder, **spec)
    stepped(model, arranged(folder, drop_backward=CHANCE))
    model.zero_grad()
    assert same(stepped(model, lambda language: None), first)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_that_change_what_goes_by_them_are_refused(tmp_path: Path, checkpointing: bool) -> None:
    """The gradient that goes by such a layer would not be that of its residual connection."""
    keys = {"checkpointing": checkpointing, "drop_backward": 0.01}
    tiny.saved("opt", tmp_path / "opt", do_layer_norm_before=False)
    with pytest.raises(QtuneError, match=r"drop_backward is 0.01, .* layer 0 of OPTForCausalLM .* legal: 0"):
        stepped(adapted(tmp_path / "opt"), arranged(tmp_path, **keys))
    tiny.saved("llama", tmp_path / "llama")
    model = adapted(tmp_path / "llama")
    layer = decoder_layers(model)[1][1]
    own = type(layer)
    scaled = {"forward": lambda self, *args, **kwargs: own.forward(self, *args, **kwargs) * 0.8}  # as Gemma 4's are
    layer.__class__ = type("Scaled", (own,), scaled)
    with pytest.raises(QtuneError, match=r"layer 1 of LlamaForCausalLM"):
        stepped(model, arranged(tmp_path, **keys))
