"""Tracer: every storage of a run, from birth to release, as torch's dispatcher sees it; on meta or for real.

A storage is born when an op returns a tensor over memory that was not there before, and released when the last tensor
over it is gone; a weak reference tells. What an op takes inside (a dequantized weight, a kernel's scratch) is declared
by the op (`ops.registry.SCRATCH`) or, for torch's own, by the target, and is traced as blocks of its own. Segments say
in which part of the step, and in which layer, an event happened. Left out: what libraries below torch allocate by
themselves (oneDNN, cuBLAS workspaces); those are the target's constants.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..memory import DEVICE, HOST, making, mark, place_of
from ..memory.cuda import pinned_bytes
from ..memory.files import PAGE
from .cost import Costs

BEFORE, FORWARD, LOSS, BACKWARD, AFTER, UPDATE = "before", "forward", "loss", "backward", "after", "update"

SLOTS = "slots of streamed layers"
SHARED = 4, 2  # uses of a gradient and of its storage, as seen from a dispatch mode, that autograd alone holds


class Segment(NamedTuple):
    """A stretch of time. part: of the step; layer: its index, None outside of the layers; micro: the micro-batch."""

    part: str
    layer: int | None = None
    micro: int = 0


@dataclass
class Trace:
    """Blocks of memory and their births (`i`) and releases (`~i`) in order of time.

    For block i: sizes[i] bytes; ops[i], the op that made it; where[i], the module; kinds[i], what it is if that is
    known (weights, adapters, gradients ...); born[i], an index into `segments`. at[e]: the segment of event e.
    last_step: the first event of the last traced step, which all later ones repeat.
    """

    sizes: list[int] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    born: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=lambda: [Segment(BEFORE, None, -1)])
    costs: Costs = field(default_factory=Costs)
    names: dict[int, str] = field(default_factory=dict)  # block -> the parameter that it is, or is the gradient of
    last_step: int = 0
    waiting: int = 0  # bytes of host memory beside the device
    files: int = 0  # bytes of mapped files

    def peak(self) -> tuple[int, int]:
        """Most bytes alive at once, and the event at which they are (the birth that reaches them)."""
        live = most = 0
        when = -1
        for index, event in enumerate(self.events):
            if event >= 0:
                live += self.sizes[event]
                if live > most:
                    most, when = live, index
            else:
                live -= self.sizes[~event]
        return most, when

    def add(self, size: int, op: str, where: str = "", kind: str = "", born: int = 0) -> int:
        """A new block, whose birth is the caller's to write; returns its number."""
        columns = (self.sizes, size), (self.ops, op), (self.where, where), (self.kinds, kind), (self.born, born)
        for column, value in columns:
            column.append(value)  # type: ignore[arg-type]
        return len(self.sizes) - 1

    def forget(self, block: int) -> None:
        """Take the birth of the newest block back."""
        assert block == len(self.sizes) - 1 and self.events[-1] == block, "only the newest block, right after its birth"
        for column in (self.sizes, self.ops, self.where, self.kinds, self.born, self.events, self.at):
            column.pop()

    def alive(self, event: int) -> list[int]:
        """The blocks that live right after an event."""
        blocks: dict[int, None] = {}
        for e in self.events[: event + 1]:
            if e >= 0:
                blocks[e] = None
            else:
                blocks.pop(~e, None)
        return list(blocks)


