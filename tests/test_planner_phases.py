"""The phases of a plan against the real thing on a tiny model, and planned beside measured."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from runs_helper import other_scheme
from torch.utils._python_dispatch import _disable_current_modes

from qtune.adapters import METHODS, adapt
from qtune.adapters.files import FIRST, TENSORS, kept_layers, save_adapter, save_first
from qtune.checkpoint import Piece
from qtune.errors import QtuneError
from qtune.export import write_merged
from qtune.model import load
from qtune.model.loading import Fill
from qtune.optim import optimizer_of
from qtune.planner import measure as measuring
from qtune.planner import phases, runtime
from qtune.planner.devices import find_device
from qtune.planner.measure import measure, process_of
from qtune.planner.models import Model
from qtune.planner.plan import Plan, Shape, maker, plan_recipe
from qtune.planner.standins import scratch_on
from qtune.planner.trace import Trace, Tracer, without_collector
from qtune.quant import QuantLinear
from qtune.recipe import Recipe
from qtune.runs import save_kept
from qtune.screen import Screen
from qtune.starting import start, wants
from qtune.step import LanguageModel
from qtune.verify import in_dtype

CPU, GPU = find_device("cpu"), find_device("rtx4090")
QUIET = Screen(quiet=True)
SCALARS = 64  # bytes: the extremes of a weight, looked at before it is packed; on meta there are none
SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def known_runtime() -> Any:
    """What a process takes is measured once, in its own test."""
    with pytest.MonkeyPatch.context() as patch:
        known = runtime.Runtime(400 << 20, "given by the test")
        patch.setattr(runtime, "host_runtime", lambda: known)
        patch.setattr(phases, "host_runtime", lambda: known)
        yield known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.saved("llama", path, torch.bfloat16, num_hidden_layers=4)
    return path


def recipe(model: object, **changes: Any) -> Recipe:
    overrides = {"data.max_length": 32, "train.micro_batch": 2} | {k.replace("__", "."): v for k, v in changes.items()}
    tree = {"model": str(model), "scheme": {"name": "nf4", "block": 32}}
    return Recipe.load(tree, overrides, training=False)


def planned(model: object, device: Any = CPU, **changes: Any) -> Plan:
    return plan_recipe(recipe(model, **changes), device)


def tracer() -> Tracer:
    return Tracer(("cpu",), scratch=scratch_on(CPU))


def peak_above(trace: Trace, first: int) -> int:
    """Most bytes alive over those at event `first`."""
    live = sum(trace.sizes[block] for block in trace.alive(first - 1)) if first else 0
    return trace.peak()[0] - live


# ---- loading


@pytest.mark.parametrize(
    "changes",
    [{}, {"scheme__embeddings": "nf4"}, {"scheme": "int8"}, {"scheme": "dense", "dtype": "float32"}],
    ids=["nf4", "embeddings", "int8", "dense"],
)
def test_loading_on_meta_takes_what_the_real_loader_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    plan, seen = planned(folder, **changes), tracer()
    filled = Fill.piece

    def piece(self: Fill, one: Piece) -> None:
        with _disable_current_modes():  # the mapped file is no memory of the process's
            mapped = {name: tensor.data for name, tensor in one.read().items()}
        filled(self, dataclasses.replace(one, read=lambda: mapped))

    monkeypatch.setattr(Fill, "piece", piece)
    monkeypatch.setattr("qtune.model.loading.compute_buffers", lambda model: None)
    monkeypatch.setattr("qtune.model.loading.finish", lambda *_: None)
    r = plan.recipe
    with without_collector(), seen:
        model = load(folder, r.scheme, embeddings=r.embeddings, dtype=getattr(torch, r.dtype))
    real, loading = seen.stop(), phases.loading_of(plan)
    there = phases.load_phase(plan, loading).device - runtime.process_bytes(CPU)
    assert 0 <= real.peak()[0] - there <= SCALARS
    held = sum(t.untyped_storage().nbytes() for t in model.parameters() if not t.is_meta)
    assert sum(loading.timeline.sizes[b] for b in alive(loading.timeline)) == held
    assert loading.published == sum(p.stat().st_size for p in folder.glob("*.safetensors")) - header(folder)


def exactly(changes: dict[str, Any]) -> Any:
    """How far the planned phase may be above the real one: a sparse method's systems hang on values."""
    return 0 if changes.get("adapter") != "qwha" else 32 << 20


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "loftq"},
        {"adapter": "cloq", "scheme": {"default": "int3", "*.down_proj": "int4"}, "calibrate__samples": 3},
        pytest.param({"adapter": "qwha", "calibrate__samples": 1, "calibrate__length": 96}, marks=pytest.mark.slow),
        {"calibrate__codes": "gptq", "calibrate__samples": 1, "calibrate__length": 96},
    ],
    ids=["loftq", "cloq", "qwha", "gptq"],
)
def test_starting_while_loading_takes_what_the_real_start_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    plan = planned(folder, **{"calibrate__length": 32} | changes)
    r, keys, loading = plan.recipe, plan.recipe.calibrate, phases.loading_of(plan)
    there = phases.load_phase(plan, loading).device - runtime.process_bytes(CPU)
    filled, seen = Fill.piece, tracer()

    def piece(self: Fill, one: Piece) -> None:
        with _disable_current_modes():  # the mapped file is no memory of the process's
            mapped = {name: tensor.data for name, tensor in one.read().items()}
        filled(self, dataclasses.replace(one, read=lambda: mapped))

    monkeypatch.setattr(Fill, "piece", piece)
    windows = torch.randint(3, tiny.VOCAB, (keys.samples, keys.length)) if wants(r.adapter, keys.codes) else None
    with without_collector():
        if windows is not None:
            seen.adopt(windows, "batch")
        with seen:
            start(folder, r.scheme, r.adapter, windows=windows, codes=keys.codes)
    assert -exactly(changes) <= seen.stop().peak()[0] - there <= 2 * SCALARS
    assert (loading.kept > 0) == (keys.codes != "nearest")


