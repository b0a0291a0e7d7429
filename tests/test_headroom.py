"""Room: micro-batches by tokens, the largest tried first, out of memory told, CUDA's settings, and nothing beside
training that takes more than training."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch
from test_data import numbered

from qtune import headroom
from qtune.adapters import adapt
from qtune.adapters.files import save_adapter
from qtune.batches import Capacity, batches, padding, steps_of, stream
from qtune.data import Example, load_data
from qtune.errors import QtuneError
from qtune.evaluate import choices_of, evaluate, generate
from qtune.memory import cuda
from qtune.model import load
from qtune.optim import optimizer_of
from qtune.planner.allocator import replay
from qtune.planner.devices import catalogue, find_device, workspaces
from qtune.planner.plan import plan_recipe, shapes_of
from qtune.planner.request import Lengths, lengths_of, request_of
from qtune.planner.standins import scratch_on
from qtune.planner.trace import Tracer, without_collector
from qtune.quant import Dense
from qtune.recipe import Recipe
from qtune.screen import Screen
from qtune.sections import TrainKeys
from qtune.step import LanguageModel, TrainStep
from qtune.trainer import train
from qtune.verify import in_dtype, logits_of

GPU = find_device("rtx4090")


def drawn(count: int, seed: int = 0, longest: int = 60) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(2, longest) for _ in range(count)]


# ---- micro-batches by tokens


@pytest.mark.parametrize("capacity", [Capacity(60, True), Capacity(200, True), Capacity(7)])
def test_an_epoch_holds_every_example_once_and_no_micro_batch_more_than_it_may(capacity: Capacity) -> None:
    lengths = drawn(100)
    for epoch in range(3):
        found = list(batches(numbered(*lengths), capacity, seed=1, epoch=epoch))
        assert sorted(i for b in found for i in b.input_ids[:, 0].tolist()) == list(range(1, 101))
        most = [b.input_ids.numel() if capacity.by_tokens else len(b.input_ids) for b in found]
        assert max(most) <= capacity.limit
        if capacity.by_tokens:  # nothing is left out that had room
            for one, after in zip(found, found[1:], strict=False):
                wider = max(one.input_ids.shape[1], int(after.attention_mask[0].sum()))
                assert (len(one.input_ids) + 1) * wider > capacity.limit


def test_the_order_is_that_of_rows_and_hangs_on_the_seed_alone() -> None:
    examples = numbered(*drawn(40))

    def order(capacity: Capacity, seed: int) -> list[int]:
        return [i for b in batches(examples, capacity, seed=seed) for i in b.input_ids[:, 0].tolist()]

    assert order(Capacity(90, True), 3) == order(Capacity(90, True), 3) == order(Capacity(4), 3)
    assert order(Capacity(90, True), 3) != order(Capacity(90, True), 4)


@pytest.mark.parametrize(("epochs", "accumulate"), [(1, 1), (2.0, 3), (0.5, 1), (2.5, 2), (1.1, 1)])
@pytest.mark.parametrize("tokens", [None, 130])
def test_the_last_step_is_the_one_that_ends_the_epochs(tokens: int | None, epochs: float, accumulate: int) -> None:
    lengths = drawn(50)
    rows = None if tokens else 4
    keys = TrainKeys(epochs=epochs, micro_batch=rows, micro_tokens=tokens, accumulate=accumulate, seed=0)
    capacity, examples = Capacity.of(keys), numbered(*lengths)
    each = [len(list(batches(examples, capacity, seed=0, epoch=epoch))) for epoch in range(3)]
    assert each == ([20, 22, 24] if tokens else [13, 13, 13]), "by tokens an epoch's number hangs on its order"
    whole = int(epochs)
    wanted = sum(each[:whole]) + round(epochs - whole, 9) * each[whole]
    assert steps_of(keys, lengths) == ceil(round(wanted / accumulate, 9))
    if epochs == whole:  # all of the epochs, and of the next one no whole step
        seen = [b.input_ids[:, 0].tolist() for b in islice(stream(examples, capacity, 0), sum(each[:whole]))]
        assert sorted(i for b in seen for i in b) == sorted([*range(1, 51)] * whole)


def test_padding_is_counted_by_its_places() -> None:
    lengths = drawn(30)
    found = list(batches(numbered(*lengths), Capacity(100, True), seed=2))
    places, real = sum(b.input_ids.numel() for b in found), sum(int(b.attention_mask.sum()) for b in found)
    assert padding(lengths, Capacity(100, True), 2) == pytest.approx(1 - real / places)
    assert padding([9] * 10, Capacity(4), 0) == 0


def test_one_of_rows_and_tokens() -> None:
    def keys(*overrides: str, **given: Any) -> tuple[Any, Any]:
        found = Recipe.load({"model": "x", "train": given}, overrides, training=False)
        assert Recipe.load(found.to_dict(), training=False) == found
        return found.train.micro_batch, found.train.micro_tokens

    assert keys() == (4, None)
    with pytest.raises(QtuneError, match="train.micro_batch and train.micro_tokens are both null; legal: a number for"):
        keys(micro_batch=None)
    assert keys(micro_tokens=512) == keys("train.micro_tokens=512", micro_batch=2) == (None, 512)
    assert keys("train.micro_batch=2", micro_tokens=512) == (2, None)
    with pytest.raises(QtuneError, match="train.micro_batch is 2 and train.micro_tokens is 512; legal: one of the two"):
        keys(micro_batch=2, micro_tokens=512)


def test_an_example_that_fits_nowhere_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        QtuneError, match=r"train.micro_tokens is 8, .*line \d+.* tokens; legal: 1\d or more, or a data."
    ):
        train(runs_helper.recipe(tmp_path, train__micro_tokens=8))
    assert not list((tmp_path / "run").glob("adapter*"))


# ---- the worst of them is planned


def every(lengths: list[tuple[int, int]], capacity: Capacity) -> Iterator[tuple[int, int, int]]:
    """Rows, longest and trained tokens of every micro-batch that could be, by trying them all."""
    for rows in range(1, len(lengths) + 1):
        for some in combinations(lengths, rows):
            longest = max(n for n, _ in some)
            if rows <= capacity.rows(longest):
                yield rows, longest, sum(t for _, t in some)


@pytest.mark.parametrize("seed", range(6))
def test_the_worst_are_the_worst_of_all_that_could_be(seed: int) -> None:
    draw = random.Random(seed)
    pairs = [(n, draw.randint(1, n - 1)) for n in drawn(9, seed, 20)]
    for capacity in (Capacity(24, True), Capacity(47, True), Capacity(3)):
        shapes = Lengths(tuple(pairs)).worst(capacity, 512)
        found = list(every(pairs, capacity))
        for size in (lambda r, n: r * n, lambda r, n: n, lambda r, n: r * n * n, lambda r, n: r):
            assert max(size(s.rows, s.length) for s in shapes) == max(size(r, n) for r, n, _ in found)
        assert shapes[0].tokens == max(r * n for r, n, _ in found)
        most = max(t for *_, t in found)
        assert all(s.trained == min(most, s.rows * (s.length - 1)) for s in shapes)
        assert {(s.rows, s.length) for s in shapes} <= {(r, n) for r, n, _ in found}, "each of them can be"


def test_no_micro_batch_of_the_data_takes_more_than_the_plan(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path, torch.bfloat16)
    tree = {"model": str(tmp_path), "train": {"micro_tokens": 105, "checkpointing": False}, "data": {"max_length": 64}}
    recipe = Recipe.load(tree, training=False)
    lengths = Lengths(tuple((n, n // 2) for n in (5, 12, 17, 31, 41, 43, 59)))
    request = request_of(recipe, GPU, GPU.memory, lengths)
    assert {(s.rows, s.length) for s in request.shapes()} == {(3, 31), (1, 59), (2, 43)}
    singles = [Lengths(tuple(p for p in lengths.pairs if p[0] <= n)) for n, _ in lengths.pairs]
    others = {shape for one in singles for shape in one.worst(Capacity(105, True), 64)}
    most = request.plan().allocated
    assert all(plan_recipe(recipe, GPU, shape=shape).allocated <= most for shape in others)


def test_without_data_the_tokens_are_filled() -> None:
    recipe = Recipe.load({"model": "x", "train": {"micro_tokens": 4096}, "data": {"max_length": 3000}}, training=False)
    assert [(s.rows, s.length) for s in shapes_of(recipe)] == [(2, 2048), (1, 3000)]
    assert [(s.rows, s.length) for s in shapes_of(recipe.with_(["data.max_length=9000"]))] == [(1, 4096)]
    assert [(s.rows, s.length) for s in shapes_of(recipe.with_(["data.max_length=512"]))] == [(8, 512)]


# ---- the dry step


def test_the_dry_step_runs_the_largest_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, ...]] = []
    real = TrainStep.__call__

    def spy(self: TrainStep, some: Any, *rest: Any) -> Any:
        seen.extend(tuple(b.input_ids.shape) for b in some)
        return real(self, some, *rest)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    losses, files = [], []
    for dry in (True, False):
        few = {"adapter__dropout": 0.2, "train__steps": 3, "train__micro_tokens": 40, "data__eval": None}
        recipe = runs_helper.recipe(tmp_path, output=str(tmp_path / str(dry)), train__dry_step=dry, **few)
        seen.clear()
        result = train(recipe, screen=Screen())
        losses.append(result.losses)
        files.append((result.folder / "adapter.safetensors").read_bytes())
        if dry:
            examples, _ = load_data(recipe.data.train, tiny.words(tmp_path / "words"), max_length=512)
            shapes = [(s.rows, s.length) for s in lengths_of(examples).worst(Capacity(40, True), 512)]
            assert seen[: 2 * len(shapes)] == [shape for shape in shapes for _ in (1, 2)]
        told = capsys.readouterr().out
        assert ("dry step" in told) is dry and "of micro-batches of 40 tokens" in told
    assert losses[0] == losses[1] and files[0] == files[1]


def test_the_dry_batches_are_those_of_the_plan() -> None:
    examples = numbered(*drawn(30), 60, 60)
    examples.append(Example(examples[0].input_ids, bytes(len(examples[0].trained)), "no token of it is trained"))
    for capacity in (Capacity(4), Capacity(130, True)):
        found = headroom.largest(examples, capacity)
        shapes = lengths_of(examples).worst(capacity, 60)
        for batch, shape in zip(found, shapes, strict=True):
            assert batch.input_ids.shape == (shape.rows, shape.length)
            assert bool((batch.attention_mask == 0).any()) == shape.padded
            assert batch.trained == min(shape.trained, int(batch.attention_mask[:, 1:].sum()))
            assert bool(((batch.labels == -100) | (batch.labels == batch.input_ids)).all())
            assert not bool(((batch.labels != -100) & (batch.attention_mask == 0)).any()), "padding is never trained"


def test_where_the_dry_step_is_taken() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    asked = [headroom.wants_dry_step(TrainKeys(dry_step=d), on) for d in (None, True, False) for on in (cpu, gpu)]
    assert asked == [False, True, True, True, False, False]


# ---- out of memory


FULL = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nof much"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", ["cuda", *(pytest.param(k, marks=pytest.mark.slow) for k in ("cpu", "python"))])
def test_out_of_memory_names_the_plan_and_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from qtune.planner import runtime

    known = runtime.Runtime(1, "given by the test")
    monkeypatch.setattr(runtime, "host_runtime", lambda: known)
    monkeypatch.setattr("qtune.planner.phases.host_runtime", lambda: known)
    monkeypatch.setattr(headroom, "LESS", 0.9)
    recipe = runs_helper.recipe(tmp_path, data__eval=None, train__checkpointing=False, train__save_every=1)
    real, calls = LanguageModel.loss_sum, iter(range(100))

    def full(self: LanguageModel, *rest: Any, **more: Any) -> Any:
        if self.model.training and next(calls) == 2:
            raise FULL[kind]
        return real(self, *rest, **more)

    monkeypatch.setattr(LanguageModel, "loss_sum", full)
    with pytest.raises(QtuneError) as error:
        train(recipe)
    told = str(error.value)
    first = str(FULL[kind]).splitlines()[0] if str(FULL[kind]) else "out of memory"
    assert told.startswith(f"{first}; ") and "holds the adapter of step 2. The plan's peak is " in told
    assert "this takes " in told and "=" in told.rpartition(": ")[2], told


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    recipe = runs_helper.recipe(tmp_path)
    with pytest.raises(RuntimeError, match="shapes"), headroom.told_out_of_memory(recipe, [], Screen(quiet=True), str):
        raise RuntimeError("shapes differ")


def test_a_plan_that_cannot_be_made_leaves_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, quiet = runs_helper.recipe(tmp_path), Screen(quiet=True)

    def fail(*rest: Any, **more: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("qtune.planner.request.request_of", fail)
    with (
        pytest.raises(QtuneError, match=r"^out of memory; saved\. To need less, lower train\.micro_batch"),
        headroom.told_out_of_memory(recipe, numbered(5), quiet, lambda: "saved"),
    ):
        raise MemoryError


# ---- CUDA's settings


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*cuda.ALLOCATOR, cuda.WORKSPACE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


OFF = "max_split_size_mb:64, expandable_segments:False"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (cuda.ALLOCATOR[1], OFF),
        pytest.param(cuda.ALLOCATOR[1], cuda.EXPANDABLE, marks=pytest.mark.slow),
        pytest.param(cuda.ALLOCATOR[0], cuda.EXPANDABLE, marks=pytest.mark.slow),
        pytest.param(cuda.ALLOCATOR[0], OFF, marks=pytest.mark.slow),
    ],
)
def test_torch_reads_both_variables_and_so_do_we(unset: pytest.MonkeyPatch, name: str, value: str) -> None:
    ask = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    done = subprocess.run([sys.executable, "-c", ask], env=os.environ | {name: value}, capture_output=True, text=True)
    assert done.stdout.strip() == value
    unset.setenv(name, value)
    assert cuda.expandable() is cuda.expandable(ours=False) is value.endswith("True")


def test_what_is_set_and_what_stays(unset: pytest.MonkeyPatch) -> None:
    unset.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    told: list[str] = []
    unset.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    cuda.settle(torch.device("cpu"))
    assert not any(name in os.environ for name in (*cuda.ALLOCATOR, cuda.WORKSPACE)) and not told
    unset.setattr(sys, "platform", "linux")
    unset.setenv(cuda.ALLOCATOR[0], "")  # so that what is set here is taken back
    unset.delenv(cuda.ALLOCATOR[0])
    unset.setenv(cuda.WORKSPACE, "")
    unset.delenv(cuda.WORKSPACE)
    cuda.settle(torch.device("cuda"))
    assert os.environ[cuda.ALLOCATOR[0]] == "expandable_segments:True,pinned_max_round_threshold_mb:1" == told.pop()
    unset.delenv(cuda.ALLOCATOR[0])
    unset.setattr(torch, "__version__", "2.11.0+cu130")  # which cannot be told
    cuda.settle(torch.device("cuda"))
    assert os.environ[cuda.ALLOCATOR[0]] == "expandable_segments:True" == told.pop()
    assert os.environ[cuda.WORKSPACE] == ":4096:8"
    unset.setenv(cuda.ALLOCATOR[1], "max_split_size_mb:64")
    unset.delenv(cuda.ALLOCATOR[0])
    unset.setenv(cuda.WORKSPACE, ":16:8")
    cuda.settle(torch.device("cuda"))
    assert cuda.ALLOCATOR[0] not in os.environ and os.environ[cuda.WORKSPACE] == ":16:8" and not told
    assert "max_split_size_mb:64" in cuda.told() and not cuda.expandable()


def test_page_locked_memory_is_rounded_where_torch_cannot_be_told(unset: pytest.MonkeyPatch) -> None:
    unset.setattr(torch, "__version__", "2.13.0+cpu")
    assert cuda.pinned_bytes(34_600_000) == 34_600_000
    unset.setenv(cuda.ALLOCATOR[0], cuda.EXPANDABLE)
    assert cuda.pinned_bytes(34_600_000) == 1 << 26 and cuda.pinned_bytes(1 << 26) == 1 << 26
    unset.setenv(cuda.ALLOCATOR[0], f"{cuda.EXPANDABLE},{cuda.PINNED}:1")
    assert cuda.pinned_bytes(34_600_000) == 34_600_000
    unset.delenv(cuda.ALLOCATOR[0])
    unset.setattr(torch, "__version__", "2.11.0+cu130")
    assert cuda.pinned_bytes(34_600_000) == 1 << 26 and cuda.pinned_bytes(0) == 0


def test_workspaces_are_what_is_set(unset: pytest.MonkeyPatch) -> None:
    assert workspaces(catalogue()["rtx4090"]) == 2 * 8_519_680
    assert workspaces(catalogue()["h100-sxm"]) == 2 * (32 << 20)
    unset.setenv(cuda.WORKSPACE, ":16:8")
    assert workspaces(catalogue()["h100-sxm"]) == 2 * 8 * 16 * 1024
    unset.setenv(cuda.WORKSPACE, "nonsense")
    assert workspaces(catalogue()["rtx4090"]) == 2 * 8_519_680
    assert workspaces(find_device("cpu")) == 0


def test_a_plan_is_of_the_segments_that_train_has(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path, torch.bfloat16)
    recipe = Recipe.load({"model": str(tmp_path)}, ["data.max_length=64"], training=False)
    for expandable in (True, False):
        if not expandable:
            unset.setenv(cuda.ALLOCATOR[0], OFF)
        found = plan_recipe(recipe, GPU)
        assert found.trace is not None
        events = [*found.trace.events, *found.trace.events[found.trace.last_step :]]
        wanted, other = (replay(found.trace.sizes, events, expandable=e).reserved for e in (expandable, not expandable))
        assert found.reserved == wanted != other


# ---- nothing takes more than training


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "gpt2"))]
)
def peaks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Most bytes alive, by the tracer over real runs on this CPU: of training, and of what else a run does."""
    root = tmp_path_factory.mktemp("room")
    recipe = runs_helper.recipe(root, request.param, dtype="bfloat16")
    model = load(recipe.model, recipe.scheme, dtype=torch.bfloat16)
    adapt(model, recipe.adapter)
    tokenizer = tiny.words(root / "words")
    task, draw = root / "long.jsonl", random.Random(3)  # rows of 16 tokens or more: kernels round up to that
    prompts = [[draw.choice("12"), *map(str, draw.choices(range(10, 40), k=draw.randint(16, 40)))] for _ in range(24)]
    rows = [{"prompt": " ".join(f"w{n}" for n in p) + " ", "completion": f"w{4 + int(p[0])}"} for p in prompts]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, _ = load_data(task, tokenizer, max_length=64)
    everything, _ = load_data(task, tokenizer, max_length=64, loss_on="all")
    assert choices_of(examples) is not None and choices_of(everything) is None
    language, capacity = LanguageModel(model), Capacity(4)
    language.choose_attention(64)
    step = TrainStep(language, optimizer_of(model, recipe.train, recipe.memory), clip=1.0)
    found = {}

    def measured(name: str, run: Callable[[], Any]) -> None:
        tracer = Tracer(("cpu",), scratch=scratch_on(find_device("cpu")))
        gc.collect()
        with without_collector():
            held = [*model.parameters(), *model.buffers()]
            held += [state for value in step.optimizer.__dict__.values() for state in tensors(value)]
            for tensor in held:
                tracer.adopt(tensor, "there")
            with tracer:
                run()
        found[name] = max(tracer.stop().peak()[0], found.get(name, 0))

    model.train()
    language.arrange(recipe.train, recipe.memory, root)
    batch = headroom.largest(examples, capacity)
    step(batch, 1, 3, 1.0)  # the optimizer's states are there from here on
    measured("train", lambda: step(batch, 2, 3, 1.0))
    by_tokens = Capacity(batch[0].input_ids.numel(), True)
    for wide in headroom.largest(examples, by_tokens):
        measured("train by tokens", lambda wide=wide: step([wide], 3, 3, 1.0))
    language.restore()
    measured("evaluate", lambda: evaluate(language, everything, capacity=capacity))
    measured("choice", lambda: evaluate(language, examples, capacity=capacity))
    measured("choice by tokens", lambda: evaluate(language, examples, capacity=by_tokens))
    measured("generate", lambda: generate(model, tokenizer, list(range(5, 20)), max_new_tokens=4))
    measured("save", lambda: save_adapter(model, recipe.adapter, root / "saved", {"model": recipe.model, "step": 1}))
    return found


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside of an optimizer's attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for inner in value.values() for t in tensors(inner))
    elif isinstance(value, (list, tuple)):
        yield from (t for inner in value for t in tensors(inner))
    elif isinstance(value, torch.optim.Optimizer):
        yield from tensors(dict(value.state))
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("qtune"):
        yield from tensors(vars(value))


