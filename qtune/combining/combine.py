"""Several runs become one adapter: what is asked, looked at before anything is read; then layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.carried import generator
from ..adapters.deltas import Delta, Factors, has_factors, norm, to_rank
from ..errors import QtuneError, listed, one_of
from ..quant import QuantLinear
from ..screen import Screen
from . import ways
from .fisher import Diagonal, examples_of_run, information
from .gather import Deltas, Given, check_together, given, open_deltas, skeleton_of
from .moments import moments, windows_of_run
from .search import mixed
from .write import Combined, check_out, write_run

HOW = {  # way -> what it does, for --help and for errors
    "concat": "the weighted sum, exact: ranks add up",
    "svd": "the weighted sum, cut to a rank",
    "ties": "each delta trimmed to its largest entries, a sign elected, those that have it averaged",
    "dare": "entries dropped at random and the rest scaled up, then summed",
    "dare-ties": "dare's dropping before ties' election of signs",
    "regmean": "least squares on the inputs of each run's own data",
    "fisher": "each entry weighed by how much it matters to its run, on each run's own data",
    "lorahub": "the weighted sum with weights that are searched for on --data",
}
SPARSE = {"ties": 0.2, "dare": 0.5, "dare-ties": 0.5}  # density: TIES' paper; DARE's delta must still pass an SVD
MEANS = ("ties", "dare-ties", "regmean", "fisher")  # divide by themselves: a weight of 1 each, not a share
DRAWN = ("dare", "dare-ties", "fisher", "lorahub")
UNCUT = ("concat", "regmean", "lorahub")  # keep all ranks, unless --rank says otherwise
TRIALS = 40
NOTED = 0.1  # share of ||delta|| lost from which a larger rank is advised


@dataclass(frozen=True)
class Asked:
    """What is asked for. None: the way's own default."""

    how: str
    weights: tuple[float, ...] | None = None
    rank: int | None = None
    density: float | None = None
    seed: int | None = None
    data: str | None = None
    trials: int | None = None

    def faults(self, runs: int) -> list[str]:
        """What is wrong with it for so many runs."""
        if self.how not in HOW:
            return [str(one_of("--how", self.how, HOW))]
        found = []
        if self.weights is not None and len(self.weights) != runs:
            found.append(f"--weights has {len(self.weights)} numbers for {runs} runs; legal: one for each")
        if self.weights is not None and not all(abs(weight) < 1e6 for weight in self.weights):
            found.append(f"--weights {listed(self.weights)}: not all are finite numbers")
        if self.how in ("regmean", "fisher") and self.weights is not None and min(self.weights) <= 0:
            found.append(f"--weights of {self.how} weigh data; legal: above 0")
        if self.rank is not None and self.rank < 1:
            found.append(f"--rank is {self.rank}; legal: 1 or more")
        if self.density is not None and not 0 < self.density <= 1:
            found.append(f"--density is {self.density:g}; legal: above 0, at most 1")
        if self.trials is not None and self.trials < 1:
            found.append(f"--trials is {self.trials}; legal: 1 or more")
        if self.seed is not None and self.seed < 0:
            found.append(f"--seed is {self.seed}; legal: 0 or more")
        return found + self._without_effect()

    def _without_effect(self) -> list[str]:
        takes = {
            "rank": [how for how in HOW if how != "concat"], "density": list(SPARSE), "seed": list(DRAWN),
            "data": ["lorahub"], "trials": ["lorahub"],
        }  # fmt: skip
        found = [
            f"--{name} has no effect with --how {self.how}; legal with {', '.join(legal)}"
            for name, legal in takes.items()
            if getattr(self, name) is not None and self.how not in legal
        ]
        if self.how == "lorahub" and self.data is None:
            found.append("--how lorahub searches for weights on data, and there is none; give --data FILE")
        return found


def combine(
    folders: Sequence[Path], out: Path, asked: Asked, *, device: str | None = None, screen: Screen | None = None
) -> Combined:
    """Make one adapter of the runs in `folders` and write it as a run to `out`, whole or not at all.

    device: where the model computes, if the way or a method asks for one; None: the recipe's. Raises QtuneError, for
    options, runs that do not go together and ranks beyond a layer before any weight is read.
    """
    screen = screen or Screen(quiet=True)
    if faults := asked.faults(len(folders)):
        raise QtuneError("Q102", "; ".join(faults))
    runs = [given(folder, screen) for folder in folders]
    check_together(runs)
    check_out(runs, out)
    rank = _rank(asked, runs)
    weights = list(asked.weights or [1.0 if asked.how in MEANS else 1 / len(runs)] * len(runs))
    windows = [windows_of_run(run, screen) for run in runs] if asked.how == "regmean" else []
    examples = [examples_of_run(run, asked.seed or 0, screen) for run in runs] if asked.how == "fisher" else []
    found: dict[str, Any] = {}
    deltas = open_deltas(runs, screen, device=device, real=asked.how in ("regmean", "fisher", "lorahub"))
    matters = information(deltas, examples, asked.seed or 0, screen) if asked.how == "fisher" else []
    if asked.how == "lorahub":
        assert asked.data is not None
        found = mixed(
            deltas, weights, asked.data, trials=asked.trials or TRIALS, seed=asked.seed or 0, rank=rank, screen=screen
        )
        weights = found["weights"]
    made: dict[str, Factors] = {}
    lost: dict[str, tuple[float, float]] = {}
    with screen.bar("combining", len(deltas.bases)) as advance:
        for name, delta in _deltas(asked, deltas, weights, windows, matters):
            size, most = norm(delta), rank
            if most is None:
                assert isinstance(delta, Factors), "what has no factors is refused without a rank"
                most = delta.rank
            made[name], share = to_rank(delta, most, name)
            lost[name] = size, share
            advance(1)
    about = {
        "how": asked.how, "weights": weights, "rank": rank, "density": _density(asked), "seed": _seed(asked), **found
    }  # fmt: skip
    return write_run(deltas, made, lost, about, out, rank)


