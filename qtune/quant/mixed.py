"""Several schemes in one model: by the name of a layer, or by an average of bits that the first layers spend.

    scheme: {default: int3, "*.down_proj": int4}        the first pattern that matches a layer decides
    scheme: {bits: 2.5, high: nf4, low: nf2}            as many of the first layers in `high` as the average allows

The second is LoftQ's way (Li et al. 2023, arXiv 2310.08659, section 5): of 32 layers the first 16, 8 or 4 in 4 bits and
the others in 2 make 3, 2.5 and 2.25. As there, bits are those of the codes; scales come on top.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..errors import QtuneError
from .scheme import SCHEMES, Scheme, scheme_from


def matches(name: str, pattern: str) -> bool:
    """Is `pattern` the layer's name, the end of it, or a pattern of it?"""
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Mixed:
    """A scheme for each layer by its name. `rules`: (pattern, scheme); a layer that none matches takes `default`."""

    default: Scheme
    rules: tuple[tuple[str, Scheme], ...]
    told: str = field(default="", compare=False)  # what made these rules, where a person did not write them

    name = "mixed"

    def of(self, site: str) -> Scheme:
        """The scheme of the layer `site`."""
        return next((scheme for pattern, scheme in self.rules if matches(site, pattern)), self.default)

    def resolve(self, sizes: Mapping[str, int]) -> Mixed:
        """Itself for a model whose packed layers are `sizes` (name -> weights). QtuneError for a pattern that matches
        none of them."""
        unused = [repr(pattern) for pattern, _ in self.rules if not any(matches(site, pattern) for site in sizes)]
        if unused:
            ends = sorted({site.rpartition(".")[2] for site in sizes})
            raise QtuneError(
                "Q109",
                f"scheme: no packed layer matches {', '.join(unused)}; legal: default, {', '.join(ends)}, or a pattern",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """{"default": ..., pattern: ...}: `storage_from` reads it back."""
        return {"default": self.default.to_dict(), **{pattern: scheme.to_dict() for pattern, scheme in self.rules}}

    def __str__(self) -> str:
        return self.told or ", ".join(
            [str(self.default), *(f"{scheme} for {pattern}" for pattern, scheme in self.rules)]
        )


@dataclass(frozen=True)
class Average:
    """The first layers in `high`, the others in `low`, so that a weight's code takes at most `bits` on average."""

    bits: float
    high: Scheme
    low: Scheme

    name = "mixed"

    def __post_init__(self) -> None:
        low, high = self.low.code_bits, self.high.code_bits
        if not low <= self.bits <= high:
            raise QtuneError(
                "Q108",
                f"an average of {self.bits:g} bits cannot be made of {self.high} and {self.low}; "
                f"legal: {low} to {high}, with `high` the larger one",
            )

    def resolve(self, sizes: Mapping[str, int]) -> Mixed:
        """The rules for a model whose packed layers are `sizes` (name -> weights)."""
        layers: dict[str, int] = {}
        for site, size in sizes.items():
            found = re.match(r"(.*?\.\d+)\.", site)
            layer = found[1] if found else site
            layers[layer] = layers.get(layer, 0) + size
        room = (self.bits - self.low.code_bits) * sum(layers.values())
        chosen = []
        for layer, size in layers.items():
            room -= (self.high.code_bits - self.low.code_bits) * size
            if room < -1e-6 * size:
                break
            chosen.append(layer)
        told = f"{self.high} for the first {len(chosen)} of {len(layers)} layers, {self.low} for the others"
        return Mixed(self.low, tuple((f"{layer}.*", self.high) for layer in chosen), told)

    def to_dict(self) -> dict[str, Any]:
        """{"bits", "high", "low"}: `storage_from` reads it back."""
        return {"bits": self.bits, "high": self.high.to_dict(), "low": self.low.to_dict()}

    def __str__(self) -> str:
        return f"{self.bits:g} bits of {self.high} and {self.low}"


Storage: TypeAlias = Scheme | Mixed | Average


def storage_from(value: Any) -> Storage:
    """What a recipe says under `scheme`: a name, {name: ..., options}, {default: ..., pattern: ...} or {bits, high,
    low}; all faults in one error."""
    if isinstance(value, Mixed | Average):
        return value
    if not isinstance(value, Mapping) or not {"default", "bits"} & set(value):
        return scheme_from(value)
    kind = "bits" if "bits" in value else "default"
    faults, made = [], {}
    keys = [key for key in value if key != "bits"]
    if kind == "bits":
        bits = value["bits"]
        if isinstance(bits, bool) or not isinstance(bits, int | float):
            faults.append(f"bits must be a number like 2.5, not {bits!r}")
        if set(keys) != {"high", "low"}:
            given, names = ", ".join(map(str, keys)) or "nothing", ", ".join(sorted(SCHEMES))
            faults.append(f"with bits go high and low, each one of {names}; given: {given}")
    for key in keys:
        try:
            made[str(key)] = scheme_from(value[key])
        except (QtuneError, TypeError) as error:
            faults.append(f"{key}: {error}")
    if faults:
        raise QtuneError("Q108", "; ".join(faults))
    if kind == "bits":
        return Average(float(value["bits"]), made["high"], made["low"])
    default = made.pop("default")
    return Mixed(default, tuple(made.items()))
