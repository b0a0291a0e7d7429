"""What is asked of `qtune plan`: arguments -> recipe, model, device, micro-batch, limit; every fault at once.

Where the recipe's data and a tokenizer are at hand, the micro-batch is the worst that the data can bring: its longest
examples together, padded to the longest. Else it is train.micro_batch x data.max_length, and a note says so. With
train.micro_tokens several can be the worst (many short rows, few long ones): each is planned, and the largest counts.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from typing import Any

import torch

from ..batches import Capacity, steps_of
from ..data import Example, load_sets
from ..data.words import add_words
from ..errors import QtuneError, all_of, one_of, tried
from ..model import load_tokenizer
from ..quant import Scheme, scheme_from
from ..recipe import Recipe
from ..screen import size
from ..sections import entries, named
from ..units import parse_size
from .devices import Device, find_device
from .models import Model, find_model
from .plan import Plan, Shape, check_shape, packed_row, plan_recipe, shapes_of, worst_of
from .roofline import measured
from .room import UNKNOWN, Room, room_of
from .words import tokenizer_at

STACKS = ("qtune", "hf", "hf:installed")
SHORTCUTS = {"batch": "train.micro_batch", "seq": "data.max_length", "rank": "adapter.rank"}  # option -> key
# a micro-batch beyond this is refused: the checkpoint boundaries of the catalogue's smallest model (SmolLM2-135M: 30
# layers of 576 in bf16) take 135 GiB then; a trace of the chunks of the loss takes longer the more tokens there are
MOST_TOKENS = 2**22
LOW = {"batch": 1, "seq": 2, "rank": 1}


@dataclass(frozen=True)
class Lengths:
    """The examples of a data file: (tokens, trained tokens) of each, in the file's order."""

    pairs: tuple[tuple[int, int], ...]

    @cached_property
    def rising(self) -> list[tuple[int, int]]:
        """The same, the shortest first."""
        return sorted(self.pairs)

    def worst(self, capacity: Capacity, length: int) -> tuple[Shape, ...]:
        """The largest micro-batches of the data, cut at `length` tokens; the first has the most tokens.

        By rows it is the one of the longest examples. By tokens the longest example says how many fit: what goes by
        rows x longest (activations), by the longest (its positions), by rows x longest^2 (masks, plain attention) and
        by rows (kernels round a row's length up) is each at its most in another one, so there are up to four. Trained
        tokens and padding, which decide too, are the most that any micro-batch can have: a bound.
        """
        cut = [(min(tokens, length), min(n, min(tokens, length) - 1)) for tokens, n in self.rising]
        if capacity.packed:
            return (self._packed(capacity.limit, cut),)
        sizes = {longest: min(capacity.rows(longest), seen) for seen, (longest, _) in enumerate(cut, 1)}
        if not capacity.by_tokens:
            sizes = {cut[-1][0]: min(capacity.limit, len(cut))}
        trained = _most_trained(cut, capacity)
        keys: tuple[Callable[[int], tuple[int, int]], ...] = (
            lambda n: (sizes[n] * n, n), lambda n: (n, 0), lambda n: (sizes[n] * n * n, n), lambda n: (sizes[n], n),
        )  # fmt: skip
        return tuple(self._shape(sizes[n], n, trained, cut) for n in dict.fromkeys(max(sizes, key=key) for key in keys))

    def _packed(self, limit: int, cut: list[tuple[int, int]]) -> Shape:
        """A row that is full, or all there is, with the most trained tokens: those of the examples that train the
        largest part of themselves, the last of them in part."""
        tokens = left = min(limit, sum(n for n, _ in cut))
        trained = 0.0
        for n, learned in sorted(cut, key=lambda pair: pair[1] / pair[0], reverse=True):
            trained += learned * min(1.0, left / n)
            left -= min(left, n)
        source = f"data: longest example {cut[-1][0]:,} tokens (of {len(cut):,} examples), packed"
        return packed_row(tokens, min(cut[-1][0], tokens), ceil(trained), source)

    def _shape(self, rows: int, longest: int, trained: int, cut: list[tuple[int, int]]) -> Shape:
        together = f"the {rows} longest in one micro-batch"
        if longest < cut[-1][0]:
            together = f"{rows} of up to {longest:,} in one micro-batch"
        several = together if rows > 1 else "alone in a micro-batch"
        source = f"data: longest example {cut[-1][0]:,} tokens (of {len(cut):,} examples), {several}"
        return Shape(rows, longest, min(trained, rows * (longest - 1)), rows > 1 and cut[0][0] < longest, source)


