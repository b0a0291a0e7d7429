"""How the API page shows a docstring: qtune's say `name: meaning` in running text, a page has a list of them.

An extension of griffe, which reads the source for mkdocstrings (mkdocs.yml). A name counts where it begins a sentence
and is a parameter, or a field of the class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import griffe


class Parameters(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        _rewrite(func, (parameter.name for parameter in func.parameters))

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        _rewrite(cls, (name for name, member in cls.members.items() if member.is_attribute))


def _rewrite(item: Any, names: Iterable[str]) -> None:
    if item.docstring:
        item.docstring.value = listed(item.docstring.value, names)


def listed(text: str, names: Iterable[str]) -> str:
    """The text with an item for each name that it explains, and what it raises or returns in a paragraph of its own."""
    known = "|".join(re.escape(name) for name in names if name not in ("self", "cls"))
    text = re.sub(r"(?<=\.)\s+(?=(?:Raises|Returns) )", "\n\n", text)
    if known:
        several = rf"`?((?:{known})(?:, (?:{known}))*)`?: "
        text = re.sub(rf"(?:(?<=[.;])\s+|\n\s*|^){several}", r"\n\n- `\1`: ", text)
    return text
