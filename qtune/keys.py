"""Keys of a recipe: what each may hold stands once, in a dataclass field, for the checks, the errors and the docs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from math import inf, isfinite
from pathlib import Path
from reprlib import Repr
from typing import Any

from .errors import QtuneError, one_of
from .units import parse_size

Limits = Mapping[str, Any]

HUB = "hf:"  # before the name of a dataset of Hugging Face's hub
DATA_FILE = "a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder of texts, a saved dataset, or hf:owner/name"
COLUMNS = (  # what records of any format hold, and a message
    "messages", "conversations", "chat", "prompt", "completion", "instruction", "input", "output", "history", "system",
    "tools", "text", "role", "content",
)  # fmt: skip


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


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted key; an empty section is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= dotted(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def legal(limits: Limits) -> str:
    """The legal values of a key in words."""
    signs = ("low", ">="), ("above", ">"), ("below", "<")
    bounds = " and".join(f" {sign} {limits[k]}" for k, sign in signs if k in limits)
    words = {
        "text": "text",
        "file": DATA_FILE,
        "sources": f"{DATA_FILE}; or a list of those and of {{file, weight, format, columns}}",
        "columns": f"a mapping from {', '.join(COLUMNS)} to the names in the file",
        "whole": f"a whole number{bounds}",
        "number": f"a number{bounds}",
        "flag": "true or false",
        "choice": ", ".join(limits.get("legal", ())),
        "device": "auto, cpu, mps, cuda, or cuda:0 and so on",
        "warmup": "a fraction >= 0 and < 1, or a whole number of steps",
        "size": "a size such as 24GB or 7.5GiB",
        "choices": f"a list of {', '.join(limits.get('legal', ()))}",
        "words": "a list of tokens, or a text file with one a line",
        "betas": "a list of two numbers >= 0 and < 1",
        "scheme": "a scheme's name or {name: ..., options}",
        "storage": "a scheme, {default: scheme, pattern: scheme ...} or {bits: 2.5, high: scheme, low: scheme}",
        "adapter": "a method's name or {method: ..., targets: ..., options}",
    }
    return words[limits["kind"]] + (" or null" if limits.get("null") else "")


def shown(value: Any) -> str:
    """A value as an error shows it."""
    try:
        text = "null" if value is None else _BRIEF.repr(value)
    except ValueError:  # Python writes out no more than some thousand digits
        text = "a number of very many digits"
    return text if len(text) <= 80 else text[:77] + "..."


# a text of a few aliases can stand for a value that fills the memory once it is written out
_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist, _BRIEF.maxtuple = 4, 20, 20, 20
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 200


# ---- readers: the value in its type, or ValueError with what is special about the fault ----


def _text(value: Any, limits: Limits) -> str:
    if not isinstance(value, str):
        raise ValueError(
            "" if value is None or isinstance(value, (dict, list)) else "not text in YAML: put it in quotes"
        )
    if not value.strip():
        raise ValueError("empty")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("it holds a NUL, or half of a surrogate pair")
    if value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise ValueError("no user of this name has a home here") from None
    return value


def _number(value: Any, limits: Limits) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError
    try:
        finite = isfinite(value)
    except OverflowError:  # a whole number that is larger than any float
        finite = False
    if not finite:
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


def _choices(value: Any, limits: Limits) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError
    names = tuple(_choice(one, limits) for one in value)
    if len(set(names)) < len(names):
        raise ValueError("one of them twice")
    return names


def _words(value: Any, limits: Limits) -> tuple[str, ...]:
    """Of a list, or of the lines of a file."""
    if isinstance(value, str):
        try:
            value = [line for line in Path(value).expanduser().read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"no file that can be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(value, (list, tuple)):
        raise ValueError
    if wrong := [word for word in value if not isinstance(word, str)]:
        raise ValueError(f"{shown(wrong[0])} is not text in YAML: put it in quotes")
    if not all(word.strip() for word in value):
        raise ValueError("one of them is empty")
    if twice := [word for number, word in enumerate(value) if word in value[:number]]:
        raise ValueError(f"{shown(twice[0])} twice")
    return tuple(value)


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


def _columns(value: Any, limits: Limits) -> dict[str, str]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    if unknown := [name for name in value if name not in COLUMNS]:
        raise ValueError(str(one_of("column of a record", unknown[0], COLUMNS)).partition(";")[0])
    if wrong := [name for name, theirs in value.items() if not isinstance(theirs, str) or not theirs]:
        raise ValueError(f"{wrong[0]} is {shown(value[wrong[0]])}, not the name of a column")
    return dict(value)


def _sources(value: Any, limits: Limits) -> Any:
    """A name as it is; a list, or one mapping, as a tuple of the dataclass `limits["of"]`."""
    if isinstance(value, str):
        return _text(value, limits)
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, (list, tuple)) or not items:
        raise ValueError("" if isinstance(items, (list, tuple)) else "not text in YAML: put it in quotes")
    keys = {f.name: f for f in fields(limits["of"])}
    faults: list[str] = []
    made = []
    for number, item in enumerate(items, 1):
        entry = item if isinstance(item, Mapping) else {"file": item}
        faults += [f"entry {number}: {one_of('key', name, keys)}" for name in entry if name not in keys]
        faults += [f"entry {number} names no file"] * ("file" not in entry)
        values = {n: read(f, f"entry {number}: {n}", entry[n], faults) for n, f in keys.items() if n in entry}
        made.append(None if faults else limits["of"](**values))
    if faults:
        raise ValueError("; ".join(faults))
    return tuple(made)


READERS: dict[str, Callable[[Any, Limits], Any]] = {
    "text": _text,
    "file": _text,
    "whole": _whole,
    "number": _number,
    "flag": _flag,
    "choice": _choice,
    "choices": _choices,
    "device": _device,
    "warmup": _warmup,
    "words": _words,
    "betas": _betas,
    "size": _size,
    "columns": _columns,
    "sources": _sources,
}