def test_hidden_states_of_the_text_are_in_host_memory_beside_a_gpu(folder: Path) -> None:
    plan = planned(folder, GPU)
    changes = {"adapter": "cloq", "calibrate__length": 64}
    recipes = [recipe(folder, **changes, calibrate__samples=n) for n in (20, 40)]
    few, many = (phases.loading_of(dataclasses.replace(plan, recipe=r)) for r in recipes)
    assert many.host - few.host == 20 * 64 * (2 * 64 * 2 + 8)  # of 64 channels in bf16, old and new, and the ids
    assert sum(many.timeline.sizes) == sum(few.timeline.sizes)


def alive(timeline: Any) -> list[int]:
    gone = {~event for event in timeline.events if event < 0}
    return [block for block in range(len(timeline.sizes)) if block not in gone]


def header(folder: Path) -> int:
    (path,) = folder.glob("*.safetensors")
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_gpu_is_loaded_with_a_copy_of_each_weight_and_a_gguf_file_dequantizes(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder, GPU)
    cpu = phases.loading_of(planned(folder)).timeline
    gpu = phases.loading_of(plan).timeline
    largest = max(
        m.shape[0] * m.shape[1] for m in maker(plan.model, plan.recipe)().modules() if isinstance(m, QuantLinear)
    )
    assert sum(gpu.sizes) - sum(cpu.sizes) > 2 * largest
    named = dataclasses.replace(plan, recipe=recipe(tmp_path / "x.gguf"))
    table = 4 * plan.model.config.vocab_size * plan.model.config.hidden_size
    assert phases.loading_of(named).host >= table
    assert phases.loading_of(plan).host == 0


def test_an_expert_s_gate_and_up_are_put_together_in_host_memory() -> None:
    config = transformers.MixtralConfig(**SMALL | {"num_local_experts": 4, "tie_word_embeddings": False})
    r = recipe("x")
    plan = dataclasses.replace(planned("smollm2-135m", GPU), model=Model("x", config, ""), recipe=r)
    assert phases.loading_of(plan).host == 2 * (2 * 512 * 256) * 2  # gate and up of one expert in bf16, twice


