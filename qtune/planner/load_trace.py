"""The trace of loading: the loader's own filling on meta, and what codes and starts do while the checkpoint streams in.

One piece of each kind is traced and stands for all of its kind. Where calibration text is run through the decoder it is
one decoder layer of each kind, with all that happens to it, on two windows: the first makes what is kept between
windows, and its hidden states stand for those of all windows but the last. Left out: the text itself, and LAPACK's own
buffers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Piece
from ..memory import DISK
from ..memory.host import is_here
from ..model.layerwise import decoder_layers
from ..model.loading import Fill, Packing, prepare
from ..model.skeleton import empty
from ..quant import QuantLinear
from ..quant.scheme import DTYPES
from ..recipe import Recipe
from ..starting import Starting, wants
from .layers import kind
from .plan import Plan
from .published import MetaFile, published
from .standins import answers_of_weights, on_meta, scratch_on
from .timeline import Timeline
from .trace import Trace, Tracer, without_collector

META = torch.device("meta")
WINDOWS = 2  # that are traced


@dataclass(frozen=True)
class Loading:
    """The loader's births and releases. host: bytes in host memory beside them; published: bytes of the checkpoint in
    bf16; kept: bytes of the codes that are the run's own, of `layers` layers; threads: that multiply; note: what
    decides the peak; disk: bytes of weights that are streamed from a file."""

    timeline: Timeline
    host: int
    published: int
    kept: int
    layers: int
    threads: int
    note: str
    disk: int


def tracer_of(plan: Plan, devices: tuple[str, ...] | None = None, answer: Any = None) -> Tracer:
    """A tracer for a stage on meta; devices: whose memory counts, else all that is the plan's device's."""
    counted = devices or (("meta", "cpu") if plan.device.kind == "cpu" else ("meta",))
    return Tracer(counted, scratch=scratch_on(plan.device), answer=answer)


def streams(recipe: Recipe) -> bool:
    """Does the adapter start while the checkpoint streams in?"""
    return bool(recipe.adapter.needs())


def loading_of(plan: Plan) -> Loading:
    """The loader's own filling, piece by piece in its order. Raises QtuneError for a start that cannot be."""
    recipe, dtype, config = plan.recipe, DTYPES[plan.recipe.dtype], plan.model.config
    skeleton: Any = empty(type(config).from_dict(config.to_dict()), dtype)  # which writes the dtype into its config
    gguf = recipe.model.lower().endswith(".gguf")
    fill: Fill
    read = MetaFile(
        torch.float32 if gguf else _stored(config), fresh=gguf, on_device=plan.device.kind == "cpu",
        site=lambda name: fill.site(name),
    )  # fmt: skip
    found = published(skeleton, read)
    packing, note = _packing(recipe)
    fill = prepare(skeleton, found, recipe.scheme, recipe.embeddings, dtype, META, packing)
    on_disk = recipe.memory.weights == DISK
    filling = _Filling(plan, fill, packing, waits=not is_here(recipe.memory.weights, plan.device.kind))
    with without_collector(), torch.no_grad(), on_meta(plan.device):
        filling.all(packing.begin(skeleton, found.pieces, {}, META))  # ties: tensors are there once as it is
    nbytes = sum(2 * prod(shape) for piece in found.pieces for shape in piece.targets.values())
    return Loading(
        filling.timeline, read.host + filling.text + filling.host + (0 if on_disk else filling.aside), nbytes,
        filling.kept, filling.layers, threads=int(isinstance(packing, Starting)), note=note,
        disk=filling.aside if on_disk else 0,
    )  # fmt: skip


def _stored(config: Any) -> torch.dtype:
    """The dtype of the published weights, as config.json says; bf16 where it does not."""
    given = getattr(config, "dtype", None)
    given = DTYPES.get(given) if isinstance(given, str) else given
    return given if isinstance(given, torch.dtype) else torch.bfloat16


def _packing(recipe: Recipe) -> tuple[Packing, str]:
    """What becomes of each weight, and in words what the peak consists of."""
    keys = recipe.calibrate
    if wants(recipe.adapter, keys.codes):
        windows = torch.empty(keys.samples, keys.length, dtype=torch.int64, device=META)
        note = f"packed so far + a dense layer, its second moments, {keys.samples:,} windows of {keys.length:,} tokens"
        return Starting(recipe.adapter, windows, keys.codes), note
    if streams(recipe):
        return Starting(recipe.adapter, None, keys.codes), "packed so far + one weight and its adapter's start"
    return Packing(), "packed so far + one weight"


@dataclass(frozen=True)
class _Seen:
    """What one of a kind did. first: the first event of its own; before, after: the blocks of the text's hidden states;
    packed: those of packed weights; kept: bytes of codes that are the run's own, of `layers` layers."""

    trace: Trace
    first: int
    before: list[int]
    after: list[int]
    packed: list[int]
    kept: int
    layers: int


