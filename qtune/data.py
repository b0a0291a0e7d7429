"""Training data: files -> records -> examples (token ids with a mask of what is trained) -> right-padded batches.

The mask is kept by position and never found by token id, so `pad == eos` cannot hide an EOS.
Left out: packing several examples into one row (`Capacity.fill` is where it would be), grouping by length.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from .encode import Encoder, shared
from .errors import QtuneError
from .loss import IGNORED, trained_tokens
from .records import Record, read_records
from .sections import TrainKeys


@dataclass(frozen=True)
class Example:
    """One tokenized record: `trained[i]` is 1 where `input_ids[i]` is learned. Position 0 never is."""

    input_ids: array[int]
    trained: bytes
    where: str


@dataclass(frozen=True)
class DataReport:
    """What became of a file. `tokens`, `trained` count the examples kept; `longest` is in tokens, before cutting."""

    path: str
    format: str
    records: int
    examples: int
    tokens: int
    trained: int
    truncated: int
    dropped: int
    longest: int
    max_length: int
    loss_on: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cut = f"{self.truncated:,} cut at {self.max_length:,}, {self.dropped:,} dropped (no trained token left)"
        line = (
            f"{self.path}: {self.records:,} record{'s' * (self.records != 1)} ({self.format}) "
            f"-> {self.examples:,} example{'s' * (self.examples != 1)}, "
            f"{self.tokens:,} tokens, {self.trained:,} trained ({self.trained / self.tokens:.0%}); "
            f"longest {self.longest:,}; {cut}"
        )
        return "\n".join((line, *(f"note: {note}" for note in self.notes)))


@dataclass(frozen=True)
class Batch:
    """All int64 [batch, longest in the batch], right-padded.

    `labels` are aligned with `input_ids` (the loss shifts them); -100 is not trained.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def trained(self) -> int:
        """The number of tokens that the shifted loss counts."""
        return trained_tokens(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def load_data(
    path: str | Path, tokenizer: Any, *, max_length: int, loss_on: str = "answer", template: str | None = None
) -> tuple[list[Example], DataReport]:
    """Read and tokenize one file: `read_records`, then `tokenize`."""
    return tokenize(
        read_records(path), tokenizer, max_length=max_length, loss_on=loss_on, template=template, path=str(path)
    )


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: str = "answer",
    template: str | None = None,
    path: str = "data",
) -> tuple[list[Example], DataReport]:
    """Examples of at most `max_length` tokens, cut on the right; those left without a trained token are dropped.

    Raises QtuneError when a record cannot be rendered, or when nothing is left to train.
    """
    if max_length < 2:
        raise QtuneError(f"data.max_length is {max_length}; legal: 2 or more")
    encoder = Encoder(tokenizer, loss_on=loss_on, template=template)
    examples: list[Example] = []
    truncated = dropped = longest = 0
    needed: list[int] = []  # for each dropped record, the length that would keep one trained token
    for record in records:
        plain = record.format == "plain text"
        for ids, trained in encoder.windows(record, max_length) if plain else [encoder.encode(record)]:
            longest = max(longest, len(ids))
            truncated += len(ids) > max_length
            if any(trained[:max_length]):
                examples.append(Example(array("i", ids[:max_length]), bytes(trained[:max_length]), record.where))
            else:
                dropped += 1
                needed += [trained.index(1) + 1] if any(trained) else []
    if not examples:
        raise QtuneError(_nothing_left(path, dropped, max_length, needed))
    report = DataReport(
        path=path,
        format=records[0].format,
        records=len(records),
        examples=len(examples),
        tokens=sum(len(e.input_ids) for e in examples),
        trained=sum(sum(e.trained) for e in examples),
        truncated=truncated,
        dropped=dropped,
        longest=longest,
        max_length=max_length,
        loss_on=loss_on,
        notes=_notes(records, encoder),
    )
    return examples, report


def _nothing_left(path: str, dropped: int, max_length: int, needed: list[int]) -> str:
    if not dropped:
        return f"{path}: no records to train on"
    fix = f"the shortest prompt needs at least {min(needed)}" if needed else "no record has a token to learn"
    return f"{path}: all {dropped} records lost every trained token when cut at data.max_length = {max_length}; {fix}"


def _notes(records: Sequence[Record], encoder: Encoder) -> tuple[str, ...]:
    notes = []
    ignored = sorted({key for record in records for key in record.ignored})
    if ignored:
        notes.append(f"keys that are not used: {', '.join(ignored)}")
    if records[0].messages and not encoder.turn_end.strip():
        notes.append("the chat template ends an answer with no token of its own, so the model may not learn to stop")
    return tuple(notes)


def collate(examples: Sequence[Example]) -> Batch:
    """Examples as one right-padded Batch. Padding is id 0: it is masked by position, so its id means nothing."""
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        mask[row, :length] = 1
        trained = torch.tensor(list(example.trained), dtype=torch.bool)
        labels[row, :length] = torch.where(trained, ids[row, :length], IGNORED)
    return Batch(ids, mask, labels)


