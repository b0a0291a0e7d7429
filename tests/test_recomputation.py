"""Layers and tiles that run again: whatever they draw, hand on or put aside, the gradients are those of one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_low_memory import HOME, adapted, batch, same, stepped, theirs

from qtune.adapters import adapted_sites
from qtune.errors import QtuneError
from qtune.memory import DISK, HOST
from qtune.memory.boundaries import Away, Boundaries
from qtune.memory.files import MappedFile
from qtune.memory.random import random_states, replayed
from qtune.memory.stream import Store
from qtune.model.layerwise import decoder_layers
from qtune.planner.devices import find_device
from qtune.planner.phases import phases_of
from qtune.planner.plan import plan_recipe
from qtune.recipe import Recipe
from qtune.sections import MemoryKeys, TrainKeys
from qtune.step import LanguageModel

BLOOM = ("BloomConfig", {"vocab_size": tiny.VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.3,
                         "attention_dropout": 0.0, "initializer_range": 0.1})  # fmt: skip
SHARED = ("Gemma4TextConfig", tiny.LLAMA | {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 16, "global_head_dim": 16, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": tiny.VOCAB, "enable_moe_block": False,
})  # fmt: skip


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize(
    ("family", "changes"),
    [("bloom", {}), ("mixtral", {"router_jitter_noise": 0.2})],
)
def test_whatever_a_layer_draws_is_drawn_again(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "bloom", BLOOM)
    tiny.saved(family, tmp_path, **changes)
    want = stepped(adapted(tmp_path), theirs)
    assert same(stepped(adapted(tmp_path), lambda language: language.checkpointing(Boundaries())), want)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_tiles_draw_the_same_dropout_twice(checkpointing: bool, tmp_path: Path) -> None:
    """The gradient is that of the loss that was computed: along a direction, the slope of it."""
    tiny.saved("llama", tmp_path)
    model = adapted(tmp_path, torch.float32, dropout=0.3)
    language = LanguageModel(model)
    language.arrange(TrainKeys(checkpointing=checkpointing), MemoryKeys(mlp_tile=7), tmp_path)
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return language.loss_sum(batch())

    loss().backward()
    along = [torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) for n, p in enumerate(trained)]
    slope = sum(float((p.grad * v).sum()) for p, v in zip(trained, along, strict=True) if p.grad is not None)
    ends = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for p, v in zip(trained, along, strict=True):
                p.add_(step * v)
        ends.append(float(loss().detach()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)


def test_random_numbers_are_those_of_then_and_go_on_afterwards() -> None:
    torch.manual_seed(0)
    then = random_states(HOME)
    first, second = torch.rand(3), torch.rand(3)
    torch.manual_seed(1)
    with replayed(then, HOME):
        assert torch.equal(torch.rand(3), first) and torch.equal(torch.rand(3), second)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_layers_that_share_keys_and_values_get_their_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left to transformers' checkpointing; what cannot be done then is refused."""
    monkeypatch.setitem(tiny.FAMILIES, "gemma4", SHARED)
    tiny.saved("gemma4", tmp_path)
    spec = {"targets": ["*.self_attn.*"]}
    want = stepped(adapted(tmp_path, **spec), theirs)
    assert same(stepped(adapted(tmp_path, **spec), lambda language: language.checkpointing(Boundaries())), want)
    language, store = LanguageModel(adapted(tmp_path, **spec)), Store(HOME, "cpu", tmp_path)
    with pytest.raises(QtuneError, match="keys and values of layers before them.*must be device"):
        language.arrange(TrainKeys(), MemoryKeys(boundaries="disk"), tmp_path)
    with pytest.raises(QtuneError, match="cannot be run one by one"):
        store.run(language.model)


# ---- what is put aside


@pytest.mark.parametrize("place", [HOST, DISK])
def test_buffers_are_as_many_and_as_large_as_one_pass_needs(place: str, tmp_path: Path) -> None:
    """Whatever the lengths of micro-batches were, and also where a backward pass never came."""
    tiny.saved("llama", tmp_path)
    away = Away(HOME, tmp_path if place == DISK else None)
    language = LanguageModel(adapted(tmp_path))
    language.checkpointing(away)
    for length in (*range(10, 30), 12, 29):
        language.loss_sum(batch(length=length)).backward()
    largest = 2 * 29 * 64 * 2  # rows, tokens, width, bytes
    assert [buffer.numel() for buffer in away.free] == [largest] * 2, "a layer each"
    for _ in range(3):
        language.loss_sum(batch(length=29))
    assert len(away.free) == 2
    if away.there.file is not None:
        assert len(away.there.file._maps) == 2


def test_packed_weights_that_wait_elsewhere_come_for_whoever_reads_them(tmp_path: Path) -> None:
    """As merging does, outside of any layer's pass. meta stands for the device."""
    tiny.saved("llama", tmp_path)
    model = adapted(tmp_path)
    store = Store(HOME, "cuda")
    for layer in decoder_layers(model)[1]:
        store.put(layer)
    for site in adapted_sites(model).values():
        site.adapter.to("meta")
        site.base.home = torch.device("meta")
        assert site.merged()[0].is_meta and site.base.dequantize().is_meta
        assert site(torch.empty(2, site.base.in_features, device="meta")).is_meta
        assert not site.base.packed.is_meta


# ---- keys that cannot be done, and what a plan says


def test_boundaries_that_wait_ask_for_checkpointing() -> None:
    tree = {"model": "x", "memory": {"boundaries": "disk"}, "train": {"checkpointing": False}}
    with pytest.raises(QtuneError, match=r"memory.boundaries is disk, train.checkpointing is false.*legal: train"):
        Recipe.load(tree, training=False)


def test_tiles_of_a_model_without_gated_mlps_are_refused(tmp_path: Path) -> None:
    tiny.saved("gpt2", tmp_path)
    language = LanguageModel(adapted(tmp_path))
    with pytest.raises(QtuneError, match="memory.mlp_tile is 8, and GPT2LMHeadModel has no gated MLP.*legal: null"):
        language.arrange(TrainKeys(), MemoryKeys(mlp_tile=8), tmp_path)


def test_what_waits_on_the_host_is_in_every_phase() -> None:
    def host(*changes: str) -> dict[str, int]:
        recipe = Recipe.load({"model": "smollm2-135m"}, changes, training=False)
        plan = plan_recipe(recipe, find_device("rtx4090"))
        return {phase.name: phase.host for phase in phases_of(plan)}

    resident, streamed = host(), host("memory.weights=host", "memory.boundaries=host")
    packed = streamed["load and quantize"] - resident["load and quantize"]
    assert packed > 50 << 20
    for name in ("adapter start", "train", "evaluate", "save", "merge"):
        assert streamed[name] - resident[name] >= 0.9 * packed, name
    assert streamed["save"] >= streamed["train"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list open files")
def test_many_tensors_in_a_file_take_few_descriptors(tmp_path: Path) -> None:
    """Python keeps one for each mapping; many systems allow a process 1,024, a Mac 256."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    file = MappedFile(tmp_path, "test")
    tensors = [file.empty(5000) for _ in range(600)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 20
    for number, tensor in enumerate(tensors):
        tensor.fill_(number % 251)
        file.release(tensor)
    assert all(bool((tensor == number % 251).all()) for number, tensor in enumerate(tensors)), "each has its own place"
    assert file.nbytes < 4 * 600 * 8192, "little is taken that is not used"
