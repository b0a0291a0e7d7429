"""A run folder as it is read for the page: recipe, metrics, adapter.json and run.json. No model is loaded.

What an older qtune or an interrupted run has not written is absent; only the recipe and one row of metrics are needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.files import INFO
from ..errors import QtuneError
from ..runs import METRICS, RECIPE
from ..state import rows_of
from ..yaml_text import load_yaml

RUN, FORMAT = "run.json", 1  # what record.py writes
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
    if missing:
        raise QtuneError(
            "Q401",
            f"{folder} is not a run: it lacks {' and '.join(missing)}; give the `output` folder of a `qtune train`",
        )
    try:
        text = (folder / RECIPE).read_text("utf-8")
        metrics = (folder / METRICS).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QtuneError(
            "Q411", f"cannot read the run {folder}: {getattr(error, 'strerror', None) or error}"
        ) from error
    faults: list[str] = []
    recipe = load_yaml(text, faults)
    if not isinstance(recipe, dict):
        raise QtuneError("Q411", f"{folder / RECIPE} is no recipe: {'; '.join(faults) or 'it holds no keys'}")
    rows = [row for row, _ in rows_of(metrics)]
    if not rows:
        raise QtuneError("Q412", f"{folder / METRICS} holds no row yet: there is nothing to show before the first step")
    return Reading(folder, recipe, text, rows, _json(folder / INFO), read_record(folder))


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a run; empty where there is none that this version reads."""
    content = _json(folder / RUN)
    return content if content.get("format") == FORMAT else {}


def section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a recipe; a mere name stands for its first key."""
    value = tree.get(name)
    if isinstance(value, str):
        return {{"adapter": "method", "scheme": "name"}.get(name, "value"): value}
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
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
