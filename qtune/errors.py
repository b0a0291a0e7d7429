"""The one exception for faults of the user's input: the CLI prints its text as one paragraph, without a traceback;
and how a full memory is recognized."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class QtuneError(Exception):
    """A fault in what the user gave (recipe, file, option). `code`, such as Q204, is its kind and does not change
    between versions (docs/errors.md lists all); str() is a text that names the thing given and the legal values."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)  # both, as workers send errors pickled
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return self.text


def one_of(what: str, given: object, legal: Iterable[object], code: str = "Q101") -> QtuneError:
    """An error for a value outside of a closed set: `unknown scheme 'nf5' (did you mean 'nf4'?); legal: dense, ...`."""
    names = sorted(str(x) for x in legal)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return QtuneError(code, f"unknown {what} {str(given)!r}{hint}; legal: {', '.join(names)}")


def tried(check: Callable[[], T], faults: list[QtuneError]) -> T | None:
    """What a check returns; None where it is at fault, which goes into `faults` unless it has no text: then it only
    stands on something that was found at fault before."""
    try:
        return check()
    except QtuneError as error:
        if str(error):
            faults.append(error)
        return None


def all_of(faults: Sequence[QtuneError], code: str) -> QtuneError:
    """One error for all of them: the only one as it is, several as a list with `code`."""
    if len(faults) == 1:
        return faults[0]
    return QtuneError(code, "\n  ".join((f"there are {len(faults)} faults:", *map(str, faults))))


def listed(things: Iterable[object], most: int = 8, between: str = ", ") -> str:
    """The first of them as words, and dots where there are more."""
    words = [str(thing) for thing in things]
    return between.join(words[:most]) + " ..." * (len(words) > most)


# how torch says on GPUs, on Linux and on Windows that memory is full; and what helps
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
FREE_MEMORY = {
    "train": "lower train.micro_batch or data.max_length, or set train.checkpointing",
    "eval": "give a smaller --batch",
    "plan": "the first values of the adapter are drawn here: lower adapter.rank",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Python's MemoryError, or torch's error of any device."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)
