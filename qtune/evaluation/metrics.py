"""Metrics over generated answers: exact match, and the user's own from a Python file.

A file defines `metric(prompt, answer, expected) -> float`, which is called once for each example; its mean is the
result. It is tried on the first example, with the expected answer as the answer, before any model is loaded.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QtuneError, one_of
from .asked import Asked

PERPLEXITY, CHOICE, EXACT = "perplexity", "choice", "exact-match"
METRICS = (PERPLEXITY, CHOICE, EXACT)
FUNCTION = "metric"
SIGNATURE = f"def {FUNCTION}(prompt: str, answer: str, expected: str) -> float"
Score = Callable[[Asked, str], float]


@dataclass(frozen=True)
class TextMetric:
    """A metric of answers. name: as it is told; score(asked, answer)."""

    name: str
    score: Score


def text_metrics(names: Sequence[str]) -> list[TextMetric]:
    """Those of the named metrics that look at generated answers. Raises one QtuneError for all that is wrong."""
    made, faults = list[TextMetric](), list[str]()
    for name in dict.fromkeys(names):
        try:
            if name == EXACT:
                made.append(TextMetric(name, exact))
            elif name.endswith(".py"):
                made.append(_from_file(name))
            elif name not in METRICS:
                raise one_of("metric", name, (*METRICS, "FILE.py"))
        except QtuneError as error:
            faults.append(str(error))
    if faults:
        raise QtuneError("Q101", "\n".join(faults))
    return made


def exact(asked: Asked, answer: str) -> float:
    """1 where the answer is the expected one, white space around both left out; else 0."""
    return float(answer.strip() == asked.expected.strip())


def try_on(metrics: Sequence[TextMetric], asked: Asked) -> None:
    """Call each metric once. Raises QtuneError where it fails."""
    for metric in metrics:
        metric.score(asked, asked.expected)


# ---- the user's file


def _from_file(name: str) -> TextMetric:
    path = Path(name).expanduser()
    if not path.is_file():
        raise QtuneError(
            "Q101", f"there is no file {name} with a metric; legal: {', '.join(METRICS)}, or a Python file"
        )
    function = getattr(_module(path), FUNCTION, None)
    if not callable(function):
        raise QtuneError("Q810", f"{path} defines no function {FUNCTION!r}; legal: {SIGNATURE}")
    try:
        given = inspect.signature(function)
        given.bind("", "", "")
    except (TypeError, ValueError):
        shown = f"{FUNCTION}{inspect.signature(function)}" if inspect.isfunction(function) else FUNCTION
        raise QtuneError(
            "Q810", f"{path}: {shown} does not take a prompt, an answer and what is expected; legal: {SIGNATURE}"
        ) from None

    def score(asked: Asked, answer: str) -> float:
        on = f"for {asked.where} (answer {answer[:60]!r}, expected {asked.expected[:60]!r})"
        try:
            value = function(asked.prompt, answer, asked.expected)
        except Exception as error:  # noqa: BLE001  (the user's code: whatever it raises is told with its line)
            raise QtuneError("Q810", f"{_place(path, error)}: {FUNCTION} {_raised(error)} {on}") from None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, str) or not math.isfinite(number):
            raise QtuneError("Q810", f"{path}: {FUNCTION} returned {value!r} {on}; legal: a finite number")
        return number

    return TextMetric(path.name, score)


def _module(path: Path) -> Any:
    """The file as a module; what lies beside it can be imported by it."""
    spec = importlib.util.spec_from_file_location(f"qtune_metric_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.absolute())
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (as above)
        raise QtuneError("Q810", f"{_place(path, error)}: cannot be imported: it {_raised(error)}") from None
    finally:
        sys.path.remove(folder)
    return module


def _place(path: Path, error: BaseException) -> str:
    """The file, and the last line of it that was at work."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).name == path.name:
        return f"{path}, line {error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).absolute() == path.absolute()
    ]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _raised(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"raised {type(error).__name__}{f': {text}' if text else ''}"
