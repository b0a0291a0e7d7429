"""The run that several runs become: an adapter of method lora on the same base, and what it was made of.

Its folder holds what a run's does but metrics: nothing was trained in it. `combined.json` says from what it was
computed and what each layer lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..adapters import AdapterSpec
from ..adapters.deltas import Factors, to_rank
from ..adapters.files import save_adapter, save_first
from ..adapters.sites import build, install
from ..errors import QtuneError
from ..recipe import Recipe
from ..report.record import session
from ..runs import COMBINED, RECIPE, anchored, pick_device, save_kept
from ..safe_io import new_folder, write_json, write_text
from ..sections import DataKeys, Source, Sources, entries
from ..vocabulary import install_rows
from .gather import Deltas, Given

FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Combined:
    """What was written. kinds: kind of layer -> layers, ||delta|| of them together, share of it lost; "all" is last.
    about: as in combined.json."""

    out: Path
    rank: int
    parameters: int
    kinds: dict[str, tuple[int, float, float]]
    about: dict[str, Any]

    @property
    def lost(self) -> float:
        """Of all layers together, as a share of ||delta||."""
        return self.kinds["all"][2]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        kinds = {
            kind: {"layers": layers, "norm": size, "lost": lost} for kind, (layers, size, lost) in self.kinds.items()
        }
        return {"out": str(self.out), "rank": self.rank, "parameters": self.parameters, "kinds": kinds} | self.about


def check_out(runs: Sequence[Given], out: Path) -> None:
    """Raises QtuneError for a folder that is a run's, or holds anything."""
    for run in runs:
        if out.resolve() in (run.folder.resolve(), run.adapter.resolve()):
            raise QtuneError("Q410", f"--out {out} is one of the runs to combine; choose another folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise QtuneError("Q801", f"--out {out} holds something already; choose another folder")


def write_run(
    deltas: Deltas, made: Mapping[str, Factors], lost: Mapping[str, tuple[float, float]], about: Mapping[str, Any],
    out: Path, rank: int | None,
) -> Combined:  # fmt: skip
    """Write the run. made: site -> its delta; lost: site -> ||delta|| before a cut, and the share that it lost. rank:
    of the cut. Raises QtuneError where writing fails; then nothing is there."""
    most = rank or max(delta.rank for delta in made.values())
    runs = deltas.runs
    targets = tuple(dict.fromkeys(t for run in runs for t in run.recipe.adapter.targets or run.method.targets))
    spec = AdapterSpec("lora", targets, {"rank": most, "alpha": float(most)})  # a scale of 1: the factors hold it all
    recipe = _recipe(runs, spec, out)
    sites, _ = build(deltas.bases, spec, any_scheme=True)
    install(deltas.model, sites, None)
    rows = [read.rows for read in deltas.read if read.rows is not None]
    if rows:
        install_rows(deltas.model, rows[0])
    described = {name: next(dict(run.sites[name]) for run in runs if name in run.sites) for name in deltas.bases}
    content = {
        "format": FORMAT, **about, "runs": [_told(run) for run in runs],
        "sites": {name: {"norm": size, "lost": share} for name, (size, share) in lost.items()},
        "session": session(pick_device("cpu")),
    }  # fmt: skip
    base = {"model": recipe.model, "scheme": recipe.scheme.to_dict(), "dtype": recipe.dtype}
    try:
        if out.exists():
            out.rmdir()
        with new_folder(out) as folder:
            save_kept(deltas.model, folder)
            if deltas.first is not None:
                for name, site in sites.items():
                    site.start = deltas.first.sites[name].start
                    start = deltas.start(name)
                    assert start is not None
                    _fill(site.adapter, to_rank(start, most, name)[0].padded(most))
                save_first(deltas.model, folder)
            for name, site in sites.items():
                _fill(site.adapter, made[name].padded(most))
            save_adapter(deltas.model, spec, folder, base, sites=described)
            write_json(folder / COMBINED, content)
            write_text(folder / RECIPE, anchored(recipe).to_yaml())
    except OSError as error:
        raise QtuneError("Q901", f"cannot write {out}: {error.strerror or error}") from error
    parameters = sum(p.numel() for site in sites.values() for p in site.adapter.parameters())
    return Combined(out, most, parameters, by_kind(lost), {k: v for k, v in content.items() if k != "sites"})


def _fill(adapter: Any, delta: Factors) -> None:
    """Let an adapter of method lora and scale 1 hold the delta, bit for bit; of any device, meta too."""
    adapter.load_state_dict({"A": delta.A.contiguous(), "B": delta.B.contiguous()}, assign=True)


def _told(run: Given) -> dict[str, Any]:
    """What is recorded of a run."""
    spec, data = run.recipe.adapter, run.recipe.data.train
    return {
        "folder": str(run.adapter.absolute()), "method": spec.method, "rank": run.rank, "data": _names(data),
        "sites": len(run.sites), "sha256": run.info["sha256"],
    }  # fmt: skip


def _names(data: Sources | None) -> str:
    """The names of files, without folders."""
    return ", ".join(Path(source.file).name for source in entries(data)) if data is not None else "unknown"


def by_kind(lost: Mapping[str, tuple[float, float]]) -> dict[str, tuple[int, float, float]]:
    """Site -> norm and share lost, as kind of layer -> layers, norm of all, share lost of it; and all."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, pair in lost.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(pair)
    found = {}
    for kind, pairs in [*kinds.items(), ("all", list(lost.values()))]:
        size = sum(norm**2 for norm, _ in pairs) ** 0.5
        gone = sum((norm * share) ** 2 for norm, share in pairs) ** 0.5
        found[kind] = len(pairs), size, gone / size if size else 0.0
    return found


def _recipe(runs: Sequence[Given], spec: AdapterSpec, out: Path) -> Recipe:
    """What is true of the run: base, adapter, data of all the runs where it is read in one way. Keys that all agree on
    stay, others take their defaults."""
    recipes = [run.recipe for run in runs]
    tokens = next((recipe.tokens for run, recipe in zip(runs, recipes, strict=True) if run.info.get("tokens")), None)
    first = recipes[0]
    blank = Recipe.load({"model": first.model}, training=False)
    return replace(
        first, adapter=spec, data=_data([recipe.data for recipe in recipes]), tokens=tokens or blank.tokens,
        train=_agreed([recipe.train for recipe in recipes], blank.train), budget=None, output=str(out.absolute()),
    )  # fmt: skip


def _data(keys: Sequence[DataKeys]) -> DataKeys:
    """All sources, where the other keys agree; else none."""
    bare = [replace(one, train=None, eval=None) for one in keys]
    if any(one != bare[0] for one in bare):
        return DataKeys(max_length=max(one.max_length for one in keys))

    return replace(bare[0], train=_joined([one.train for one in keys]), eval=_joined([one.eval for one in keys]))


def _joined(given: Sequence[Sources | None]) -> Sources | None:
    """Each source once."""
    found: list[Source] = []
    for source in (source for some in given if some is not None for source in entries(some)):
        if source not in found:
            found.append(source)
    return tuple(found) or None


def _agreed(values: Sequence[T], other: T) -> T:
    return values[0] if all(value == values[0] for value in values) else other
