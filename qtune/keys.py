"""Keys of a recipe: what each may hold stands once, in a dataclass field, for the checks, the errors and the docs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field
from math import inf, isfinite
from typing import Any

from .errors import QtuneError
from .units import parse_size

Limits = Mapping[str, Any]


def key(kind: str, doc: str, default: Any = MISSING, *, factory: Any = MISSING, **limits: Any) -> Any:
    """A dataclass field for a recipe key. kind: see READERS; limits: legal (choices), low (>=), above (>), below (<),
    null."""
    metadata = {"kind": kind, "doc": doc, **limits}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def read(f: Field[Any], name: str, value: Any, faults: list[str]) -> Any:
    """The value in the key's own type; its default, and a line in `faults`, where the value is not legal."""
    if value is None and f.metadata.get("null"):
        return None
    try:
        return READERS[f.metadata["kind"]](value, f.metadata)
    except ValueError as error:
        note = f" ({error})" if str(error) else ""
        faults.append(f"{name} is {shown(value)}{note}; legal: {legal(f.metadata)}")
        return None if f.default is MISSING else f.default


def legal(limits: Limits) -> str:
    """The legal values of a key in words."""
    signs = ("low", ">="), ("above", ">"), ("below", "<")
    bounds = " and".join(f" {sign} {limits[k]}" for k, sign in signs if k in limits)
    words = {
        "text": "text",
        "file": "a .jsonl, .json or .txt file",
        "whole": f"a whole number{bounds}",
        "number": f"a number{bounds}",
        "flag": "true or false",
        "choice": ", ".join(limits.get("legal", ())),
        "device": "auto, cpu, mps, cuda, or cuda:0 and so on",
        "warmup": "a fraction >= 0 and < 1, or a whole number of steps",
        "size": "a size such as 24GB or 7.5GiB",
        "betas": "a list of two numbers >= 0 and < 1",
        "scheme": "a scheme's name or {name: ..., options}",
        "storage": "a scheme, {default: scheme, pattern: scheme ...} or {bits: 2.5, high: scheme, low: scheme}",
        "adapter": "a method's name or {method: ..., targets: ..., options}",
    }
    return words[limits["kind"]] + (" or null" if limits.get("null") else "")


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- readers: the value in its type, or ValueError with what is special about the fault ----


def _text(value: Any, limits: Limits) -> str:
    if not isinstance(value, str):
        raise ValueError(
            "" if value is None or isinstance(value, (dict, list)) else "not text in YAML: put it in quotes"
        )
    if not value.strip():
        raise ValueError("empty")
    return value


def _number(value: Any, limits: Limits) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise ValueError
    low, above, below = limits.get("low", -inf), limits.get("above", -inf), limits.get("below", inf)
    if value < low or value <= above or value >= below:
        raise ValueError
    return float(value)


def _whole(value: Any, limits: Limits) -> int:
    if _number(value, limits) != int(value):
        raise ValueError
    return int(value)


def _flag(value: Any, limits: Limits) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _choice(value: Any, limits: Limits) -> str:
    if value not in limits["legal"]:
        raise ValueError
    return str(value)


def _device(value: Any, limits: Limits) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError
    return value


def _warmup(value: Any, limits: Limits) -> float:
    number = _number(value, {"low": 0})
    if number >= 1 and number != int(number):
        raise ValueError
    return number


def _betas(value: Any, limits: Limits) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError
    first, second = (_number(v, {"low": 0}) for v in value)
    if max(first, second) >= 1:
        raise ValueError
    return first, second


def _size(value: Any, limits: Limits) -> str:
    try:
        parse_size(value)
    except QtuneError as error:
        raise ValueError(str(error).partition(";")[0]) from error
    return str(value)


READERS: dict[str, Callable[[Any, Limits], Any]] = {
    "text": _text,
    "file": _text,
    "whole": _whole,
    "number": _number,
    "flag": _flag,
    "choice": _choice,
    "device": _device,
    "warmup": _warmup,
    "betas": _betas,
    "size": _size,
}