# ---- the adapter's start, evaluation


@pytest.fixture(scope="module")
def by_method(folder: Path) -> Callable[[str], Plan]:
    return cache(lambda method: planned(folder, CPU, adapter=method, **other_scheme(method)))


def has_all_phases(plan: Plan, device: Any) -> None:
    found = {phase.name: phase for phase in phases.phases_of(plan)}
    before = [phases.STREAMED] if plan.recipe.adapter.needs() else ["load and quantize", "adapter start"]
    merge = ["merge"] * METHODS[plan.recipe.adapter.method].mergeable
    assert list(found) == [*before, "train", "evaluate", "save", *merge]
    weights = plan.groups["weights"]
    assert all(phase.device > weights and phase.note for phase in found.values())
    assert found["train"].device == plan.process
    assert all(bool(phase.host) == (device is GPU) for phase in found.values())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_all_phases(by_method: Callable[[str], Plan], method: str) -> None:
    has_all_phases(by_method(method), CPU)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m == "lora" else pytest.mark.slow) for m in sorted(METHODS)]
)
def test_every_method_has_all_phases_on_a_gpu(folder: Path, method: str) -> None:
    has_all_phases(planned(folder, GPU, adapter=method, **other_scheme(method)), GPU)


def test_the_start_of_an_adapter_takes_what_the_real_one_takes(folder: Path, by_method: Callable[[str], Plan]) -> None:
    for method in ("lora", "dora"):
        plan, seen = by_method(method), tracer()
        model = load(folder, plan.recipe.scheme, dtype=torch.bfloat16)
        with without_collector():
            for tensor in (*model.parameters(), *model.buffers()):
                seen.adopt(tensor, "weights")
            with seen:
                adapt(model, plan.recipe.adapter)
        there = phases.start_phase(plan, maker(plan.model, plan.recipe)()).device - runtime.process_bytes(CPU)
        # one generator's state is kept while a site draws
        assert 0 <= seen.stop().peak()[0] - there <= torch.get_rng_state().nbytes + SCALARS, method


def test_evaluation_takes_what_the_real_one_takes(folder: Path, by_method: Callable[[str], Plan]) -> None:
    plan = by_method("lora")
    model = load(folder, plan.recipe.scheme, dtype=torch.bfloat16)
    adapt(model, plan.recipe.adapter)
    language, seen = LanguageModel(model), tracer()
    language.choose_attention(32)
    model.eval()
    batch = measuring.batch_of(plan.shape, plan.model.config.vocab_size, torch.device("cpu"))
    with without_collector(), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers(), batch.input_ids, batch.attention_mask, batch.labels):
            seen.adopt(tensor, "weights")
        first = len(seen.trace.events)
        with seen:
            language.loss_sum(batch)
    few = maker(plan.model, plan.recipe)()
    phases.cut(few, phases.pattern(few))
    assert peak_above(*phases.evaluate_trace(plan, few)) == peak_above(seen.stop(), first)
    phase = next(phase for phase in phases.phases_of(plan) if phase.name == "evaluate")
    assert phase.device < plan.process


# ---- what is written


