"""Adapters that start while the checkpoint streams in: each weight is in high precision once, alone, and then packed.

A start that needs no data (LoftQ, PiSSA ...) happens as its weight arrives. Codes and starts that depend on what a
layer sees (GPTQ, CLoQ, QWHA ...) take the decoder layer by layer: its dense weights are held, calibration text runs
through them on what the layers below, packed and adapted, hand up; the second moments of every distinct input choose
the codes and the adapter's first values; then the text moves on through the layer as it will be trained. Peak memory:
packed so far, one dense layer, its second moments and the hidden states of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import METHODS, Adapted, AdapterSpec, Source, Start, adapt, adapted_sites, find_sites
from .adapters.sites import begin, build, place
from .checkpoint import Piece
from .errors import QtuneError, listed, one_of
from .model.layerwise import Grams, Layerwise, decoder_layers
from .model.loading import Aside, Packing, Progress, give_back, load, packed_sites, tie
from .quant import QuantLinear, Scheme, Storage
from .quant.calibrate import CODES, choose, refuses, too_little
from .screen import Screen


def start(
    model: str | Path,
    scheme: Storage,
    spec: AdapterSpec,
    *,
    windows: Tensor | None = None,
    codes: str = "nearest",
    seed: int = 0,
    embeddings: Scheme | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    aside: Aside | None = None,
) -> PreTrainedModel:
    """Load a model, pack it, and put adapters on it that start from the weights before packing.

    windows: calibration text, token ids int64 [samples, length], where codes or the method ask for it (see `wants`).
    codes: how codes are chosen (nearest, gptq, magr-gptq). Each adapted site tells in `.start` how far it is from its
    weight. model, scheme, embeddings, dtype, device, progress, aside: as of `load`.
    Raises QtuneError before anything is read for what cannot be: a rank or width that does not fit, a method
    that makes no sense on the scheme, too little text, weights that are packed already.
    """
    spec.checked()
    if codes not in CODES:
        raise one_of("codes", codes, CODES)
    packing = Starting(spec, windows, codes, seed)
    options: dict[str, Any] = {"embeddings": embeddings, "dtype": dtype, "device": device, "progress": progress}
    made = load(model, scheme, packing=packing, aside=aside, **options)
    if packing.needs:
        for name, site in packing.started.items():
            place(made, name, site)
            site.adapter.thaw()  # loading ends with everything frozen
    else:
        adapt(made, spec, seed=seed)
    return made


def wants(spec: AdapterSpec | None, codes: str) -> bool:
    """Does a start with these codes need calibration text?"""
    return codes != "nearest" or (spec is not None and "gram" in spec.needs())


class Starting(Packing):
    """Packs each weight with the codes asked for and starts its adapter (`spec` None: there is none)."""

    def __init__(self, spec: AdapterSpec | None, windows: Tensor | None, codes: str, seed: int = 0) -> None:
        self.spec, self.codes, self.seed = spec, codes, seed
        self.data = wants(spec, codes)
        self.needs = frozenset() if spec is None else spec.needs()
        if self.data and windows is None:
            what = f"codes {codes} are chosen" if codes != "nearest" else f"method {spec.method if spec else ''} starts"
            raise QtuneError("Q704", f"{what} from calibration text, and there is none; give `windows`")
        self.windows = windows if self.data else None
        self.held: dict[str, Tensor] = {}  # weights of the layer at hand
        self.started: dict[str, Adapted] = {}
        self.few: list[str] = []  # experts that too little text reached

    def begin(
        self, model: PreTrainedModel, pieces: list[Piece], ties: dict[str, str], device: torch.device
    ) -> list[Piece]:
        self.model, self.ties, self.device = model, ties, device
        self.sites: dict[str, QuantLinear] = {}
        if self.spec is not None:
            self.sites = find_sites(model, self.spec.targets or METHODS[self.spec.method].targets)
            build(self.sites, self.spec)  # on meta: whatever does not fit is told before anything is read
        self._refuse_packed(pieces)
        self._refuse_tied()
        if not self.data:
            return pieces
        assert self.windows is not None
        name, layers = decoder_layers(model)
        inside = re.compile(re.escape(name) + r"\.(\d+)\.")
        self._refuse_codes(inside)
        self._refuse_outside(inside)
        self._refuse_little(layers)
        self.walk = Layerwise(model, self.windows, device)
        self.layer_of = {target: inside.match(target) for piece in pieces for target in piece.targets}
        self.within = {layer.name for layer in packed_sites(self.walk.layers).values()}
        ordered = sorted(pieces, key=lambda p: int(m[1]) if (m := self.turn(p)) else -1)
        self.left = [0] * len(layers)
        for piece in pieces:
            if match := self.turn(piece):
                self.left[int(match[1])] += 1
        return ordered

    def turn(self, piece: Piece) -> re.Match[str] | None:
        """The decoder layer of a piece: [1] is its number."""
        return self.layer_of[next(iter(piece.targets))]

    def _refuse_packed(self, pieces: Iterable[Piece]) -> None:
        packed = [name for piece in pieces if piece.scheme is not None for name in piece.targets]
        if packed and (self.needs or self.data):
            what = f"method {self.spec.method} needs" if self.spec and self.needs else f"codes {self.codes} need"
            raise QtuneError(
                "Q313",
                f"the model's weights are packed already ({', '.join(packed[:3])} ...), but {what} them as they were "
                "before; take the original model",
            )

    def _refuse_tied(self) -> None:
        """A tied head is never read, and other codes for it would be the table's as well."""
        shared = {*self.ties, *self.ties.values()}
        if self.spec is not None and self.needs and (tied := [s for s in self.sites if f"{s}.weight" in shared]):
            raise QtuneError(
                "Q707",
                f"{', '.join(tied)}: its weight is the input table's, too, so that method {self.spec.method} cannot "
                "start from it; take it out of adapter.targets",
            )

    def _refuse_codes(self, inside: re.Pattern[str]) -> None:
        """Codes are chosen inside of the layers, where the inputs are known, and where there are any: a layer that a
        mixture leaves dense stays so."""
        layers = [layer for name, layer in packed_sites(self.model).items() if inside.match(name)]
        why = {refuses(layer.scheme, self.codes) for layer in layers}
        if "" not in why:
            raise QtuneError("Q702", "; ".join(sorted(why)))

    def _refuse_outside(self, inside: re.Pattern[str]) -> None:
        outside = [site for site in self.sites if not inside.match(site)]
        if outside and self.spec is not None and "gram" in self.needs:
            raise QtuneError(
                "Q707",
                f"{', '.join(outside[:3])}: method {self.spec.method} starts from the inputs of a layer on calibration "
                "text, which are gathered inside of the decoder's layers only; take these out of adapter.targets",
            )

    def _refuse_little(self, layers: torch.nn.ModuleList) -> None:
        assert self.windows is not None
        rows: int = self.model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        if not self.windows.is_meta and not 0 <= int(self.windows.min()) <= int(self.windows.max()) < rows:
            raise QtuneError(
                "Q222", f"windows hold token {int(self.windows.max())}; the model has tokens 0 to {rows - 1}"
            )
        sites = self.sites.values() if self.codes == "nearest" else packed_sites(layers).values()
        message = too_little(self.windows.numel(), max(layer.in_features for layer in sites))
        if message:
            raise QtuneError("Q221", message)

    def weight(self, layer: QuantLinear, weight: Tensor) -> None:
        if self.data and layer.name in self.within:
            self.held[layer.name] = weight
        else:
            self._pack(layer, weight, None)

    def _pack(self, layer: QuantLinear, weight: Tensor, gram: Tensor | None) -> None:
        """Fill the layer and start its adapter, if it has one; what a start packs gets the same choice of codes."""
        if self.codes == "nearest" or gram is None or refuses(layer.scheme, self.codes):
            super().weight(layer, weight)
        else:
            layer.pack = lambda w: choose(layer.scheme, w, gram, self.codes, name=layer.name)
            layer.set_weight(weight)
        if self.spec is not None and self.needs and layer.name in self.sites:
            site = build({layer.name: layer}, self.spec, among=self.sites)[0][layer.name]
            source = Source(weight.to(layer.device), gram if "gram" in self.needs else None)
            site.start = begin(layer.name, site, self.spec, source, self.seed)
            self.started[layer.name] = site
            if self.data:  # the text moves on through the layer as it will be trained
                place(self.model, layer.name, site)
        layer.pack = None

    def filled(self, piece: Piece) -> None:
        """Behind the last piece of a decoder layer, that layer's turn."""
        match = self.turn(piece) if self.data else None
        if not match:
            return
        index = int(match[1])
        self.left[index] -= 1
        if not self.left[index]:
            self._layer(index)

    def _gram(self, grams: Grams, layer: QuantLinear) -> Tensor | None:
        """A layer's second moments; None for an expert that too few tokens reached, whose codes are then nearest."""
        seen = grams.seen(layer.name)
        assert self.windows is not None
        few = not seen if self.windows.is_meta else bool(too_little(seen, layer.in_features))  # a plan's are samples
        if not (layer.routed and few):
            return grams.gram(layer.name)
        if self.spec is not None and "gram" in self.needs and layer.name in self.sites:
            raise QtuneError(
                "Q221",
                f"{layer.name}: a router sent {seen} tokens of the calibration text to this expert, and method "
                f"{self.spec.method} needs {layer.in_features}; give more text, or leave experts out of "
                "adapter.targets",
            )
        self.few.append(layer.name)
        return None

    def notes(self) -> list[str]:
        """The experts whose codes are nearest after all."""
        if not self.few:
            return []
        return [f"codes are nearest, not {self.codes}, in {len(self.few)} expert weights, which fewer tokens of the "
                f"calibration text reached than they have inputs ({listed(self.few, 3)})"]  # fmt: skip

    def _layer(self, index: int) -> None:
        if index == 0:
            tie(self.model, self.ties, self.device)
        sites = {layer.name: layer for layer in packed_sites(self.walk.layers[index]).values()}
        with Grams(sites, self.held) as grams:
            self.walk.pass_through(index, advance=False)
        for name, layer in sites.items():
            self._pack(layer, self.held.pop(name), self._gram(grams, layer))
        del grams, sites
        if index + 1 < len(self.walk.layers):
            self.walk.pass_through(index, advance=True)
        give_back()  # what a start frees lies in pieces between what stays


