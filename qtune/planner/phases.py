"""Phases: what a job takes outside of its training steps, by running the very code of each on meta under the Tracer.

Loading (`load_trace`), the adapter's start and merging do the same for every layer of a kind, so one of each is traced
and its events are put together for all. Device bytes are of the process, as the plan's; host bytes are those beside a
GPU. Pages of mapped files are not counted: the system drops them when it needs the memory. Left out: the tokenizer, the
examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import METHODS, adapted_sites
from ..adapters.files import FORMAT, adapter_tensors, describe_tokens
from ..checkpoint import NAMES, Entry
from ..export import PROMPT_TOKENS, PROMPTS, merged_entries
from ..memory import DEVICE, HOST, place_of
from ..memory.cuda import pinned_bytes
from ..optim import optimizer_of
from ..screen import size
from ..verify import in_dtype
from ..version import version
from .allocator import peak_allocated
from .layers import cut, pattern
from .load_trace import Loading, loading_of, streams, tracer_of
from .plan import Phase, Plan, maker
from .runtime import host_runtime, process_bytes
from .standins import answers, answers_of_weights, on_meta
from .step_trace import MetaBatch, language_of, place, slots_of
from .timeline import Timeline
from .trace import Trace, without_collector

STREAMED = "load, quantize and start"
MERGED = torch.bfloat16  # the dtype that `qtune merge` writes where it is not told another


def phases_of(plan: Plan) -> tuple[Phase, ...]:
    """Every phase of the plan's job, in order of time. No merge where no weight does what the method does."""
    model = maker(plan.model, plan.recipe)()
    place(model, plan.recipe.memory, plan.device)
    loading = loading_of(plan)
    start = () if streams(plan.recipe) else (start_phase(plan, model),)  # else it is a part of loading
    save = save_phase(plan, model, loading)
    merging = Merging(plan, model) if METHODS[plan.recipe.adapter.method].mergeable else None
    cut(model, pattern(model))  # from here on few layers do
    # before the model's modules become faster twins, which merging does without
    merge = () if merging is None else (merging.phase(model),)
    evaluate = evaluate_phase(plan, model)
    return (*_download(plan, loading), load_phase(plan, loading), *start, _train_phase(plan), evaluate, save, *merge)


def _host(plan: Plan, held: int) -> int:
    """Host bytes of a process with `held` bytes of its own; on a CPU they are in the device's column."""
    return host_runtime().nbytes + held if plan.device.kind == "cuda" else 0


# ---- before training


def _download(plan: Plan, loading: Loading) -> Iterable[Phase]:
    """The base as published, where it is not on this machine as a folder or file."""
    if Path(plan.recipe.model).expanduser().exists():
        return ()
    return (Phase("download", 0, 0, loading.published, "the base, unless it is here"),)


def load_phase(plan: Plan, loading: Loading | None = None) -> Phase:
    """Load and quantize: every weight is read, copied to a GPU, packed and dropped; adapters that ask for it start
    meanwhile."""
    loading = loading or loading_of(plan)
    device, host = loading.timeline.peak(plan.device, loading.threads), _host(plan, loading.host)
    name = STREAMED if streams(plan.recipe) else "load and quantize"
    return Phase(name, device, host, loading.disk, loading.note)


def start_phase(plan: Plan, whole: nn.Module) -> Phase:
    """Adapter start: first values, drawn on the CPU."""
    timeline, drawn = Timeline(), Timeline()
    for parameter in _unique(whole):
        timeline.born(_nbytes(parameter))
    traced: dict[Any, tuple[tuple[Trace, int], tuple[Trace, int]]] = {}
    with without_collector(), torch.random.fork_rng(devices=[]), torch.no_grad():
        for site in adapted_sites(whole).values():
            key = (site.base.shape, site.base.scheme)
            if key not in traced:
                traced[key] = _reset(plan, site, None), _reset(plan, site, ("cpu",))
            timeline.gone(timeline.insert(*traced[key][0]).values())
            drawn.gone(drawn.insert(*traced[key][1]).values())
    host = peak_allocated(drawn.sizes, drawn.events, 1)[0] + _waiting(whole)
    return Phase("adapter start", timeline.peak(plan.device), _host(plan, host), 0, "the adapter's first values")


def _reset(plan: Plan, site: Any, devices: tuple[str, ...] | None) -> tuple[Trace, int]:
    tracer = tracer_of(plan, devices)
    for tensor in _unique(site):
        tracer.adopt(tensor, "weights")
    first = len(tracer.trace.events)
    with tracer:
        site.adapter.reset(site.base)
    return tracer.stop(), first