def _most_trained(cut: list[tuple[int, int]], capacity: Capacity) -> int:
    """The most trained tokens that a micro-batch can have. cut: (tokens, trained) of the examples, the shortest first.

    For each longest example: of it and all shorter ones the most trained, as many as fit beside it.
    """
    most = total = 0
    taken: list[int] = []  # a heap, the smallest first
    for longest, n in cut:
        heapq.heappush(taken, n)
        total += n
        while len(taken) > capacity.rows(longest):
            total -= heapq.heappop(taken)
        most = max(most, total)
    return most


@dataclass(frozen=True)
class Request:
    """What to plan. budget: bytes, the device's memory or what the user allows. source: the recipe's file, None for
    --model; changes: KEY=VALUE as the user gave them. lengths: of the data, where it was read; known: the recipe's own
    micro-batch, where another has found it; room: host memory and disk, where they are known; first_note: the one of
    `notes` that is told before all else, how a device was chosen; typed: the options' sizes as the user wrote them."""

    recipe: Recipe
    model: Model
    device: Device
    budget: int
    stack: str = "qtune"
    source: str | None = None
    changes: tuple[str, ...] = ()
    lengths: Lengths | None = None
    notes: tuple[str, ...] = ()
    known: Shape | None = None
    room: Room = UNKNOWN
    first_note: str = ""
    typed: Mapping[str, str] = field(default_factory=dict)

    @property
    def late_notes(self) -> tuple[str, ...]:
        """The notes that are not told before all else."""
        return tuple(note for note in self.notes if note != self.first_note)

    def shapes(self, recipe: Recipe | None = None) -> tuple[Shape, ...]:
        """The largest micro-batches of the recipe, or of a changed one; the first has the most tokens."""
        recipe = recipe or self.recipe
        if self.known is not None and _micro_batch(recipe) == _micro_batch(self.recipe):
            return (self.known,)
        if self.lengths is None:
            return shapes_of(recipe)
        return self.lengths.worst(*_micro_batch(recipe))

    def shape(self, recipe: Recipe | None = None) -> Shape:
        """The micro-batch of the most tokens, of the recipe or of a changed one."""
        return self.shapes(recipe)[0]

    def steps(self) -> int | None:
        """Optimizer steps of the run, as the trainer counts them; None where the number of examples is not known."""
        keys = self.recipe.train
        if keys.steps is not None or self.lengths is None:
            return keys.steps
        return steps_of(keys, [tokens for tokens, _ in self.lengths.pairs])

    def plan(self, recipe: Recipe | None = None, stack: str | None = None) -> Plan:
        """The plan of the recipe, or of a changed one, for the micro-batch that takes the most."""
        recipe, stack = recipe or self.recipe, stack or self.stack
        return replace(worst_of(self._plan(recipe, stack, shape) for shape in self.shapes(recipe)), room=self.room)

    def _plan(self, recipe: Recipe, stack: str, shape: Shape) -> Plan:
        if stack == "qtune":
            return plan_recipe(recipe, self.device, model=self.model, shape=shape, budget=self.budget)
        from .hf import plan_stack

        release = "installed" if stack.endswith(":installed") else "published"
        return plan_stack(recipe, self.device, model=self.model, shape=shape, budget=self.budget, release=release)


def _micro_batch(recipe: Recipe) -> tuple[Capacity, int]:
    return Capacity.of(recipe.train), recipe.data.max_length


def with_phases(plan: Plan) -> Plan:
    """The plan with the other stages of the job beside the step; another stack has none that are known. This traces
    more than the step does, so a search goes without."""
    if plan.phases or plan.stack != "qtune":
        return plan
    from .phases import phases_of

    return replace(plan, phases=phases_of(plan))