class Tracer(TorchDispatchMode):
    """Fills a Trace while it is active.

    devices: the device types whose memory counts; what is marked to wait elsewhere (memory.host) does not.
    answer(op, args, maker): a result in place of an op that meta cannot
    give (`NotImplemented`: run it), where maker(args) is the op that made the first argument. scratch(op, args):
    declared bytes beside the results, by name: `temporary` is released with the op, any other is a buffer that only
    grows.
    """

    def __init__(
        self,
        devices: tuple[str, ...],
        *,
        scratch: Callable[[str, tuple[Any, ...]], Mapping[str, int]],
        answer: Callable[[str, tuple[Any, ...], Callable[..., str]], Any] | None = None,
    ) -> None:
        super().__init__()
        self.trace, self.devices, self.scratch, self.answer = Trace(), devices, scratch, answer
        self._of: dict[int, int] = {}  # storage -> block
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._kept: dict[str, int] = {}  # buffer -> block
        self._modules: list[str] = []
        self._funcs: dict[Any, tuple[str, bool]] = {}  # name, and whether it makes views only

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch asks; by default it wraps every dispatch for its compiler's sake, a tenth of a plan's time."""
        return False

    # ---- what the run tells

    def enter(self, segment: Segment) -> None:
        """From here on events belong to this segment."""
        if self.trace.segments[-1] != segment:
            self.trace.segments.append(segment)
        self._modules.clear()

    def adopt(self, tensor: Tensor, kind: str, name: str = "") -> None:
        """A tensor that was there before; each storage once."""
        block = self._birth(tensor, "", kind)
        if block is not None and name:
            self.trace.names[block] = name

    def name(self, tensor: Tensor, kind: str, name: str) -> None:
        """Say what a tensor is, that the trace has seen being made."""
        block = self.block(tensor)
        if block is not None:
            self.trace.kinds[block], self.trace.names[block] = kind, name

    def block(self, tensor: Tensor) -> int | None:
        """The block that a tensor lies in; None: the trace knows of none."""
        return self._of.get(tensor.untyped_storage()._cdata)

    def follow(self, tensor: Tensor, block: int) -> None:
        """A tensor that stands for a block of the trace: its release is the block's."""
        storage = tensor.untyped_storage()
        old = self._of.get(storage._cdata)
        if old is not None:  # it was seen being made: that was not part of the run
            self._refs.pop(old)
            self.trace.forget(old)
        self._of[storage._cdata] = block
        self._refs[block] = weakref.ref(storage, partial(self._gone, block, storage._cdata))

    def into(self, name: str) -> None:
        """A module begins: what is made from here on is its."""
        while self._modules and not name.startswith(self._modules[-1] + "."):
            self._modules.pop()  # a recomputation that stops early leaves modules without a word
        self._modules.append(name)

    # ---- what torch tells

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = self._funcs.get(func)
        if known is None:
            known = self._funcs[func] = (func.name(), bool(func.is_view))
        name, view = known
        out = NotImplemented if self.answer is None else self.answer(name, args, self._maker)
        if name == "aten::add.Tensor" and (sum_ := summed_in_place(args)) is not None:
            return sum_
        if out is NotImplemented:
            out = func(*args, **(kwargs or {}))
        if view:
            return out
        made = [t for t in out if isinstance(t, Tensor)] if isinstance(out, (tuple, list)) else [out]
        temporary = self._declared(name, args)
        for tensor in made:
            if isinstance(tensor, Tensor):
                self._birth(tensor, name)
        if temporary:
            self._release(self._new(temporary, f"{name} scratch", "scratch"))
        self.trace.costs.add(len(self.trace.segments) - 1, name, args, made)
        return out

    def _maker(self, args: tuple[Any, ...]) -> str:
        """The op that made an op's first argument, where the trace has seen it."""
        if not args or not isinstance(args[0], Tensor):
            return ""
        block = self.block(args[0])
        return "" if block is None else self.trace.ops[block]

    def _declared(self, op: str, args: tuple[Any, ...]) -> int:
        """Grows the kept buffers that an op declares; returns its temporary bytes."""
        temporary = 0
        for name, size in self.scratch(op, args).items():
            if name == "temporary":
                temporary = size
                continue
            old = self._kept.get(name)
            if old is None or self.trace.sizes[old] < size:
                if old is not None:
                    self._release(old)  # a buffer is released before it grows
                self._kept[name] = self._new(size, name, "buffer")
        return temporary

    def _birth(self, tensor: Tensor, op: str, kind: str = "") -> int | None:
        if tensor.device.type not in self.devices:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._of:
            return None
        if making() != DEVICE:
            mark(tensor, making())
        if place_of(tensor) != DEVICE:
            self._waits(storage, place_of(tensor))
            return None
        block = self._of[key] = self._new(storage.nbytes(), op, kind)
        self._refs[block] = weakref.ref(storage, partial(self._gone, block, key))
        return block

    def _waits(self, storage: Any, place: str) -> None:
        """Host memory beside the device, or a file: each storage once, as a cost of the segment that makes it."""
        if not hasattr(storage, "qtune_seen"):
            storage.qtune_seen = True
            taken = pinned_bytes(storage.nbytes()) if place == HOST else -(storage.nbytes() // -PAGE) * PAGE
            self.trace.costs.wait(len(self.trace.segments) - 1, taken, place)

    def _new(self, size: int, op: str, kind: str) -> int:
        trace = self.trace
        at = len(trace.segments) - 1
        block = trace.add(size, op, self._modules[-1] if self._modules else "", kind, at)
        trace.events.append(block)
        trace.at.append(at)
        return block

    def _gone(self, block: int, key: int, _: Any) -> None:
        self._of.pop(key, None)
        self._release(block)

    def _release(self, block: int) -> None:
        self._refs.pop(block, None)
        self.trace.events.append(~block)
        self.trace.at.append(len(self.trace.segments) - 1)

    def stop(self) -> Trace:
        """The trace; nothing is added to it any more."""
        self._refs.clear()
        return self.trace


def summed_in_place(args: tuple[Any, ...]) -> Tensor | None:
    """autograd adds a gradient to one that nothing else holds in place (InputBuffer::accumulate); under a dispatch
    mode and on meta it does not. The sum, done as without them; None: it is none of autograd's, or shared."""
    if torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled():
        return None
    a, b = args[:2]
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return None
    for into, other in ((a, b), (b, a)):
        storage = torch._C._storage_Use_Count(into.untyped_storage()._cdata)
        uses = into._use_count()  # type: ignore[attr-defined, union-attr, unused-ignore]
        if uses <= SHARED[0] and storage <= SHARED[1] and into.is_contiguous():
            return into.add_(other)
    return None


class Joined:
    """Puts whole traces into one that is being made."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.buffers: dict[str, int] = {}

    def insert(self, other: Trace) -> dict[str, int]:
        """All events of `other` now. A buffer that an earlier insertion made is there already. Returns the blocks of
        parameters' gradients by the parameter's name."""
        trace, moved, made = self.trace, {}, {}
        segments = len(trace.segments)
        trace.segments += other.segments
        kept = set(self.buffers)
        for event, at in zip(other.events, other.at, strict=True):
            block = event if event >= 0 else ~event
            if other.kinds[block] == "buffer":
                if other.ops[block] in kept:
                    continue
                self.buffers[other.ops[block]] = block
            if event >= 0:
                what = other.sizes[block], other.ops[block], other.where[block], other.kinds[block]
                moved[block] = trace.add(*what, segments + other.born[block])
                if block in other.names:
                    trace.names[moved[block]] = made_name = other.names[block]
                    made[made_name] = moved[block]
            trace.events.append(moved[block] if event >= 0 else ~moved[block])
            trace.at.append(segments + at)
        trace.costs.join(other.costs)
        return made


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's cycle collector runs when it likes; a trace must not depend on it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def followed(tracer: Tracer, model: Any, layers: nn.ModuleList) -> Iterator[None]:
    """Tell a tracer in which module and layer of a transformers model the run is; each forward is a micro-batch."""
    handles, micro, last = [], -1, len(layers) - 1
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(_into, tracer, name)))

    def begun(module: nn.Module, args: Any) -> None:
        nonlocal micro
        micro += 1
        tracer.enter(Segment(BEFORE, None, micro))

    def backward(index: int, _: Any) -> None:
        tracer.enter(Segment(BACKWARD, index, micro))

    def first(module: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() < 0:
            tracer.enter(Segment(FORWARD, 0, micro))

    def done(index: int, module: nn.Module, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() >= 0:
            return  # recomputed in the backward
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(partial(backward, index))
        tracer.enter(Segment(FORWARD, index + 1, micro) if index < last else Segment(LOSS, None, micro))

    handles.append(model.base_model.register_forward_pre_hook(begun, prepend=True))
    handles.append(layers[0].register_forward_pre_hook(first, prepend=True))
    handles += [layer.register_forward_hook(partial(done, i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _into(tracer: Tracer, name: str, module: nn.Module, args: Any) -> None:
    tracer.into(name)
