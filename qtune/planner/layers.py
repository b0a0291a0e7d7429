"""Trace few layers, extend exactly to all: layers of a kind repeat, so their events do.

A model's layers are read as `head + period * count + tail`, where layers are of one kind if their modules, shapes and
settings agree (windows, experts, positions). Only four periods are traced: the first and the last are special (nothing
below the first adapter is differentiated), the two in the middle must do the same, event by event, to blocks of the
same place in the neighbouring periods. That is checked, so the extension is exact; where it does not hold, or nothing
repeats, all layers are traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .trace import FORWARD, Segment, Trace

TRACED = 4  # periods
HEAD, TAIL = -1, -2  # units of the layers beside them: no period has such a number, however many there are
WORTH = 0.85  # of the layers: where more would be traced anyway, all are
Owner = tuple[str, int, int | None]  # part, micro-batch, unit: where a block was born
Place = tuple[Owner, int]  # and its number there


class Irregular(Exception):
    """The middle periods do not repeat each other."""


@dataclass(frozen=True)
class Pattern:
    """Layers as head + period * count + tail; `path`: the module list's name."""

    path: str
    head: int
    period: int
    count: int
    tail: int

    @property
    def layers(self) -> int:
        return self.head + self.period * self.count + self.tail

    def whole(self) -> Pattern:
        """All layers as one: nothing is left out of the trace."""
        return Pattern(self.path, self.layers, 1, 0, 0)

    def traced(self) -> list[int]:
        """Indices of the layers to trace: all, if that is not many more."""
        if self.count <= TRACED:
            return list(range(self.layers))
        first, end = self.head + self.period * TRACED, self.layers - self.tail
        return [*range(first), *range(end, self.layers)]


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name in the model; ('', empty) where there is none of the config's length."""
    wanted = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted and name:
            return name, module
    return "", nn.ModuleList()


def kind(layer: nn.Module, also: Any) -> int:
    """What two layers must share to be of one kind: modules, shapes, settings, and what the config says of them."""
    found: list[Any] = [also]
    for path, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, bool, type(None))) and key not in ("layer_idx", "name", "unfused")
        }
        shapes = {
            name: (tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters(recurse=False)
        }
        scheme = str(getattr(module, "scheme", ""))
        found.append((path, type(module).__name__, scheme, sorted(plain.items(), key=str), sorted(shapes.items())))
    return hash(repr(found))


def pattern(model: Any) -> Pattern:
    """The shortest head + period * count + tail that the model's layers are."""
    path, layers = find_layers(model)
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    kinds = [kind(layer, types[i]) for i, layer in enumerate(layers)]
    best = Pattern(path, len(kinds), 1, 0, 0)
    for head in range(max(1, len(kinds) - TRACED)):
        for period in range(1, min(len(kinds), 16) + 1):
            count = 1
            while (
                head + (count + 1) * period <= len(kinds)
                and kinds[head + count * period : head + (count + 1) * period] == kinds[head : head + period]
            ):
                count += 1
            found = Pattern(path, head, period, count, len(kinds) - head - count * period)
            if (
                count > TRACED
                and len(found.traced()) <= WORTH * len(kinds)
                and len(found.traced()) < len(best.traced())
            ):
                best = found
    return best


def cut(model: Any, chosen: Pattern) -> nn.ModuleList:
    """Leave only the traced layers in the model, in place; returns them."""
    config, kept = model.config.get_text_config(), chosen.traced()
    layers = model.get_submodule(chosen.path)
    left = nn.ModuleList([layers[i] for i in kept])
    if len(left) < len(layers):
        model.set_submodule(chosen.path, left)
        config.num_hidden_layers = len(left)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in kept]
    return left


# ---- the extension


@dataclass
class _Run:
    """Consecutive events of one owner: (block, born or released)."""

    owner: Owner
    segments: list[int]
    events: list[int]


