"""Runs as they are given to be combined or looked at: what must hold among them, and the delta of each at each site.

Of LoRA and the starts that extend it everything is in the adapter's file, so that a model on meta is enough, and the
base, whose digests the files know, is not read. Other methods need the packed base: their delta is the merged weight
less the base's, a layer at a time.

A run that did not start as the identity learned D - S, S its start, which makes up for the quantization: only what was
learned may be weighted, and S stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from ..adapters import METHODS, Adapted, Adapter
from ..adapters.deltas import Delta, Factors, delta_of, dense, is_lora, stacked
from ..adapters.files import FIRST, Fitted, fill_first, fit_adapter, read_adapter_json
from ..adapters.mixture import packed_layers
from ..errors import QtuneError, listed
from ..model.skeleton import build
from ..model.source import open_source
from ..quant import QuantLinear
from ..quant.scheme import DTYPES
from ..recipe import Recipe
from ..runs import kept_in, load_base, read_recipe
from ..screen import Screen
from ..state import adapter_in, run_of


@dataclass(frozen=True)
class Given:
    """A run as it lies on the disk. adapter: the folder of its adapter's files. info: of adapter.json."""

    folder: Path
    adapter: Path
    recipe: Recipe
    info: Mapping[str, Any]

    @property
    def method(self) -> type[Adapter]:
        return METHODS[self.recipe.adapter.method]

    @property
    def sites(self) -> Mapping[str, Any]:
        """Of adapter.json: what each base is."""
        sites: Mapping[str, Any] = self.info["sites"]
        return sites

    @property
    def rank(self) -> int | None:
        """The option of the method, where it has one."""
        return self.recipe.adapter.resolved().get("rank")

    @property
    def alone(self) -> bool:
        """Does its delta follow from its own files?"""
        return is_lora(self.method) and not self.info.get("kept") and not self.info.get("tokens")


def given(folder: Path, screen: Screen) -> Given:
    """Raises QtuneError where it is no run, its files are damaged, or no weight does what its adapter does."""
    recipe, run = read_recipe(folder), run_of(folder)
    METHODS[recipe.adapter.method].check_merges()
    adapter, note = adapter_in(folder)
    if note:
        screen.line(f"note: {note}", "yellow")
    return Given(run, adapter, recipe, read_adapter_json(adapter))


def check_together(runs: Sequence[Given]) -> None:
    """Raises QtuneError with all that keeps these runs from being one: a run given twice, other bases, other starts,
    rows of tokens in several."""
    faults: list[str] = []
    folders = [run.adapter.resolve() for run in runs]
    if len(runs) < 2 or len(set(folders)) < len(folders):
        raise QtuneError("Q102", f"{listed(run.folder for run in runs)}: give two runs or more, each once")
    faults += _other_bases(runs)
    first = runs[0]
    for run in runs[1:]:
        if run.info.get("first") != first.info.get("first"):
            faults.append(
                f"{run.folder} started from other values than {first.folder}, and a start cannot be in twice: train "
                "both with the same method, train.seed and calibrate.data, or from the identity (lora)"
            )
    if len(named := [run for run in runs if run.info.get("tokens")]) > 1:
        faults.append(
            f"{listed(run.folder for run in named)} have rows of tokens of their own, which are no deltas to be added; "
            "legal: in one of the runs"
        )
    if faults:
        raise QtuneError("Q419", "these runs do not go together: " + "; ".join(faults))


def check_bases(runs: Sequence[Given]) -> None:
    """Raises QtuneError where runs were trained on other bases than the first."""
    if faults := _other_bases(runs):
        raise QtuneError("Q419", "these runs do not go together: " + "; ".join(faults))


def _other_bases(runs: Sequence[Given]) -> list[str]:
    return [f"{run.folder} {fault}" for run in runs[1:] for fault in _other_base(runs[0], run)]


