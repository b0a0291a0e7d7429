"""Is there room? The plan held to the budget, the largest micro-batch tried before the first step, and out of memory
told with a recipe that would fit.

Planning imports much that a run does without, so it is imported where it is asked for.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch

from .adapters import Adapter
from .batches import Batch, Capacity, collate
from .data import Example
from .errors import FREE_MEMORY, QtuneError, is_out_of_memory
from .memory.layers import whole_backward
from .recipe import Recipe
from .runs import away, pick_device
from .screen import Screen, size
from .sections import TrainKeys
from .step import NonFinite, TrainStep
from .units import parse_size

if TYPE_CHECKING:
    from .planner.devices import Device
    from .planner.plan import Shape

LESS = 0.8  # of the planned peak: what is looked for where the plan says that the recipe fits and it did not


def check_room(recipe: Recipe, examples: Sequence[Example], screen: Screen) -> None:
    """Tell the plan beside the budget, where there is one. Raises QtuneError, with what would fit, where the plan's
    peak is beyond it, and where what waits in host memory or on the disk is more than there is."""
    from .planner.fit import peak, refuse_beyond
    from .planner.request import lengths_of, request_of

    place, lengths = pick_device(recipe.device), lengths_of(examples)
    if recipe.budget is not None:
        device = _planned_for(place)
        plan = refuse_beyond(recipe, parse_size(recipe.budget), device, shape=lengths, screen=screen)
        most = peak(plan)
        by = next((f", in the stage: {phase.name}" for phase in plan.phases if phase.device == most > plan.process), "")
        source = plan.shape.source.removeprefix("data: ")
        screen.line(f"plan  {size(most)} of the budget of {recipe.budget}, for {source}{by}")
    elif away(recipe.memory, place.type):
        try:
            device = _planned_for(place)
            short = request_of(recipe, device, sys.maxsize, lengths).plan().short
        except (QtuneError, MemoryError, RuntimeError) as error:
            screen.line(f"note: it is not known whether host memory and disk have room for this run: {error}", "yellow")
            return
        if short:
            refuse_beyond(recipe, sys.maxsize, device, shape=lengths, screen=screen)


def _planned_for(place: torch.device) -> Device:
    from .planner.devices import find_device

    return find_device(str(place))


def over_budget(recipe: Recipe, device: torch.device) -> str:
    """By how much the process has gone beyond the recipe's budget, in words; empty where it has not."""
    if recipe.budget is None:
        return ""
    taken, budget = peak_memory(device), parse_size(recipe.budget)
    if device.type == "cuda":
        taken = torch.cuda.max_memory_reserved(device) + _planned_for(device).context
    if taken <= budget:
        return ""
    return (
        f"the process has taken {size(taken)}, {size(taken - budget)} more than the budget of {recipe.budget}: a "
        "smaller one leaves room for what no plan knows"
    )


# ---- the dry step


def wants_dry_step(keys: TrainKeys, device: torch.device) -> bool:
    """On CUDA, where a step is cheap and memory is hard, unless the recipe says it."""
    return device.type == "cuda" if keys.dry_step is None else keys.dry_step


def largest(examples: Sequence[Example], capacity: Capacity) -> list[Batch]:
    """The micro-batches of these examples that can take the most: those that are planned for.

    Trained tokens and padding are raised to what any micro-batch of the examples can have, as in the plan.
    """
    from .planner.request import lengths_of

    rising = sorted(examples, key=lambda example: (len(example.input_ids), sum(example.trained)))
    longest = len(rising[-1].input_ids)
    return [_batch_of(rising, shape) for shape in lengths_of(examples).worst(capacity, longest)]


def _batch_of(rising: Sequence[Example], shape: Shape) -> Batch:
    """The longest examples that a shape takes, with its trained tokens where there are places, and its padding."""
    if shape.lengths:  # what is in it means nothing
        made = collate([_cut(rising[-1], length) for length in shape.lengths], packed=True)
    else:
        made = collate([example for example in rising if len(example.input_ids) <= shape.length][-shape.rows :])
    if shape.padded and bool(made.attention_mask.all()):
        made.attention_mask[-1, -1], made.labels[-1, -1] = 0, -100
    places = (made.labels[:, 1:] < 0) & made.attention_mask[:, 1:].bool()
    more = places.flatten().nonzero()[: max(0, shape.trained - made.trained), 0]
    row, place = more // places.shape[1], more % places.shape[1] + 1
    made.labels[row, place] = made.input_ids[row, place]
    return made