def _density(asked: Asked) -> float | None:
    return asked.density or SPARSE.get(asked.how)


def _seed(asked: Asked) -> int | None:
    return (asked.seed or 0) if asked.how in DRAWN else None


def _rank(asked: Asked, runs: Sequence[Given]) -> int | None:
    """The rank to cut to; None: there is no cut. Raises QtuneError where nothing says it, and where a layer has no such
    rank."""
    rank = asked.rank
    if asked.how in UNCUT and rank is None:
        if not all(has_factors(run.method) for run in runs):
            raise _not_exact(asked.how, runs)
        return None
    if rank is None:
        rank = max((run.rank for run in runs if run.rank is not None), default=None)
        if rank is not None and runs[0].info.get("first"):
            rank *= 2  # the start that they share goes in as well
    if rank is None:
        raise QtuneError("Q103", f"--how {asked.how} cuts to a rank, and no run has one of its own; give --rank")
    model = skeleton_of(runs[0].recipe)
    sites = {name for run in runs for name in run.sites}
    shapes = {name: m.shape for name, m in model.named_modules() if name in sites and isinstance(m, QuantLinear)}
    name = min(shapes, key=lambda name: min(shapes[name]), default="")
    if name and rank > min(shapes[name]):
        raise QtuneError(
            "Q107", f"--rank {rank} is beyond {name}, {shapes[name][0]} x {shapes[name][1]}; "
            f"legal: 1 to {min(shapes[name])}"
        )  # fmt: skip
    return rank


def _not_exact(how: str, runs: Sequence[Given]) -> QtuneError:
    dense = [f"{run.folder} ({run.recipe.adapter.method})" for run in runs if not has_factors(run.method)]
    return QtuneError(
        "Q103", f"--how {how} keeps all ranks, and the delta of {listed(dense)} has no rank of its own; give a rank: "
        f"--how {'svd' if how == 'concat' else how} --rank R"
    )  # fmt: skip


def _deltas(
    asked: Asked, deltas: Deltas, weights: Sequence[float], windows: Sequence[Tensor],
    matters: Sequence[Mapping[str, Diagonal]],
) -> Iterator[tuple[str, Delta]]:  # fmt: skip
    """Each site's combined delta, before any cut."""
    if asked.how == "regmean":
        for grams in moments(deltas, windows):
            for name, found in grams.items():
                yield name, _on_start(deltas, name, _regmean(deltas, name, found, weights))
        return
    for name in deltas.bases:
        if asked.how in SPARSE:
            yield name, _on_start(deltas, name, _sparse(asked, deltas, name, weights))
        elif asked.how == "fisher":
            diagonals = [(run[name].rows, run[name].columns) for run in matters]
            yield name, _on_start(deltas, name, ways.fisher(deltas.learned(name), diagonals, weights))
        else:
            yield name, _sum(deltas, name, weights)


def _sum(deltas: Deltas, name: str, weights: Sequence[float]) -> Delta:
    """sum w_i D_i + (1 - sum w_i) S: what was learned is weighted, the start is in it once."""
    pairs = [(delta, weight) for delta, weight in zip(deltas.whole(name), weights, strict=True) if delta is not None]
    start, rest = deltas.start(name), 1 - sum(weights)
    if start is not None and abs(rest) > 1e-9:
        pairs.append((start, rest))
    return ways.weighted([delta for delta, _ in pairs], [weight for _, weight in pairs])


def _sparse(asked: Asked, deltas: Deltas, name: str, weights: Sequence[float]) -> Tensor:
    pairs = [(d, weight) for d, weight in zip(deltas.learned(name), weights, strict=True) if d is not None]
    learned, own, density = [d for d, _ in pairs], [weight for _, weight in pairs], _density(asked)
    assert density is not None
    if asked.how == "ties":
        return ways.ties(learned, own, density)
    drawn = generator("dare", asked.seed or 0, name)
    return ways.dare(learned, own, density, drawn, elect=asked.how == "dare-ties")


def _regmean(deltas: Deltas, name: str, grams: Mapping[int, Tensor], weights: Sequence[float]) -> Delta:
    """A run without the site has learned nothing there, and its data says so."""
    learned = deltas.learned(name)
    there = [i for i, delta in enumerate(learned) if delta is not None]
    shape = deltas.bases[name].shape
    every = [learned[i] if i in there else _nothing(shape, grams[i]) for i in range(len(learned))]
    return ways.regmean([d for d in every if d is not None], [grams[i] for i in range(len(every))], weights, name)


def _nothing(shape: tuple[int, int], like: Tensor) -> Factors:
    return Factors(like.new_zeros(0, shape[1]), like.new_zeros(shape[0], 0))


def _on_start(deltas: Deltas, name: str, delta: Delta) -> Delta:
    start = deltas.start(name)
    return delta if start is None else ways.weighted([delta, start], [1.0, 1.0])


__all__ = ["HOW", "NOTED", "SPARSE", "TRIALS", "Asked", "Combined", "combine"]