class _Filling:
    """Puts the traces of pieces, and of decoder layers, together."""

    def __init__(self, plan: Plan, fill: Fill, packing: Packing, waits: bool) -> None:
        """waits: a decoder layer's packed weights are put aside once the layer is whole."""
        self.plan, self.fill, self.waits = plan, fill, waits
        self.waiting: dict[int, list[int]] = {}  # decoder layer -> the timeline's blocks of its packed weights
        self.packing = packing if isinstance(packing, Starting) else None
        self.timeline, self.seen = Timeline(), dict[Any, _Seen]()
        self.states: list[int] = []  # the timeline's blocks of the text's hidden states
        self.text = self.host = self.kept = self.layers = self.aside = 0
        self.stack = decoder_layers(fill.model)[0] if waits else "\n"  # no name begins so

    def all(self, pieces: list[Piece]) -> None:
        """Every piece, in this order; layers that take their turns as a whole."""
        if self.packing is not None and self.packing.windows is not None:
            self._text(self.packing, self.packing.windows)
        self.left = Counter(map(self._layer_of, pieces))
        for index, group in groupby(pieces, self._turn):
            if index is not None:
                self._one(self._kind_of_layer(index), list(group), self._layers()[index])
                continue
            for piece in group:
                self._one(self._kind(piece), [piece], self.fill.model.get_submodule(piece.source.rpartition(".")[0]))
        self.timeline.gone(self.states)

    def _text(self, packing: Starting, windows: Tensor) -> None:
        """The calibration text, of which few windows are traced."""
        if self.plan.device.kind == "cpu":
            self.timeline.born(_nbytes(windows))
        else:
            self.text = _nbytes(windows)
        packing.walk.windows = windows[:WINDOWS]

    def _layers(self) -> nn.ModuleList:
        assert self.packing is not None
        return self.packing.walk.layers

    def _turn(self, piece: Piece) -> int | None:
        """The decoder layer of a piece, where layers take their turns."""
        match = self.packing.turn(piece) if self.packing is not None and self.packing.data else None
        return int(match[1]) if match else None

    def _kind(self, piece: Piece) -> Any:
        layer, shape = self.fill.site(piece.source), piece.targets[piece.source]
        adapted = self.packing is not None and layer is not None and layer.name in self.packing.sites
        return type(layer), getattr(layer, "scheme", None), shape, self.fill.dtypes[piece.source], adapted

    def _kind_of_layer(self, index: int) -> Any:
        assert self.packing is not None
        layers = self._layers()
        types = getattr(self.packing.model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
        inside = {m.name for m in layers[index].modules() if isinstance(m, QuantLinear)} & set(self.packing.sites)
        adapted = sorted(name.partition(f".{index}.")[2] for name in inside)
        return kind(layers[index], types[index]), tuple(adapted), index == 0, index == len(layers) - 1

    def _one(self, key: Any, pieces: list[Piece], module: nn.Module) -> None:
        """What is read together, into `module`."""
        if key not in self.seen:
            self.seen[key] = self._traced(pieces, module, text=self._turn(pieces[0]) is not None)
        one = self.seen[key]
        moved = self.timeline.insert(one.trace, one.first, dict(zip(one.before, self.states, strict=False)))
        if one.after:
            self.states = [moved[block] for block in one.after]
        self.kept, self.layers = self.kept + one.kept, self.layers + one.layers
        self._put_aside(pieces, [moved[block] for block in one.packed])

    def _put_aside(self, pieces: list[Piece], packed: list[int]) -> None:
        index = self._layer_of(pieces[0])
        if index is None:
            return
        self.waiting.setdefault(index, []).extend(packed)
        self.left[index] -= len(pieces)
        if self.waits and not self.left[index]:
            blocks = self.waiting.pop(index)
            self.aside += sum(self.timeline.sizes[block] for block in blocks)
            self.timeline.gone(blocks)

    def _layer_of(self, piece: Piece) -> int | None:
        """The decoder layer that a piece belongs to."""
        inside, _, rest = next(iter(piece.targets)).partition(f"{self.stack}.")
        return int(rest.partition(".")[0]) if not inside and rest else None

    def _traced(self, pieces: list[Piece], module: nn.Module, text: bool) -> _Seen:
        tracer = tracer_of(self.plan, answer=answers_of_weights())
        before = self._hidden(tracer, adopt=True) if text else []
        first = len(tracer.trace.events)
        with tracer:
            for piece in pieces:
                self.fill.piece(piece)
                if self.packing is not None:
                    self.packing.filled(piece)
        after = self._hidden(tracer) if text else []
        trace = tracer.stop()
        if after != before:
            trace.sizes[after[0]] *= self._windows()[0]
        linears = [m for m in module.modules() if isinstance(m, QuantLinear)]
        packed = [block for m in linears if (block := tracer.block(m.packed)) is not None]
        own = [m for m in linears if m.own]
        kept = sum(_nbytes(p) for m in own for p in m.parts.values())
        return _Seen(trace, first, before, after, packed, kept, len(own))

    def _windows(self) -> list[int]:
        """How many windows each of the traced ones stands for."""
        assert self.packing is not None and self.packing.windows is not None
        count = len(self.packing.windows)
        return [count - WINDOWS + 1, 1] if count > 1 else [1]

    def _hidden(self, tracer: Tracer, adopt: bool = False) -> list[int]:
        """The blocks of the hidden states as they are now; none where they are in another memory than the device's."""
        assert self.packing is not None
        states = self.packing.walk.states or []
        if self.plan.device.kind != "cpu":  # the old ones live until the new ones are all there
            self.host = max(self.host, 2 * sum(n * _nbytes(s) for n, s in zip(self._windows(), states, strict=False)))
            return []
        for state in states if adopt else ():
            tracer.adopt(state, "activations")
        return [block for state in states if (block := tracer.block(state)) is not None]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