def read_request(args: argparse.Namespace) -> Request:
    """The request that the command's arguments make. Raises one QtuneError with every fault."""
    faults: list[QtuneError] = []
    notes: list[str] = []
    pairs = [*([args.recipe] if _is_change(args.recipe) else []), *args.overrides]
    source = None if _is_change(args.recipe) else args.recipe
    recipe = tried(lambda: _recipe(args, source, pairs, faults), faults)
    device = tried(lambda: _device(args.device, recipe, notes), faults)
    chosen = notes[:1]
    limit = tried(lambda: _limit(args, recipe), faults)
    room = tried(lambda: _room(args, recipe, device), faults)
    if args.stack not in STACKS:
        faults.append(one_of("stack", args.stack, STACKS, "Q105"))
    elif args.stack != "qtune" and (args.fit is not None or args.explain or args.measure):
        told = f"--stack {args.stack} can be planned and swept; --fit, --explain and --measure are of qtune's own"
        faults.append(QtuneError("Q105", told))
    model = tried(lambda: find_model(recipe.model), faults) if recipe is not None else None
    if recipe is not None and model is not None and (args.seq is not None or recipe.data.train is None):
        for shape in shapes_of(recipe):
            tried(partial(_check, shape, model), faults)
    if faults or recipe is None or model is None or device is None:
        raise all_of(faults, "Q105")
    if limit and limit > device.memory:
        notes.append(f"the budget of {size(limit)} is beyond the {size(device.memory)} of {device.name}")
    lengths = None if args.seq is not None else _lengths(recipe, model, notes)
    return Request(
        recipe=recipe, model=model, device=device, budget=limit or device.memory, stack=args.stack, source=source,
        changes=tuple(_given(args, pairs)), lengths=lengths, notes=tuple(notes), room=room or UNKNOWN,
        first_note=chosen[0] if chosen else "", typed=_typed(args),
    )  # fmt: skip


def _check(shape: Shape, model: Model) -> None:
    check_shape(shape, model)
    if shape.rows * shape.length > MOST_TOKENS:
        raise QtuneError(
            "Q507",
            f"a micro-batch of {shape.rows:,} x {shape.length:,} tokens is more than can be planned; "
            f"legal: up to {MOST_TOKENS:,} tokens",
        )


def _is_change(text: str | None) -> bool:
    """Is the first word a KEY=VALUE, the recipe left out?"""
    return text is not None and "=" in text and not Path(text).is_file()


# ---- recipe


def _recipe(args: argparse.Namespace, source: str | None, pairs: list[str], faults: list[QtuneError]) -> Recipe:
    both = "one of RECIPE and --model is needed: a recipe's file, or a model's name such as llama-3.1-8b"
    if (source is None) == (args.model is None):
        raise QtuneError("Q103", both if source is None else f"{both}; given: {source} and --model {args.model}")
    if source is not None and (Path(source).suffix == ".gguf" or (Path(source) / "config.json").is_file()):
        raise QtuneError("Q103", f"{source} is a model, not a recipe; give it as --model {source}")
    for name, low in LOW.items():
        if (value := getattr(args, name)) is not None and value < low:
            faults.append(QtuneError("Q105", f"--{name} is {value}; legal: {low} or more"))
    tree: Any = {"model": args.model} if source is None else Path(source)
    recipe = Recipe.load(tree, pairs, training=False)
    if args.batch is not None and recipe.train.micro_tokens is not None and not recipe.train.packing:
        both = f"--batch is {args.batch} and train.micro_tokens is {recipe.train.micro_tokens}"
        faults.append(QtuneError("Q105", f"{both}; legal: one of the two (train.micro_tokens=null)"))
    late: dict[str, Any] = {}
    if args.scheme is not None:
        late["scheme"] = scheme_tree(recipe, args.scheme)
    if args.method is not None and args.method != recipe.adapter.method:
        late["adapter"] = {"method": args.method}
    for name, low in LOW.items():
        if (value := getattr(args, name)) is not None and value >= low:
            late[SHORTCUTS[name]] = value
    return recipe.with_(late) if late else recipe


def scheme_tree(recipe: Recipe, scheme: str | Scheme) -> dict[str, Any]:
    """The value of the recipe's key `scheme` with another scheme and the same embeddings."""
    made = scheme_from(scheme).to_dict() if isinstance(scheme, str) else scheme.to_dict()
    return {**made, "embeddings": recipe.embeddings.to_dict() if recipe.embeddings else None}


def _given(args: argparse.Namespace, pairs: list[str]) -> list[str]:
    """What changes the recipe, as KEY=VALUE for `qtune train`."""
    names = {"scheme": "scheme", "method": "adapter", **SHORTCUTS}
    options = [f"{key}={getattr(args, name)}" for name, key in names.items() if getattr(args, name) is not None]
    return [*pairs, *options]


# ---- device, limit


