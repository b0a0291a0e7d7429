"""The trace on meta is that of the real step, event by event; few layers extended are all layers; rows add up."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch
from torch import Tensor
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config

import qtune
from qtune.adapters import METHODS, Adapter, AdapterSpec, adapt
from qtune.batches import Batch
from qtune.errors import QtuneError
from qtune.model import load
from qtune.model.skeleton import build
from qtune.optim.rules import RULES
from qtune.planner.allocator import replay
from qtune.planner.breakdown import parameters_of, rows_of
from qtune.planner.devices import find_device
from qtune.planner.layers import Pattern, find_layers, pattern
from qtune.planner.plan import plan_recipe
from qtune.planner.step_trace import MetaBatch, planned_trace, step_trace
from qtune.planner.trace import BACKWARD, LOSS, Trace, Tracer
from qtune.quant import SCHEMES, scheme_from, storage_from
from qtune.recipe import Recipe
from qtune.screen import Screen
from qtune.sections import MemoryKeys, TrainKeys
from qtune.trainer import train
from qtune.vocabulary import Token, give_rows

CPU, GPU = find_device("cpu"), find_device("rtx4090")
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda n: LlamaConfig(**SIZES, num_hidden_layers=n),
    "qwen3": lambda n: Qwen3Config(**SIZES, num_hidden_layers=n, head_dim=16, tie_word_embeddings=True),
    "gemma2": lambda n: Gemma2Config(**SIZES, num_hidden_layers=n, head_dim=16, sliding_window=32),
    "gpt2": lambda n: GPT2Config(vocab_size=512, n_embd=64, n_layer=n, n_head=4, n_positions=256),
    "mixtral": lambda n: MixtralConfig(**SIZES, num_hidden_layers=n, num_local_experts=4),
}


def made(family: str = "llama", layers: int = 3, method: str = "lora", scheme: str = "nf4", **options: Any) -> Any:
    model = build(FAMILIES[family](layers), scheme_from(scheme), **options)
    adapt(model, AdapterSpec(method))
    return model


def bytes_in_order(trace: Trace) -> list[int]:
    """Births as positive sizes, releases as negative ones."""
    return [trace.sizes[e] if e >= 0 else -trace.sizes[~e] for e in trace.events]


# ---- meta is real


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.saved("llama", path)
    return path


def steps() -> list[Any]:
    """Each method and each scheme in one cheap step; lora also in another one and summed over micro-batches."""
    scheme = {m: runs_helper.other_scheme(m).get("scheme", "nf4") for m in sorted(METHODS)}
    fast = [(m, scheme[m], True, 1 + (m == "lora")) for m in scheme]
    fast += [("lora", s, True, 1) for s in sorted(SCHEMES) if s != "nf4"]
    fast += [("lora", "nf4", False, 1), ("hira", "dense", True, 1)]
    slow = [(m, scheme[m], c, 2) for m in scheme for c in (True, False) if (m, c) != ("lora", True)]
    slow += [(m, s, False, 2) for m, s in (("lora", "int8"), ("hira", "dense"))]
    return [*fast, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize(("method", "scheme", "checkpointing", "accumulate"), steps())
def test_the_trace_on_meta_is_that_of_the_real_step(
    folder: Path, method: str, scheme: str, checkpointing: bool, accumulate: int
) -> None:
    keys, spec = TrainKeys(checkpointing=checkpointing, accumulate=accumulate), AdapterSpec(method)
    real = tiny.started(folder, spec, scheme_from(scheme))
    planned = build(copy.deepcopy(real.config), scheme_from(scheme))
    adapt(planned, spec)
    ids = torch.randint(0, real.config.vocab_size, (2, 40))
    batch = Batch(ids, torch.ones_like(ids), ids.clone())
    want, _ = step_trace(real, keys, [batch] * accumulate, CPU)
    got, _ = step_trace(planned, keys, [MetaBatch.of(2, 40)] * accumulate, CPU)
    assert got.peak() == want.peak()
    assert Counter(bytes_in_order(got)) == Counter(bytes_in_order(want))


EARLY = {"update_in_backward": True, "clip": None}


@pytest.mark.parametrize(
    "optimizer",
    [{"optimizer": "adamw8"}, {"master_weights": False}, {"optimizer": "lion"}, {"optimizer": "adafactor"}]
    + [EARLY, EARLY | {"optimizer": "adafactor"}]
    + [pytest.param(EARLY | {"optimizer": rule}, marks=pytest.mark.slow) for rule in ("adamw8", "lion")],
)
def test_every_optimizer_is_the_real_one(folder: Path, optimizer: dict[str, Any]) -> None:
    keys = TrainKeys(**optimizer)
    real = load(folder, scheme_from("nf4"))
    planned = build(copy.deepcopy(real.config), scheme_from("nf4"))
    for model in (real, planned):
        adapt(model, AdapterSpec("lora", options={"rank": 128}))  # large enough for states of 8 bits
    ids = torch.randint(0, real.config.vocab_size, (2, 40))
    want, _ = step_trace(real, keys, [Batch(ids, torch.ones_like(ids), ids.clone())], CPU)
    got, _ = step_trace(planned, keys, [MetaBatch.of(2, 40)], CPU)
    assert bytes_in_order(got) == bytes_in_order(want)


@pytest.mark.parametrize("embeddings", ["int3", "int8"])
def test_a_packed_head_in_tiles_is_planned_as_it_runs(
    embeddings: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arena is a tile; sums over tiles are declared. fp32: no kernel multiplies without unpacking."""
    monkeypatch.setattr("qtune.ops.product.TILE", 4096)
    options: dict[str, Any] = {"embeddings": scheme_from(embeddings), "dtype": torch.float32}
    real = load(folder, scheme_from("nf4"), **options)
    planned = build(copy.deepcopy(real.config), scheme_from("nf4"), **options)
    for model in (real, planned):
        adapt(model, AdapterSpec("lora"))
    ids = torch.randint(0, real.config.vocab_size, (2, 40))
    want, _ = step_trace(real, TrainKeys(), [Batch(ids, torch.ones_like(ids), ids.clone())], CPU)
    got, _ = step_trace(planned, TrainKeys(), [MetaBatch.of(2, 40)], CPU)
    assert bytes_in_order(got) == bytes_in_order(want)
    arenas = {got.sizes[block] for block, op in enumerate(got.ops) if op == "arena torch.float32"}
    assert arenas == {4096 * 4, 96 * 64 * 4}  # a layer of less than a block of nested scales is no tiles; the head is