# ---- what a start did


def tell(model: torch.nn.Module, spec: AdapterSpec, screen: Screen) -> None:
    """Show how far the layers are from their weights before and after the start, by kind of layer."""
    kinds: dict[str, list[tuple[str, Start]]] = {}
    for name, site in adapted_sites(model).items():
        if site.start is not None:
            kinds.setdefault(name.rpartition(".")[2], []).append((name, site.start))
    if not kinds:
        return
    weighted = next(iter(kinds.values()))[0][1].weighted
    of = "outputs on the calibration text" if weighted else "weights"
    screen.line(f"start  {spec.method}: distance from the unquantized {of}, base alone -> with the adapter")
    everything = [pair for pairs in kinds.values() for pair in pairs]
    for kind, pairs in [*kinds.items(), ("all", everything)]:
        before, after = (sum(getattr(s, key) for _, s in pairs) / len(pairs) for key in ("before", "after"))
        worst, least = max(pairs, key=lambda pair: ratio(pair[1]))
        tail = f", least gain {ratio(least):.2f} in {worst}" if kind == "all" else ""
        screen.line(f"       {kind:12} {before:.4f} -> {after:.4f}  ({after / before if before else 1:.2f}x{tail})")
    if worse := sum(ratio(s) > 1.01 for _, s in everything):
        screen.line(f"note: {worse} layers start over 1% farther from their weights than the base alone", "yellow")


def ratio(start: Start) -> float:
    """What is left of the base's distance; 1 where there was none."""
    return start.after / start.before if start.before else 1.0