def _device(given: str | None, recipe: Recipe | None, notes: list[str]) -> Device:
    """The device that is named; else the recipe's or this machine's GPU, else the CPU."""
    wanted = recipe.device if recipe is not None else "auto"
    here = torch.cuda.is_available()
    if given is None:
        given = wanted if wanted == "cpu" or (here and wanted.startswith("cuda")) else "cuda" if here else "cpu"
        why = {"auto": "this machine has no GPU" if not here else "this machine's GPU"}.get(
            wanted, "the recipe's device"
        )
        if given == "cpu" and wanted not in ("auto", "cpu"):
            why = f"the recipe's device {wanted} cannot be planned here"
        notes.append(f"planned for {given} ({why}); --device rtx4090 plans for a card that is not here")
    device = find_device(given)
    return measured(device) if device.kind == "cpu" else device


def _limit(args: argparse.Namespace, recipe: Recipe | None) -> int | None:
    """Bytes that are allowed; None: the device's memory."""
    if args.fit and args.budget:
        raise QtuneError("Q103", f"--fit {args.fit} and --budget {args.budget} both say the limit; legal: one of them")
    for name in ("fit", "budget"):
        if text := getattr(args, name):
            return parse_size(text, f"--{name}")
    if args.budget == "":
        raise QtuneError("Q102", "--budget is empty; legal: a size such as 24GB")
    budget = getattr(recipe, "budget", None)
    return parse_size(budget, "budget") if budget else None


def _typed(args: argparse.Namespace) -> dict[str, str]:
    given = {"budget": args.budget or args.fit, "host": args.host, "disk": args.disk}
    return {name: text for name, text in given.items() if text}


def _room(args: argparse.Namespace, recipe: Recipe | None, device: Device | None) -> Room:
    """What there is beside the device, as the options say, else as this machine has it."""
    host, disk = (parse_size(text, f"--{name}") if (text := getattr(args, name)) else None for name in ("host", "disk"))
    if host is not None and device is not None and device.kind == "cpu":
        raise QtuneError(
            "Q103", f"--host {args.host} is the memory beside a GPU, and the device is cpu; legal: --budget SIZE"
        )
    here = room_of(recipe, device) if recipe is not None and device is not None else UNKNOWN
    return Room(host or here.host, disk or here.disk, "" if disk else here.folder)


# ---- data


def _lengths(recipe: Recipe, model: Model, notes: list[str]) -> Lengths | None:
    """The lengths of the recipe's examples; None, with a note, where data or tokenizer are not at hand."""
    keys = recipe.data
    taken = "so a micro-batch of examples of data.max_length was taken"
    if keys.train is None:
        return None
    if away := [source.file for source in entries(keys.train) if not Path(source.file).expanduser().exists()]:
        notes.append(f"data.train is {named(keys.train)}: no such file here ({away[0]}), {taken}")
        return None
    place = tokenizer_at(recipe.model)
    if place is None:
        notes.append(f"no tokenizer of {recipe.model} is at hand for {named(keys.train)}, {taken}")
        return None
    tokenizer = load_tokenizer(place)
    add_words(tokenizer, recipe.tokens)
    sets = load_sets(replace(keys, eval=None), tokenizer, seed=recipe.train.seed)
    if count := sets.report.truncated - sets.report.left_out:
        notes.append(f"{count:,} examples are cut at data.max_length = {keys.max_length:,}")
    Capacity.of(recipe.train).check(sets.train)
    return lengths_of(sets.train)


def lengths_of(examples: Sequence[Example]) -> Lengths:
    """The lengths of examples at hand."""
    return Lengths(tuple((len(example.input_ids), sum(example.trained)) for example in examples))


def request_of(recipe: Recipe, device: Device, budget: int, data: Shape | Lengths | None = None) -> Request:
    """A request of the library's own, without arguments. data: the lengths of its examples, or the recipe's largest
    micro-batch; smaller ones are then taken to be of examples as long as its longest."""
    known = data if isinstance(data, Shape) else None
    if known is not None:
        sizes = known.lengths or (known.length,) * known.rows
        data = Lengths(tuple((n, min(-(known.trained // -len(sizes)), n - 1)) for n in sizes if n > 1))
    lengths = data if isinstance(data, Lengths) else None
    room = room_of(recipe, device)
    return Request(recipe, find_model(recipe.model), device, budget, lengths=lengths, known=known, room=room)
