"""Training files -> records. Each file holds one format, which is recognised by its keys:

messages     {"messages": [{"role": ..., "content": ...}, ...], "tools": optional}: the tokenizer's chat template
prompt       {"prompt": ..., "completion": ...}: joined as they stand
alpaca       {"instruction": ..., "input": optional, "output": ...}: Stanford Alpaca's prompt (Taori et al. 2023)
text         {"text": ...}: learned throughout
plain text   a .txt file: one long text, later cut in windows

Faults are collected and reported together, by line. Left out: ShareGPT, preference pairs, images, compressed files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import QtuneError, one_of

FORMATS = {  # format -> the keys that a record must have; the first format whose keys are all there is taken
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL = {"messages": ("tools",), "prompt": (), "alpaca": ("input",), "text": ()}
LEGAL = '{"messages": [...]}, {"prompt", "completion"}, {"instruction", "input" (optional), "output"} or {"text"}'
ROLES = ("system", "developer", "user", "assistant", "tool")
SHOWN_FAULTS = 5

# "Response:" ends with a newline, as in alpaca-lora and most later tools: then the answer begins a token of its own
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Record:
    """One record: `messages` in the format messages, else `prompt` (context, may be empty) and `answer` (learned)."""

    format: str
    where: str  # "train.jsonl, line 3": for error messages
    prompt: str = ""
    answer: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    ignored: tuple[str, ...] = ()  # keys of the record that no format knows


class _Fault(Exception):
    """What is wrong with one record; collected, never seen by the user as such."""


def read_records(path: str | Path) -> list[Record]:
    """All records of a .jsonl, .json or .txt file, in order. QtuneError names lines, what was found, what is legal."""
    path = Path(path).expanduser()
    readers: dict[str, Callable[[Path, str], list[Record]]] = {
        ".jsonl": _read_lines,
        ".json": _read_list,
        ".txt": _read_plain,
    }
    if path.suffix.lower() not in readers:
        raise one_of(f"kind of data file: {path} ends in", path.suffix, readers)
    records = readers[path.suffix.lower()](path, _decode(path))
    if not records:
        raise QtuneError(
            f"{path} holds no records; legal are {LEGAL}, one object a line in .jsonl or in a list in .json"
        )
    return records


def _decode(path: Path) -> str:
    """The file's text. A UTF-8 byte-order mark is dropped and CRLF becomes LF."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise QtuneError(f"cannot read the data file {path}: {error.strerror or error}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise QtuneError(f"{path} is UTF-16 text (it begins with that byte-order mark); save it as UTF-8")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise QtuneError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8") from error


def _read_plain(path: Path, text: str) -> list[Record]:
    return [Record("plain text", str(path), answer=text)] if text.strip() else []


def _read_lines(path: Path, text: str) -> list[Record]:
    if text.lstrip()[:1] == "[":
        raise QtuneError(
            f"{path} begins with '[', as a JSON list does, but .jsonl holds one object a line; rename it to .json"
        )

    def values() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
            if line.strip():
                yield f"line {number}", _json(line)

    return _collect(path, values())


def _read_list(path: Path, text: str) -> list[Record]:
    if not text.strip():
        return []
    value = _json(text)
    if isinstance(value, _Fault):
        lines = "; each line is JSON by itself: rename it to .jsonl" if _is_json_lines(text) else ""
        raise QtuneError(f"{path} is no JSON list: {value}{lines}")
    if not isinstance(value, list):
        raise QtuneError(
            f"{path} holds {_found(value)}, but a .json file must hold a list of records; legal are {LEGAL}"
        )
    return _collect(path, ((f"record {number}", item) for number, item in enumerate(value, 1)))


def _is_json_lines(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) > 1 and all(isinstance(_json(line), dict) for line in lines[:2])


