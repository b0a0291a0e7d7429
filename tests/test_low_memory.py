"""What waits elsewhere and what is done in parts changes no bit of a step, or rounds no worse; a plan counts it."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch
from test_planner_trace import bytes_in_order, made

from qtune.adapters import AdapterSpec, adapt
from qtune.batches import Batch
from qtune.errors import QtuneError
from qtune.memory import DISK, HOST, host_empty, mark, place_of
from qtune.memory.boundaries import Away, Boundaries
from qtune.memory.files import MappedFile
from qtune.memory.layers import Layers, layers_of
from qtune.memory.stream import Slots, Store, linears
from qtune.memory.table import table_on_host
from qtune.memory.tiles import tile_mlps, whole_mlps
from qtune.model import load
from qtune.model.layerwise import decoder_layers
from qtune.model.skeleton import build
from qtune.optim import optimizer_of
from qtune.planner.devices import find_device
from qtune.planner.plan import plan_recipe
from qtune.planner.step_trace import MetaBatch, planned_trace, step_trace
from qtune.quant import NF4
from qtune.recipe import Recipe
from qtune.sections import MemoryKeys, TrainKeys
from qtune.step import LanguageModel
from qtune.trainer import train

CPU, GPU = find_device("cpu"), find_device("rtx4090")
HOME = torch.device("cpu")
Found = tuple[float, dict[str, torch.Tensor]]


def batch(rows: int = 2, length: int = 24) -> Batch:
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return Batch(ids, mask, torch.where(mask.bool(), ids, -100))


def adapted(folder: Path, dtype: torch.dtype = torch.bfloat16, **spec: Any) -> Any:
    model = load(folder, NF4(block=32), dtype=dtype)
    method, targets = spec.pop("method", "lora"), tuple(spec.pop("targets", ()))
    options = {"rank": 4} | ({"alpha": 8.0} if method == "lora" else {}) | spec
    adapt(model, AdapterSpec(method, targets, options), seed=0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.train()


def stepped(model: Any, arrange: Callable[[LanguageModel], object]) -> Found:
    """Loss and gradients of two micro-batches."""
    language = LanguageModel(model)
    arrange(language)
    torch.manual_seed(5)
    losses = []
    for length in (24, 17):
        loss = language.loss_sum(batch(length=length))
        loss.backward()
        losses.append(loss.item())
    return sum(losses), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def theirs(language: LanguageModel) -> None:
    """transformers' own checkpointing."""
    language.model.gradient_checkpointing_enable({"use_reentrant": False})


def same(ours: Found, others: Found) -> bool:
    return ours[0] == others[0] and ours[1].keys() == others[1].keys() and all(
        torch.equal(ours[1][name], others[1][name]) for name in others[1]
    )  # fmt: skip


# ---- recomputation


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize(
    "family", ["llama", "qwen3-moe", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "gpt2"))]
)
def test_layers_are_recomputed_as_transformers_does_it(tmp_path: Path, family: str) -> None:
    tiny.saved(family, tmp_path)
    want = stepped(adapted(tmp_path), theirs)
    assert same(stepped(adapted(tmp_path), lambda language: language.checkpointing(Boundaries())), want)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("spec", [{"dropout": 0.2}, {"targets": ["*.1.*"]}])
@pytest.mark.parametrize("place", [None, HOST, DISK])
def test_boundaries_may_wait_anywhere(tmp_path: Path, spec: dict[str, Any], place: str | None) -> None:
    tiny.saved("llama", tmp_path)
    want = stepped(adapted(tmp_path, **spec), theirs)
    away = Boundaries() if place is None else Away(HOME, tmp_path if place == DISK else None)
    assert same(stepped(adapted(tmp_path, **spec), lambda language: language.checkpointing(away)), want)
    assert not getattr(away, "stack", None), "all came back"


def test_nothing_is_kept_below_the_first_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.saved("llama", tmp_path)
    kept: list[int] = []
    put = Boundaries.put
    monkeypatch.setattr(Boundaries, "put", lambda self, ctx, given: (kept.append(len(given)), put(self, ctx, given))[1])
    stepped(adapted(tmp_path, targets=["model.layers.1.*"]), lambda language: language.checkpointing(Boundaries()))
    assert kept == [1, 1], "one layer of two, in two micro-batches"


