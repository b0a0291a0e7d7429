"""Records with choices: one of the formats without its answer, a list of `choices`, and which of them is right.

    {"prompt": "2 + 2 = ", "choices": ["3", "4"], "answer": 1}        answer: an index from 0, or the text of a choice
    {"messages": [..., {"role": "user", ...}], "choices": [...], "answer": "4"}
    {"instruction": ..., "input": ..., "choices": [...], "answer": ...}
Each choice becomes the answer of a record of its own, encoded as training would, with the tokens that end it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import QtuneError
from ..sections import DataKeys, Sources, entries
from .encode import Encoder
from .formats import Reading
from .load import reading_of
from .records import Fault, Faults, Record, found
from .report import Example
from .sources import Origin, Row, open_source

CHOICES, ANSWER = "choices", "answer"
SHOWN = '{"prompt" or "messages" or "instruction", "choices": [two texts or more], "answer": an index from 0 or a text}'


@dataclass(frozen=True)
class Question:
    """A prompt with each of its choices as an Example; texts: of the choices; right: which one is."""

    where: str
    candidates: tuple[Example, ...]
    texts: tuple[str, ...]
    right: int


def load_questions(source: Sources, tokenizer: Any, keys: DataKeys) -> tuple[list[Question], str] | None:
    """The questions of all sources, and what became of them in words; None where the first record has no `choices`.

    A question with a candidate that is longer than data.max_length is left out and counted. Raises one QtuneError for
    all faults of a source, and where nothing is left.
    """
    origins = [(open_source(entry.file), entry) for entry in entries(source)]
    first = next(origins[0][0].rows(), None)
    if origins[0][0].plain or first is None or not isinstance(first.value, dict) or CHOICES not in first.value:
        return None
    encoder, made, long = Encoder(tokenizer, loss_on="last", template=keys.template), list[Question](), 0
    for origin, entry in origins:
        asked = _asked(origin, reading_of(entry, keys))
        coded = iter(encoder.encode_many([record for records, _, _ in asked for record in records]))
        for records, texts, right in asked:
            where = records[0].where
            some = tuple(Example(*next(coded), where) for _ in records)
            if max(len(one.input_ids) for one in some) > keys.max_length:
                long += 1
            else:
                made.append(Question(where, some, texts, right))
    name = ", ".join(origin.name for origin, _ in origins)
    if not made:
        raise QtuneError(
            "Q216", f"{name}: no question is left: {long:,} of them longer than data.max_length = {keys.max_length:,}"
        )
    counts = sorted({len(question.texts) for question in made})
    of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    left_out = f"; {long:,} longer than {keys.max_length:,} tokens left out" if long else ""
    return made, f"{name}: {len(made):,} question{'s' * (len(made) != 1)} with {of} choices{left_out}"


def _asked(origin: Origin, reading: Reading) -> list[tuple[list[Record], tuple[str, ...], int]]:
    """Of each row: its choices as records, as texts, and which is right."""
    faults, made = Faults(origin.name), []
    for row in origin.rows():
        try:
            made.append(_question(row, reading, f"{origin.name}, {row.place}"))
        except Fault as fault:
            faults.add(row.place, fault)
    if len({records[0].format for records, _, _ in made}) > 1:
        faults.add("", "one file holds one format")
    if faults.count:
        raise faults.error(SHOWN)
    return made


def _question(row: Row, reading: Reading, where: str) -> tuple[list[Record], tuple[str, ...], int]:
    value = row.value
    if isinstance(value, Fault):
        raise value
    if not isinstance(value, dict) or CHOICES not in value:
        raise Fault(f"has no {CHOICES!r}, which the first record has; found {found(value)}")
    texts = value[CHOICES]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
        raise Fault(f"{CHOICES!r} must be a list of two texts or more, none of them empty; found {found(texts)}")
    if len(set(texts)) < len(texts):
        raise Fault(f"{CHOICES!r} holds a text twice: {', '.join(map(repr, texts))[:100]}")
    right = _right(value, texts)
    rest = {key: item for key, item in value.items() if key not in (CHOICES, ANSWER)}
    return [reading.record(one, where) for one in _answered(rest, texts, reading.columns)], tuple(texts), right


def _right(value: Mapping[str, Any], texts: list[str]) -> int:
    answer = value.get(ANSWER)
    legal = f"legal: 0 to {len(texts) - 1}, or the text of a choice"
    if isinstance(answer, str) and answer in texts:
        return texts.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    raise Fault(f"{ANSWER!r} is {found(answer)}; {legal}" if ANSWER in value else f"has no {ANSWER!r}; {legal}")


def _answered(rest: dict[str, Any], texts: list[str], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The row as an ordinary record, once with each choice as its answer."""
    for ours, form in (("messages", "role content"), ("conversations", "from value")):
        if (key := columns.get(ours, ours)) in rest:
            if not isinstance(rest[key], list):
                raise Fault(f"{key!r} must be a list of messages; found {found(rest[key])}")
            role, content = (columns.get(k, own) for k, own in zip(("role", "content"), form.split(), strict=True))
            yield from ({**rest, key: [*rest[key], {role: "assistant", content: text}]} for text in texts)
            return
    for ours, answer in (("prompt", "completion"), ("instruction", "output")):
        if columns.get(ours, ours) in rest:
            yield from ({**rest, columns.get(answer, answer): text} for text in texts)
            return
    raise Fault(f"asks nothing; found {found(rest)}")
