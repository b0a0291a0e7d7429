"""What became of data: the report, the histogram of lengths, an example with its trained parts shown."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from .chat import shared

BARS = 10  # of a histogram


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized record: `trained[i]` is 1 where `input_ids[i]` is learned. Position 0 never is."""

    input_ids: array[int]
    trained: bytes
    where: str


@dataclass(frozen=True)
class DataReport:
    """What became of data. `examples`, `tokens`, `trained` count what is learned from; the other counts are of what was
    read, without duplicates. `longest` is in tokens, before cutting.

    duplicates: records equal to an earlier one, removed where deduped. truncated: examples longer than max_length.
    cut_answers: answers of theirs that lost tokens. dropped: examples that lost every trained token. left_out: longer
    ones that data.too_long = drop leaves out. held_out: examples that data.split puts aside.
    """

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
    duplicates: int = 0
    deduped: bool = False
    cut_answers: int = 0
    left_out: int = 0
    held_out: int = 0
    sources: tuple[str, ...] = ()

    def __str__(self) -> str:
        lost = f" ({_count(self.cut_answers, 'answer')} lost tokens)" if self.cut_answers else ""
        cut = f"{self.truncated - self.left_out:,} cut at {self.max_length:,}{lost}"
        cut += f", {self.left_out:,} longer than {self.max_length:,} left out" if self.left_out else ""
        head = (
            f"{self.path}: {_count(self.records, 'record')} ({self.format})"
            + (f", {_count(self.duplicates, 'duplicate')} removed" if self.deduped else "")
            + (f", {self.held_out:,} held out" if self.held_out else "")
        )
        line = (
            f"{head} -> {_count(self.examples, 'example')}, {self.tokens:,} tokens, {self.trained:,} trained "
            f"({self.trained / self.tokens:.0%}); longest {self.longest:,}; {cut}, "
            f"{self.dropped:,} dropped (no trained token left)"
        )
        return "\n".join((*self.sources, line, *(f"note: {note}" for note in self.notes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, examples) of up to BARS equal steps over the lengths; both ends included. `lengths` is not empty."""
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high - low + 1) // BARS))
    counts = [0] * (-(-(high - low + 1) // step))
    for length in lengths:
        counts[(length - low) // step] += 1
    return [(low + i * step, min(high, low + (i + 1) * step - 1), count) for i, count in enumerate(counts)]


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """The lengths below which half, nine tenths and 99 of 100 examples stay. `lengths` is not empty."""
    ordered = sorted(lengths)
    return {
        name: ordered[int(share * (len(ordered) - 1))] for name, share in (("50%", 0.5), ("90%", 0.9), ("99%", 0.99))
    }


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