@pytest.mark.parametrize("method", sorted(METHODS))
def test_saved_bytes_are_those_of_the_file(
    folder: Path, by_method: Callable[[str], Plan], tmp_path: Path, method: str
) -> None:
    plan = by_method(method)
    model = tiny.started(folder, plan.recipe.adapter, plan.recipe.scheme)
    adapters = {name: site.adapter for name, site in phases.adapted_sites(model).items()}
    METHODS[method].worst(adapters, plan.recipe.train.steps)  # what grows has grown
    base = {"model": str(folder), "scheme": plan.recipe.scheme.to_dict(), "dtype": plan.recipe.dtype, "step": 0}
    save_adapter(model, plan.recipe.adapter, tmp_path, base)
    whole = maker(plan.model, plan.recipe)()
    content = phases.adapter_bytes(phases.adapter_tensors(whole))
    assert content == (tmp_path / TENSORS).stat().st_size
    info, sites = (tmp_path / "adapter.json").stat().st_size, len(phases.adapted_sites(whole))
    loading = phases.loading_of(plan)
    assert loading.layers == len(kept_layers(model))
    # the digits of the magnitudes, which integers do not have, and of two distances
    digits = 15 if other_scheme(method) else 8 + 6 * (info > 8000)
    assert abs(phases._info_bytes(plan, whole, loading.layers) - info) <= digits * (sites + 1)
    kept, first = save_kept(model, tmp_path), tmp_path / FIRST
    assert loading.kept == kept
    save_first(model, tmp_path)
    once = kept + (first.stat().st_size if first.exists() else 0)
    state = optimizer_of(model, plan.recipe.train).state_bytes()  # with train.keep checkpoints and the next one
    planned = phases.save_phase(plan, whole, loading).disk - once - 3 * state
    assert 5 * content < planned < 5 * (content + info) + 4096


def test_merged_bytes_are_those_of_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder)
    model = load(folder, plan.recipe.scheme, dtype=torch.bfloat16)
    adapt(model, plan.recipe.adapter)
    seen = tracer()
    with without_collector(), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            seen.adopt(tensor, "weights")
        with seen:
            nbytes = write_merged(model, tmp_path, torch.bfloat16, QUIET)
    merging = phases.Merging(plan, maker(plan.model, plan.recipe)())
    assert merging.disk == nbytes
    assert merging.written.peak(CPU) - runtime.process_bytes(CPU) == pytest.approx(seen.stop().peak()[0], abs=SCALARS)


def test_the_reference_of_a_merge_takes_what_the_real_one_takes(folder: Path) -> None:
    plan = planned(folder)
    model = load(folder, plan.recipe.scheme, dtype=torch.bfloat16)
    adapt(model, plan.recipe.adapter)
    model.eval()
    ids, seen = torch.zeros(1, phases.PROMPT_TOKENS, dtype=torch.int64), tracer()
    with without_collector(), torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            seen.adopt(tensor, "weights")
        with seen, in_dtype(model, torch.float32):
            model(input_ids=ids, use_cache=False).logits[0].float()
    few = maker(plan.model, plan.recipe)()
    merging = phases.Merging(plan, few)
    phases.cut(few, phases.pattern(few))
    timeline, how = merging._reference(few)
    assert timeline.peak(CPU) - runtime.process_bytes(CPU) == pytest.approx(seen.stop().peak()[0], abs=ids.nbytes)
    assert how == "the reference logits in fp32"


def test_what_is_not_here_is_downloaded(folder: Path) -> None:
    plan = planned("smollm2-135m")
    first = phases.phases_of(plan)[0]
    assert (first.name, first.disk) == ("download", 2 * plan.model.parameters)


# ---- measured


def small(path: Path) -> Path:
    config = transformers.LlamaConfig(**SMALL)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_allocators_own_events_agree_with_the_plan(small_folder: Path, checkpointing: bool) -> None:
    plan = planned(small_folder, data__max_length=512, train__micro_batch=4, train__checkpointing=checkpointing)
    device = torch.device("cpu")
    model, weights = measuring.base_of(plan.recipe, device)
    assert weights == measuring.REAL
    adapt(model, plan.recipe.adapter)
    batches = [measuring.batch_of(plan.shape, SMALL["vocab_size"], device)]
    measuring._steps(model, plan.recipe, batches)  # kernels and tables that are made once
    assert plan.allocated == pytest.approx(measuring._profiled(model, plan.recipe, batches), rel=0.02)
    assert plan.allocated == pytest.approx(measuring._traced(model, plan.recipe, batches), abs=SCALARS)


