"""Planned beside measured: two real steps of a recipe on this machine, in a process of its own.

Tiers. Allocated: the most bytes alive at once, by the allocator's own events (torch.profiler on a CPU, the caching
allocator's statistics on a GPU) and, on a CPU, by the planner's tracer over the real step. Reserved: CUDA's allocator.
Process: the resident memory of the whole process at its peak, loading included (CPU), what the process takes of the
GPU (CUDA). A base that is not on this machine gets random weights of its shapes, read and packed like real ones.
Left out: the tokenizer and the examples.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.profiler

from ..adapters import adapt
from ..errors import QtuneError
from ..loss import loss_options
from ..memory.cuda import settle
from ..memory.layers import device_of
from ..model.loading import finish, load, prepare, ties_of
from ..model.skeleton import Origin, compute_buffers, empty
from ..model.source import looks_like_hub_id
from ..optim import optimizer_of
from ..quant.scheme import DTYPES
from ..recipe import Recipe
from ..runs import folder_of
from ..screen import Screen, size
from ..starting import start, wants
from ..step import LanguageModel, TrainStep
from ..vocabulary import give_rows
from .devices import Device
from .models import find_model
from .phases import load_phase
from .plan import Plan, Shape, plan_recipe
from .published import published, random_blocks, random_weight
from .runtime import child_command, child_environment, resident, warm
from .step_trace import MICRO_BATCHES, STEPS, MetaBatch, step_trace
from .words import words_of

REAL, RANDOM = "the recipe's own", "random, of the same shapes"


@dataclass(frozen=True)
class Row:
    """One tier: planned and measured bytes. how: by what it was measured."""

    tier: str
    planned: int
    measured: int
    how: str

    @property
    def error(self) -> float:
        """(planned - measured) / measured."""
        return self.planned / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True)
class Measured:
    """A plan and what was measured beside it. weights: which were in the base. tiers: see the module."""

    plan: Plan
    weights: str
    tiers: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """Plain values: tier, planned, measured (bytes), error (a fraction), how."""
        return [{**asdict(row), "error": row.error} for row in self.tiers]


def measure(recipe: Recipe, device: Device, shape: Shape | None, screen: Screen) -> Measured:
    """Plan a recipe for this machine's `device` and run two of its steps there.

    shape: the micro-batch, else the largest that the recipe allows. Raises QtuneError where the device is not this
    machine's, where the plan says that it does not fit, and where the run itself fails.
    """
    _here(device)
    plan = plan_recipe(recipe, device, shape=shape)
    if plan.process > min(device.memory, free_memory(device)):
        raise QtuneError(
            "Q509",
            f"the plan is {size(plan.process)}, and {plan.device.name} has {size(free_memory(device))} free: "
            "it was not run. Make the recipe smaller (`--fit` says how), or plan without measuring",
        )
    screen.line(f"measuring {STEPS} steps of {plan.shape.rows} x {plan.shape.length} tokens in a process of its own")
    answer = _run(plan)
    tiers = [_row(name, plan, answer) for name in ("allocator", "traced", "reserved", "process") if answer.get(name)]
    return Measured(plan, answer["weights"], tuple(tiers), tuple(answer["notes"]))


def _row(name: str, plan: Plan, answer: dict[str, Any]) -> Row:
    cuda = plan.device.kind == "cuda"
    tier, planned, how = {
        "allocator": ("allocated", plan.allocated, "max_memory_allocated" if cuda else "torch.profiler's events"),
        "traced": ("allocated", plan.allocated, "the tracer over the real step"),
        "reserved": ("reserved", plan.reserved, "max_memory_reserved"),
        "process": ("process", process_of(plan), "device memory in use" if cuda else "resident memory"),
    }[name]
    return Row(tier, planned, int(answer[name]), how)


def process_of(plan: Plan) -> int:
    """The process's peak, loading included."""
    return max(plan.process, load_phase(plan).device)


def _here(device: Device) -> None:
    if device.kind == "cuda" and not torch.cuda.is_available():
        raise QtuneError("Q601", f"{device.name} is not in this machine, so nothing can be measured; legal: cpu")
    if device.kind == "cuda" and torch.cuda.get_device_name() != device.name:
        raise QtuneError(
            "Q601", f"{device.name} is not in this machine, which has {torch.cuda.get_device_name()}; legal: cuda, cpu"
        )