def _unique(model: nn.Module) -> list[Tensor]:
    """What of a model lies in the device's memory."""
    return [t for t in (*model.parameters(), *model.buffers(), *slots_of(model)) if place_of(t) == DEVICE]


def _waiting(model: nn.Module) -> int:
    """Bytes of a model that wait in the host's memory for another device."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({id(t.untyped_storage()): pinned_bytes(_nbytes(t)) for t in tensors if place_of(t) == HOST}.values())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- training


def _train_phase(plan: Plan) -> Phase:
    note = plan.moment.part.partition(" (")[0] + (" pass" if plan.moment.layer is not None else "")
    assert plan.trace is not None
    if not isinstance(plan.speed, str) and plan.speed.read + plan.speed.written:
        note += f"; files: {size(plan.speed.read)} read and {size(plan.speed.written)} written a step"
    return Phase("train", plan.process, _host(plan, plan.waiting), plan.files, note)


def evaluate_phase(plan: Plan, few: Any) -> Phase:
    """Evaluate: the loss of a micro-batch without a backward, beside what training left: the optimizer's states too.

    few: the model on meta, its layers cut to few: a forward that keeps nothing takes the same for any number.
    """
    timeline, trace = Timeline(), plan.trace
    assert trace is not None
    for block in trace.alive(len(trace.events) - 1):
        new = timeline.born(trace.sizes[block])
        if trace.kinds[block] == "buffer":
            timeline.buffers[trace.ops[block]] = new
    timeline.insert(*evaluate_trace(plan, few))
    return Phase("evaluate", timeline.peak(plan.device), _host(plan, plan.waiting), plan.files, "no backward")


def evaluate_trace(plan: Plan, model: Any) -> tuple[Trace, int]:
    """`loss_sum` of a micro-batch over a model on meta, and the number of its first event."""
    shape = plan.shape
    batch = MetaBatch.of(shape.rows, shape.length, shape.trained, shape.padded, shape.lengths)
    language = language_of(model, plan.recipe.train, batch, plan.device, plan.recipe.memory)
    model.eval()
    tracer = tracer_of(plan, answer=answers(shape.trained, shape.padded))
    with without_collector(), on_meta(plan.device), torch.no_grad():
        for tensor in (*_unique(model), batch.input_ids, batch.attention_mask, batch.labels):
            tracer.adopt(tensor, "weights")
        first = len(tracer.trace.events)
        with tracer:
            language.loss_sum(batch, plain=True)
    return tracer.stop(), first


# ---- what is written


def save_phase(plan: Plan, whole: nn.Module, loading: Loading) -> Phase:
    """Save: the adapter's tensors become one string of bytes; each file is written beside the one that it replaces.
    A checkpoint has the optimizer's states as well, and a new one is whole before the oldest goes. What the start chose
    is written once: the run's own codes, and first values that are no identity."""
    tensors = adapter_tensors(whole)
    content, info = adapter_bytes(tensors), _info_bytes(plan, whole, loading.layers)
    first = content if METHODS[plan.recipe.adapter.method].bound is not None else 0
    copies = content if plan.device.kind == "cuda" else 0
    device = plan.process if plan.device.kind == "cuda" else _after(plan) + content
    keys = plan.recipe.train
    optimizer = optimizer_of(whole, keys, plan.recipe.memory, torch.device(plan.device.kind))
    count, pair = keys.keep + 1 + keys.keep_best, content + info
    recipe = len(plan.recipe.to_yaml().encode())
    disk = count * (pair + optimizer.state_bytes()) + 2 * pair + recipe + first + loading.kept
    extra = [*(["first values"] if first else []), *(["codes of the start"] if loading.kept else [])]
    note = ", ".join([f"the adapter, and {count} checkpoints with the optimizer's states", *extra])
    return Phase("save", device, _host(plan, content + copies + plan.waiting), disk, note)


def _after(plan: Plan) -> int:
    """The process between two steps."""
    trace = plan.trace
    assert trace is not None
    return sum(trace.sizes[block] for block in trace.alive(len(trace.events) - 1)) + process_bytes(plan.device)


def adapter_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of adapter.safetensors: the format's header, as safetensors writes it, padded to 8, and the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + _nbytes(tensor)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + end


