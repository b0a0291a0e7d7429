"""The figures of a run in words, for the page and for runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..screen import count, duration, size
from .read import Reading, section


@dataclass(frozen=True)
class Number:
    """A key number: `label`, its `value`, where it came from (`start`, shown before the value), and a `note` below."""

    label: str
    value: str
    start: str = ""
    note: str = ""


def numbers(run: Reading) -> list[Number]:
    """The key numbers of a run; what was not recorded is left out."""
    found = [_loss(run), *_evaluations(run), _tokens(run), _time(run), *_memory(run)]
    skipped = sum("skipped" in row for row in run.rows)
    if skipped:
        found.append(Number("Skipped steps", f"{skipped:,}", note="loss or gradient not finite"))
    return [number for number in found if number is not None]


def loss(value: float) -> str:
    """A loss in four digits, but no more than four behind the point."""
    return f"{value:.4f}" if abs(value) < 1 else f"{value:#.4g}".rstrip(".")


def _loss(run: Reading) -> Number | None:
    pair = run.losses()
    if pair is None:
        return None
    return Number("Training loss", loss(pair[1]), loss(pair[0]), "means of the first and the last steps")


def _evaluations(run: Reading) -> list[Number]:
    """Loss, and accuracy where the answers are a choice: before -> after."""
    found = []
    steps, losses = run.series("eval_loss")
    if losses:
        first, last = (loss(losses[0]) if len(losses) > 1 else ""), loss(losses[-1])
        best = min(range(len(losses)), key=losses.__getitem__)
        note = f"best {loss(losses[best])} at step {steps[best]:,}" if best not in (0, len(losses) - 1) else "held out"
        found.append(Number("Evaluation loss", last, first, note))
    values = run.series("accuracy")[1]
    if values:
        chance = run.last("chance") or 0.0
        start = f"{values[0]:.1%}" if len(values) > 1 else ""
        found.append(Number("Accuracy", f"{values[-1]:.1%}", start, f"most frequent answer: {chance:.1%}"))
    return found


def _tokens(run: Reading) -> Number | None:
    tokens = run.last("tokens")
    if tokens is None:
        return None
    return Number("Tokens", f"{tokens:,.0f}", note=f"in {run.steps:,} step{'s' * (run.steps != 1)}")


def _time(run: Reading) -> Number | None:
    seconds, tokens = run.last("seconds"), run.last("tokens")
    if not seconds:
        return None
    return Number("Time", duration(seconds), note=f"{(tokens or 0) / seconds:,.0f} tokens a second")


def peak(run: Reading) -> tuple[float | None, int | None]:
    """Measured and planned peak in bytes, of the same tier: allocated on CUDA, of the process elsewhere."""
    plan = run.record.get("plan", {})
    measured = max(run.series("memory_peak")[1], default=0.0) or None
    return measured, plan.get("allocated" if on_cuda(run) else "process")


def on_cuda(run: Reading) -> bool:
    """Did it train on a GPU of NVIDIA?"""
    return str(hardware(run).get("device", "")).startswith("cuda")


def hardware(run: Reading) -> Mapping[str, Any]:
    """Of the last session."""
    sessions = run.record.get("sessions") or [{}]
    found: Mapping[str, Any] = sessions[-1].get("hardware", {})
    return found


def _memory(run: Reading) -> list[Number]:
    measured, planned = peak(run)
    if measured is None:
        return [Number("Planned peak", size(planned))] if planned else []
    what = "allocated on the GPU" if on_cuda(run) else "resident in the process"
    if planned is None:
        return [Number("Peak memory", size(measured), note=what)]
    return [Number("Peak memory", size(measured), note=f"planned {size(planned)}, {what}")]


def status(run: Reading) -> str:
    """How it ended and when, as far as it is recorded."""
    ended = run.record.get("ended")
    steps, wanted = run.steps, run.record.get("steps")
    of = f"{steps:,} of {wanted:,} steps" if wanted and wanted != steps else f"{steps:,} step{'s' * (steps != 1)}"
    if not ended:
        return f"{of}, no end recorded" if run.record else of
    early = "stopped early, as the evaluation got no better," if ended.get("early") else "finished"
    how = "interrupted" if ended["interrupted"] else early
    best = ended.get("best")
    of_best = f", with the adapter of step {best:,}, the best by its evaluation" if best not in (None, steps) else ""
    return f"{of}, {how} {date(ended['at'])}{of_best}"


def date(text: str) -> str:
    """21 Nov 2026, 14:05."""
    when = datetime.fromisoformat(text)
    return f"{when.day} {when:%b %Y, %H:%M}"


def trained(run: Reading) -> tuple[list[dict[str, Any]], int | None]:
    """Rows {kind, layers, parameters, share} and their sum. Where only adapter.json is there, no parameters."""
    rows = run.record.get("trained") or []
    if rows:
        total = sum(row["parameters"] for row in rows)
        most = max(row["parameters"] for row in rows) or 1
        return [row | {"words": count(row["parameters"]), "share": row["parameters"] / most} for row in rows], total
    kinds: dict[str, int] = {}
    for name in run.adapter.get("sites", {}):
        kind = name.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    return [{"kind": kind, "layers": n} for kind, n in kinds.items()], run.adapter.get("parameters")


def options(run: Reading) -> dict[str, str]:
    """Name -> value of what says what was trained: base, scheme, method and its options, targets."""
    adapter, scheme = section(run.recipe, "adapter"), section(run.recipe, "scheme")
    about = run.record.get("model", {})
    rest = {key: value for key, value in adapter.items() if key not in ("method", "targets")}
    layers = f", {about['layers']} layers" if about.get("layers") else ""
    found = {
        "Base": f"{run.model}{layers}",
        "Architecture": str(about.get("class", "")),
        "Stored as": _with_options(scheme, "name"),
        "Computed in": str(run.recipe.get("dtype", "")),
        "Method": str(adapter.get("method", "?")),
        "Options": plain(rest),
        "Targets": plain(adapter.get("targets", "")),
    }
    return {name: value for name, value in found.items() if value}


def _with_options(tree: Mapping[str, Any], name: str) -> str:
    """nf4, block 64, double true; a tree without a name as its keys and values."""
    rest = plain({key: value for key, value in tree.items() if key != name})
    return ", ".join(filter(None, [str(tree.get(name, "")), rest]))


def plain(value: Any) -> str:
    """A value of a recipe as one reads it: lists with commas, mappings as key value."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items() if one is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(one) for one in value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