def _other_base(first: Given, run: Given) -> list[str]:
    """What is different in the bases that two runs were trained on."""
    if first.recipe.scheme != run.recipe.scheme:
        return [f"was trained on {run.recipe.scheme}, {first.folder} on {first.recipe.scheme}"]
    if first.recipe.embeddings != run.recipe.embeddings:
        return [f"has embeddings in {run.recipe.embeddings}, {first.folder} in {first.recipe.embeddings}"]
    shared = [name for name in run.sites if name in first.sites]
    if not shared and first.recipe.model != run.recipe.model:
        return [f"was trained on {run.recipe.model}, {first.folder} on {first.recipe.model}"]
    wrong = [name for name in shared if not _same(first.sites[name], run.sites[name])]
    if wrong:
        return [f"was trained on other weights than {first.folder} ({run.recipe.model}): {listed(wrong, 3)}"]
    return []


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    same = a.get("scheme") == b.get("scheme") and a.get("digest") == b.get("digest")
    return same and isclose(a["magnitude"], b["magnitude"], rel_tol=1e-4)


def skeleton_of(recipe: Recipe) -> Any:
    """The packed model of a recipe on meta: names and shapes."""
    if Path(recipe.model).is_absolute() and not Path(recipe.model).exists():
        raise QtuneError("Q406", f"the base is gone: there is no {recipe.model}")
    config = open_source(recipe.model).config
    return build(config, recipe.scheme, embeddings=recipe.embeddings, dtype=DTYPES[recipe.dtype])


class Deltas:
    """Runs over one model, which carries none of them. real: with weights, so that it computes."""

    def __init__(self, runs: Sequence[Given], model: Any, *, tokenizer: Any = None, real: bool = False) -> None:
        self.runs, self.model, self.tokenizer, self.real = runs, model, tokenizer, real
        layers, any_base = packed_layers(model), not real  # nobody compares codes on meta
        self.read: list[Fitted] = [fit_adapter(model, layers, run.adapter, other_base=any_base) for run in runs]
        self.first: Fitted | None = None
        if runs[0].info.get("first"):
            run = runs[0]
            self.first = fit_adapter(model, layers, run.adapter, other_base=any_base)
            if not (run.folder / FIRST).is_file():
                raise QtuneError("Q403", f"{run.folder} lacks {FIRST}, its adapter's first values")
            fill_first(self.first.sites, self.first.shared, run.folder, run.adapter)
        union = {name for read in self.read for name in read.sites}
        self.bases: dict[str, QuantLinear] = {
            name: module for name, module in model.named_modules() if name in union and isinstance(module, QuantLinear)
        }

    def start(self, name: str) -> Delta | None:
        """S, where the runs did not start as the identity."""
        return None if self.first is None else _of(self.first.sites, name)

    def whole(self, name: str) -> list[Delta | None]:
        """D of each run at a site; None where it has none."""
        return [_of(read.sites, name) for read in self.read]

    def learned(self, name: str) -> list[Delta | None]:
        """D - S of each run at a site."""
        found: list[Delta | None] = []
        for delta in self.whole(name):
            start = None if delta is None else self.start(name)
            if delta is None or start is None:
                found.append(delta)
            elif isinstance(delta, Factors) and isinstance(start, Factors):
                found.append(stacked([delta, start.times(-1)]))
            else:
                found.append(dense(delta).sub_(dense(start)))
        return found


def _of(sites: Mapping[str, Adapted], name: str) -> Delta | None:
    return delta_of(sites[name], name) if name in sites else None


def open_deltas(runs: Sequence[Given], screen: Screen, *, device: str | None = None, real: bool = False) -> Deltas:
    """The deltas of runs over their base, which is loaded where a run, or the caller (`real`), needs it."""
    if not real and all(run.alone for run in runs):
        return Deltas(runs, skeleton_of(runs[0].recipe))
    run = next((run for run in runs if run.info.get("tokens")), runs[0])
    model, tokenizer = load_base(run.recipe, screen, device=device, kept=kept_in(run.folder, run.adapter))
    return Deltas(runs, model, tokenizer=tokenizer, real=True)