def _info_bytes(plan: Plan, whole: nn.Module, kept: int = 0) -> int:
    """Bytes of adapter.json, but for the digits of a few numbers. kept: layers whose codes are the run's own."""
    recipe, digest, number = plan.recipe, "0" * 64, 0.0123456789012345
    start = {"before": number, "after": number, "weighted": "gram" in recipe.adapter.needs()}
    bound = METHODS[recipe.adapter.method].bound
    started = {} if bound is None else {"start": start}
    info = {
        "format": FORMAT, "qtune": version(), "adapter": recipe.adapter.to_dict(),
        "base": {"model": recipe.model, "scheme": recipe.scheme.to_dict(), "dtype": recipe.dtype, "step": 0},
        "parameters": plan.trained, "bytes": 0, "sha256": digest, "kept": kept,
        "first": None if bound is None else digest,
        "sites": {
            name: {"scheme": str(site.base.scheme), "digest": digest, "magnitude": number} | started
            for name, site in adapted_sites(whole).items()
        },
    } | describe_tokens(whole)  # fmt: skip
    return len(json.dumps(info, indent=2)) + 1


class Merging:
    """Merge, in a process of its own: the logits of base + adapter in fp32, then one layer after the other dense."""

    def __init__(self, plan: Plan, whole: nn.Module) -> None:
        """What needs the whole model: its tensors, and how each entry of the merged checkpoint is made."""
        tensors = _unique(whole)
        self.plan, self.static = plan, [_nbytes(tensor) for tensor in tensors]
        self.casts = {
            number: 4 * tensor.numel()
            for number, tensor in enumerate(tensors)
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype != torch.float32
        }  # of the tensors, by number: bytes in fp32
        self.written, self.host, self.disk, self.waiting = Timeline(), 0, 0, _waiting(whole)
        for nbytes in self.static:
            self.written.born(nbytes)
        traced: dict[Any, Trace] = {}
        previous: list[int] = []  # the writer lets go of a tensor once it has the next one
        with without_collector(), torch.no_grad():
            for entry in merged_entries(whole, MERGED):
                self.disk, self.host = self.disk + entry.nbytes, max(self.host, entry.nbytes)
                module = whole.get_submodule(entry.site)
                key = (entry.shape, entry.name.rpartition(".")[2], type(module), getattr(module, "scheme", None))
                if key not in traced:
                    traced[key] = self._entry(entry)
                made = [*self.written.insert(traced[key]).values()]
                self.written.gone(previous)
                previous = made

    def _entry(self, entry: Entry) -> Trace:
        tracer = tracer_of(self.plan, answer=answers_of_weights())
        with tracer:
            kept = entry.tensor()
        trace = tracer.stop()  # while the result lives
        del kept
        return trace

    def phase(self, few: Any) -> Phase:
        """few: the model on meta, its layers cut to few."""
        plan = self.plan
        reference, how = self._reference(few)
        logits = PROMPTS * PROMPT_TOKENS * few.config.get_text_config().vocab_size * 4
        on_cpu = 2 * logits if plan.device.kind == "cpu" else 0  # the reference's and the written model's are kept
        in_fp32, dense = reference.peak(plan.device, 1) + on_cpu, self.written.peak(plan.device, 1) + on_cpu
        decides = f"a command of its own: {how if in_fp32 >= dense else 'the largest layer in fp32'}"
        return Phase(
            "merge", max(in_fp32, dense), _host(plan, max(self.host, 2 * logits) + self.waiting), self.disk, decides
        )

    def _reference(self, few: Any) -> tuple[Timeline, str]:
        """`Reference.of`: all that is not packed is cast to fp32, one tensor after the other."""
        timeline = Timeline()
        blocks = [timeline.born(nbytes) for nbytes in self.static]
        for number, nbytes in self.casts.items():
            timeline.born(nbytes)
            timeline.gone([blocks[number]])
        how = "the reference logits in fp32"
        try:
            trace, first = self._forward(few, torch.float32)
        except (NotImplementedError, RuntimeError):  # an op that meta has for the model's own dtype only
            trace, first = self._forward(few, None)
            trace.sizes = [2 * nbytes for nbytes in trace.sizes]
            how += ", at most"
        timeline.insert(trace, first)
        return timeline, how

    def _forward(self, few: Any, dtype: torch.dtype | None) -> tuple[Trace, int]:
        few.eval()
        ids = torch.empty(1, PROMPT_TOKENS, dtype=torch.int64, device="meta")
        tracer = tracer_of(self.plan, answer=answers(1, False))
        wide = in_dtype(few, dtype) if dtype else nullcontext()
        with without_collector(), on_meta(self.plan.device), torch.no_grad(), wide:
            for tensor in (*_unique(few), ids):
                tracer.adopt(tensor, "weights")
            first = len(tracer.trace.events)
            with tracer:
                few(input_ids=ids, use_cache=False).logits[0].float()
        return tracer.stop(), first
