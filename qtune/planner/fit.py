"""Which knobs of a recipe make it fit, and what each of them is worth.

The ladder is climbed in the order of KNOBS, what costs the user least first; each rung keeps what the ones below it
changed. Of a knob with several values the mildest that fits is taken, and in the end every change without which the
recipe fits as well is taken back. What changes what is learned (length, rank) is touched only if nothing else helps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import QtuneError
from ..recipe import Recipe
from ..screen import Screen, size
from ..starting import wants
from .devices import Device
from .knobs import KNOBS, LAST, ROOM, Change, Knob, Level, both_ways, embeddings, home
from .phases import load_phase
from .plan import Plan, Shape
from .request import Lengths, Request, request_of, with_phases

SLOWER = 0.1


@dataclass(frozen=True)
class Rung:
    """A step of the ladder. saved: bytes of the peak less than on the rung before; kept: is it part of the answer?"""

    level: Level
    plan: Plan
    saved: int
    kept: bool = True


@dataclass(frozen=True)
class Fit:
    """The answer of a search. start: the plan of the recipe as it is; plan: of the recipe with `change`."""

    start: Plan
    plan: Plan
    rungs: tuple[Rung, ...]
    change: Change

    @property
    def missing(self) -> int:
        """Bytes by which even the smallest recipe is too large; 0 where it fits."""
        return self.plan.missing


@dataclass(frozen=True)
class Row:
    """One knob changed alone. difference: bytes of the peak, negative where it saves. plan: None where it cannot be
    done, `cost` then says why."""

    words: str
    cost: str
    plan: Plan | None
    difference: int


# ---- the search


class Search:
    """Plans of changed recipes, each traced once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._plans: dict[str, Plan | QtuneError] = {}
        self._steps: dict[str, Plan] = {}

    def recipe(self, change: Change) -> Recipe:
        """The request's recipe with a change."""
        return self.request.recipe.with_(change) if change else self.request.recipe

    def levels(self, knob: Knob, recipe: Recipe) -> list[Level]:
        """A knob's values beside the recipe's, the mildest first."""
        return list(knob(recipe, self.request.shape(recipe), self.request.device.kind))

    def plan(self, change: Change) -> Plan:
        """Raises QtuneError where the changed recipe cannot be built."""
        recipe = self.recipe(change)
        key = json.dumps([recipe.to_dict(), repr(self.request.shape(recipe))], default=str)
        if key not in self._plans:
            try:
                self._plans[key] = self._planned(recipe)
            except QtuneError as error:
                self._plans[key] = error
        found = self._plans[key]
        if isinstance(found, QtuneError):
            raise found
        return found

    def _planned(self, recipe: Recipe) -> Plan:
        """The step, and where text is run through the model while it is loaded, that phase: it may take more."""
        tree = recipe.to_dict() | {"calibrate": None}  # the step is the same
        key = json.dumps([tree, repr(self.request.shape(recipe))], default=str)
        if key not in self._steps:  # a trace is large, and only the plan is asked for
            self._steps[key] = replace(self.request.plan(recipe), trace=None)
        step = replace(self._steps[key], recipe=recipe)
        return replace(step, phases=(load_phase(step),)) if wants(recipe.adapter, recipe.calibrate.codes) else step


def fit(request: Request, screen: Screen | None = None) -> Fit:
    """The mildest change of the request's recipe that fits its budget.

    A plan that fits barely is taken only where no knob that leaves what is learned alone, and costs little time, gives
    more room.
    """
    search = Search(request)
    with (screen or Screen(quiet=True)).bar("planning", len(KNOBS) + 1) as advance:
        start = at = search.plan({})
        advance()
        if at.verdict == "no" and (hopeless := _hopeless(search)) is not None:
            advance(len(KNOBS))
            return Fit(start, hopeless.plan, (hopeless,), hopeless.level.change)
        rungs: list[Rung] = []
        for knob in KNOBS:
            if at.verdict == "fits" or (at.verdict == "barely" and knob in LAST):
                break
            rung = _climb(search, knob, rungs, at) if at.short or knob not in ROOM else None
            if rung is not None and _helps(rung, at) and not (at.verdict == "barely" and _slower(rung.plan, at)):
                rungs.append(rung)
                at = rung.plan
            advance(note=rung.level.words if rung else "")
        if at.verdict != "no":
            rungs = _taken_back(search, rungs, at.verdict)
    change = _joined(rungs)
    return Fit(start, search.plan(change), tuple(rungs), change)


def _hopeless(search: Search) -> Rung | None:
    """Every knob at its strongest, as one rung, if even that is too much for the device (of host memory and disk fewer
    knobs may take less). Packed embeddings may take more than they save (they are unpacked to be multiplied), so it is
    tried without them as well."""
    start, tried = search.plan({}), []
    for left_out in ((home,), (home, embeddings)):
        change: Change = {}
        for knob in KNOBS:
            recipe = search.recipe(change)
            levels = [] if knob in left_out else search.levels(knob, recipe)
            change |= levels[-1].change if levels else {}
        level = Level(change, "everything at its smallest", " ".join(shown(change)))
        rung = _rung(search, level, {}, start)
        if rung is not None and rung.plan.left >= 0:
            return None
        tried += [] if rung is None else [rung]
    return min(tried, key=lambda rung: peak(rung.plan), default=None)


