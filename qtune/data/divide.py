"""Examples of several sources: which are held out, how often each is drawn, and which are on both sides."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import QtuneError
from .records import PLAIN
from .report import Example
from .tokens import Tokens


@dataclass
class Part:
    """The examples of one source, each with the digest of its record, and what was counted on the way."""

    name: str
    weight: float
    tokens: Tokens
    examples: list[tuple[Example, bytes]] = field(default_factory=list)
    duplicates: int = 0
    truncated: int = 0
    cut_answers: int = 0
    left_out: int = 0
    dropped: int = 0
    longest: int = 0
    needed: list[int] = field(default_factory=list)  # of each dropped record, the length that keeps a trained token
    long: list[str] = field(default_factory=list)


def split(parts: Sequence[Part], share: float, seed: int, name: str) -> list[Example]:
    """Take what is held out away from the parts: whole records, those with the smallest hash of content and seed.

    Duplicates go to one side, also those that only became equal when they were cut. Of several texts each goes to one
    side, but for windows that a training text has as well; a single text goes by window.
    """
    texts = {digest for part in parts for _, digest in part.examples if part.tokens.format == PLAIN}
    key, one = str(seed).encode()[:64], texts if len(texts) == 1 else set[bytes]()

    def unit(example: Example, digest: bytes) -> bytes:
        return digest if digest in texts and not one else digest_of(example)

    ranks: dict[bytes, bytes] = {}
    for part in parts:
        for example, digest in part.examples:
            own = unit(example, digest)
            rank = hashlib.blake2b(own if digest in one else digest, key=key).digest()
            ranks[own] = min(rank, ranks.get(own, rank))
    count = min(max(1, round(share * len(ranks))), len(ranks) - 1)
    chosen = set(sorted(ranks, key=ranks.__getitem__)[: max(0, count)])
    pairs = [pair for part in parts for pair in part.examples]
    learned = {digest_of(example) for example, digest in pairs if unit(example, digest) not in chosen}
    held = [example for example, _ in pairs if digest_of(example) not in learned]
    if not held:
        raise QtuneError(
            "Q215", f"{name} holds no two records that differ, so data.split = {share:g} can hold out none; legal: null"
        )
    for part in parts:
        part.examples = [pair for pair in part.examples if digest_of(pair[0]) in learned]
    return held


def digest_of(example: Example) -> bytes:
    return hashlib.blake2b(example.input_ids.tobytes(), digest_size=16).digest()


def drawn(parts: Sequence[Part], seed: int) -> list[Example]:
    """The examples of an epoch: each part as often as its weight says, a broken rest of it by the seed."""
    made: list[Example] = []
    for number, part in enumerate(parts):
        examples = [example for example, _ in part.examples]
        times = int(part.weight)
        count = round((part.weight - times) * len(examples))
        some = random.Random(f"{seed}/{number}").sample(range(len(examples)), count)
        made += examples * times + [examples[i] for i in sorted(some)]
    return made


def both(parts: Sequence[Part], others: Sequence[Part]) -> list[str]:
    """A note where examples of data.eval are in data.train as well."""
    known = {digest_of(example) for part in parts for example, _ in part.examples}
    evaluated = [digest_of(example) for part in others for example, _ in part.examples]
    count = sum(digest in known for digest in evaluated)
    return [f"{count:,} of the {len(evaluated):,} examples of data.eval are in data.train, too"] if count else []
