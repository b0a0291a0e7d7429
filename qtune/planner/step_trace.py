"""The trace of a training step: the trainer's own step over the recipe's own model, on meta or for real.

`step_trace` runs it as it is, for a model of any device. `planned_trace` does so on meta with few layers and extends it
to all; the optimizer's half of the step runs over the whole model's parameters. Two steps are traced: the optimizer's
states are made in the first and are there throughout the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import optimizer_of
from ..recipe import TrainKeys
from ..step import LanguageModel, TrainStep
from .devices import Device
from .layers import extended, find_layers
from .standins import answers, on_meta, scratch_on
from .trace import AFTER, BEFORE, UPDATE, Joined, Segment, Trace, Tracer, followed, without_collector

STEPS = 2
MICRO_BATCHES = 2  # of a step, at most: from the second on gradients are there, and nothing else changes


@dataclass(frozen=True)
class MetaBatch:
    """A batch without values: input_ids, attention_mask, labels int64 [rows, length]. trained: positions with a loss;
    padded: does a row end in padding?"""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    trained: int
    padded: bool

    @classmethod
    def of(cls, rows: int, length: int, trained: int | None = None, padded: bool = False) -> MetaBatch:
        """trained: all that can be, where it is not given."""
        ids, mask, labels = (torch.empty(rows, length, dtype=torch.int64, device="meta") for _ in range(3))
        return cls(ids, mask, labels, rows * (length - 1) if trained is None else trained, padded)


def _adopt(tracer: Tracer, model: nn.Module, *batches: Any) -> None:
    """Weights, adapters and buffers of a model, in its order, and what the step is given."""
    for name, parameter in model.named_parameters():
        tracer.adopt(parameter, "adapters" if parameter.requires_grad else "weights", name)
    for name, buffer in model.named_buffers():
        tracer.adopt(buffer, "weights", name)
    for batch in batches:
        for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
            tracer.adopt(tensor, "batch")


def _name_gradients(tracer: Tracer, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tracer.name(parameter.grad, "gradients", name)


def _tracer(device: Device, on: str, answer: Any = None) -> Tracer:
    """on: where the tensors are. What is on the CPU counts where the run is to be on the CPU."""
    counted = (on, "cpu") if device.kind == "cpu" else (on,)
    return Tracer(counted, scratch=scratch_on(device), answer=answer)


def step_trace(
    model: Any, keys: TrainKeys, batches: Sequence[Any], device: Device, *, steps: int = STEPS
) -> tuple[Trace, int]:
    """Steps of training of an adapted model, as they are; also the number of the first event of the first step.

    batches: those of one step; MetaBatch for a model on meta.
    """
    on = next(model.parameters()).device.type
    language = language_of(model, keys, batches[0], device)
    answer = answers(batches[0].trained, batches[0].padded, device) if on == "meta" else None
    tracer = _tracer(device, on, answer)
    _, layers = find_layers(model)
    with ExitStack() as stack:
        stack.enter_context(without_collector())
        if on == "meta":
            stack.enter_context(on_meta(device))
        _adopt(tracer, model, *batches)
        stack.enter_context(tracer)
        step = TrainStep(language, optimizer_of(model, keys), clip=keys.clip)
        start = len(tracer.trace.events)
        for number in range(1, steps + 1):
            tracer.enter(Segment(BEFORE, None, -1))
            tracer.trace.last_step = len(tracer.trace.events)
            with followed(tracer, model, layers):
                step.gradients(batches)
            tracer.enter(Segment(UPDATE))
            _name_gradients(tracer, model)
            step.update(1.0, number, steps, 1.0)
            tracer.enter(Segment(AFTER))
    return tracer.stop(), start


def planned_trace(make: Callable[[], Any], keys: TrainKeys, batch: MetaBatch, device: Device) -> tuple[Trace, Any]:
    """The trace of two steps over the whole model, and that model; `make` builds and adapts it on meta.

    batch: the micro-batch; every micro-batch is taken to be like it. Raises Untraceable where a model asks for values.
    """
    whole, batches = make(), [batch] * min(MICRO_BATCHES, keys.accumulate)
    gradients = extended(make, lambda model, layers: _gradients(model, layers, keys, batches, device))
    return _steps(whole, keys, batches, gradients, device), whole


def _gradients(
    model: Any, layers: nn.ModuleList, keys: TrainKeys, batches: Sequence[MetaBatch], device: Device
) -> tuple[Trace, int]:
    """The first half of a step: forward and backward of all micro-batches."""
    language = language_of(model, keys, batches[0], device)
    tracer = _tracer(device, "meta", answers(batches[0].trained, batches[0].padded, device))
    with without_collector(), on_meta(device):
        _adopt(tracer, model, batches[0])
        step = TrainStep(language, optimizer_of(model, keys), clip=keys.clip)
        first = len(tracer.trace.events)
        with followed(tracer, model, layers), tracer:
            step.gradients(batches)
            tracer.enter(Segment(UPDATE))
            _name_gradients(tracer, model)
    return tracer.stop(), first


def language_of(model: Any, keys: TrainKeys, batch: MetaBatch, device: Device) -> LanguageModel:
    """The model as the trainer would set it up on the device."""
    language = LanguageModel(model)
    language.choose_attention(batch.input_ids.shape[1], torch.device(device.kind))
    language.checkpointing(keys.checkpointing)
    model.train()
    return language


def _steps(whole: Any, keys: TrainKeys, batches: Sequence[MetaBatch], gradients: Trace, device: Device) -> Trace:
    """Two steps of the whole model: `gradients` is the first half of each, the second half is traced here."""
    tracer = _tracer(device, "meta", answers(batches[0].trained, batches[0].padded, device))
    joined = Joined(tracer.trace)
    trained = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
    with without_collector(), on_meta(device):
        _adopt(tracer, whole, batches[0])
        with tracer:
            step = TrainStep(LanguageModel(whole), optimizer_of(whole, keys), clip=keys.clip)
            for number in range(1, STEPS + 1):
                tracer.trace.last_step = len(tracer.trace.events)
                made = joined.insert(gradients)
                for name, parameter in trained:
                    if name in made:
                        parameter.grad = torch.empty_like(parameter)
                        tracer.follow(parameter.grad, made[name])
                tracer.enter(Segment(UPDATE))
                step.update(1.0, number, STEPS, 1.0)
                tracer.enter(Segment(AFTER))
    return tracer.stop()
