"""A run folder as it is read for the page: recipe, metrics, adapter.json and run.json. No model is loaded.

What an older qtune or an interrupted run has not written is absent; only the recipe and one row of metrics are needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..adapters.files import INFO
from ..errors import QtuneError
from ..keys import shown
from ..runs import METRICS, RECIPE, combined_from
from ..state import rows_of
from ..yaml_text import load_yaml

RUN, FORMAT = "run.json", 1  # what record.py writes
NUMBERS = (  # columns of the metrics that are read here
    "step", "loss", "eval_loss", "accuracy", "chance", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds", "memory",
    "memory_peak", "moved", "skipped",
)  # fmt: skip
MOST = 2**63
WORDS: dict[Any, str] = {str: "text", int: "a whole number", float | int: "a number", bool: "true or false"}
_HARDWARE = {"device": str, "cpu": str, "cores?": int, "threads": int, "memory": int, "system": str}
_LENGTHS = {"examples": int, "tokens": int, "trained": int, "median": int, "longest": int, "width": int, "bins": [int]}
RECORD: dict[str, Any] = {  # the shape of run.json, as far as the page reads it
    "sessions": [{"started": datetime, "command": str, "folder": str, "versions": {}, "hardware": _HARDWARE}],
    "steps?": int,
    "model?": {"class?": str, "layers?": int},
    "trained?": [{"kind": str, "layers": int, "parameters": int}],
    "data?": {"*": _LENGTHS},
    "plan?": {"device?": str, "allocated?": int, "reserved?": int, "process?": int, "why?": str, "groups?": {"*": int}},
    "samples?": [{}],
    "ended?": {"at": datetime, "steps": int, "interrupted": bool, "best?": int},
}
ADAPTER: dict[str, Any] = {  # of adapter.json
    "sites?": {"*": {"start?": {"before": float | int, "after": float | int, "weighted?": bool}}}, "parameters?": int,
}  # fmt: skip
MEAN = 20  # rows whose mean stands for "the loss at the end"; a fifth of a short run


@dataclass(frozen=True)
class Reading:
    """recipe: as a tree of plain values, and as text. rows: of metrics, in order. adapter: of adapter.json; record: of
    run.json; empty where there is none."""

    folder: Path
    recipe: Mapping[str, Any]
    text: str
    rows: list[dict[str, Any]]
    adapter: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column of the metrics, where a row has it."""
        pairs = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), (int, float))]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]

    def last(self, name: str) -> float | None:
        """The last value of a column."""
        values = self.series(name)[1]
        return values[-1] if values else None

    def losses(self) -> tuple[float, float] | None:
        """Mean training loss of the first rows and of the last ones; None without any."""
        values = self.series("loss")[1]
        if not values:
            return None
        many = max(1, min(MEAN, len(values) // 5))
        return sum(values[:many]) / many, sum(values[-many:]) / many

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def model(self) -> str:
        """The base's name, without folders and endings."""
        name = Path(str(self.recipe.get("model", "?"))).name
        return name.removesuffix(".gguf")

    @property
    def data(self) -> str:
        """The names of the training files."""
        names = list(dict.fromkeys(_names(section(self.recipe, "data").get("train"))))
        return " + ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "?"

    @property
    def method(self) -> str:
        """The adapter in a few words: lora, rank 16."""
        adapter = section(self.recipe, "adapter")
        rank = f", rank {adapter['rank']}" if adapter.get("rank") else ""
        return f"{adapter.get('method', '?')}{rank}"

    @property
    def scheme(self) -> str:
        """How the base is stored, in a few words."""
        scheme = section(self.recipe, "scheme")
        return str(scheme.get("name") or scheme.get("default") or f"{scheme.get('bits', '?')} bits")


def read_run(folder: Path) -> Reading:
    """Raises QtuneError where the folder holds no run, or nothing was logged yet."""
    missing = [name for name in (RECIPE, METRICS) if not (folder / name).is_file()]
    if missing == [METRICS] and (parts := combined_from(folder)):
        raise QtuneError(
            "Q412", f"nothing was trained in {folder}: it was combined from {', '.join(parts)}; look at it with "
            f"`qtune inspect {folder}`"
        )  # fmt: skip
    if missing:
        raise QtuneError(
            "Q401",
            f"{folder} is not a run: it lacks {' and '.join(missing)}; give the `output` folder of a `qtune train`",
        )
    text, metrics = _text(folder / RECIPE), _text(folder / METRICS)
    faults: list[str] = []
    recipe = load_yaml(text, faults)
    if not isinstance(recipe, dict):
        raise QtuneError("Q411", f"{folder / RECIPE} is no recipe: {'; '.join(faults) or 'it holds no keys'}")
    rows = [row for row, _ in rows_of(metrics)]
    for row in rows:
        for name in NUMBERS:
            value = row.get(name)
            if value is not None and not (isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST)):
                raise QtuneError("Q411", f"{folder / METRICS}: {name} is {shown(value)} in a row; legal: a number")
    if not rows:
        raise QtuneError("Q412", f"{folder / METRICS} holds no row yet: there is nothing to show before the first step")
    return Reading(folder, recipe, text, rows, _json(folder / INFO, ADAPTER), read_record(folder))


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a run; empty where there is none that this version reads. Raises QtuneError where it is damaged."""
    content = _json(folder / RUN, {})
    return _json(folder / RUN, RECORD) if content.get("format") == FORMAT else {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QtuneError("Q411", f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _json(path: Path, shape: Any) -> dict[str, Any]:
    """A JSON object of this shape; empty where there is no such file."""
    try:
        value = json.loads(path.read_text("utf-8"))
        faults = _misshapen(value, shape, "")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise QtuneError("Q411", f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        faults = [f"it is no JSON text ({error})"]
    if faults:
        raise QtuneError(
            "Q411", f"{path} is damaged: {'; '.join(faults[:3])}; put it back from a copy, or remove it: the page does "
            "without"
        )  # fmt: skip
    found: dict[str, Any] = value
    return found


def _misshapen(value: Any, shape: Any, name: str) -> list[str]:
    """What of a JSON value is not of its shape: a type, a list of one shape, or keys with theirs (`*`: every key; with
    `?` at its end: may be absent or null)."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{name} is {shown(value)}, not a list"]
        return [fault for i, one in enumerate(value) for fault in _misshapen(one, shape[0], f"{name}[{i}]")]
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{name or 'it'} is {shown(value)}, not an object"]
        inner = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
        faults = []
        for key, one in inner.items():
            known, place = key.removesuffix("?"), f"{name}.{key}".strip(".?")
            if value.get(known) is not None:
                faults += _misshapen(value[known], one, place)
            elif known == key:
                faults.append(f"{place} is missing")
        return faults
    if shape is datetime:
        try:
            datetime.fromisoformat(value)
        except (TypeError, ValueError):
            return [f"{name} is {shown(value)}, not a time"]
        return []
    return [] if isinstance(value, shape) else [f"{name} is {shown(value)}, not {WORDS[shape]}"]


def section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a recipe; a mere name stands for its first key."""
    value = tree.get(name)
    if isinstance(value, str):
        return {{"adapter": "method", "scheme": "name"}.get(name, "value"): value}
    return value if isinstance(value, dict) else {}


def _names(value: Any) -> list[str]:
    """The file names in a key that may be a path, a list of sources, or a mapping with a path in it."""
    if isinstance(value, str):
        return [Path(value).name or value]
    if isinstance(value, dict):
        return [name for one in value.values() if isinstance(one, str) for name in _names(one)][:1]
    if isinstance(value, list):
        return [name for one in value for name in _names(one)]
    return []