@pytest.mark.parametrize("what", ["evaluate", "choice", "choice by tokens", "generate", "save"])
def test_nothing_takes_more_than_training(peaks: dict[str, int], what: str) -> None:
    assert 0 < peaks[what] <= peaks["train by tokens" if "tokens" in what else "train"], peaks


def test_a_choice_is_never_of_more_rows_than_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(runs_helper.write_model(tmp_path / "m"), Dense("float32"), dtype=torch.float32)
    path = tmp_path / "eight.jsonl"
    rows = [{"prompt": f"w{i} w9 " * (1 + i % 3), "completion": f"w{20 + i % 8}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, _ = load_data(path, tiny.words(tmp_path), max_length=32)
    assert len(choices_of(examples) or ()) == 8
    language, shapes, results = LanguageModel(model), [], []
    real = LanguageModel.hidden

    def spy(self: LanguageModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return real(self, ids, mask)

    monkeypatch.setattr(LanguageModel, "hidden", spy)
    longest = max(len(e.input_ids) for e in examples)
    done: list[int] = []
    for capacity in (Capacity(3), Capacity(3 * longest, True), Capacity(1000)):
        shapes.clear()
        done.clear()
        results.append(evaluate(language, examples, capacity=capacity, advance=done.append))
        if capacity.limit < 1000:
            assert max(r * n for r, n in shapes) <= 3 * longest
            assert capacity.by_tokens or max(r for r, _ in shapes) == 3
        assert sum(done) == len(examples)
    for other in results[1:]:
        assert other.accuracy == results[0].accuracy and other.loss == pytest.approx(results[0].loss, rel=1e-5)


# ---- merging


def test_a_wider_dtype_takes_the_place_of_the_own_one_and_gives_it_back(tmp_path: Path) -> None:
    model = load(runs_helper.write_model(tmp_path / "m"), Dense("bfloat16"), dtype=torch.bfloat16)
    first = next(p for p in model.parameters() if p.is_floating_point())
    before, pointer = first.detach().clone(), first.data_ptr()
    held = sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    tracer = Tracer(("cpu",), scratch=lambda op, args: {})
    with tracer:
        for parameter in model.parameters():
            tracer.adopt(parameter, "weights")
        with in_dtype(model, torch.float32):
            assert first.dtype == torch.float32 and first.data_ptr() != pointer
            alive = sum(tracer.trace.sizes[b] for b in tracer.trace.alive(len(tracer.trace.events) - 1))
    packed = sum(p.nbytes for p in model.parameters() if not p.is_floating_point())
    assert alive == 2 * held + packed, "fp32 in place of bf16, and not beside it"
    assert first.dtype == torch.bfloat16 and torch.equal(first, before)
    wide = model.float()
    with in_dtype(wide, torch.bfloat16):
        assert first.dtype == torch.bfloat16
    assert torch.equal(first, before.float()), "what is rounded is kept"
    assert logits_of(model, [[3, 4, 5]])[0].isfinite().all()
