"""Plan: what a recipe will take on a device, in bytes that add up to the peak of the process.

Three tiers. Allocated: the most bytes alive at once in two traced steps, each block rounded as the device's allocator
rounds. Reserved: what the caching allocator takes from the device for that (CUDA; elsewhere the same). Process: with
what torch itself takes there. No formula says what a model or a method needs: `step_trace` runs them on meta.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..adapters import METHODS, adapt
from ..errors import QtuneError
from ..memory.cuda import ALLOCATOR, EXPANDABLE, expandable
from ..model.skeleton import build
from ..quant.mixed import Average, Mixed
from ..quant.scheme import DTYPES
from ..recipe import Overrides, Recipe
from ..screen import size
from ..units import parse_size
from ..vocabulary import give_rows
from .allocator import peak_allocated, replay
from .breakdown import GRANULE, GROUPS, parameters_of, rows_of
from .cost import JOINED
from .devices import Device, find_device, workspaces
from .models import Model, find_model
from .roofline import Cost, Speed, estimate
from .room import UNKNOWN, Room, Short
from .runtime import host_runtime, process_bytes
from .standins import Untraceable
from .step_trace import MICRO_BATCHES, STEPS, MetaBatch, planned_trace
from .trace import BEFORE, LOSS, UPDATE, Trace
from .words import words_of

EVENLY = (
    "tokens are taken to spread evenly over the experts; what one expert computes at a time is larger where a router "
    "prefers it, up to all tokens of a micro-batch"
)
CUDNN = "newer torch may take cuDNN's attention on this card, whose workspace is not planned"
WORTH = 0.97  # of reserved bytes: below this, a change of settings is worth a note
HEAP = 0.25  # of a CPU's plan: the C library's heap keeps gaps; above the worst row of benchmarks/results/plan.jsonl
CLOSE = 0.05  # of the device: a plan that leaves less than its own error bound fits barely


@dataclass(frozen=True)
class Item:
    """One row of the breakdown: a group of GROUPS, what it is, bytes at the peak."""

    group: str
    name: str
    nbytes: int


@dataclass(frozen=True)
class Moment:
    """When the peak is reached: the part of the step, the layer (0-based) of `layers`, the module and the op."""

    part: str
    layer: int | None
    layers: int
    module: str
    op: str

    def __str__(self) -> str:
        where = f"{self.part} pass, layer {self.layer + 1} of {self.layers}" if self.layer is not None else {
            BEFORE: "before the first layer", LOSS: "loss (final norm, head, cross entropy)", UPDATE: "optimizer step"
        }.get(self.part, self.part)  # fmt: skip
        leaf = self.module.rpartition(f".{self.layer}.")[2] if self.layer is not None else self.module
        inside = f", in {leaf}" if leaf else ""
        return f"{where}{inside}" + (f" ({self.op})" if self.op else "")


@dataclass(frozen=True)
class Shape:
    """The micro-batch that is planned for. source: where it comes from, in words; lengths: of the examples that lie
    end to end in its one row, if they do."""

    rows: int
    length: int
    trained: int
    padded: bool
    source: str
    lengths: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths, default=self.length)

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Phase:
    """A stage of the job: peak bytes on the device, in host memory, and written to disk. note: what decides it."""

    name: str
    device: int
    host: int = 0
    disk: int = 0
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A recipe on a device. allocated, reserved, process: bytes, see the module. budget: bytes that are there.

    items add up to `process`. parameters: of the base; trained: of the adapter. waiting: bytes that wait in host memory
    beside a GPU; files: in mapped files; room: what there is for them.
    """

    model: Model
    recipe: Recipe
    device: Device
    stack: str
    shape: Shape
    items: tuple[Item, ...]
    allocated: int
    reserved: int
    process: int
    budget: int
    moment: Moment
    parameters: int
    trained: int
    speed: Speed | str
    waiting: int = 0
    files: int = 0
    room: Room = UNKNOWN
    phases: tuple[Phase, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    trace: Trace | None = field(default=None, repr=False, compare=False)

    @property
    def left(self) -> int:
        """Bytes of the budget that stay free in `qtune train`; negative where it is too small. Merging is a command of
        its own, which can run on the CPU."""
        return self.budget - max(self.process, *(phase.device for phase in self.phases if phase.name != "merge"), 0)

    @property
    def host(self) -> int:
        """Bytes of host memory that training takes beside a GPU; on a CPU they are the device's."""
        if self.device.kind != "cuda":
            return 0
        told = (phase.host for phase in self.phases if phase.name != "merge")
        return max(host_runtime().nbytes + self.waiting if self.waiting else 0, *told, 0)

    @cached_property
    def short(self) -> tuple[Short, ...]:
        """What there is too little of beside the device."""
        needs = ("host memory", self.host, self.room.host), ("disk", self.files, self.room.disk)
        return tuple(Short(what, need, there) for what, need, there in needs if there is not None and need > there)

    @property
    def missing(self) -> int:
        """Bytes that are missing, on the device, in host memory and on the disk."""
        return max(0, -self.left) + sum(short.need - short.there for short in self.short)

    @property
    def verdict(self) -> str:
        """fits, barely or no."""
        if self.missing:
            return "no"
        return "barely" if self.left < self.doubt else "fits"

    @property
    def doubt(self) -> float:
        """Bytes by which the process may take more than is planned."""
        return CLOSE * self.budget if self.device.kind == "cuda" else HEAP * self.process

    @cached_property
    def groups(self) -> dict[str, int]:
        """Bytes a group, in the order of GROUPS."""
        return {group: sum(item.nbytes for item in self.items if item.group == group) for group in GROUPS}


# ---- what is built


def maker(model: Model, recipe: Recipe) -> Callable[[], Any]:
    """A function that builds the recipe's packed and adapted model on meta, anew at each call."""
    config = model.config.to_dict()
    tokens, _ = words_of(recipe, model.config)

    def make() -> Any:
        fresh = type(model.config).from_dict(config)  # tracing cuts layers off its own copy
        made = build(fresh, recipe.scheme, embeddings=recipe.embeddings, dtype=DTYPES[recipe.dtype])
        sites = adapt(made, recipe.adapter)
        adapters = {name: site.adapter for name, site in sites.items()}
        METHODS[recipe.adapter.method].worst(adapters, recipe.train.steps)
        give_rows(made, tokens, recipe.tokens.start)
        return made

    return make


def stored_as(recipe: Recipe) -> str:
    """How the weights are stored, in few words: nf4; int3, int4 for *.down_proj; 2.5 bits of nf4 and nf2."""
    scheme = recipe.scheme
    if isinstance(scheme, Mixed):
        return ", ".join([scheme.default.name, *(f"{one.name} for {pattern}" for pattern, one in scheme.rules)])
    if isinstance(scheme, Average):
        return f"{scheme.bits:g} bits of {scheme.high.name} and {scheme.low.name}"
    return scheme.name


def shapes_of(recipe: Recipe) -> tuple[Shape, ...]:
    """The largest micro-batches that a recipe allows, where its data is not read: one by rows, of up to two by tokens
    (the most tokens, the longest example): which takes more has to be planned. Many rows of few tokens are left out."""
    length, tokens = recipe.data.max_length, recipe.train.micro_tokens
    if tokens is None:
        rows = recipe.train.micro_batch or 1
        sizes, words = [(rows, length)], "train.micro_batch x data.max_length, all tokens trained"
    else:
        if recipe.train.packing:
            return (packed_row(tokens, min(length, tokens), tokens, "as many as fit into train.micro_tokens, packed"),)
        length, words = min(length, tokens), "as many as fit into train.micro_tokens, all tokens trained"
        many = -(-tokens // length)  # the fewest rows that can fill it, all but a rest below their number
        sizes = list(dict.fromkeys([(many, tokens // many), (tokens // length, length)]))
    return tuple(Shape(rows, length, rows * (length - 1), rows > 1, words) for rows, length in sizes)


def packed_row(tokens: int, longest: int, trained: int, source: str) -> Shape:
    """A row of examples as long as they can be, which takes kernels the most, and of what is left."""
    lengths = (longest,) * (tokens // longest) + ((tokens % longest,) if tokens % longest else ())
    return Shape(1, tokens, min(trained, tokens - len(lengths)), False, source, lengths)


def worst_of(plans: Iterable[Plan]) -> Plan:
    """The plan with the largest peak."""
    return max(plans, key=lambda plan: plan.process)


def check_shape(shape: Shape, model: Model) -> None:
    """Raises QtuneError for a sequence beyond the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and shape.longest > positions:
        raise QtuneError(
            "Q507",
            f"data.max_length is {shape.longest:,}, beyond the {positions:,} positions of {model.name}; "
            f"legal: 2 to {positions:,}",
        )


# ---- the plan


def plan_recipe(
    recipe: Recipe,
    device: Device,
    *,
    model: Model | None = None,
    shape: Shape | None = None,
    budget: int | None = None,
) -> Plan:
    """The plan of a recipe's training on a device.

    model: the recipe's, where it is found already. shape: the micro-batch, else the largest that the recipe allows.
    budget: bytes, else the device's memory. Raises QtuneError, naming the architecture, where it cannot be traced.
    """
    model = model or find_model(recipe.model)
    if shape is None:
        shapes = shapes_of(recipe)
        return worst_of(plan_recipe(recipe, device, model=model, shape=one, budget=budget) for one in shapes)
    started = time.perf_counter()
    check_shape(shape, model)
    batch = MetaBatch.of(shape.rows, shape.length, shape.trained, shape.padded, shape.lengths)
    with refused_by_name(model):
        trace, whole = planned_trace(maker(model, recipe), recipe.train, batch, device, recipe.memory)
    return planned(model, recipe, device, "qtune", shape, trace, whole, budget, time.perf_counter() - started)


@contextmanager
def refused_by_name(model: Model) -> Iterator[None]:
    """What cannot be traced is told as a fault of the architecture, by its name."""
    kind = type(model.config).__name__
    try:
        yield
    except Untraceable as error:
        raise QtuneError("Q506", f"{kind} cannot be planned: it {error}") from error
    except (NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise QtuneError("Q506", f"{kind} cannot be planned: {reason}") from error


def planned(
    model: Model,
    recipe: Recipe,
    device: Device,
    stack: str,
    shape: Shape,
    trace: Trace,
    whole: Any,
    budget: int | None,
    seconds: float,
) -> Plan:
    """The plan that a trace tells. whole: the model whose parameters the trace names."""
    accumulate, routed = recipe.train.accumulate, any(getattr(module, "routed", False) for module in whole.modules())
    allocated, reserved, event, note = tiers(trace, device, expandable=expandable(ours=stack == "qtune"))
    runtime, (_, guess) = process_bytes(device), words_of(recipe, model.config)
    rows = rows_of(trace, whole, event, recipe.train.checkpointing)
    items = [Item(group, name, nbytes) for (group, name), nbytes in rows.items() if nbytes]
    gap = reserved - sum(item.nbytes for item in items)
    items += [Item("runtime", "allocator: rounding and gaps", gap)] if gap else []
    items.append(
        Item("runtime", "CUDA context and kernels" if device.kind == "cuda" else "torch and libraries", runtime)
    )
    order = {group: index for index, group in enumerate(GROUPS)}
    return Plan(
        model=model, recipe=recipe, device=device, stack=stack, shape=shape,
        items=tuple(sorted(items, key=lambda item: (order[item.group], -item.nbytes))),
        allocated=allocated, reserved=reserved, process=reserved + runtime, budget=budget or device.memory,
        moment=moment_of(trace, event, model.config.get_text_config().num_hidden_layers),
        parameters=parameters_of(whole), trained=sum(p.numel() for p in whole.parameters() if p.requires_grad),
        speed=estimate(
            costs_of(trace, STEPS, accumulate / min(MICRO_BATCHES, accumulate)),
            device, shape.tokens * accumulate, recipe.train.steps, accumulate,
        ),
        notes=(
            *note, *([guess] if guess else []), *([CUDNN] if device.capability[0] in (9, 10) else []),
            *([EVENLY] if routed else []),
        ),
        waiting=trace.waiting, files=trace.files, seconds=seconds, trace=trace,
    )  # fmt: skip


def tiers(trace: Trace, device: Device, *, expandable: bool = False) -> tuple[int, int, int, list[str]]:
    """Allocated and reserved bytes, the event of the peak, and what to know of them. The allocator sees three steps:
    its segments settle in the second and third. cuBLAS workspaces come from it, too. expandable: its segments."""
    if device.kind != "cuda":
        allocated, event = peak_allocated(trace.sizes, trace.events, 1)
        return allocated, allocated, event, []
    _add_workspace(trace, workspaces(device))
    _, event = peak_allocated(trace.sizes, trace.events, GRANULE)
    events = [*trace.events, *trace.events[trace.last_step :]]
    taken = replay(trace.sizes, events, expandable=expandable)
    notes = []
    if not expandable and (other := replay(trace.sizes, events, expandable=True).reserved) < WORTH * taken.reserved:
        notes.append(f"with {ALLOCATOR[0]}={EXPANDABLE} the allocator would take {size(other)}")
    return taken.allocated, taken.reserved, event, notes


def _add_workspace(trace: Trace, nbytes: int) -> None:
    """One block, there from the start."""
    trace.events.insert(0, trace.add(nbytes, "cuBLAS", kind="workspace"))
    trace.at.insert(0, 0)
    trace.last_step += 1


def moment_of(trace: Trace, event: int, layers: int) -> Moment:
    """What happens at an event."""
    segment, block = trace.segments[trace.at[event]], trace.events[event]
    op = trace.ops[block].removesuffix(" scratch")
    return Moment(segment.part, segment.layer, layers, trace.where[block], op.partition(".")[0])


def costs_of(trace: Trace, steps: int, more: float) -> list[Cost]:
    """The costs of one of the traced steps, by class and dtype. more: a step's micro-batches for each traced one."""
    total: dict[tuple[str, str], list[float]] = {}
    for (segment, kind, dtype), row in trace.costs.rows.items():
        sums = total.setdefault((kind, dtype), [0, 0, 0])
        for index, value in enumerate(row):
            sums[index] += value * (more if segment == JOINED else 1) / steps
    return [Cost(kind, dtype, *(int(value) for value in sums)) for (kind, dtype), sums in total.items()]


def plan(
    recipe: Recipe | str | Mapping[str, Any],
    *,
    device: str | None = None,
    overrides: Overrides = (),
    budget: str | None = None,
) -> Plan:
    """What a recipe (a file, a mapping or a Recipe) will take on a device.

    device: of the catalogue ("rtx4090"), a size ("24GB"), "cuda" or "cpu" of this machine; None: its GPU if it has
    one, else its CPU. budget: a size; None: the device's memory. The recipe's data is not read: the largest micro-batch
    that it allows is planned for.
    """
    made = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides, training=False)
    here = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return plan_recipe(made, find_device(here), budget=parse_size(budget) if budget else None)
