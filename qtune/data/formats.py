"""Rows -> records. A source holds one format, which is recognised by its keys:

messages     {"messages": [{"role", "content"}, ...], "tools": optional}: the chat template of the tokenizer
sharegpt     {"conversations": [{"from", "value"}, ...], "system", "tools": optional}: the same, in other words
glaive       {"system": "SYSTEM: ... functions", "chat": "USER: ... ASSISTANT: ..."}: the same, as text
prompt       {"prompt", "completion"}: joined as they stand
alpaca       {"instruction", "output", "input", "system", "history": optional}: Stanford Alpaca's prompt (Taori 2023)
text         {"text"}: learned throughout
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .messages import conversation, glaive, tools_of
from .records import PLAIN, Fault, Faults, Record, found, parsed, text_of
from .sources import Origin

FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # name -> keys that must be there, that may be there
    "messages": (("messages",), ("tools", "system")),
    "sharegpt": (("conversations",), ("tools", "system")),
    "glaive": (("system", "chat"), ()),
    "prompt": (("prompt", "completion"), ()),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "text": (("text",), ()),
}
CONVERSATIONS = ("messages", "sharegpt", "glaive")
OPTIONAL = {name for _, may in FORMATS.values() for name in may}
INNER = ("role", "content")  # keys of a message

# "Response:" ends with a newline, as in alpaca-lora and most later tools: then the answer begins a token of its own
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass
class Reading:
    """How rows of one source become records. system: put before conversations (and Alpaca prompts) that have none."""

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    seen: set[str] = field(default_factory=set)  # mapped columns that some row has

    def records(self, origin: Origin) -> Iterator[tuple[Record, int]]:
        """(record, bytes read since the last one), in order. Once a row is at fault no more come, but all are looked
        at, and one QtuneError tells every fault."""
        faults, first, empty = Faults(origin.name), None, True
        for row in origin.rows():
            empty = False
            try:
                where = f"{origin.name}, {row.place}" if row.place else origin.name
                if origin.plain:
                    record = self._plain(row.value, where)
                else:
                    record = self.record(row.value, where)
                first = first or (record.format, row.place)
                if record.format != first[0]:
                    raise Fault(
                        f"is of the format {record.format}, but {first[1]} is {first[0]}: one file holds one format"
                    )
                if not faults.count:
                    yield record, row.size
            except Fault as fault:
                faults.add(row.place, fault)
        if faults.count:
            raise faults.error()
        if not empty:
            self._unseen(origin.name)

    def record(self, value: Any, where: str) -> Record:
        """One row as a record. Raises Fault."""
        if isinstance(value, Fault):
            raise value
        if not isinstance(value, dict):
            raise Fault(f"found {found(value)}, not an object")
        row = self._renamed(value)
        name = self.format or recognised(row)
        must, may = FORMATS[name]
        if absent := [key for key in must if key not in row]:
            raise Fault(f"has no {absent[0]!r}, which the format {name} needs; found {found(value)}")
        ignored = tuple(sorted(key for key in row if key not in (*must, *may)))
        return MAKERS[name](self, row, where, ignored)

    def _plain(self, value: Any, where: str) -> Record:
        if isinstance(value, Fault):
            raise value
        if self.format or self.columns:
            key = "format" if self.format else "columns"
            raise Fault(f"data.{key} is set, but this is plain text, which has no columns; legal: null")
        return Record(PLAIN, where, answer=value)

    def _renamed(self, value: dict[str, Any]) -> dict[str, Any]:
        """The row with the recipe's names for its columns."""
        columns = {ours: theirs for ours, theirs in self.columns.items() if ours not in INNER}
        if not columns:
            return value
        for ours, theirs in columns.items():
            if theirs not in value and ours not in OPTIONAL:
                raise Fault(f"has no column {theirs!r}, which data.columns names for {ours}; found {found(value)}")
        self.seen.update(theirs for theirs in columns.values() if theirs in value)
        rest = {key: item for key, item in value.items() if key not in columns.values()}
        return rest | {ours: value[theirs] for ours, theirs in columns.items() if theirs in value}

    def _unseen(self, name: str) -> None:
        missing = [(o, t) for o, t in self.columns.items() if o not in INNER and t not in self.seen]
        if missing:
            faults = Faults(name)
            for ours, theirs in missing:
                faults.add("", f"no record has the column {theirs!r}, which data.columns names for {ours}")
            raise faults.error()

    def messages(self, row: dict[str, Any], where: str, ignored: tuple[str, ...], key: str = "messages") -> Record:
        """A record of the format messages or, by its key, sharegpt."""
        value = row[key]
        if isinstance(value, str) and isinstance(listed := parsed(value), list):  # a cell of a table
            value = listed
        turns = conversation(value, key, row.get("system"), self.columns)
        name = "messages" if key == "messages" else "sharegpt"
        return Record(name, where, messages=self._led(turns), tools=tools_of(row.get("tools")), ignored=ignored)

    def sharegpt(self, row: dict[str, Any], where: str, ignored: tuple[str, ...]) -> Record:
        return self.messages(row, where, ignored, "conversations")

    def glaive(self, row: dict[str, Any], where: str, ignored: tuple[str, ...]) -> Record:
        turns, tools = glaive(text_of(row, "system", empty=True), text_of(row, "chat"))
        made = conversation(turns, "chat", None, {})
        return Record("glaive", where, messages=self._led(made), tools=tools, ignored=ignored)

    def prompt(self, row: dict[str, Any], where: str, ignored: tuple[str, ...]) -> Record:
        prompt = text_of(row, "prompt", empty=True)
        return Record("prompt", where, prompt, text_of(row, "completion"), ignored=ignored)

    def text(self, row: dict[str, Any], where: str, ignored: tuple[str, ...]) -> Record:
        return Record("text", where, answer=text_of(row, "text"), ignored=ignored)

    def alpaca(self, row: dict[str, Any], where: str, ignored: tuple[str, ...]) -> Record:
        """Earlier turns of `history` are context, in the form of the last one."""
        given = {key: text_of(row, key, empty=True) if row.get(key) is not None else "" for key in ("input", "system")}
        head = given["system"] or self.system or (ALPACA_INPUT if given["input"] else ALPACA)
        asked = f"### Instruction:\n{text_of(row, 'instruction')}\n\n"
        asked += f"### Input:\n{given['input']}\n\n" if given["input"] else ""
        before = "".join(f"### Instruction:\n{q}\n\n### Response:\n{a}\n\n" for q, a in _history(row.get("history")))
        prompt = f"{head}\n\n{before}{asked}### Response:\n"
        return Record("alpaca", where, prompt, text_of(row, "output"), ignored=ignored)

    def _led(self, messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """With the recipe's system prompt where there is none."""
        if self.system is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return ({"role": "system", "content": self.system}, *messages)


MAKERS: dict[str, Callable[[Reading, dict[str, Any], str, tuple[str, ...]], Record]] = {
    name: getattr(Reading, name) for name in FORMATS
}


def recognised(value: dict[str, Any]) -> str:
    """The format of a row, by its keys. Raises Fault, which says what half of a format is missing."""
    for name, (must, _) in FORMATS.items():
        if all(key in value for key in must):
            return name
    for must, _ in FORMATS.values():
        present = [key for key in must if key in value and key != "system"]
        if present:
            absent = [key for key in must if key not in value]
            raise Fault(f"has {present[0]!r} but no {absent[0]!r}; found {found(value)}")
    raise Fault(
        f"of no known format; found {found(value)}; a recipe can say what is what, as in data.columns: "
        "{prompt: question, completion: answer}"
    )


def _history(value: Any) -> list[tuple[str, str]]:
    """Pairs of an earlier instruction and its answer."""
    value = parsed(value) if isinstance(value, str) and value.strip() else value
    if not value:
        return []
    pairs = value if isinstance(value, list) else [value]
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Fault(f"'history' must be a list of [instruction, answer] pairs of text; found {found(pair)}")
    return [(question, answer) for question, answer in pairs]
