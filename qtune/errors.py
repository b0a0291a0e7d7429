"""The one exception for faults of the user's input: the CLI prints its text as one paragraph, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QtuneError(Exception):
    """A fault in what the user gave (recipe, file, option). The text names the thing given and the legal values."""


def one_of(what: str, given: object, legal: Iterable[object]) -> QtuneError:
    """An error for a value outside of a closed set: `unknown scheme 'nf5' (did you mean 'nf4'?); legal: dense, ...`."""
    names = sorted(str(x) for x in legal)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return QtuneError(f"unknown {what} {str(given)!r}{hint}; legal: {', '.join(names)}")
