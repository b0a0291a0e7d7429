"""What a record is, and how a fault of one is told: by file and place, with what was found and what is legal."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..errors import QtuneError

LEGAL = (
    '{"messages": [...]}, {"conversations": [...]}, {"prompt", "completion"}, {"instruction", "output", with "input", '
    '"system", "history" if there are any}, {"text"} or {"system", "chat"}'
)
SHOWN_FAULTS = 5
_SORTED = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
PLAIN = "plain text"  # the format of .txt files: one long text, cut in windows


@dataclass(frozen=True)
class Record:
    """One record: `messages` of a conversation, else `prompt` (context, may be empty) and `answer` (learned)."""

    format: str
    where: str  # "train.jsonl, line 3": for error messages
    prompt: str = ""
    answer: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    ignored: tuple[str, ...] = ()  # keys of the record that no format knows

    def digest(self) -> bytes:
        """16 bytes that are equal for records with equal content, wherever they stand."""
        content = [self.messages, self.tools] if self.messages else [self.prompt, self.answer]
        text = _SORTED.encode(content)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Fault(Exception):
    """What is wrong with one record; collected, never seen by the user as such."""


class Faults:
    """The faults of one source: counted, the first few kept in full."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.first = name, 0, list[str]()

    def add(self, place: str, fault: object) -> None:
        self.count += 1
        if len(self.first) < SHOWN_FAULTS:
            self.first.append(f"{place}: {fault}" if place else str(fault))

    def error(self, legal: str = LEGAL) -> QtuneError:
        """All of them in one error."""
        more = f"\n  ... and {self.count - SHOWN_FAULTS} more" if self.count > SHOWN_FAULTS else ""
        listed = "".join(f"\n  {fault}" for fault in self.first)
        plural = "s" * (self.count > 1)
        return QtuneError(
            "Q206", f"{self.name}: {self.count} bad record{plural}:{listed}{more}\n  legal records: {legal}"
        )


def text_of(value: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """The text under `key`, which is there. Raises Fault for what is no text, or has none."""
    text = value[key]
    if not isinstance(text, str):
        raise Fault(f"{key!r} must be text; found {found(text)}")
    if not empty and not text.strip():
        raise Fault(f"{key!r} is empty: there is nothing to learn")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Fault(
                f"{key!r} holds half of a surrogate pair (character {error.start + 1}), which is no valid Unicode text"
            ) from error
    return text


def parsed(text: str) -> Any:
    """The value of a JSON text, or the Fault that says why there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        return Fault(f"not JSON ({error.msg} at {place}): {short(text)}")
    except (ValueError, RecursionError) as error:
        return Fault(f"not readable as JSON ({error}): {short(text)}")


def found(value: Any) -> str:
    """What a JSON value is, in words a user knows."""
    if isinstance(value, dict):
        return "an object with the keys " + ", ".join(map(str, value)) if value else "an empty object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"{json.dumps(value, default=str)[:60]}"


def short(text: str) -> str:
    """A text as an error quotes it."""
    text = text.strip()
    return text if len(text) <= 60 else text[:57] + "..."