def _cut(example: Example, length: int) -> Example:
    return Example(example.input_ids[:length], example.trained[:length], example.where)


def dry_step(step: TrainStep, batches: Sequence[Batch], accumulate: int) -> list[float]:
    """Two steps over each of the batches: in the second the optimizer's states are there, as from then on in training.
    Returns the seconds that a micro-batch of the second took, for each of the batches.

    Weights and random states (of the CPU and of CUDA) are afterwards as they were. The optimizer is not: it is to be
    made anew. Raises what a step that finds no memory raises.
    """
    device = step.optimizer.parameters[0].device
    states = [one.state_dict(keep_vars=True).values() for one in step.sites.values()]
    changed = list(dict.fromkeys([*step.optimizer.parameters, *chain.from_iterable(states)]))
    before = [tensor.detach().to("cpu", copy=True) for tensor in changed]
    seconds: list[float] = []
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, whole_backward(step.model.model):
        for batch in batches:
            micro_batches = [batch.to(device)] * min(2, accumulate)  # from the second on gradients are there
            for number in (1, 2):
                tick = time.perf_counter()
                with suppress(NonFinite):  # told by the step that meets it: more is trained here than in the data
                    step(micro_batches, number, sys.maxsize, 0.0)  # the first of many: nothing is due yet
            seconds.append((time.perf_counter() - tick) / len(micro_batches))
    with torch.no_grad():
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
    return seconds


@contextmanager
def at_worst(adapters: Mapping[str, Adapter], steps: int) -> Iterator[None]:
    """Inside of the block adapters have the sizes with which a run of `steps` takes the most memory; behind it they
    are as before."""
    grow = {name: adapter for name, adapter in adapters.items() if adapter.grows}
    sizes = {name: adapter.sizes() for name, adapter in grow.items()}
    before = {name: {key: getattr(one, key).detach().to("cpu", copy=True) for key in one.grows}
              for name, one in grow.items()}  # fmt: skip
    for method in {type(adapter) for adapter in grow.values()}:
        method.worst(grow, steps)
    try:
        yield
    finally:
        for name, adapter in grow.items():
            adapter.resize(sizes[name])
            for key, value in before[name].items():
                getattr(adapter, key).data.copy_(value)


# ---- out of memory


@contextmanager
def told_out_of_memory(
    recipe: Recipe, examples: Sequence[Example], screen: Screen, saved: Callable[[], str]
) -> Iterator[None]:
    """Out of memory inside of the block becomes a QtuneError that names the planned peak and a change of the recipe
    that takes less. saved: what is left of the run, in words."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
    gc.collect()  # the error is gone, and with it the step's tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    screen.line(f"{reason}; planning what would fit ...", "yellow")
    raise QtuneError("Q501", f"{reason}; {saved()}. {_way_out(recipe, examples, screen)}")


def _way_out(recipe: Recipe, examples: Sequence[Example], screen: Screen) -> str:
    """What the plan says, and the smallest change that fits; where neither is known, what helps in general."""
    from .planner.devices import find_device
    from .planner.fit import peak, shown, smallest_change
    from .planner.request import lengths_of, request_of

    hint = f"To need less, {FREE_MEMORY['train']}"
    try:
        device = find_device(str(pick_device(recipe.device)))
        there = _there(device)
        request = request_of(recipe, device, there, lengths_of(examples))
        most = peak(request.plan())
        told = f"The plan's peak is {size(most)}, and this process can have {size(there)} of {device.name}"
        found = smallest_change(replace(request, budget=min(there, int(LESS * most))), screen)
    except (QtuneError, MemoryError, RuntimeError):  # the architecture cannot be planned, or there is no memory to plan
        return hint
    if found is None or not found.change:
        return f"{told}. {hint}"
    return f"{told}; this takes {size(peak(found.plan))}: {' '.join(shown(found.change))}"


def _there(device: Device) -> int:
    """Bytes of the device that this process holds or that are free."""
    from .planner.measure import free_memory
    from .planner.runtime import resident

    if device.kind == "cuda":
        return free_memory(device) + torch.cuda.memory_reserved() + device.context
    now = resident()
    return min(device.memory, free_memory(device) + (now.own + now.files if now else 0))


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident of the whole process elsewhere; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