class _Extension:
    def __init__(self, trace: Trace, chosen: Pattern, first: int) -> None:
        self.trace, self.pattern = trace, chosen
        self.runs = list(self._read(first))
        self.place: dict[int, Place] = {}
        count: dict[Owner, int] = {}
        for run in self.runs:
            for event in run.events:
                if event >= 0:  # a buffer belongs to no layer: the first that needs it makes it
                    owner = ("buffer", 0, None) if trace.kinds[event] == "buffer" else run.owner
                    number = count[owner] = count.get(owner, -1) + 1
                    self.place[event] = (owner, number)
        self.out = Trace(segments=[*trace.segments[:1]])
        self.made: dict[Place, int] = {}

    def _unit(self, layer: int | None) -> int | None:
        """The traced period of a traced layer, HEAD or TAIL; None outside of layers."""
        if layer is None:
            return None
        unit = (layer - self.pattern.head) // self.pattern.period if layer >= self.pattern.head else HEAD
        return unit if unit < TRACED else TAIL

    def _read(self, first: int) -> Iterator[_Run]:
        trace, run = self.trace, None
        for event, at in zip(trace.events[first:], trace.at[first:], strict=True):
            segment = trace.segments[at]
            owner = (segment.part, segment.micro, self._unit(segment.layer))
            if run is None or run.owner != owner:
                if run is not None:
                    yield run
                run = _Run(owner, [], [])
            run.events.append(event)
            run.segments.append(at)
        if run is not None:
            yield run

    def check(self) -> None:
        """The two middle periods are equal, as seen from themselves; what else touches them is next to them."""
        views: dict[tuple[str, int], dict[int, Any]] = {}
        for run in self.runs:
            part, micro, unit = run.owner
            touched = {place[0][2] for event in run.events if (place := self._place(event)) is not None}
            near = {0, TRACED - 1} if unit is None or unit in (HEAD, TAIL) else {unit - 1, unit, unit + 1}
            if {of for of in touched if of is not None and 0 <= of < TRACED} - near:
                raise Irregular("what is not next to a period touches it")
            if unit in (1, 2):
                if unit in views.setdefault((part, micro), {}):
                    raise Irregular("a middle period runs twice")
                views[part, micro][unit] = [self._seen_from(event, unit) for event in run.events]
        for both in views.values():
            if len(both) != 2 or both[1] != both[2]:
                raise Irregular("the middle periods differ")

    def _place(self, event: int) -> Place | None:
        """Where the block of an event was born; None if it was there before the step."""
        return self.place.get(event if event >= 0 else ~event)

    def _seen_from(self, event: int, unit: int | None) -> tuple[bool, Owner, int, int]:
        block = event if event >= 0 else ~event
        place = self.place.get(block)
        if place is None:  # it was there before the step
            return event >= 0, ("static", 0, None), block, 0
        (part, micro, of), number = place
        relative = of if of is None or unit is None or of in (HEAD, TAIL) else of - unit
        return event >= 0, (part, micro, relative), number, self.trace.sizes[block]

    def extend(self) -> Trace:
        """All periods' events, in the order in which the whole model has them."""
        for run in self.runs:
            part, _, unit = run.owner
            last = self.pattern.count - 1
            if unit is None or unit in (HEAD, 0, TAIL):
                self._emit(run, 0 if unit != TAIL else last - 3)
            elif unit == TRACED - 1:
                self._emit(run, last - 3)
            elif part == FORWARD:
                for shift in range(1) if unit == 1 else range(last - 2):
                    self._emit(run, shift)
            else:
                for shift in (last - 3,) if unit == 2 else range(last - 3, -1, -1):
                    self._emit(run, shift)
        return self.out

    def _emit(self, run: _Run, shift: int) -> None:
        trace, out, unit = self.trace, self.out, run.owner[2]
        at = -1
        for event, segment in zip(run.events, run.segments, strict=True):
            if segment != at:
                at = segment
                new = self._moved(trace.segments[segment], shift)
                if out.segments[-1] != new:
                    out.segments.append(new)
            block = event if event >= 0 else ~event
            key = self._key(block, unit, shift)
            if event >= 0:
                self.made[key] = self._copy(block, self._moved(trace.segments[trace.born[block]], shift).layer)
                out.events.append(self.made[key])
            elif key in self.made:
                out.events.append(~self.made[key])
            else:
                continue  # static: not this trace's to release
            out.at.append(len(out.segments) - 1)

    def _moved(self, segment: Segment, shift: int) -> Segment:
        if segment.layer is None:
            return segment
        return segment._replace(layer=segment.layer + shift * self.pattern.period)

    def _key(self, block: int, unit: int | None, shift: int) -> Place:
        """The place of a block in the whole model, as a run of `unit`, moved by `shift` periods, means it."""
        place = self.place.get(block)
        if place is None:
            return ("static", 0, None), block
        (part, micro, of), number = place
        if of is None or of in (HEAD, TAIL):
            return place
        if unit is None or unit in (HEAD, TAIL):  # counted from the nearer end
            shift = 0 if of < 2 else self.pattern.count - TRACED
        return (part, micro, of + shift), number

    def _copy(self, block: int, layer: int | None) -> int:
        trace, out = self.trace, self.out
        where = self._renamed(trace.where[block], layer)
        new = out.add(trace.sizes[block], trace.ops[block], where, trace.kinds[block], len(out.segments) - 1)
        if block in trace.names:
            out.names[new] = self._renamed(trace.names[block], self._named_after(block, layer))
        return new

    def _named_after(self, block: int, layer: int | None) -> int | None:
        """The layer that a block's name tells, where the block is born in `layer`: another one if layers share a
        parameter, which is named after the first of them and gets its gradient from the last."""
        trace, start = self.trace, self.pattern.path + "."
        number = trace.names[block].removeprefix(start).partition(".")[0]
        if layer is None or not number.isdigit() or int(number) == trace.segments[trace.born[block]].layer:
            return layer
        first = int(number)
        return first + (self.pattern.count - TRACED) * self.pattern.period if self._unit(first) == TAIL else first

    def _renamed(self, name: str, layer: int | None) -> str:
        start = self.pattern.path + "."
        if layer is None or not name.startswith(start):
            return name
        _, _, rest = name[len(start) :].partition(".")
        return f"{start}{layer}.{rest}"