TOKENS = tuple(Token(f"<{id}>", id) for id in (5, 129, 131, 132))  # two in the table of the tiny models, two behind


@pytest.mark.parametrize(("family", "embeddings"), [("llama", None), ("llama-tied", "nf4")])
def test_rows_of_tokens_are_planned_as_they_run(family: str, embeddings: str | None, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path)
    scheme = scheme_from(embeddings) if embeddings else None
    real = load(tmp_path, scheme_from("nf4"), embeddings=scheme)
    planned = build(copy.deepcopy(real.config), scheme_from("nf4"), embeddings=scheme)
    for model in (real, planned):
        adapt(model, AdapterSpec("lora"))
        give_rows(model, TOKENS, "mean")
    ids = torch.randint(0, 133, (2, 40))
    want, _ = step_trace(real, TrainKeys(), [Batch(ids, torch.ones_like(ids), ids.clone())], CPU)
    got, _ = step_trace(planned, TrainKeys(), [MetaBatch.of(2, 40)], CPU)
    assert bytes_in_order(got) == bytes_in_order(want)
    held = rows_of(got, planned, len(got.events) - 1, True)
    assert held["adapters", "rows of tokens"] == (1 + (family == "llama")) * 4 * planned.config.hidden_size * 2


def test_rows_of_tokens_take_the_gradient_through_all_layers() -> None:
    """An adapter on the last layer alone leaves those below without a backward; rows of the input table do not."""
    batch, layers = MetaBatch.of(1, 16), {}
    for tokens in ((), TOKENS):

        def make(tokens: Any = tokens) -> Any:
            model = build(FAMILIES["qwen3"](7), scheme_from("nf4"))
            adapt(model, AdapterSpec("lora", ("model.layers.6.*",)))
            give_rows(model, tokens, "mean")
            return model

        want, _ = step_trace(make(), TrainKeys(), [batch], CPU)
        layers[len(tokens)] = {segment.layer for segment in want.segments if segment.part == BACKWARD} - {None}
        got, _ = planned_trace(make, TrainKeys(), batch, CPU)
        assert_same(got, want)
    assert layers == {0: {6}, 4: set(range(7))}


