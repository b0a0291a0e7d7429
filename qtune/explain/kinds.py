"""The table of the kinds of faults: code -> title, meaning, advice.

A kind is what a user can do about it, not a line of our code; several faults of one advice share it. A code stays what
it is for good: a kind that is gone leaves a gap. inputs.py and work.py hold the text: `= Q1: family`, then entries of a
line with code and title, the meaning, and the advice after `>`, apart by an empty line.
"""

from __future__ import annotations

from dataclasses import dataclass

from .inputs import INPUTS
from .work import WORK

HEAD = """# Errors

A fault is told in one paragraph with a code, such as `error Q204: ...`. The code stays the same between versions; with
`--json` it is in the JSON value on stdout, in Python it is `error.code` of a `qtune.errors.QtuneError`.
`qtune explain Q204` prints an entry of this page, which `qtune explain --markdown` writes.
"""


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `advice` says what a user can do."""

    code: str
    title: str
    meaning: str
    advice: str
    family: str


def _kinds(text: str) -> list[Kind]:
    found, family = [], ""
    for block in text.strip().split("\n\n"):
        if block.startswith("= "):
            family = block.partition(": ")[2]
            continue
        head, _, rest = block.partition("\n")
        code, _, title = head.partition(" ")
        meaning, _, advice = rest.partition("\n> ")
        found.append(Kind(code, title, " ".join(meaning.split()), " ".join(advice.split()), family))
    return found


KINDS: dict[str, Kind] = {kind.code: kind for kind in (*_kinds(INPUTS), *_kinds(WORK))}


def markdown() -> str:
    """docs/errors.md: every kind, by family."""
    parts, family = [HEAD], ""
    for kind in KINDS.values():
        if kind.family != family:
            family = kind.family
            parts.append(f"## {family[0].upper()}{family[1:]}\n")
        # an anchor of its own, as a heading's would change with its title
        parts.append(f'<a id="{kind.code.lower()}"></a>\n\n### {kind.code} {kind.title}\n\n{kind.meaning}\n')
        parts.append(f"**What to do:** {kind.advice}\n")
    return "\n".join(parts)