@pytest.mark.slow
def test_measure_end_to_end(folder: Path) -> None:
    shape = Shape(2, 24, 30, True, "the test")
    found = measure(recipe(folder), CPU, shape, QUIET)
    assert found.weights == measuring.REAL and found.plan.shape == shape
    rows = found.rows()
    assert [row["tier"] for row in rows] == ["allocated", "allocated", *(["process"] if runtime.resident() else [])]
    profiled, traced = rows[:2]
    assert traced["error"] == pytest.approx(0, abs=1e-3)
    assert profiled["error"] == pytest.approx(0, abs=0.3)  # of half a megabyte: kernels' scratch is declared by threads
    assert all(row["measured"] > 0 and row["error"] == row["planned"] / row["measured"] - 1 for row in rows)
    assert json.dumps(rows)


def test_a_model_without_weights_is_measured_with_random_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = measuring.random_base(recipe("tiny"), torch.device("cpu"), transformers.LlamaConfig(**SMALL))
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table and table.float().std() == pytest.approx(0.02, rel=0.05)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 4 * 7 and layers[0].dequantize().std() == pytest.approx(0.02, rel=0.05)
    assert measuring._local("llama-3.1-8b") is None


def test_what_does_not_fit_or_is_not_here_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "free_memory", lambda device: 1 << 20)
    monkeypatch.setattr(measuring, "_run", lambda plan: pytest.fail("it was run"))
    with pytest.raises(QtuneError, match=r"has 1\.0 MiB free: it was not run"):
        measure(recipe(folder), CPU, None, QUIET)
    if not torch.cuda.is_available():
        with pytest.raises(QtuneError, match="RTX 4090 is not in this machine"):
            measure(recipe(folder), GPU, None, QUIET)


def test_a_fault_of_the_child_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = runtime.child_command("x", "y")[:2]
    monkeypatch.setattr(measuring, "child_command", lambda *_: [*start, 'print(\'{"fault": "why"}\')'])
    with pytest.raises(QtuneError, match="the measured run failed: why"):
        measure(recipe(folder), CPU, None, QUIET)
    monkeypatch.setattr(measuring, "child_command", lambda *_: [*start, "raise SystemExit('dead')"])
    with pytest.raises(QtuneError, match="the measured run failed: dead"):
        measure(recipe(folder), CPU, None, QUIET)


def test_a_batch_holds_what_the_shape_says() -> None:
    batch = measuring.batch_of(Shape(3, 10, 17, True, ""), 50, torch.device("cpu"))
    assert batch.input_ids.shape == (3, 10) and int(batch.input_ids.max()) < 50
    assert int((batch.labels[:, 1:] != -100).sum()) == 17
    assert batch.attention_mask.sum() == 29


def test_the_process_counts_loading(folder: Path) -> None:
    plan = planned(folder)
    assert process_of(plan) == max(plan.process, phases.load_phase(plan).device)


# ---- the runtime


def test_the_runtime_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    calls = []

    def measured(threads: int) -> tuple[int, str]:
        calls.append(threads)
        return 5 << 20, "measured"

    ask = ORIGINAL.__wrapped__
    monkeypatch.setattr(runtime, "_measured", measured)
    assert ask().nbytes == ask().nbytes == 5 << 20 and len(calls) == 1
    (path,) = tmp_path.glob("runtime-*.json")
    path.write_text(path.read_text().replace("torch", "other"))
    assert ask().nbytes == 5 << 20 and len(calls) == 2  # what was kept is of something else
    monkeypatch.setenv("QTUNE_KERNELS", "reference")
    ask()
    assert len(calls) == 3
    path.write_text("no json")
    monkeypatch.delenv("QTUNE_KERNELS")
    ask()
    assert len(calls) == 4


ORIGINAL = runtime.host_runtime


def test_where_nothing_is_told_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(runtime, "child_command", lambda *_: [os.devnull])
    found = ORIGINAL.__wrapped__()
    assert found.nbytes == 0 and found.note.startswith("unknown")
    assert not list(tmp_path.iterdir())
    assert runtime.process_bytes(GPU) == GPU.context and runtime.runtime_note(GPU) == GPU.context_source


@pytest.mark.slow
def test_a_child_tells_its_own_memory() -> None:
    nbytes, note = runtime._measured(1)
    assert 100 << 20 < nbytes < 2 << 30 and note == runtime.MEASURED
