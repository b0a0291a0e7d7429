"""The trace of a training step: the trainer's own step over the recipe's own model, on meta or for real.

`step_trace` runs it as it is, for a model of any device. `planned_trace` does so on meta with few layers and extends it
to all; the optimizer's half of the step runs over the whole model's parameters. Two steps are traced: the optimizer's
states are made in the first and are there throughout the second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..loss import loss_options
from ..memory import DISK, HOST
from ..memory.layers import device_of, layers_of
from ..memory.stream import store_of
from ..memory.table import table_on_host
from ..model.layerwise import decoder_layers
from ..optim import optimizer_of
from ..sections import MemoryKeys, TrainKeys
from ..step import LanguageModel, TrainStep
from .devices import Device
from .layers import extended, find_layers
from .standins import answers, on_meta, scratch_on
from .trace import AFTER, BEFORE, SLOTS, UPDATE, Joined, Segment, Trace, Tracer, followed, without_collector

STEPS = 2
HERE = MemoryKeys()  # everything on the device
MICRO_BATCHES = 2  # of a step, at most: from the second on gradients are there, and nothing else changes


@dataclass(frozen=True)
class MetaBatch:
    """A batch without values: input_ids, attention_mask, labels int64 [rows, length]. trained: positions with a loss;
    padded: does a row end in padding? lengths: of the examples in a packed row."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    trained: int
    padded: bool
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, rows: int, length: int, trained: int | None = None, padded: bool = False, lengths: tuple[int, ...] = ()
    ) -> MetaBatch:
        """trained: all that can be, where it is not given."""
        ids, mask, labels = (torch.empty(rows, length, dtype=torch.int64, device="meta") for _ in range(3))
        return cls(ids, mask, labels, rows * (length - 1) if trained is None else trained, padded, lengths)


def _adopt(tracer: Tracer, model: nn.Module, *batches: Any) -> None:
    """Weights, adapters and buffers of a model, in its order, and what the step is given."""
    for name, parameter in model.named_parameters():
        tracer.adopt(parameter, "adapters" if parameter.requires_grad else "weights", name)
    for name, buffer in model.named_buffers():
        tracer.adopt(buffer, "weights", name)
    for slot in slots_of(model):
        tracer.adopt(slot, "weights", SLOTS)
    for batch in batches:
        for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
            tracer.adopt(tensor, "batch")


def slots_of(model: nn.Module) -> list[Tensor]:
    """What streamed weights are copied into."""
    return getattr(getattr(layers_of(model), "weights", None), "slots", [])


