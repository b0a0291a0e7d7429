"""Sizes that a person types: "24GB" is 24 x 10^9 bytes, "24GiB" is 24 x 2^30, as SI and IEC 80000-13 have it.

A number without a unit is refused, as text and as a number of a YAML file: 8 can be meant as bytes or as gigabytes.
"""

from __future__ import annotations

import re
from decimal import Decimal

from .errors import QtuneError

UNITS = {"B": 1} | {
    f"{letter}{middle}B": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate(("k" if base == 1000 else "K", "M", "G", "T"), 1)
}
LARGEST = 2**63 - 1  # what a size in torch can hold
_BY_NAME = {name.lower(): factor for name, factor in UNITS.items()}
_SIZE = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*([a-z]*)", re.IGNORECASE)


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes of "7.5GiB", "24 gb", "512 B". Case and a space do not matter; a fraction of a byte is cut off.

    what: names the value in the error. Raises QtuneError for no unit, an unknown one, and for what is not above 0.
    """
    given = str(text).strip()
    found = _SIZE.fullmatch(given)
    legal = f"a number above 0 and one of {', '.join(UNITS)}, such as 24GB or 7.5GiB"
    if found is None:
        raise QtuneError("Q110", f"{what} {given!r} is not a size; legal: {legal}")
    number, unit = found.groups()
    if not unit:
        raise QtuneError("Q110", f"{what} {given!r} has no unit; legal: {legal}")
    if unit.lower() not in _BY_NAME:
        raise QtuneError("Q110", f"{what} {given!r} has the unknown unit {unit!r}; legal: {legal}")
    size = int(Decimal(number) * _BY_NAME[unit.lower()])
    if not 1 <= size <= LARGEST:
        raise QtuneError(
            "Q110", f"{what} {given!r} is {'too large' if size > LARGEST else 'below one byte'}; legal: {legal}"
        )
    return size
