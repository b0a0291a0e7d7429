"""Examples -> micro-batches: rows padded on the right, or packed: end to end in one row, without padding.

Packed examples do not see each other: the model is told their lengths, begins its positions anew at each of them, and
attends to them one by one (`model/apart.py`); the first token of none is learned. Best fit: the longest first, each
into the fullest row that has room for it.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice

import torch
from torch import Tensor

from .data import Example
from .errors import QtuneError
from .loss import IGNORED, trained_tokens
from .sections import TrainKeys


@dataclass(frozen=True)
class Batch:
    """All int64 [batch, longest in the batch], right-padded; where `lengths` are given [1, their sum], without padding.

    `labels` are aligned with `input_ids` (the loss shifts them); -100 is not trained. lengths: tokens of the examples
    that lie end to end.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    lengths: tuple[int, ...] = ()

    @property
    def examples(self) -> int:
        """How many there are in it."""
        return len(self.lengths) or len(self.input_ids)

    @property
    def trained(self) -> int:
        """The number of tokens that the shifted loss counts."""
        return trained_tokens(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        ids, mask, labels = (tensor.to(device) for tensor in (self.input_ids, self.attention_mask, self.labels))
        return Batch(ids, mask, labels, self.lengths)


def collate(examples: Sequence[Example], packed: bool = False) -> Batch:
    """Examples as one Batch, right-padded or packed. Padding is id 0: it is masked by position, so its id means
    nothing."""
    if packed:
        parts = [collate([example]) for example in examples]
        columns = zip(*((part.input_ids, part.attention_mask, part.labels) for part in parts), strict=True)
        ids, mask, labels = (torch.cat(column, 1) for column in columns)
        return Batch(ids, mask, labels, tuple(part.input_ids.shape[1] for part in parts))
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
    as examples x longest, padding with them; with `packed` as well, without padding."""

    limit: int
    by_tokens: bool = False
    packed: bool = False

    @classmethod
    def of(cls, keys: TrainKeys) -> Capacity:
        """What a recipe asks for."""
        if keys.micro_tokens is not None:
            return cls(keys.micro_tokens, True, keys.packing)
        assert keys.micro_batch is not None, "a recipe has one of the two"
        return cls(keys.micro_batch)

    def __str__(self) -> str:
        one = "" if self.limit == 1 else "s"
        return f"{self.limit:,} token{one}" if self.by_tokens else f"{self.limit:,} example{one}"

    def rows(self, longest: int) -> int:
        """Examples in a micro-batch whose longest has `longest` tokens; one is always taken."""
        return max(1, self.limit // max(1, longest)) if self.by_tokens else self.limit

    def fill(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Micro-batches of examples, by number, in `order`: each takes the next ones as long as they fit. Packed ones
        take what fits best, and come in the order of what is first of them.

        lengths: tokens of every example. Every example of the order is in one micro-batch, whole.
        """
        if self.packed:
            yield from _best_fit(order, lengths, self.limit)
            return
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
                "Q217",
                f"train.micro_tokens is {self.limit:,}, and the longest example ({longest.where}) has "
                f"{len(longest.input_ids):,} tokens; legal: {len(longest.input_ids):,} or more, or a data.max_length "
                f"of up to {self.limit:,}",
            )


def _best_fit(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows of at most `limit` tokens, the longest examples first, each into the row whose rest it fills best. Equal
    lengths keep their order, so that other orders give other rows."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[list[int]]] = {}  # tokens left -> rows
    left: list[int] = []  # its keys, rising
    for index in sorted(order, key=lambda i: -lengths[i]):
        at = bisect_left(left, lengths[index])
        if at == len(left):
            row, rest = [index], limit - lengths[index]
            rows.append(row)
        else:
            room = left[at]
            row, rest = open_rows[room].pop(), room - lengths[index]
            row.append(index)
            if not open_rows[room]:
                del open_rows[room], left[at]
        if rest > 0:
            if rest not in open_rows:
                insort(left, rest)
            open_rows.setdefault(rest, []).append(row)
    place = {index: at for at, index in enumerate(order)}
    for row in rows:
        row.sort(key=place.__getitem__)
    return sorted(rows, key=lambda row: place[row[0]])


def order_of(count: int, seed: int | None, epoch: int) -> list[int]:
    """The order of `count` examples in an epoch: by (seed, epoch) alone; `seed=None` keeps the file's."""
    order = list(range(count))
    if seed is not None:
        random.Random(f"{seed}/{epoch}").shuffle(order)  # a string is hashed whole: (0, 1) and (1, 0) differ
    return order


def batches(
    examples: Sequence[Example], capacity: Capacity, *, seed: int | None, epoch: int = 0, skip: int = 0
) -> Iterator[Batch]:
    """One pass over the examples in the order of (seed, epoch), the first `skip` micro-batches left out; the last one
    may be smaller."""
    if not examples:
        raise QtuneError("Q207", "no examples to make batches of")
    lengths = [len(example.input_ids) for example in examples]
    for taken in islice(capacity.fill(order_of(len(examples), seed, epoch), lengths), skip, None):
        yield collate([examples[i] for i in taken], capacity.packed)


def stream(examples: Sequence[Example], capacity: Capacity, seed: int, skip: int = 0) -> Iterator[Batch]:
    """Batches without end: epoch after epoch, each in an order of its own. skip: micro-batches that a run has seen;
    they are passed over, not made."""
    epoch, lengths = 0, [len(example.input_ids) for example in examples]
    while skip and skip >= (count := micro_batches(lengths, capacity, seed, epoch)) > 0:
        skip, epoch = skip - count, epoch + 1
    while True:
        yield from batches(examples, capacity, seed=seed, epoch=epoch, skip=skip)
        skip, epoch = 0, epoch + 1


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
    """The share of a first epoch's places that is padding; where examples are packed, that stays empty in rows."""
    taken = list(capacity.fill(order_of(len(lengths), seed, 0), lengths))
    places = sum(len(one) * max(lengths[i] for i in one) for one in taken)
    if capacity.packed:
        places = len(taken) * capacity.limit
    return 1 - sum(lengths) / places
