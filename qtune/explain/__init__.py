"""What the code of an error means: `Q204` -> what happened, and what to do. `qtune explain` prints it, docs/errors.md
is written from it."""

from .kinds import KINDS, Kind, markdown

__all__ = ["KINDS", "Kind", "markdown"]