def test_a_packed_head_costs_a_tile_whatever_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for tile in (1 << 40, 1 << 16):
        monkeypatch.setattr("qtune.ops.product.TILE", tile)
        config = LlamaConfig(**SIZES | {"vocab_size": 20_000}, num_hidden_layers=2)
        model = build(config, scheme_from("nf4"), embeddings=scheme_from("nf4"))
        adapt(model, AdapterSpec("lora"))
        found, _ = step_trace(model, TrainKeys(), [MetaBatch.of(1, 16)], GPU)
        taken.append(max(found.sizes[block] for block, op in enumerate(found.ops) if op.startswith("arena")))
    assert taken == [20_000 * 64 * 2, (1 << 16) * 2]


def test_trained_positions_and_padding_are_the_batch_s(folder: Path) -> None:
    real = load(folder, scheme_from("nf4"))
    planned = build(copy.deepcopy(real.config), scheme_from("nf4"))
    for model in (real, planned):
        adapt(model, AdapterSpec("lora"))
    ids = torch.randint(0, real.config.vocab_size, (2, 40))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 30:] = 0
    labels[1, 30:], labels[:, :20] = -100, -100
    trained = int((labels[:, 1:] != -100).sum())
    want, _ = step_trace(real, TrainKeys(), [Batch(ids, mask, labels)], CPU)
    got, _ = step_trace(planned, TrainKeys(), [MetaBatch.of(2, 40, trained, padded=True)], CPU)
    assert bytes_in_order(got) == bytes_in_order(want)