def extend(trace: Trace, first: int, chosen: Pattern) -> Trace:
    """The events of `trace` from number `first` on (what came before is static), for all layers. Raises Irregular."""
    cut_short = len(chosen.traced()) < chosen.layers
    extension = _Extension(trace, chosen if cut_short else chosen.whole(), first)
    if cut_short:
        extension.check()
    out = extension.extend()
    out.costs.rows = dict(_costs(trace, extension.pattern))
    return out


def extended(make: Callable[[], Any], traced: Callable[[Any, nn.ModuleList], tuple[Trace, int]]) -> Trace:
    """The trace of the whole model that `make` builds, from few of its layers where that is exact.

    traced(model, its layers): a trace, and the number of its first event that is not static.
    """
    few = make()
    chosen = pattern(few)
    try:
        return extend(*traced(few, cut(few, chosen)), chosen)
    except Irregular:
        few = make()
        chosen = pattern(few).whole()
        return extend(*traced(few, cut(few, chosen)), chosen)


def _costs(trace: Trace, chosen: Pattern) -> Iterator[tuple[Any, list[int]]]:
    """Costs without their segments, the middle periods counted as often as they are there."""
    total: dict[Any, list[int]] = {}
    times = (chosen.count - 2) / 2  # there are two of them
    for (segment, kind_, dtype), row in trace.costs.rows.items():
        layer = trace.segments[segment].layer
        unit = None if layer is None or layer < chosen.head else (layer - chosen.head) // chosen.period
        factor = times if unit in (1, 2) else 1
        sums = total.setdefault((0, kind_, dtype), [0, 0, 0])
        for i, value in enumerate(row):
            sums[i] += int(value * factor)
    yield from total.items()
