"""What a machine has beside its device: host memory, and free space where the files of `memory` lie.

Of a card that is only named nothing is known: what a plan needs there is told, and compared where the user gives it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from ..memory import host_memory
from ..memory.files import existing
from ..recipe import Recipe
from ..runs import folder_of
from ..screen import size
from .devices import HERE, Device


@dataclass(frozen=True)
class Room:
    """Bytes; None: not known. host: of the machine's memory; disk: free in `folder`."""

    host: int | None = None
    disk: int | None = None
    folder: str = ""


@dataclass(frozen=True)
class Short:
    """What there is too little of: bytes that are needed, and that are there."""

    what: str
    need: int
    there: int

    def __str__(self) -> str:
        more = size(self.need - self.there)
        return f"{size(self.need)} of {self.what}, {more} more than the {size(self.there)} that are there"


UNKNOWN = Room()


def room_of(recipe: Recipe, device: Device) -> Room:
    """What this machine has, if the device is its own."""
    if not device.source.startswith(HERE):
        return UNKNOWN
    folder = existing(folder_of(recipe))
    return Room(host_memory() if device.kind == "cuda" else None, shutil.disk_usage(folder).free, str(folder))
