"""Plans and searches as plain values, for `--json`: everything that is known, bytes as ints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .fit import Fit, Row, peak, shown, tokens_per_second
from .plan import Plan
from .request import Request


def plan_dict(plan: Plan, request: Request) -> dict[str, Any]:
    """Everything of a plan as plain values; bytes are ints."""
    speed = {"reason": plan.speed} if isinstance(plan.speed, str) else asdict(plan.speed)
    return {
        "model": {"name": plan.model.name, "source": plan.model.source, "parameters": plan.parameters},
        "trained": plan.trained,
        "stack": plan.stack,
        "device": {"key": plan.device.key, "name": plan.device.name, "memory": plan.device.memory},
        "shape": asdict(plan.shape),
        "budget": plan.budget,
        "verdict": plan.verdict,
        "left": plan.left,
        "peak": peak(plan),
        "allocated": plan.allocated,
        "reserved": plan.reserved,
        "process": plan.process,
        "waiting": plan.waiting,
        "files": plan.files,
        "room": asdict(plan.room),
        "short": [asdict(short) for short in plan.short],
        "groups": plan.groups,
        "items": [asdict(item) for item in plan.items],
        "moment": {**asdict(plan.moment), "text": str(plan.moment)},
        "phases": [asdict(phase) for phase in plan.phases],
        "speed": speed,
        "steps": request.steps(),
        "notes": [*request.notes, *plan.notes],
        "seconds": plan.seconds,
        "recipe": plan.recipe.to_dict(),
    }


def fit_dict(found: Fit, request: Request) -> dict[str, Any]:
    """A search's answer as plain values. overrides: as `qtune train` takes them."""
    return {
        "budget": request.budget,
        "verdict": found.plan.verdict,
        "missing": found.missing,
        "overrides": shown(found.change),
        "start": plan_dict(found.start, request),
        "rungs": [
            {
                "change": rung.level.change, "text": rung.level.words, "cost": rung.level.cost,
                "peak": peak(rung.plan), "saved": rung.saved, "verdict": rung.plan.verdict, "kept": rung.kept,
            }
            for rung in found.rungs
        ],
        "plan": plan_dict(found.plan, request),
    }  # fmt: skip


def rows_dict(start: Plan, rows: Sequence[Row], request: Request) -> dict[str, Any]:
    """The explained knobs as plain values; `peak` is null where a change cannot be built."""
    return {
        "plan": plan_dict(start, request),
        "rows": [
            {
                "text": row.words, "cost": row.cost, "difference": row.difference,
                "peak": None if row.plan is None else peak(row.plan),
                "verdict": None if row.plan is None else row.plan.verdict,
                "tokens_per_second": (tokens_per_second(row.plan) or None) if row.plan is not None else None,
            }
            for row in rows
        ],
    }  # fmt: skip
