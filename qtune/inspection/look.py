"""Runs or a model looked at, one layer at a time: what is kept of each layer is numbers.

The base is loaded as for any use of it. Where it is packed on the way in, each weight is compared with what packing
made of it before it goes; so the error costs no second reading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..adapters.deltas import Delta, Factors, dense, norm
from ..adapters.starts import top
from ..combining.gather import Deltas, Given, check_bases, given
from ..errors import QtuneError, listed
from ..model import load
from ..model.loading import Packing
from ..model.source import open_source
from ..quant import QuantLinear
from ..recipe import Recipe
from ..report.compare import names as told_apart
from ..runs import is_run, kept_in, load_base, load_with_bar
from ..screen import Screen
from .measures import Overlap, Spread, overlap, spectrum, spread

LEFT = 16  # rank of the correction whose rest is shown beside a packing error: LoftQ's and LQER's
MOST = 8  # runs: as many colours
T = TypeVar("T")


@dataclass(frozen=True)
class Learned:
    """What a run learned at a site. relative: ||D|| / ||W||; values: singular values; cut: the error of the best delta
    of half the rank, or None where the rank is 1."""

    site: str
    size: float
    relative: float
    effective: float
    stable: float
    values: list[float]
    cut: Spread | None


@dataclass(frozen=True)
class Packed:
    """A packed layer: the error of packing it, and what its best correction of rank LEFT leaves of that error."""

    site: str
    error: Spread
    left: Spread | None


@dataclass
class Look:
    """All that was seen. runs: name -> layers; pairs: two names -> site -> overlap. scheme: in words."""

    model: str
    scheme: str
    runs: dict[str, list[Learned]] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    pairs: dict[tuple[str, str], dict[str, Overlap]] = field(default_factory=dict)
    packed: list[Packed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        pairs = [
            {"runs": list(pair), "layers": {s: asdict(o) for s, o in sites.items()}}
            for pair, sites in self.pairs.items()
        ]
        return asdict(self) | {"pairs": pairs}


def kind_of(site: str) -> str:
    """q_proj of model.layers.3.self_attn.q_proj."""
    return site.rpartition(".")[2]


def number_of(site: str) -> int | None:
    """3 of model.layers.3.self_attn.q_proj."""
    return next((int(part) for part in site.split(".") if part.isdigit()), None)


def by_kind(items: Sequence[T], site: Callable[[T], str]) -> dict[str, list[T]]:
    """Kind of layer -> its items, in their order; all of them last, as "all"."""
    found: dict[str, list[T]] = {}
    for item in items:
        found.setdefault(kind_of(site(item)), []).append(item)
    return found | {"all": list(items)}


class Watching(Packing):
    """Packs as ever, and looks at what that makes of each weight."""

    def __init__(self, instead: Any = None) -> None:
        self.seen: list[Packed] = []
        self.instead = instead  # a packed model, whose codes are looked at in place of fresh ones

    def weight(self, layer: QuantLinear, weight: Tensor) -> None:
        if self.instead is None:
            super().weight(layer, weight)
        else:
            layer.set_parts(self.instead.get_submodule(layer.name).parts)
        w = weight.detach().to(torch.float32)
        error = layer.dequantize(torch.float32).sub_(w)
        rest = None
        if min(error.shape) > LEFT and norm(error):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                u, s, vh = top(error, LEFT, "fast", 2)
            rest = spread(error.addmm(u * s, vh, alpha=-1), norm(w))
        found = spread(error, norm(w))
        if found is not None:
            self.seen.append(Packed(layer.name, found, rest))


def look(
    subjects: Sequence[str], *, scheme: str | None = None, original: str | None = None, device: str | None = None,
    screen: Screen | None = None,
) -> Look:  # fmt: skip
    """Look at runs of one base, or at one model. scheme: how a model is packed; original: what a packed one was packed
    from. Raises QtuneError before anything is loaded for what cannot be looked at."""
    screen = screen or Screen(quiet=True)
    runs = [is_run(subject) for subject in subjects]
    if all(runs):
        if scheme is not None or original is not None:
            raise QtuneError(
                "Q103", "--scheme and --original are of a MODEL; a run's base is stored as its recipe says"
            )
        return _look_at_runs([given(Path(subject), screen) for subject in subjects], device, screen)
    if len(subjects) > 1:
        wrong = listed(s for s, run in zip(subjects, runs, strict=True) if not run)
        raise QtuneError("Q401", f"{wrong}: not a run; legal: runs of one base, or one MODEL")
    return _look_at_model(subjects[0], scheme, original, device, screen)


def _look_at_model(model: str, scheme: str | None, original: str | None, device: str | None, screen: Screen) -> Look:
    source = open_source(model)
    stored = source.kind == "qtune"
    if stored and original is None:
        raise QtuneError(
            "Q103",
            f"{model} is packed already, and what packing lost is seen beside the original; give --original MODEL",
        )
    if not stored and original is not None:
        raise QtuneError("Q103", f"--original: {model} is not packed; legal: without it, --scheme says how to pack it")
    if stored and scheme is not None:
        raise QtuneError("Q103", f"--scheme {scheme}: {model} is packed already; legal: without it")
    watching = Watching()
    recipe = Recipe.load({"model": model, "scheme": scheme or "nf4", "device": device or "auto"}, training=False)
    if not stored:
        made, _ = load_base(recipe, screen, packing=watching)
    else:
        made, _ = load_base(recipe, screen, stored=True)
        watching = Watching(made)
        assert original is not None
        load_with_bar(original, screen, load, scheme=made.qtune.scheme, dtype=made.qtune.dtype, packing=watching)
    if not watching.seen:
        raise QtuneError("Q103", f"{model} in {made.qtune.scheme}: packing loses nothing, there is nothing to show")
    return Look(model, str(made.qtune.scheme), packed=watching.seen)


def _look_at_runs(runs: Sequence[Given], device: str | None, screen: Screen) -> Look:
    folders = [run.adapter.resolve() for run in runs]
    if len(runs) > MOST or len(set(folders)) < len(folders):
        raise QtuneError("Q102", f"{len(runs)} runs to look at; legal: 1 to {MOST} different ones")
    check_bases(runs)
    watching, recipe = Watching(), runs[0].recipe
    model, _ = load_base(recipe, screen, device=device, kept=kept_in(runs[0].folder, runs[0].adapter), packing=watching)
    found = Look(recipe.model, str(recipe.scheme), packed=watching.seen)
    if runs[0].info.get("kept"):
        found.notes.append("the codes of this base are the run's own, chosen at its start: no packing error is shown")
        found.packed = []
    elif not watching.seen:
        found.notes.append(f"{recipe.model} in {recipe.scheme}: what packing lost is not to be seen here")
    apart = told_apart(folders) if len(runs) > 1 else [runs[0].folder.name]
    labels = dict(zip(apart, runs, strict=True))
    each = {label: Deltas([run], model, real=True) for label, run in labels.items()}
    for label, run in labels.items():
        rank = f", rank {run.rank}" if run.rank else ""
        found.about[label] = f"{run.recipe.adapter.method}{rank}"
        found.runs[label] = []
        if run.info.get("first"):
            found.notes.append(
                f"{label}: the start of {run.recipe.adapter.method} is left out, only what was learned counts"
            )
    found.pairs = {pair: {} for pair in combinations(labels, 2)}
    bases = {name: base for deltas in each.values() for name, base in deltas.bases.items()}
    with screen.bar("looking", len(bases)) as advance:
        for name, base in bases.items():
            _layer(found, name, base, {label: d.learned(name)[0] for label, d in each.items() if name in d.bases})
            advance(1)
    return found


def _layer(found: Look, name: str, base: QuantLinear, deltas: dict[str, Delta | None]) -> None:
    """One layer of all runs."""
    whole = norm(base.dequantize(torch.float32))
    there = {label: delta for label, delta in deltas.items() if delta is not None}
    spectra = {label: spectrum(delta) for label, delta in there.items()}
    for label, delta in there.items():
        its, size = spectra[label], norm(delta)
        half = len(its.values) // 2
        cut = None
        if half:
            rest = Factors(its.v[:, half:].T, its.u[:, half:] * its.values[half:])
            cut = spread(dense(rest), size)
        found.runs[label].append(
            Learned(name, size, size / whole, its.effective, its.stable, its.values.tolist(), cut)
        )  # fmt: skip
    for pair, sites in found.pairs.items():
        if all(label in there for label in pair):
            a, b = pair
            seen = overlap(there[a], there[b], spectra[a], spectra[b])
            if seen is not None:
                sites[name] = seen