@dataclass(frozen=True)
class Capacity:
    """What a micro-batch holds at most: `limit` examples; with `by_tokens`, as many as fit into `limit` tokens, counted
    as examples x longest, padding with them."""

    limit: int
    by_tokens: bool = False

    @classmethod
    def of(cls, keys: TrainKeys) -> Capacity:
        """What a recipe asks for."""
        if keys.micro_tokens is not None:
            return cls(keys.micro_tokens, True)
        assert keys.micro_batch is not None, "a recipe has one of the two"
        return cls(keys.micro_batch)

    def __str__(self) -> str:
        one = "" if self.limit == 1 else "s"
        return f"{self.limit:,} token{one}" if self.by_tokens else f"{self.limit:,} example{one}"

    def rows(self, longest: int) -> int:
        """Examples in a micro-batch whose longest has `longest` tokens; one is always taken."""
        return max(1, self.limit // max(1, longest)) if self.by_tokens else self.limit

    def fill(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Micro-batches of examples, by number, in `order`: each takes the next ones as long as they fit.

        lengths: tokens of every example. Every example of the order is in one micro-batch, whole.
        """
        taken: list[int] = []
        longest = 0
        for index in order:
            longest = max(longest, lengths[index])
            if taken and len(taken) >= self.rows(longest):
                yield taken
                taken, longest = [], lengths[index]
            taken.append(index)
        if taken:
            yield taken

    def check(self, examples: Sequence[Example]) -> None:
        """Raises QtuneError for an example that does not fit even alone."""
        longest = max(examples, key=lambda example: len(example.input_ids))
        if self.by_tokens and len(longest.input_ids) > self.limit:
            raise QtuneError(
                f"train.micro_tokens is {self.limit:,}, and the longest example ({longest.where}) has "
                f"{len(longest.input_ids):,} tokens; legal: {len(longest.input_ids):,} or more, or a data.max_length "
                f"of up to {self.limit:,}"
            )


def order_of(count: int, seed: int | None, epoch: int) -> list[int]:
    """The order of `count` examples in an epoch: by (seed, epoch) alone; `seed=None` keeps the file's."""
    order = list(range(count))
    if seed is not None:
        random.Random(f"{seed}/{epoch}").shuffle(order)  # a string is hashed whole: (0, 1) and (1, 0) differ
    return order


def batches(examples: Sequence[Example], capacity: Capacity, *, seed: int | None, epoch: int = 0) -> Iterator[Batch]:
    """One pass over the examples in the order of (seed, epoch); the last batch may be smaller."""
    if not examples:
        raise QtuneError("no examples to make batches of")
    lengths = [len(example.input_ids) for example in examples]
    for taken in capacity.fill(order_of(len(examples), seed, epoch), lengths):
        yield collate([examples[i] for i in taken])


def stream(examples: Sequence[Example], capacity: Capacity, seed: int) -> Iterator[Batch]:
    """Batches without end: epoch after epoch, each in an order of its own."""
    epoch = 0
    while True:
        yield from batches(examples, capacity, seed=seed, epoch=epoch)
        epoch += 1


def micro_batches(lengths: Sequence[int], capacity: Capacity, seed: int, epoch: int) -> int:
    """How many micro-batches an epoch has. By tokens that hangs on its order, so they are made and counted."""
    if not capacity.by_tokens:
        return math.ceil(len(lengths) / capacity.limit)
    return sum(1 for _ in capacity.fill(order_of(len(lengths), seed, epoch), lengths))


def steps_of(keys: TrainKeys, lengths: Sequence[int]) -> int:
    """Optimizer steps of a run over examples of these lengths, in the order of their file.

    The micro-batches of each epoch are those of its own order, of a broken epoch the first part of them. Where they do
    not come out even, the last step takes more, from what comes next.
    """
    if keys.steps is not None:
        return keys.steps
    capacity, epochs = Capacity.of(keys), Fraction(str(keys.epochs or 1.0))
    whole = int(epochs)
    if capacity.by_tokens:
        total = Fraction(sum(micro_batches(lengths, capacity, keys.seed, epoch) for epoch in range(whole)))
        total += (epochs - whole) * (micro_batches(lengths, capacity, keys.seed, whole) if epochs > whole else 0)
    else:
        total = epochs * micro_batches(lengths, capacity, keys.seed, 0)
    return max(1, math.ceil(total / keys.accumulate))


def padding(lengths: Sequence[int], capacity: Capacity, seed: int) -> float:
    """The share of a first epoch's places that is padding."""
    taken = capacity.fill(order_of(len(lengths), seed, 0), lengths)
    places = sum(len(one) * max(lengths[i] for i in one) for one in taken)
    return 1 - sum(lengths) / places


def show_example(example: Example, tokenizer: Any, *, colour: bool = True, limit: int = 800) -> Text:
    """The example decoded, trained parts green; without `colour` they stand between ⟦ and ⟧.

    Parts beyond `limit` characters lose their middle.
    """
    text, seen, start = Text(), "", 0
    ids, trained = list(example.input_ids), example.trained
    for end in range(1, len(ids) + 1):
        if end < len(ids) and trained[end] == trained[start]:
            continue
        # decoded from 0 on, so that the spaces between the parts are kept
        decoded = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = _elide(decoded[shared(seen, decoded) :], limit)
        if colour:
            text.append(piece, style="bold green" if trained[start] else "dim")
        else:
            text.append(f"⟦{piece}⟧" if trained[start] else piece)
        seen, start = decoded, end
    return text


def _elide(text: str, limit: int) -> str:
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