def test_a_forward_without_a_backward_leaves_no_trace(tmp_path: Path) -> None:
    """An evaluation in training mode, or a step that was given up, must not shift what the next backward gets."""
    tiny.saved("llama", tmp_path)
    want = stepped(adapted(tmp_path), lambda language: language.checkpointing(Boundaries()))
    model, away = adapted(tmp_path), Away(HOME)
    LanguageModel(model).checkpointing(away)
    LanguageModel(model).loss_sum(batch(length=11))
    assert same(stepped(model, lambda language: None), want) and not away.stack


def test_recomputation_can_be_taken_back(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    model = adapted(tmp_path)
    language = LanguageModel(model)
    language.arrange(TrainKeys(), MemoryKeys(mlp_tile=5), tmp_path)
    assert isinstance(layers_of(model), Layers)
    language.restore()
    own = [module for module in model.modules() if "forward" in module.__dict__]
    assert layers_of(model) is None and not own


# ---- streaming


def streamed(folder: Path, how: str, method: str = "lora") -> Any:
    model = adapted(folder, method=method)
    store = Store(HOME, "cpu" if how == "mapped" else "cuda", None if how == "slots from host" else folder)
    for layer in decoder_layers(model)[1]:
        store.put(layer)
    store.run(model)
    return model


@pytest.mark.parametrize(
    ("how", "method"),
    [("mapped", "lora"), ("slots from host", "lora"), ("slots from host", "hira"), ("slots from disk", "lora")],
)
def test_streamed_weights_change_no_bit(tmp_path: Path, how: str, method: str) -> None:
    """HiRA dequantizes its base in each forward pass."""
    tiny.saved("llama", tmp_path)
    want = stepped(adapted(tmp_path, method=method), lambda language: language.checkpointing(Boundaries()))
    model = streamed(tmp_path, how, method)
    assert {place_of(m.packed) for m in linears(model)} == {HOST if how == "slots from host" else DISK}
    digests = [m.digest() for m in linears(adapted(tmp_path))]
    assert same(stepped(model, lambda language: language.checkpointing(Boundaries())), want)
    assert [m.digest() for m in linears(model)] == digests, "the waiting bytes are what they were"


def test_slots_hold_two_layers_and_copy_each_once_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.saved("llama", tmp_path, num_hidden_layers=5)
    copied: list[int] = []
    copy = Slots._copy
    monkeypatch.setattr(Slots, "_copy", lambda self, i, slot: (copied.append(i), copy(self, i, slot))[1])
    model = streamed(tmp_path, "slots from host")
    language = LanguageModel(model)
    language.checkpointing(Boundaries())
    language.loss_sum(batch()).backward()
    assert copied == [0, 1, 2, 3, 4, 2, 1, 0], "the last two layers are there when the backward begins"
    slots, layer = layers_of(model).weights.slots, decoder_layers(model)[1][0]
    assert len(slots) == 2 and slots[0].numel() < 2 * sum(m.packed.numel() for m in linears(layer))


def test_weights_that_are_packed_anew_reach_the_slots(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    model, plain = streamed(tmp_path, "slots from host"), adapted(tmp_path)
    ids = batch().input_ids
    with torch.no_grad():
        model(ids)  # the last layers are in the slots
        for one in (model, plain):
            linear = linears(decoder_layers(one)[1][-1])[0]
            linear.set_weight(2 * linear.dequantize())
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_mapped_file_keeps_what_was_written(tmp_path: Path) -> None:
    file = MappedFile(tmp_path, "test")
    tensors = [file.empty(n) for n in (1, 4096, 10_000)]
    for value, tensor in enumerate(tensors, 1):
        tensor.fill_(value)
        file.release(tensor)
    assert [(len(t), set(t.tolist())) for t in tensors] == [(1, {1}), (4096, {2}), (10_000, {3})]
    assert all(place_of(t[1:]) == DISK for t in tensors) and not list(tmp_path.iterdir()), "the file has no name"


def test_released_pages_are_not_resident(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells")
    file, size = MappedFile(tmp_path, "test"), 64 << 20
    tensor = file.empty(size)
    before = resident()
    tensor.fill_(7)
    assert resident() - before > size // 2
    file.release(tensor)
    assert resident() - before < size // 8
    assert int(tensor[::4096].sum()) == 7 * (size // 4096)


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QtuneError, match=r"cannot write the streamed weights to .*file.*memory.folder"):
        Store(HOME, "cpu", tmp_path / "file")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(QtuneError, match=r"no room for the streamed weights in .*4.8 MiB more .*memory.folder"):
        Store(HOME, "cpu", tmp_path).keep(torch.zeros(5_000_000, dtype=torch.uint8))


def test_what_waits_is_marked_through_views() -> None:
    tensor = mark(torch.zeros(8, 8), HOST)
    assert place_of(tensor[2:].view(-1)) == place_of(torch.nn.Parameter(tensor.t())) == HOST
    assert (
        place_of(torch.zeros(8)) == "device"
        and place_of(host_empty((4,), torch.int8, torch.device("meta"), "")) == HOST
    )


# ---- tiles


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tiles_of_an_mlp_are_the_mlp(tmp_path: Path, family: str) -> None:
    tiny.saved(family, tmp_path)

    def arrange(language: LanguageModel) -> None:
        language.arrange(TrainKeys(), MemoryKeys(mlp_tile=7), tmp_path)

    model = adapted(tmp_path, torch.float32)
    want = stepped(model, lambda language: language.checkpointing(Boundaries()))
    got = stepped(adapted(tmp_path, torch.float32), arrange)
    assert abs(got[0] - want[0]) <= 1e-6 * want[0] and got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(("family", "later"), [("llama", 4), ("gemma2", 6)])
def test_an_output_that_nobody_reads_is_not_computed(tmp_path: Path, family: str, later: int) -> None:
    """Two tiles: forward, the layer recomputed, each tile again. Gemma 2 norms what its MLP gives, so it is read."""
    tiny.saved(family, tmp_path)
    model, seen = adapted(tmp_path), []
    model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(lambda *_: seen.append(1))
    language = LanguageModel(model)
    language.arrange(TrainKeys(), MemoryKeys(mlp_tile=24), tmp_path)
    counts, gradients = [], []
    for _ in range(3):
        seen.clear()
        language.loss_sum(batch()).backward()
        counts.append(len(seen))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert counts == [later, later, later], "the layer above told, and it is the same in all steps"
    assert all(torch.equal(gradients[0][name], gradients[2][name]) for name in gradients[0])


def test_tiles_come_off(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    model = adapted(tmp_path)
    assert tile_mlps(model, 4) == len(decoder_layers(model)[1])
    whole_mlps(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


# ---- plans


EVERYTHING = {"weights": DISK, "boundaries": DISK, "mlp_tile": 16}


@pytest.mark.parametrize("keys", [{"weights": DISK}, {"boundaries": DISK}, {"mlp_tile": 16}, EVERYTHING], ids=str)
def test_a_plan_is_what_the_step_does(tmp_path: Path, keys: dict[str, Any]) -> None:
    tiny.saved("llama", tmp_path)
    real = load(tmp_path, NF4(block=32))
    adapt(real, AdapterSpec("lora"))
    planned = build(copy.deepcopy(real.config), NF4(block=32))
    adapt(planned, AdapterSpec("lora"))
    memory = MemoryKeys(**keys, folder=str(tmp_path))
    ids = torch.randint(0, 64, (2, 40))
    want, _ = step_trace(real, TrainKeys(), [Batch(ids, torch.ones_like(ids), ids.clone())], CPU, memory=memory)
    got, _ = step_trace(planned, TrainKeys(), [MetaBatch.of(2, 40)], CPU, memory=memory)
    assert bytes_in_order(got) == bytes_in_order(want)


@pytest.mark.parametrize("keys", [{"weights": HOST}, {"boundaries": HOST}, {"mlp_tile": 16}], ids=str)
def test_few_layers_are_all(keys: dict[str, Any]) -> None:
    memory, one = MemoryKeys(**keys), MetaBatch.of(2, 48)
    got, _ = planned_trace(lambda: made(layers=7), TrainKeys(), one, GPU, memory)
    want, _ = step_trace(made(layers=7), TrainKeys(), [one], GPU, memory=memory)
    assert got.peak()[0] == want.peak()[0]
    if memory.mlp_tile is None:  # else the last layer, in the first step, computes what nobody reads
        assert len(got.events) == len(want.events)


def peak(*changes: str) -> int:
    tree = {"model": "meta-llama/Llama-3.2-1B", "data": {"max_length": 2048}, "train": {"micro_batch": 4}}
    return plan_recipe(Recipe.load(tree, changes, training=False), GPU).allocated


def test_a_plan_counts_on_the_device_what_is_there() -> None:
    """Llama-3.2-1B: 16 layers of 60.8 M packed weights; a boundary of 4 x 2,048 tokens is 32 MiB."""
    base, layer, boundary = peak(), 31.4e6, 2 * 4 * 2048 * 2048
    assert 13 * layer < base - peak("memory.weights=host") < 15 * layer, "two slots in place of sixteen layers"
    assert 12 * boundary < base - peak("memory.boundaries=host") < 15 * boundary
    assert peak("memory.mlp_tile=512") < base and peak("memory.weights=disk") == peak("memory.weights=host")


# ---- runs


def test_a_run_is_the_same_wherever_things_wait(tmp_path: Path) -> None:
    def losses(name: str, **changes: Any) -> list[float]:
        recipe = runs_helper.recipe(tmp_path, train__steps=4, output=str(tmp_path / name), **changes)
        return train(recipe).losses

    want = losses("device")
    assert losses("disk", memory__weights="disk", memory__boundaries="disk") == want
    tiled = losses("tiles", memory__mlp_tile=8)
    assert tiled == pytest.approx(want, rel=1e-5)
    assert not [path for path in (tmp_path / "disk").iterdir() if path.name.startswith("tmp")]


def as_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """On a CPU `host` is the device and does nothing: tell optimizer and table that the device is a GPU, so that they
    do there what they do beside one. Returns the optimizers and the models that are made so."""
    optimizers: list[Any] = []
    models: list[Any] = []

    def optimizer(model: Any, keys: TrainKeys, memory: MemoryKeys) -> Any:
        optimizers.append(optimizer_of(model, keys, memory, torch.device("cuda")))
        return optimizers[-1]

    def table(model: Any, kind: str) -> str:
        models.append(model)
        return table_on_host(model, "cuda")

    monkeypatch.setattr("qtune.loop.optimizer_of", optimizer)
    monkeypatch.setattr("qtune.runs.table_on_host", table)
    return optimizers, models


def test_table_and_states_wait_on_the_host_and_change_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(name: str, **changes: Any) -> list[float]:
        return train(runs_helper.recipe(tmp_path, train__steps=3, output=str(tmp_path / name), **changes)).losses

    want = losses("device")
    optimizers, models = as_beside_a_gpu(monkeypatch)
    assert losses("host", memory__embeddings="host", memory__optimizer="host") == want
    (one,) = optimizers
    states = [waiting.host for bucket in one.buckets.values() for waiting in bucket.waiting.values()]
    assert states and {place_of(state) for state in states} == {HOST}
    assert place_of(models[0].get_input_embeddings().weight) == HOST


@pytest.mark.slow
def test_twenty_steps_with_every_knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All knobs that change no arithmetic give the losses to the bit, tiles and another order of rows to a bound."""

    def losses(name: str, **changes: Any) -> list[float]:
        settings = {"train__steps": 20, "train__clip": None, "train__lr": 1e-3, **changes}
        return train(runs_helper.recipe(tmp_path, output=str(tmp_path / name), **settings)).losses

    want = losses("plain")
    as_beside_a_gpu(monkeypatch)
    exact = {
        "memory__weights": "disk", "memory__boundaries": "disk", "memory__embeddings": "host",
        "memory__optimizer": "host", "train__update_in_backward": True, "train__dry_step": True,
    }  # fmt: skip
    assert losses("exact", **exact) == want
    assert losses("off", train__checkpointing=False) == want
    everything = exact | {"memory__mlp_tile": 8, "memory__loss_chunk": 3}
    assert losses("everything", **everything) == pytest.approx(want, rel=1e-4)
