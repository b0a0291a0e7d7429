"""Packed layers in the place of adapters: what `qtune merge --keep` makes of a model, a decoder layer at a time.

Codes are the nearest ones, or chosen (quant/calibrate.py) by second moments G of the layer's inputs: over text, which
comes through the layers that are packed already, or without text:

    feedback     GPTQ with G = d^T d: rounding errors E are carried on so that E d^T vanishes, and with it <E, d>: what
                 d reads of the input is answered as if nothing had been rounded, the noise is put where it does not
                 look
    remainder    what packing lost, R = W + d - P(W + d), as a LoRA B A of a rank: the least ||R - B A|| (Eckart & Young
                 1936, as in method lqer), with text the least tr((R - B A) G (R - B A)^T) (as in method cloq)
Text goes on through a layer as it was packed, with its remainder beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .adapters import METHODS, Adapted, AdapterSpec, Source, adapted_sites
from .adapters.sites import begin, place
from .errors import QtuneError, listed
from .memory.layers import device_of
from .model.layerwise import Grams, Layerwise, by_layer
from .model.loading import packed_sites
from .quant import Dense, Parts, QuantLinear, Scheme
from .quant.calibrate import CODES, choose, refuses, too_little
from .screen import Screen

FEEDBACK = "feedback"
MERGE_CODES = ("nearest", FEEDBACK, *(codes for codes in CODES if codes != "nearest"))


@dataclass(frozen=True)
class Way:
    """How layers are packed. codes: one of MERGE_CODES; rank: of the remainder, None: there is none."""

    scheme: Scheme
    codes: str = "nearest"
    rank: int | None = None

    @property
    def by_text(self) -> bool:
        """Are codes chosen by text?"""
        return self.codes not in ("nearest", FEEDBACK)

    @property
    def choice(self) -> str:
        """What of `calibrate.CODES` chooses them."""
        return "gptq" if self.codes == FEEDBACK else self.codes

    def __str__(self) -> str:
        beside = "" if self.rank is None else f" and a remainder of rank {self.rank}"
        return f"{self.scheme} ({self.codes}){beside}"


@dataclass
class Shares:
    """What is left of what was learned: <Q - W, d> / |d|^2 of each layer Q, and of all together."""

    layers: dict[str, float] = field(default_factory=dict)
    along: float = 0.0
    size: float = 0.0

    def add(self, name: str, moved: Tensor, change: Tensor) -> None:
        """A layer whose weight went by `moved` where it should have gone by `change`, both [out, in]."""
        along, size = float((moved * change).sum()), float(change.square().sum())
        self.layers[name] = along / size if size else 1.0
        self.along, self.size = self.along + along, self.size + size

    @property
    def all(self) -> float:
        return self.along / self.size if self.size else 1.0


@dataclass(frozen=True)
class Repacked:
    """packed: what packing left; both: what packed layers and remainder leave; beside: site -> packed layer with its
    remainder, which then stand in the model."""

    packed: Shares = field(default_factory=Shares)
    both: Shares = field(default_factory=Shares)
    beside: dict[str, Adapted] = field(default_factory=dict)


@torch.no_grad()
def repack(model: Any, way: Way, windows: Tensor | None, screen: Screen) -> Repacked:
    """Put packed layers in the place of all adapters, and of what is packed in another scheme. windows: token ids
    [samples, length], where codes are chosen by text.

    Raises QtuneError, before anything is packed, for a rank that a layer does not have; and for too little text.
    """
    repacking = _Repacking(model, way, screen)
    repacking.check_rank()
    with screen.bar("packing", len(repacking.names)) as advance:
        if windows is None:
            repacking.pack(repacking.names, {}, advance)
        else:
            repacking.along(windows, advance)
    return repacking.made


class _Repacking:
    """sites: what is adapted; others: what is packed in another scheme; fixed: what stays packed as it is."""

    def __init__(self, model: Any, way: Way, screen: Screen) -> None:
        self.model, self.way, self.screen, self.made = model, way, screen, Repacked()
        self.sites, head = adapted_sites(model), model.get_output_embeddings()
        self.fixed = {name for name, module in model.named_modules() if module is head}  # packed as embeddings, dense
        bases = {f"{name}.base" for name in self.sites}
        self.others = {
            name: layer for name, layer in packed_sites(model).items()
            if name not in bases | self.fixed and layer.scheme != way.scheme and not isinstance(layer.scheme, Dense)
        }  # fmt: skip
        self.names = [*self.sites, *self.others]

    def base(self, name: str) -> QuantLinear:
        """The packed layer that stands there before."""
        return self.sites[name].base if name in self.sites else self.others[name]

    def check_rank(self) -> None:
        """Raises QtuneError for layers that have no such rank."""
        rank = self.way.rank
        small = [name for name in self.names if rank is not None and rank > min(self.base(name).shape)]
        if small:
            most = min(min(self.base(name).shape) for name in self.names)
            size = " x ".join(map(str, self.base(small[0]).shape))
            raise QtuneError(
                "Q102", f"--remainder {rank} is beyond {len(small)} layers ({listed(small, 3)}; {small[0]} is {size}); "
                f"legal: 1 to {most}"
            )  # fmt: skip

    def along(self, windows: Tensor, advance: Callable[[int], None]) -> None:
        """Pack as text goes by: the layers in their order, each read by the text as the layers below were packed; then
        what stands outside of them."""
        walk = Layerwise(self.model, windows, device_of(self.model))
        inside, outside = by_layer(self.model, self.names)
        last = max((number for number, names in enumerate(inside) if names), default=-1)
        for number, names in enumerate(inside[: last + 1]):
            if names:
                grams = self._grams(names, partial(walk.pass_through, number, advance=False))
                self.pack(names, grams, advance)
                del grams
            if number < last:
                walk.pass_through(number, advance=True)
        if outside:
            self.pack(outside, self._grams(outside, partial(self._run, windows)), advance)

    def _run(self, windows: Tensor) -> None:
        for window in windows:
            self.model(input_ids=window[None].to(device_of(self.model)), use_cache=False)

    def _grams(self, names: list[str], run: Callable[[], None]) -> dict[str, Tensor]:
        """Second moments [in, in], fp32, of the inputs of each layer while `run` lasts. An expert that too little text
        reaches has none, which is told: its codes are the nearest. Raises QtuneError for any other layer of which that
        is true."""
        with Grams({name: self.model.get_submodule(name) for name in names}, None) as grams:
            run()
        seen, few = {name: grams.seen(name) for name in names}, []
        for name in names:
            if why := too_little(seen[name], self.base(name).in_features):
                if not self.base(name).routed:
                    raise QtuneError("Q706", f"{name}: {why}")
                few.append(name)
        if few:
            self.screen.line(f"note: too little text reaches {', '.join(few)}: the nearest codes are taken", "yellow")
        return {name: grams.gram(name) for name in names if name not in few}

    def pack(self, names: list[str], grams: dict[str, Tensor], advance: Callable[[int], None]) -> None:
        """Pack layers, each by its gram, if there is one."""
        for name in names:
            self._one(name, grams.get(name))
            advance(1)

    def _one(self, name: str, gram: Tensor | None) -> None:
        site, base, scheme = self.sites.get(name), self.base(name), self.way.scheme
        before = base.dequantize(torch.float32)
        after, bias = (before, base.bias) if site is None else site.merged()
        if name in self.fixed or isinstance(base.scheme, Dense):
            scheme = base.scheme
        change = None if site is None else after - before
        by = change.T @ change if self.way.codes == FEEDBACK and change is not None else gram
        how = "nearest" if by is None or refuses(scheme, self.way.choice) else self.way.choice
        made = _packed(base, name, scheme, choose(scheme, after, by, how, name=name), bias)
        beside = None if self.way.rank is None else _with_remainder(made, name, after, gram, self.way.rank)
        place(self.model, name, beside or made)  # type: ignore[arg-type]
        if beside is not None:
            self.made.beside[name] = beside
        if change is not None:
            self.made.packed.add(name, made.dequantize(torch.float32).sub_(before), change)
            if beside is not None:
                self.made.both.add(name, beside.merged()[0].sub_(before), change)


def _packed(base: QuantLinear, name: str, scheme: Scheme, parts: Parts, bias: Tensor | None) -> QuantLinear:
    """A layer as `base` is, of these parts of `scheme`."""
    if bias is not None and base.bias is None:
        raise QtuneError("Q805", f"{name}: the adapter adds a bias, which a checkpoint of this model cannot hold")
    made = QuantLinear(
        base.in_features, base.out_features, scheme, bias=base.bias is not None, dtype=base.dtype,
        device=base.device, name=name, conv1d=base.conv1d,
    )  # fmt: skip
    made.routed = base.routed
    made.set_parts(parts)
    if made.bias is not None and bias is not None:
        made.bias.data.copy_(bias)
    return made


def _with_remainder(made: QuantLinear, name: str, weight: Tensor, gram: Tensor | None, rank: int) -> Adapted:
    """`made` with a LoRA of scale 1 beside it: of what it lacks of weight [out, in], seen by the gram if there is
    one."""
    options: dict[str, Any] = {"rank": rank, "alpha": float(rank)}
    spec = AdapterSpec("lqer", (), options | {"data": False}) if gram is None else AdapterSpec("cloq", (), options)
    site = Adapted(made, METHODS[spec.method](made, **spec.options))
    begin(name, site, spec, Source(weight, gram), 0)
    return site