@pytest.mark.parametrize(
    ("family", "padded"),
    [("llama", True), ("gemma2", False), ("phi3", False), ("gpt2", True)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("llama", False), ("gemma2", True), ("phi3", True), ("gpt2", False)]
    ],
)
def test_torch_s_own_attention_is_planned_as_torch_calls_it(
    family: str, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of mixtures: how a router spreads these tokens no plan knows."""
    monkeypatch.setattr("qtune.step.use_own_attention", lambda model, device: False)
    tiny.saved(family, tmp_path, **{"n_positions" if family == "gpt2" else "max_position_embeddings": 256})
    real = load(tmp_path, scheme_from("nf4"))
    planned = build(copy.deepcopy(real.config), scheme_from("nf4"))
    for model in (real, planned):
        adapt(model, AdapterSpec("lora"))
    ids = torch.randint(0, real.config.vocab_size, (2, 160))  # longer than what plain products serve
    mask = torch.ones_like(ids)
    mask[1, 100:] = int(not padded)
    want, _ = step_trace(real, TrainKeys(), [Batch(ids, mask, ids.clone())], CPU)
    got, _ = step_trace(planned, TrainKeys(), [MetaBatch.of(2, 160, padded=padded)], CPU)
    assert bytes_in_order(got) == bytes_in_order(want)


@pytest.mark.parametrize("embeddings", [None, "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_planned_model_holds_what_the_loaded_one_does(tmp_path: Path, embeddings: str | None, tied: bool) -> None:
    tiny.saved("llama-tied" if tied else "llama", tmp_path)
    scheme = scheme_from(embeddings) if embeddings else None
    real = load(tmp_path, scheme_from("nf4"), embeddings=scheme)
    planned = build(real.config, scheme_from("nf4"), embeddings=scheme)

    def shapes(model: Any) -> dict[str, tuple[Any, ...]]:
        return {name: (tuple(t.shape), t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())}

    assert shapes(planned) == shapes(real)


# ---- few layers are all


@pytest.mark.parametrize("rule", ["adamw", *(pytest.param(r, marks=pytest.mark.slow) for r in RULES if r != "adamw")])
def test_updates_in_the_backward_are_planned(rule: str) -> None:
    """All layers are traced: an update lies in the backward of the layer below, and the last layer has none above."""
    batch, peaks = MetaBatch.of(1, 16), []
    for more in ({"clip": None}, EARLY):
        keys = TrainKeys(**{"optimizer": rule} | more)
        got, _ = planned_trace(lambda: made(layers=6), keys, batch, CPU)
        want, _ = step_trace(made(layers=6), keys, [batch], CPU)
        assert_same(got, want)
        peaks.append(got.peak()[0])
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("early", [{}, pytest.param(EARLY, marks=pytest.mark.slow)])
def test_states_on_the_host_are_not_the_device_s(early: dict[str, Any]) -> None:
    batch, trained = MetaBatch.of(1, 16), 0
    traces = {}
    for place in ("device", "host"):
        keys, memory = TrainKeys(**{"clip": None} | early), MemoryKeys(optimizer=place)
        traces[place], whole = planned_trace(lambda: made(layers=5), keys, batch, GPU, memory)
        want, _ = step_trace(made(layers=5), keys, [batch], GPU, memory=memory)
        assert_same(traces[place], want)
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    left = {place: sum(t.sizes[b] for b in t.alive(len(t.events) - 1)) for place, t in traces.items()}
    assert left["device"] - left["host"] == 12 * trained


def refused(self: Pattern) -> Pattern:
    raise AssertionError("all layers are traced")


def extensions() -> Iterator[Any]:
    """Every family once on the CPU, the simplest also summed over micro-batches; the product is slow."""
    for family in sorted(FAMILIES):
        for checkpointing, accumulate in ((True, 3), (False, 1)):
            for device in (CPU, GPU):
                fast = device is CPU and (family == "llama" or not checkpointing)
                marks = [] if fast else [pytest.mark.slow]
                yield pytest.param(family, checkpointing, accumulate, device, marks=marks)


@pytest.mark.parametrize(("family", "checkpointing", "accumulate", "device"), list(extensions()))
def test_few_layers_extended_are_all_layers(
    family: str, checkpointing: bool, accumulate: int, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family != "gpt2":  # without checkpointing its second layer lets go of what was before the first
        monkeypatch.setattr(Pattern, "whole", refused)  # nothing is traced whole instead
    keys, layers = TrainKeys(checkpointing=checkpointing, accumulate=accumulate), 10 if family == "gemma2" else 7
    batch = MetaBatch.of(2, 48, padded=True)
    got, _ = planned_trace(lambda: made(family, layers), keys, batch, device)
    want, _ = step_trace(made(family, layers), keys, [batch] * min(2, accumulate), device)
    assert len(pattern(made(family, layers)).traced()) < layers
    assert_same(got, want)
    assert sorted(s for s in got.segments if s.layer is not None) == sorted(
        s for s in want.segments if s.layer is not None
    )


def assert_same(got: Trace, want: Trace) -> None:
    """The same blocks, born in the same order, and the same peak at the same place; what goes when the function that
    holds the losses returns, goes in the order of Python's liking."""
    assert Counter(bytes_in_order(got)) == Counter(bytes_in_order(want))
    assert [got.sizes[e] for e in got.events if e >= 0] == [want.sizes[e] for e in want.events if e >= 0]
    assert got.peak() == want.peak()
    block, other = got.events[got.peak()[1]], want.events[want.peak()[1]]
    assert (got.where[block], got.ops[block]) == (want.where[other], want.ops[other])
    assert got.segments[got.born[block]] == want.segments[want.born[other]]


def by_forward() -> Iterator[Any]:
    """A method whose forward is that of one before it is slow: how it starts does not change a step."""
    seen: set[Any] = {extended(METHODS["lora"])}
    for name in sorted(set(METHODS) - {"lora"}):
        yield pytest.param(name, marks=[pytest.mark.slow] if extended(METHODS[name]) in seen else [])
        seen.add(extended(METHODS[name]))


def extended(method: type[Adapter]) -> tuple[Any, ...]:
    """What a method runs in a step."""
    return tuple(getattr(method, name, None) for name in ("forward", "changed", "penalty", "after_step"))


@pytest.mark.parametrize("method", list(by_forward()))
def test_every_method_is_extended(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not METHODS[method].has_own("varied"):  # layers that differ are all traced
        monkeypatch.setattr(Pattern, "whole", refused)
    options = {"layers": 5, "method": method, **runs_helper.other_scheme(method)}
    batch = MetaBatch.of(1, 48)
    got, _ = planned_trace(lambda: made(**options), TrainKeys(), batch, CPU)
    want, _ = step_trace(made(**options), TrainKeys(), [batch], CPU)
    assert_same(got, want)


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.slow)], ids=["cpu", "gpu"])
def test_layers_beside_the_repeating_ones_are_their_own(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail is no period: with six or more periods one of them would have its number."""
    monkeypatch.setattr(Pattern, "whole", refused)
    sizes = {**SIZES, "num_hidden_layers": 9, "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 7}
    keys, batch = TrainKeys(checkpointing=False), MetaBatch.of(1, 48)

    def make() -> Any:
        model = build(Qwen2Config(**sizes), scheme_from("nf4"))
        adapt(model, AdapterSpec("lora"))
        return model

    assert pattern(make()) == Pattern("model.layers", 0, 1, 7, 2)
    got, _ = planned_trace(make, keys, batch, device)
    want, _ = step_trace(make(), keys, [batch], device)
    assert_same(got, want)
    events = [*got.events, *got.events[got.last_step :]]
    assert replay(got.sizes, events).allocated >= got.peak()[0]  # which refuses a block that is released twice


def test_layers_that_do_not_repeat_are_all_traced() -> None:
    model = made(layers=9)
    _, layers = find_layers(model)
    layers[4].mlp.down_proj = made(layers=1, scheme="int8").model.layers[0].mlp.down_proj
    found = pattern(model)
    assert found.layers == 9 and found.traced() == list(range(9))


@pytest.mark.parametrize(
    ("scheme", "traced"),
    [({"default": "int3", "*.down_proj": "int4"}, 4), ({"bits": 2.5, "high": "nf4", "low": "nf2"}, 7)],
    ids=["regular", "first layers"],
)
def test_mixed_schemes_are_extended(scheme: dict[str, Any], traced: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pattern, "whole", refused)

    def make() -> Any:
        model = build(FAMILIES["llama"](12), storage_from(scheme))
        adapt(model, AdapterSpec("lora", options={"rank": 4}))
        return model

    batch = MetaBatch.of(1, 48)
    assert len(pattern(make()).traced()) == traced
    got, whole = planned_trace(make, TrainKeys(), batch, CPU)
    want, _ = step_trace(make(), TrainKeys(), [batch], CPU)
    assert_same(got, want)
    rows = rows_of(got, whole, got.peak()[1], True)
    assert {name for _, name in rows if name.endswith("codes")} == (
        {"int3 codes", "int4 codes"} if "default" in scheme else {"nf4 codes", "nf2 codes"}
    )


def test_adapters_on_some_layers_only_are_planned_as_they_are() -> None:
    """Nothing below the first adapter is differentiated."""

    def make() -> Any:
        model = build(FAMILIES["llama"](12), scheme_from("nf4"))
        adapt(model, AdapterSpec("lora", targets=("model.layers.1[01].*",)))
        return model

    batch = MetaBatch.of(1, 48)
    got, _ = planned_trace(make, TrainKeys(checkpointing=False), batch, CPU)
    want, _ = step_trace(make(), TrainKeys(checkpointing=False), [batch], CPU)
    everywhere, _ = planned_trace(lambda: made(layers=12), TrainKeys(checkpointing=False), batch, CPU)
    assert_same(got, want)
    assert got.peak()[0] < everywhere.peak()[0]


# ---- what the plan says


def recipe(model: str, *overrides: str) -> Recipe:
    return Recipe.load({"model": model}, overrides, training=False)


@pytest.mark.parametrize(
    ("model", "checkpointing", "device"),
    [("smollm2-135m", "true", CPU), ("gpt2", "true", GPU), ("smollm2-135m", "false", CPU)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("smollm2-135m", "true", GPU), ("smollm2-135m", "false", GPU)]
        + [("gpt2", "true", CPU), ("gpt2", "false", CPU), ("gpt2", "false", GPU)]
    ],
)
def test_the_rows_add_up_to_the_peak(model: str, checkpointing: str, device: Any) -> None:
    found = plan_recipe(recipe(model, f"train.checkpointing={checkpointing}"), device)
    assert sum(item.nbytes for item in found.items) == found.process == sum(found.groups.values())
    assert found.allocated <= found.reserved < found.process
    trained = found.trained * 2
    assert found.groups["adapters"] == trained and found.groups["optimizer"] >= 6 * trained
    assert found.parameters == found.model.parameters
    assert found.moment.part in (BACKWARD, LOSS) and all(item.nbytes > 0 for item in found.items)


def test_rows_say_what_a_byte_is_for() -> None:
    trace, whole = planned_trace(lambda: made(layers=8), TrainKeys(), MetaBatch.of(2, 100), GPU)
    event = max(i for i, at in enumerate(trace.at) if trace.segments[at].part == LOSS)  # all layers are forward
    rows = rows_of(trace, whole, event, True)
    assert sum(rows.values()) == sum(trace.sizes[block] for block in trace.alive(event))
    linear = sum(m.shape[0] * m.shape[1] for m in whole.modules() if hasattr(m, "packed"))
    assert rows["weights", "nf4 codes"] == linear // 2
    assert rows["weights", "embeddings"] == rows["weights", "head"] == 512 * 64 * 2
    boundaries = rows["activations", "checkpoint boundaries"]
    assert boundaries == 7 * (2 * 100 * 64 * 2)  # the first layer's is the embedding's result
    assert rows["optimizer", "states and master weights"] >= 12 * sum(
        p.numel() for p in whole.parameters() if p.requires_grad
    )


def test_experts_are_counted_once() -> None:
    assert parameters_of(made("mixtral", 2)) > 2 * 4 * 3 * 64 * 128


def test_more_of_anything_never_takes_less(folder: Path) -> None:
    def peak(*overrides: str) -> int:
        return plan_recipe(recipe(str(folder), "data.max_length=64", "train.micro_batch=4", *overrides), GPU).allocated

    base = peak()
    assert peak("train.micro_batch=8") > base > peak("train.micro_batch=2")
    assert peak("train.checkpointing=false") > base
    assert peak("adapter.rank=64") > base > peak("train.master_weights=false")
    assert peak("scheme=int8") > base


def test_a_sequence_beyond_the_positions_is_refused() -> None:
    with pytest.raises(
        QtuneError, match=r"data.max_length is 9,000, beyond the 8,192 positions of smollm2-135m; legal"
    ):
        plan_recipe(recipe("smollm2-135m", "data.max_length=9000"), GPU)


def test_an_architecture_that_asks_for_values_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    own = LlamaRotaryEmbedding.forward

    def forward(self: Any, x: Tensor, *rest: Any, **more: Any) -> Any:
        return own(self, x + 1 if bool((x > 3).any()) else x, *rest, **more)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    with pytest.raises(QtuneError, match=r"LlamaConfig cannot be planned: it asks for a value that aten::any computes"):
        plan_recipe(recipe("smollm2-135m"), GPU)


def test_the_public_function_plans() -> None:
    found = qtune.plan({"model": "smollm2-135m"}, device="rtx3060", overrides=["data.max_length=128"], budget="1GiB")
    assert found.device.key == "rtx3060" and found.budget == 2**30 and found.shape.length == 128


# ---- the tracer


def test_a_storage_is_born_once_and_released_with_its_last_tensor() -> None:
    tracer = Tracer(("cpu",), scratch=lambda op, args: {})
    with tracer:
        a = torch.empty(100, dtype=torch.uint8)
        view = a[10:]
        b = a + 1
        del a
        c = b.view(10, 10)
        del b, view
    trace = tracer.stop()
    assert trace.sizes == [100, 100] and trace.events == [0, 1, ~0] and c.numel() == 100
    assert trace.peak() == (200, 1) and trace.alive(2) == [1]


def test_declared_scratch_is_released_with_the_op_and_buffers_only_grow() -> None:
    sizes = iter([{"temporary": 7, "arena": 50}, {"arena": 20}, {"arena": 60}])
    tracer = Tracer(("cpu",), scratch=lambda op, args: next(sizes))
    with tracer:
        kept = [torch.empty(4, dtype=torch.uint8) for _ in range(3)]
    trace = tracer.stop()
    assert bytes_in_order(trace) == [50, 4, 7, -7, 4, -50, 60, 4] and len(kept) == 3


# ---- the trainer keeps to it


@pytest.mark.parametrize("budget", ["1TB", "100MB"])
def test_train_does_not_start_beyond_its_budget(
    tmp_path: Path, budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = replace(runs_helper.recipe(tmp_path, train__steps=2), budget=budget)
    if budget == "1TB":
        assert train(made, screen=Screen()).steps == 2
        assert f"of the budget of {budget}, for longest example" in capsys.readouterr().out
        return
    with pytest.raises(QtuneError, match=r"the plan's peak is [0-9.]+ .iB on .*, beyond the budget of 95.4 MiB; "):
        train(made)
    assert not (Path(made.output or "") / "adapter.safetensors").exists()