def _json(text: str) -> Any:
    """The value, or the _Fault that says why there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
        return _Fault(f"not JSON ({error.msg} at {place}): {_short(text)}")
    except (ValueError, RecursionError) as error:
        return _Fault(f"not readable as JSON ({error}): {_short(text)}")


def _collect(path: Path, values: Iterator[tuple[str, Any]]) -> list[Record]:
    """Records of `(place, value)` pairs; all faults in one error, the first few in full."""
    records: list[Record] = []
    faults: list[str] = []
    first: tuple[str, str] | None = None
    for place, value in values:
        try:
            record = _record(value, f"{path}, {place}")
            first = first or (record.format, place)
            if record.format != first[0]:
                raise _Fault(
                    f"is of the format {record.format}, but {first[1]} is {first[0]}: one file holds one format"
                )
            records.append(record)
        except _Fault as fault:
            faults.append(f"{place}: {fault}")
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
        raise QtuneError(
            f"{path}: {len(faults)} bad record{'s' * (len(faults) > 1)}:{listed}{more}\n  legal records: {LEGAL}"
        )
    return records


def _record(value: Any, where: str) -> Record:
    """One parsed JSON value as a Record; raises _Fault."""
    if isinstance(value, _Fault):
        raise value
    if not isinstance(value, dict):
        raise _Fault(f"found {_found(value)}, not an object")
    name = _format(value)
    known = FORMATS[name] + OPTIONAL[name]
    ignored = tuple(sorted(key for key in value if key not in known))
    if name == "messages":
        return Record(
            name, where, messages=_messages(value["messages"]), tools=_tools(value.get("tools")), ignored=ignored
        )
    if name == "prompt":
        prompt = _text(value, "prompt", empty=True)
        return Record(name, where, prompt, _text(value, "completion"), ignored=ignored)
    if name == "text":
        return Record(name, where, answer=_text(value, "text"), ignored=ignored)
    fields = {
        "instruction": _text(value, "instruction"),
        "input": "" if value.get("input") is None else _text(value, "input", empty=True),
    }
    prompt = (ALPACA_INPUT if fields["input"] else ALPACA).format(**fields)
    return Record(name, where, prompt, _text(value, "output"), ignored=ignored)


def _format(value: dict[str, Any]) -> str:
    for name, required in FORMATS.items():
        if all(key in value for key in required):
            return name
    for required in FORMATS.values():  # say which half of a format is missing
        present = [key for key in required if key in value]
        if present:
            absent = [key for key in required if key not in value]
            raise _Fault(f"has {present[0]!r} but no {absent[0]!r}; found {_found(value)}")
    raise _Fault(f"of no known format; found {_found(value)}")


def _text(value: dict[str, Any], key: str, *, empty: bool = False) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise _Fault(f"{key!r} must be text; found {_found(text)}")
    if not empty and not text.strip():
        raise _Fault(f"{key!r} is empty: there is nothing to learn")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Fault(
            f"{key!r} holds half of a surrogate pair (character {error.start + 1}), which is no valid Unicode text"
        ) from error
    return text


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _Fault(f"'messages' must be a list of {{role, content}} objects; found {_found(value)}")
    for number, message in enumerate(value, 1):
        try:
            _check_message(message)
        except _Fault as fault:
            raise _Fault(f"message {number}: {fault}") from None
    roles = [message["role"] for message in value]
    if "assistant" not in roles:
        raise _Fault(f"has no assistant message, so there is nothing to learn; roles found: {', '.join(roles)}")
    if roles[0] == "assistant":
        raise _Fault("begins with the assistant; a conversation must begin with a system or user message")
    return tuple(value)


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or "role" not in message:
        raise _Fault(f"must be an object with 'role' and 'content'; found {_found(message)}")
    if message["role"] not in ROLES:
        raise _Fault(str(one_of("role", message["role"], ROLES)))
    if message["role"] == "assistant" and message.get("tool_calls"):
        if message.get("content") is not None:
            _text(message, "content", empty=True)
        return
    if "content" not in message:
        raise _Fault(f"has no 'content'; found {_found(message)}")
    _text(message, "content", empty=message["role"] != "assistant")


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _Fault(f"'tools' must be a list of objects; found {_found(value)}")
    return tuple(value)


def _found(value: Any) -> str:
    """What a JSON value is, in words a user knows."""
    if isinstance(value, dict):
        return "an object with the keys " + ", ".join(map(str, value)) if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"{json.dumps(value)[:60]}"


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else text[:57] + "..."