def free_memory(device: Device) -> int:
    """Bytes that are free on this machine now; the device's memory where the system does not tell."""
    if device.kind == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return device.memory


def _run(plan: Plan) -> dict[str, Any]:
    task = {
        "recipe": plan.recipe.to_dict(), "shape": asdict(plan.shape), "device": plan.device.kind,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    done = subprocess.run(
        child_command("measure", "child"), input=json.dumps(task), capture_output=True, text=True,
        env=child_environment(),
    )  # fmt: skip
    with suppress(ValueError, IndexError):
        answer = json.loads(done.stdout.splitlines()[-1])
        if "fault" not in answer:
            return dict(answer)
        raise QtuneError("Q509", f"the measured run failed: {answer['fault']}")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise QtuneError("Q509", f"the measured run failed: {last}")


# ---- in the child


def child() -> None:
    """Reads a task from stdin; prints what was measured, or the fault, as the last line."""
    task = json.load(sys.stdin)
    try:
        answer = _measured(task)
    except (QtuneError, torch.OutOfMemoryError) as error:
        answer = {"fault": str(error)}
    print("\n" + json.dumps(answer))


def _measured(task: dict[str, Any]) -> dict[str, Any]:
    recipe = Recipe.load(task["recipe"], training=False)
    shape, device = Shape(**task["shape"]), torch.device(task["device"])
    settle(device)
    warm(task["threads"])
    with watched(device) as loading:
        model, weights = started(recipe, device)
        give_rows(model, words_of(recipe, model.config)[0], recipe.tokens.start)
    batches = [batch_of(shape, model.config.get_text_config().vocab_size, device)] * min(
        MICRO_BATCHES, recipe.train.accumulate
    )
    found: dict[str, Any] = {"weights": weights, "notes": list(model.qtune.notes), "loading": loading.peak}
    _steps(model, recipe, batches)
    if device.type == "cuda":
        return found | _cuda()
    if (now := resident()) is not None:
        found["process"] = max(loading.peak, now.own) + now.files
    return found | {"allocator": _profiled(model, recipe, batches), "traced": _traced(model, recipe, batches)}


def started(recipe: Recipe, device: torch.device) -> tuple[Any, str]:
    """The recipe's base with its adapter, and which weights are in it; what starts from text does so from random
    words."""
    keys, source = recipe.calibrate, _local(recipe.model)
    text = wants(recipe.adapter, keys.codes)
    if not text and not recipe.adapter.needs():
        model, weights = base_of(recipe, device)
        adapt(model, recipe.adapter, seed=recipe.train.seed)
        return model, weights
    if source is None:
        raise QtuneError(
            "Q509", f"method {recipe.adapter.method} starts from the weights of {recipe.model}, which are not here"
        )
    vocabulary = find_model(recipe.model).config.get_text_config().vocab_size
    made = start(
        source, recipe.scheme, recipe.adapter, codes=keys.codes, seed=recipe.train.seed, device=device,
        windows=torch.randint(vocabulary, (keys.samples, keys.length)) if text else None,
        embeddings=recipe.embeddings, dtype=DTYPES[recipe.dtype],
    )  # fmt: skip
    return made, REAL


def base_of(recipe: Recipe, device: torch.device) -> tuple[Any, str]:
    """The recipe's packed base, and which weights are in it."""
    options: dict[str, Any] = {"embeddings": recipe.embeddings, "dtype": DTYPES[recipe.dtype], "device": device}
    source = _local(recipe.model)
    if source is not None:
        return load(source, recipe.scheme, **options), REAL
    return random_base(recipe, device), RANDOM


def _local(name: str) -> str | None:
    """The name, if its weights are on this machine: a folder, a .gguf file, a hub id in the cache."""
    path = Path(name).expanduser()
    if path.is_file() or (path.is_dir() and any(path.glob("*.safetensors"))):
        return name
    if looks_like_hub_id(name):
        from huggingface_hub import snapshot_download

        with suppress(Exception):  # not in the cache, in one of the hub client's many words
            folder = Path(snapshot_download(name, local_files_only=True))
            return name if any(folder.glob("*.safetensors")) else None
    return None


def random_base(recipe: Recipe, device: torch.device, config: Any = None) -> Any:
    """A packed base of the recipe's model (or of `config`) with random weights, filled by the loader piece by piece."""
    dtype, config = DTYPES[recipe.dtype], config or find_model(recipe.model).config
    skeleton: Any = empty(config, dtype)
    compute_buffers(skeleton)
    found = published(skeleton, random_weight, random_blocks)
    ties = ties_of(skeleton, found)
    prepare(skeleton, found, recipe.scheme, recipe.embeddings, dtype, device).all(found.pieces, recipe.model, None)
    finish(skeleton, ties, device)
    skeleton.qtune = Origin(recipe.model, recipe.scheme, recipe.embeddings, dtype, "random")
    return skeleton


def batch_of(shape: Shape, vocabulary: int, device: torch.device) -> MetaBatch:
    """Random tokens, of which the first `trained` that can be are; with padding, the last place of the first row."""
    ids = torch.randint(vocabulary, (shape.rows, shape.length), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    chosen = torch.arange(shape.rows * (shape.length - 1)).view(shape.rows, -1) < shape.trained
    labels[:, 1:][chosen] = ids[:, 1:][chosen]
    if shape.padded:
        mask[0, -1] = 0
    lengths = tuple(shape.lengths)
    return MetaBatch(ids.to(device), mask.to(device), labels.to(device), shape.trained, shape.padded, lengths)


def _steps(model: Any, recipe: Recipe, batches: Sequence[Any]) -> None:
    """The trainer's own steps; nothing of them is left but what the allocator keeps."""
    language = LanguageModel(model, loss_options(recipe.train, recipe.memory, device_of(model).type))
    language.choose_attention(
        batches[0].input_ids.shape[1], packed=bool(batches[0].lengths), dropped=bool(recipe.train.drop_keys)
    )
    whole = replace(recipe.train, drop_backward=0.0)  # as a plan's
    language.arrange(whole, recipe.memory, folder_of(recipe))
    model.train()
    step = TrainStep(language, optimizer_of(model, recipe.train, recipe.memory), clip=recipe.train.clip)
    for number in range(1, STEPS + 1):
        step(batches, number, sys.maxsize, 1.0)


def tiny_steps() -> None:
    """Two steps of a Llama of a few kilobytes on the CPU, with the default recipe."""
    from transformers import LlamaConfig

    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, **shape)
    recipe, device = Recipe.load({"model": "tiny"}, training=False), torch.device("cpu")
    model = random_base(recipe, device, config)
    adapt(model, recipe.adapter)
    _steps(model, recipe, [batch_of(Shape(1, 32, 31, False, "tiny"), 64, device)])


def _profiled(model: Any, recipe: Recipe, batches: Sequence[Any]) -> int:
    """Most bytes alive by the allocator's events, over those that were there before."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for batch in batches for t in (batch.input_ids, batch.attention_mask, batch.labels)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    live = peak = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    changes: list[tuple[int, int]] = []

    def run() -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            _steps(model, recipe, batches)
        assert seen.profiler is not None and seen.profiler.kineto_results is not None
        events = seen.profiler.kineto_results.events()
        changes.extend((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")

    thread = threading.Thread(target=run)  # the kernels' kept buffers are a thread's own: here they are made anew
    thread.start()
    thread.join()
    if not changes:
        raise QtuneError("Q509", "torch.profiler told nothing of the allocator's events")
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        live += nbytes
        peak = max(peak, live)
    return peak


def _traced(model: Any, recipe: Recipe, batches: Sequence[Any]) -> int:
    from .devices import find_device

    return step_trace(model, recipe.train, batches, find_device("cpu"), memory=recipe.memory)[0].peak()[0]


def _cuda() -> dict[str, int]:
    """What the caching allocator took at most, and what is in use of the device, other processes taken off."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocator": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "process": total - free - _others(total - free),
    }


def _others(used: int) -> int:
    """Device memory of other processes, by nvidia-smi; 0 where it does not tell."""
    asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        import os

        lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
        apps = [[int(field) for field in line.split(",")] for line in lines]
        return min(used, sum(mib for pid, mib in apps if pid != os.getpid()) * 2**20)
    return 0


class Watched:
    """peak: the most bytes of its own that the process held, looked at every 2 ms."""

    def __init__(self) -> None:
        self.peak = 0

    def look(self) -> None:
        if (now := resident()) is not None:
            self.peak = max(self.peak, now.own)


@contextmanager
def watched(device: torch.device) -> Iterator[Watched]:
    """Watch the host memory of this process while the block runs."""
    seen, done = Watched(), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.look()