def _name_gradients(tracer: Tracer, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tracer.name(parameter.grad, "gradients", name)


def _tracer(device: Device, on: str, answer: Any = None) -> Tracer:
    """on: where the tensors are. What is on the CPU counts where the run is to be on the CPU."""
    counted = (on, "cpu") if device.kind == "cpu" else (on,)
    return Tracer(counted, scratch=scratch_on(device), answer=answer)


def step_trace(
    model: Any,
    keys: TrainKeys,
    batches: Sequence[Any],
    device: Device,
    *,
    steps: int = STEPS,
    memory: MemoryKeys = HERE,
) -> tuple[Trace, int]:
    """Steps of training of an adapted model, as they are; also the number of the first event of the first step.

    batches: those of one step; MetaBatch for a model on meta.
    """
    on = next(model.parameters()).device.type
    language = language_of(model, keys, batches[0], device, memory)
    answer = answers(batches[0].trained, batches[0].padded, device) if on == "meta" else None
    tracer = _tracer(device, on, answer)
    _, layers = find_layers(model)
    with ExitStack() as stack:
        stack.enter_context(without_collector())
        if on == "meta":
            stack.enter_context(on_meta(device))
        _adopt(tracer, model, *batches)
        stack.enter_context(tracer)
        step = TrainStep(language, optimizer_of(model, keys, memory, torch.device(device.kind)), clip=keys.clip)
        start = len(tracer.trace.events)
        for number in range(1, steps + 1):
            tracer.enter(Segment(BEFORE, None, -1))
            tracer.trace.last_step = len(tracer.trace.events)
            with followed(tracer, model, layers):
                step.gradients(batches, 1.0)
            tracer.enter(Segment(UPDATE))
            _name_gradients(tracer, model)
            step.penalty()
            step.update(1.0, number, sys.maxsize, 1.0)  # the first of many: nothing is due yet
            tracer.enter(Segment(AFTER))
    return tracer.stop(), start


def planned_trace(
    make: Callable[[], Any], keys: TrainKeys, batch: MetaBatch, device: Device, memory: MemoryKeys = HERE
) -> tuple[Trace, Any]:
    """The trace of two steps over the whole model, and that model; `make` builds and adapts it on meta.

    batch: the micro-batch; every micro-batch is taken to be like it. Raises Untraceable where a model asks for values.
    """
    whole, batches = make(), [batch] * min(MICRO_BATCHES, keys.accumulate)
    gradients = extended(make, lambda model, layers: _gradients(model, layers, keys, batches, device, memory))
    return _steps(whole, keys, batches, gradients, device, memory), whole


def _gradients(
    model: Any,
    layers: nn.ModuleList,
    keys: TrainKeys,
    batches: Sequence[MetaBatch],
    device: Device,
    memory: MemoryKeys,
) -> tuple[Trace, int]:
    """The first half of a step: forward and backward of all micro-batches."""
    language = language_of(model, keys, batches[0], device, memory)
    tracer = _tracer(device, "meta", answers(batches[0].trained, batches[0].padded, device))
    with without_collector(), on_meta(device):
        _adopt(tracer, model, batches[0])
        for there in (HOST, DISK):
            tracer.trace.costs.waiting(there)  # of the whole model, these are counted there
        with tracer:  # the states that an update in the backward finds
            step = TrainStep(language, optimizer_of(model, keys, memory, torch.device(device.kind)), clip=keys.clip)
        first = len(tracer.trace.events)
        with followed(tracer, model, layers), tracer:
            step.gradients(batches, 1.0)
            tracer.enter(Segment(UPDATE))
            _name_gradients(tracer, model)
    return tracer.stop(), first


def language_of(
    model: Any, keys: TrainKeys, batch: MetaBatch, device: Device, memory: MemoryKeys = HERE
) -> LanguageModel:
    """The model as the loader and the trainer would set it up on the device."""
    place(model, memory, device)
    language = LanguageModel(model, loss_options(keys, memory, device.kind))
    language.choose_attention(
        batch.input_ids.shape[1], torch.device(device.kind), packed=bool(batch.lengths), dropped=bool(keys.drop_keys)
    )
    language.arrange(keys, memory, Path(memory.folder or "."), device.kind)
    model.train()
    return language


def place(model: Any, memory: MemoryKeys, device: Device) -> None:
    """Put the layers' weights and the input table where they wait, if the loader has not done so."""
    if memory.embeddings == HOST:
        table_on_host(model, device.kind)
    on = device_of(model)
    store = store_of(memory.weights, device.kind, on, Path(memory.folder or "."))
    if store is not None and layers_of(model) is None:
        for layer in decoder_layers(model)[1]:
            store.put(layer)
        store.run(model)


def _steps(
    whole: Any,
    keys: TrainKeys,
    batches: Sequence[MetaBatch],
    gradients: Trace,
    device: Device,
    memory: MemoryKeys,
) -> Trace:
    """Two steps of the whole model: `gradients` is the first half of each, the second half is traced here."""
    tracer = _tracer(device, "meta", answers(batches[0].trained, batches[0].padded, device))
    joined = Joined(tracer.trace)
    waiting, files = gradients.costs.waiting(), gradients.costs.waiting(DISK)
    trained = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
    place(whole, memory, device)
    with without_collector(), on_meta(device):
        _adopt(tracer, whole, batches[0])
        with tracer:
            optimizer = optimizer_of(whole, keys, memory, torch.device(device.kind))
            step = TrainStep(LanguageModel(whole, loss_options(keys, memory, device.kind)), optimizer, clip=keys.clip)
            for number in range(1, STEPS + 1):
                tracer.trace.last_step = len(tracer.trace.events)
                made = joined.insert(gradients)
                for name, parameter in trained:
                    if name in made:
                        parameter.grad = torch.empty_like(parameter)
                        tracer.follow(parameter.grad, made[name])
                tracer.enter(Segment(UPDATE))
                optimizer.begin(1.0)
                step.penalty()
                step.update(1.0, number, sys.maxsize, 1.0)
                tracer.enter(Segment(AFTER))
    trace = tracer.stop()
    trace.waiting, trace.files = waiting + trace.costs.waiting(), files + trace.costs.waiting(DISK)
    return trace
