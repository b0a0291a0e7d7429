"""Records -> token ids with a mask of the trained positions.

Only the answer is learned by default, with the tokens that end it: a model that never sees its EOS never stops. Ids are
those of the tokenizer's own apply_chat_template, and of its encoding of a prompt alone where a prompt comes first.
Records are encoded many at a time, so that the tokenizer's own threads work; each text is encoded once, and its parts
are found by the characters that tokens stand for. Where a token's characters are not certain, parts are encoded again.
"""

from __future__ import annotations

import re
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

from ..errors import QtuneError, one_of
from .chat import Chat, read_template, shared
from .records import Record

LOSS_ON = ("answer", "last", "all")
AT_ONCE = 1000  # records, and
CHARACTERS = 500_000  # characters that are encoded at a time
CHUNK = 1 << 13  # characters of a plain text that are encoded together
CONTEXT = 64  # characters before and behind such a chunk that are encoded with it
NEAR = 1 << 10  # characters from the edge of a prompt in which a line is looked for
_BREAK = re.compile(r"\n(?=\S)")

Coded = tuple["array[int]", bytes]  # ids; 1 where they are trained


class Encoder:
    """Turns records into ids and masks with one transformers tokenizer and one chat template."""

    def __init__(self, tokenizer: Any, *, loss_on: str = "answer", template: str | None = None) -> None:
        if loss_on not in LOSS_ON:
            raise one_of("data.loss_on", loss_on, LOSS_ON)
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.chat = Chat(tokenizer, read_template(template) if template else None)
        self.lock = threading.Lock()  # transformers notes what a template marks in one place

    def encode(self, record: Record) -> Coded:
        """(ids, trained) of the whole record, uncut; equal lengths. Raises QtuneError naming the record."""
        return self.encode_many([record])[0]

    def check(self, record: Record) -> None:
        """Raise QtuneError for what is wrong with tokenizer or template, and not with one record."""
        if not record.messages:
            assert self.eos is not None
        elif self.loss_on != "all":
            assert self.chat.turn_end is not None
        else:
            assert self.chat.text

    def encode_many(self, records: Sequence[Record]) -> list[Coded]:
        """The same of records of one format."""
        if not records:
            return []
        made = self._conversations(records) if records[0].messages else self._continuations(records)
        if self.loss_on == "all":
            made = [(ids, b"\1" * len(ids)) for ids, _ in made]
        return [(ids, b"\0" * min(1, len(ids)) + trained[1:]) for ids, trained in made]

    def stream(self, records: Iterable[tuple[Record, int]]) -> Iterator[tuple[Record, Coded | QtuneError, int]]:
        """Every record with its code, or why there is none, and its size, in order. Two batches are at work at a time:
        while the tokenizer encodes one in threads of its own, the other is rendered and masked."""
        self.ids("a")  # the first call may change the tokenizer's settings, which no thread may do
        waiting: list[tuple[list[tuple[Record, int]], Future[list[Coded | QtuneError]]]] = []
        with ThreadPoolExecutor(2) as pool:
            try:
                for batch in _batched(records):
                    waiting.append((batch, pool.submit(self._each, [record for record, _ in batch])))
                    if len(waiting) > 2:
                        yield from _done(*waiting.pop(0))
                while waiting:
                    yield from _done(*waiting.pop(0))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _each(self, records: Sequence[Record]) -> list[Coded | QtuneError]:
        """As `encode_many`; where that fails, which records are at fault."""
        try:
            return list(self.encode_many(records))
        except QtuneError:
            made: list[Coded | QtuneError] = []
            for record in records:
                try:
                    made.append(self.encode(record))
                except QtuneError as error:
                    made.append(error)
            return made

    def text(self, text: str) -> array[int]:
        """The ids of a long text and EOS, encoded in chunks where that gives the same ids."""
        starts = [0]
        while (found := _BREAK.search(text, starts[-1] + CHUNK)) is not None:
            starts.append(found.end())
        edges = [*zip(starts, [*starts[1:], len(text)], strict=True)]
        ids: array[int] = array("i")
        for first in range(0, len(edges), CHARACTERS // CHUNK + 1):
            some = edges[first : first + CHARACTERS // CHUNK + 1]
            for codes in self._within(text, some):
                if codes is None:  # a token goes over the edge of a chunk
                    return array("i", [*self.ids(text), self.eos])
                ids.extend(codes)
        ids.append(self.eos)
        return ids

    def _within(self, text: str, parts: Sequence[tuple[int, int]]) -> Iterator[Sequence[int] | None]:
        """The ids of each text[start:end] as the whole text has them: what stands around it is encoded, too, as an
        empty line is one token or two by what follows it. None where a token goes over an edge."""
        around = [(max(0, start - CONTEXT), min(len(text), end + CONTEXT)) for start, end in parts]
        coded = self._encoded([text[begin:beyond] for begin, beyond in around])
        for (start, end), (begin, beyond), (ids, encoding) in zip(parts, around, coded, strict=True):
            some = text[begin:beyond]
            first = self._clean(some, start - begin, ids, encoding) if start > begin else 0
            last = self._clean(some, end - begin, ids, encoding) if end < beyond else len(ids)
            yield None if first is None or last is None else ids[first:last]

    def windows(self, ids: array[int], length: int) -> Iterator[Coded]:
        """The ids of a long text in windows of at most `length` tokens, each with the opening tokens."""
        opening = array("i", self.opening)
        step = max(1, length - len(opening))
        for start in range(0, len(ids), step):
            window = opening + ids[start : start + step]
            yield window, b"\0" + b"\1" * (len(window) - 1)

    def ids(self, text: str) -> list[int]:
        """The ids of `text` without any special token added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise QtuneError(
                "Q219",
                "the tokenizer has no EOS token, so the model could not learn to stop; "
                "set eos_token in tokenizer_config.json of the model's folder",
            )
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def opening(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text: its BOS, or nothing."""
        inner = self.ids("a")
        outer = list(self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(outer) - len(inner) + 1):
            if outer[start : start + len(inner)] == inner:
                return outer[:start]
        raise QtuneError(
            "Q219",
            f"the tokenizer encodes 'a' as {inner}, but with special tokens as {outer}: cannot tell its opening tokens",
        )

    # ---- texts

    def _encoded(self, texts: Sequence[str]) -> list[tuple[list[int], Any]]:
        """Ids of each text, and the encoding that knows their characters, where the tokenizer keeps one."""
        out = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encodings = getattr(out, "encodings", None) or [None] * len(texts)
        return list(zip(out["input_ids"], encodings, strict=True))

    def _clean(self, text: str, end: int, ids: Sequence[int], encoding: Any) -> int | None:
        """How many of the ids of `text` make up text[:end], if that is certain: no token goes over that edge."""
        if encoding is None:
            return None
        try:
            if (next_one := encoding.char_to_token(end)) is not None:  # the common case
                stop = encoding.token_to_chars(next_one - 1)[1] if next_one else 0
                if encoding.token_to_chars(next_one)[0] == stop == end:
                    return int(next_one)
            count = bisect_right(range(len(ids)), end, key=lambda i: encoding.token_to_chars(i)[1])
            stop = encoding.token_to_chars(count - 1)[1] if count else 0
            start = encoding.token_to_chars(count)[0] if count < len(ids) else end
        except TypeError:  # a token that stands for no characters
            return None
        if stop != end or start < end:
            return None
        # many tokenizers leave the space that belongs to a token out of its characters
        hidden = start > end and str(self.tokenizer.convert_ids_to_tokens(ids[count - 1])).endswith(("Ġ", "▁", " "))
        return None if hidden or (start > end and count == 0) else count

    def _count(self, text: str, end: int, ids: Sequence[int], encoding: Any) -> int:
        """How many of `ids` lie wholly in text[:end]."""
        if end == len(text):
            return len(ids)
        count = self._clean(text, end, ids, encoding)
        return shared(self.ids(text[:end]), list(ids)) if count is None else count

    def _prompt(self, prompt: str, text: str, ids: Sequence[int], encoding: Any) -> int | None:
        """How many of the ids of `text` are those of the prompt that it begins with, if that is certain: spaces and
        empty lines at a prompt's end are other tokens where nothing follows."""
        return None if prompt[-2:].isspace() else self._clean(text, len(prompt), ids, encoding)

    def _continuations(self, records: Sequence[Record]) -> list[Coded]:
        """Prompt and answer as they stand, then EOS. The prompt's ids are those that generation will be given."""
        texts = [record.prompt + record.answer for record in records]
        coded = self._encoded(texts)
        counts = [
            self._prompt(record.prompt, text, ids, encoding) if record.prompt else 0
            for record, text, (ids, encoding) in zip(records, texts, coded, strict=True)
        ]
        # where a token may go over the edge the prompt is encoded alone; where it does, the answer is, too
        unsure = [i for i, count in enumerate(counts) if count is None]
        prompts = dict(zip(unsure, self._alone([(records[i], *coded[i]) for i in unsure], 0), strict=True))
        split = [i for i, ids in prompts.items() if coded[i][0][: len(ids)] != ids]
        answers = dict(zip(split, self._alone([(records[i], *coded[i]) for i in split], 1), strict=True))
        made = []
        for i, (whole, _) in enumerate(coded):
            prompt = prompts[i] if i in prompts else whole[: counts[i]]
            answer = array("i", answers[i] if i in answers else whole[len(prompt) :])
            if answer[-1:] != array("i", [self.eos]):
                answer.append(self.eos)
            has_bos = prompt[: len(self.opening)] == self.opening
            context = array("i", prompt if has_bos else self.opening + prompt)
            made.append((context + answer, b"\0" * len(context) + b"\1" * len(answer)))
        return made

    def _alone(self, whole: Sequence[tuple[Record, Sequence[int], Any]], half: int) -> list[list[int]]:
        """The ids that the prompts (half 0) or the answers (half 1) have by themselves, from those of both together.
        Between a line near the edge and the far end they are the same, so that only what is left is encoded again."""
        pieces: list[str] = []
        kept: list[tuple[int, Sequence[int]] | None] = []  # where the piece and the rest meet, in the piece
        for record, ids, encoding in whole:
            text, edge = record.prompt + record.answer, len(record.prompt)
            at = _line_near(text, edge, half)
            count = self._clean(text, at, ids, encoding) if at is not None else None
            if at is None or count is None:
                pieces.append((text[:edge], text[edge:])[half])
                kept.append(None)
                continue
            begin = max(0, at - CONTEXT)
            pieces.append(text[edge : at + CONTEXT] if half else text[begin:edge])
            kept.append((at - (edge if half else begin), ids[count:] if half else ids[:count]))
        made = []
        for piece, rest, (ids, encoding), (record, *_) in zip(
            pieces, kept, self._encoded(pieces) if pieces else (), whole, strict=True
        ):
            if rest is None:
                made.append(ids)
            elif (count := self._clean(piece, rest[0], ids, encoding)) is None:
                made.append(self.ids((record.prompt, record.answer)[half]))
            else:
                made.append([*ids[:count], *rest[1]] if half else [*rest[1], *ids[count:]])
        return made

    def _conversations(self, records: Sequence[Record]) -> list[Coded]:
        """Conversations through the chat template."""
        if self.loss_on != "all" and self.chat.marks_answers:
            with self.lock:
                return [self._marked(record) for record in records]
        texts = self.chat.render(records)
        spans: Sequence[Sequence[tuple[int, int]]] = [()] * len(texts)
        if self.loss_on != "all":
            spans = self.chat.answers(records, texts, last=self.loss_on == "last")
        made = []
        for text, (ids, encoding), answers in zip(texts, self._encoded(texts), spans, strict=True):
            trained = bytearray(len(ids))
            for start, end in answers:
                first, last = self._count(text, start, ids, encoding), self._count(text, end, ids, encoding)
                trained[first:last] = b"\1" * (last - first)
            made.append((array("i", ids), bytes(trained)))
        return made

    def _marked(self, record: Record) -> Coded:
        ids, marks = self.chat.marked(record)
        trained = bytes(marks)
        if self.loss_on == "last":
            first = trained.rstrip(b"\0").rfind(b"\0\1") + 1
            trained = b"\0" * first + trained[first:]
        return array("i", ids), trained


def _line_near(text: str, edge: int, half: int) -> int | None:
    """Where the last line begins before text[edge] (half 0), or the first one behind it (half 1), if it is near."""
    if half:
        found = _BREAK.search(text, edge + 1, edge + NEAR)
        return found.end() if found else None
    return max((found.end() for found in _BREAK.finditer(text, max(0, edge - NEAR), edge)), default=None)


def _batched(records: Iterable[tuple[Record, int]]) -> Iterator[list[tuple[Record, int]]]:
    """Batches of some hundred thousand characters."""
    batch: list[tuple[Record, int]] = []
    characters = 0
    for record, size in records:
        batch.append((record, size))
        characters += len(record.prompt) + len(record.answer)
        characters += sum(len(message.get("content") or "") for message in record.messages)
        if len(batch) >= AT_ONCE or characters >= CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _done(
    batch: list[tuple[Record, int]], coded: Future[list[Coded | QtuneError]]
) -> Iterator[tuple[Record, Coded | QtuneError, int]]:
    for (record, size), code in zip(batch, coded.result(), strict=True):
        yield record, code, size