def _helps(rung: Rung, at: Plan) -> bool:
    """Does it take less of what there is too little of, or as little and less of the device?"""
    return (rung.plan.missing, -rung.saved) < (at.missing, 0)


def _slower(plan: Plan, than: Plan) -> bool:
    """Does the time model see more than SLOWER of the time a token? That is too much for a recipe that fits barely."""
    now, before = (tokens_per_second(one) for one in (plan, than))
    return bool(now and before) and before > (1 + SLOWER) * now


def tokens_per_second(plan: Plan) -> float:
    """By the time model; 0 where that is not known."""
    return 0.0 if isinstance(plan.speed, str) else plan.speed.tokens_per_second or 0.0


def _joined(rungs: Sequence[Rung]) -> Change:
    return {key: value for rung in rungs if rung.kept for key, value in rung.level.change.items()}


def _climb(search: Search, knob: Knob, rungs: Sequence[Rung], at: Plan) -> Rung | None:
    """The mildest level of a knob that fits, else its strongest that can be built; None where it has none."""
    below = _joined(rungs)
    recipe = search.recipe(below)
    levels = search.levels(knob, recipe)
    strongest = None
    while levels and strongest is None:
        strongest = _rung(search, levels[-1], below, at)
        levels.pop()
    if strongest is not None and strongest.plan.verdict == "fits":
        for level in levels:
            milder = _rung(search, level, below, at)
            if milder is not None and milder.plan.verdict == "fits":
                return milder
    return strongest


def _rung(search: Search, level: Level, below: Change, at: Plan) -> Rung | None:
    try:
        plan = search.plan({**below, **level.change})
    except QtuneError:  # a model whose embeddings cannot be packed, say
        return None
    return Rung(level, plan, peak(at) - peak(plan))


def _taken_back(search: Search, rungs: list[Rung], verdict: str) -> list[Rung]:
    """Without the changes that are not needed for the verdict; the last one is."""
    for index in range(len(rungs) - 2, -1, -1):
        without = [*rungs[:index], replace(rungs[index], kept=False), *rungs[index + 1 :]]
        try:
            if search.plan(_joined(without)).verdict in ("fits", verdict):
                rungs = without
        except QtuneError:  # what the changes left cannot be built together: this one stays
            continue
    return rungs


def peak(plan: Plan) -> int:
    """Bytes that the device must have: of the step, or of the phase that takes more."""
    return plan.budget - plan.left


def smallest_change(request: Request, screen: Screen | None = None) -> Fit | None:
    """The change that makes a recipe fit; None where none does."""
    found = fit(request, screen)
    return found if found.plan.verdict != "no" else None


def shown(change: Mapping[str, Any]) -> list[str]:
    """A change as KEY=VALUE, in YAML's short form."""
    return [f"{key}={_text(value)}" for key, value in change.items()]


def _text(value: Any) -> str:
    if isinstance(value, dict):  # a scheme: its name is enough where the rest is default
        return str(value["name"]) if value.get("embeddings") is None else json.dumps(value)  # YAML reads JSON
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) else f"{value:.1f}"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- one knob at a time


def explain(request: Request, screen: Screen | None = None) -> tuple[Plan, list[Row]]:
    """The recipe's plan, and one row for each knob changed alone, the largest saving first."""
    search = Search(request)
    levels = list(both_ways(request))
    rows = []
    with (screen or Screen(quiet=True)).bar("planning", len(levels) + 1) as advance:
        start = search.plan({})
        advance()
        for level in levels:
            try:
                plan = search.plan(level.change)
                rows.append(Row(level.words, level.cost, plan, peak(plan) - peak(start)))
            except QtuneError as error:
                rows.append(Row(level.words, str(error), None, 0))
            advance(note=level.words)
    return start, sorted(rows, key=lambda row: (row.plan is None, row.difference))


# ---- before training


def refuse_beyond(
    recipe: Recipe, budget: int, device: Device, *, shape: Shape | Lengths | None = None, screen: Screen | None = None
) -> Plan:
    """The plan of a recipe that stays within `budget` bytes on a device.

    shape: the largest micro-batch or the lengths of the data. Raises QtuneError with the planned peak, the budget
    and the smallest change that fits.
    """
    request = request_of(recipe, device, budget, shape)
    plan = with_phases(request.plan())
    if plan.verdict != "no":
        return plan
    found = fit(request, screen)
    beyond = f"the plan's peak is {size(peak(plan))} on {device.name}, beyond the budget of {size(budget)}"
    start = "; ".join([*([beyond] if plan.left < 0 else []), *(f"the plan takes {short}" for short in plan.short)])
    if found.missing:
        raise QtuneError(
            "Q502", f"{start}; none of the changes that --fit makes is enough: {size(found.missing)} are missing"
        )
    by = max(plan.phases, key=lambda phase: phase.device if phase.name != "merge" else 0, default=None)
    if not found.change:
        raise QtuneError("Q502", f"{start}; it is reached in: {by.name if by else 'training'}")
    raise QtuneError("Q502", f"{start}; this fits, with {size(peak(found.plan))}: {' '.join(shown(found.change))}")
