"""TensorBoard, Weights & Biases and others, by accelerate's trackers: each gets the recipe once and every metrics row.

They come beside metrics.jsonl, never in its place. A package that is missing is told before training; a tracker that
fails while it trains (a network that is gone) is left out from then on, with a note, and the run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import QtuneError
from ..keys import dotted
from ..recipe import Recipe
from ..screen import Screen

PROJECT, BOARD = "qtune", "tensorboard"
PIP = {"comet_ml": "comet-ml"}  # where the package is called otherwise
NAMED = {  # how a run is named there; the others have no such option
    "wandb": "name", "trackio": "name", "swanlab": "experiment_name", "clearml": "task_name", "mlflow": "run_name",
}  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """Raises QtuneError for trackers whose package is not installed, with the pip command."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    there = {str(name) for name in get_available_trackers()}
    missing = [name for name in names if name not in there]
    if missing:
        packages = " ".join(PIP.get(name, name) for name in missing)
        raise QtuneError(
            "Q904",
            f"train.trackers has {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install {packages}",
        )


class Trackers:
    """The recipe's trackers, started. Files of theirs lie in the run. fresh: what tensorboard has there of an earlier
    run goes, for it would show both as one."""

    def __init__(self, recipe: Recipe, folder: Path, screen: Screen, *, fresh: bool) -> None:
        self.screen = screen
        self.running: dict[str, Any] = {}
        if not recipe.train.trackers:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if fresh:
            shutil.rmtree(folder / BOARD, ignore_errors=True)
        for name in recipe.train.trackers:
            kind = LOGGER_TYPE_TO_CLASS[name]
            options: dict[str, Any] = {NAMED[name]: folder.name} if name in NAMED else {}
            if kind.requires_logging_directory:
                options["logging_dir"] = folder
            elif name == "dvclive":
                options["dir"] = str(folder / name)
            try:
                made = kind(name if name == BOARD else PROJECT, **options)  # of tensorboard: its folder
                made.start()
                made.store_init_configuration(flat(recipe.to_dict()))
            except Exception as error:  # any library's own: an account, a server that is not there
                raise QtuneError("Q808", f"train.trackers: {name} did not start: {error}") from error
            self.running[name] = made

    def log(self, row: Mapping[str, Any]) -> None:
        """Give a row of metrics to all."""
        values = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        for name in list(self.running):
            self._tell(name, lambda tracker: tracker.log(values, step=row["step"]))

    def close(self) -> None:
        """The run is at its end."""
        for name in list(self.running):
            self._tell(name, lambda tracker: tracker.finish())
        self.running.clear()

    def _tell(self, name: str, do: Any) -> None:
        try:
            do(self.running[name])
        except Exception as error:  # noqa: BLE001 (any library's own; a tracker is not worth a run)
            self.screen.line(f"note: {name} gets nothing more of this run: {error}", "yellow")
            self.running.pop(name, None)


def flat(tree: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Dotted key -> plain value; lists and null as text."""
    values = {key: value for key, value in dotted(tree).items() if not isinstance(value, Mapping)}
    return {k: v if isinstance(v, (bool, int, float, str)) else _text(v) for k, v in values.items()}


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
