"""How methods are named in PEFT, in one table for both directions, and an adapter as PEFT wrote it.

PEFT's rules: a key of `rank_pattern` or `alpha_pattern` is a regular expression that the end of a site's name matches
behind a dot (`get_pattern_key`); the first that matches counts, and where none does, the value for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..errors import QtuneError

LARGEST = 1 << 31  # of a number in a config: not NaN, not infinite, no text of a thousand digits


@dataclass(frozen=True)
class PeftNames:
    """How PEFT names a method: one table for both directions. tensors, shared and options map ours to PEFT's.

    constants go into its config, and are asked of one that comes in; conv1d: does PEFT put the method on transformers'
    Conv1D? native: PEFT has this very method, so that its adapters come in as ours. reads: keys of PEFT's config that
    `from_peft` takes beside those of `options`.
    """

    peft_type: str
    tensors: Mapping[str, str]
    options: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    conv1d: bool = True
    native: bool = False
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class FromPeft:
    """config: its adapter_config.json; sites: site -> PEFT's name of a tensor -> tensor."""

    config: Mapping[str, Any]
    sites: Mapping[str, Mapping[str, Tensor]]

    def value(self, key: str, like: Any) -> Any:
        """What the config says under `key`, of the type of `like` (a float may be written as an integer). Raises
        QtuneError where it is of another; where it is absent, unless that means off."""
        off = isinstance(like, bool) or key.endswith("dropout")
        found = self.config.get(key, type(like)() if off else None)
        kinds = (int, float) if isinstance(like, float) else (type(like),)
        if type(found) not in kinds or not -LARGEST < found < LARGEST:
            kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(like)]
            raise QtuneError("Q417", f"adapter_config.json: {key} is {found!r}; legal: {kind}")
        return found

    def at(self, site: str, key: str, otherwise: Any) -> Any:
        """What a pattern of the config says of a site. Raises QtuneError for what is no mapping of patterns to
        numbers."""
        patterns = self.config.get(key) or {}
        kinds = (int,) if key == "rank_pattern" else (int, float)
        legal = isinstance(patterns, dict) and all(type(v) in kinds and 0 < v < LARGEST for v in patterns.values())
        if not legal:
            raise QtuneError("Q417", f"adapter_config.json: {key} is {patterns!r}; legal: names of layers with numbers")
        return next((value for pattern, value in patterns.items() if matches_end(pattern, site, key)), otherwise)


def matches_end(pattern: str, site: str, key: str) -> bool:
    """Does this regular expression of the config's `key` match a site's name, or the end of it behind a dot?"""
    return matches_whole(rf"(.*\.)?({pattern})", site, key)


def matches_whole(pattern: str, site: str, key: str) -> bool:
    """Does this regular expression of the config's `key` match a site's name? Raises QtuneError where it is none."""
    try:
        return re.fullmatch(pattern, site) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise QtuneError("Q417", f"adapter_config.json: {key} holds {pattern!r}, no pattern: {error}") from None


def padded(value: Tensor, dim: int, rank: int, most: int, site: str) -> Tensor:
    """A factor whose dimension `dim` is the rank, with zeros up to `most`. Raises QtuneError where it has another rank
    than the config says."""
    if value.dim() != 2 or value.shape[dim] != rank:
        raise QtuneError(
            "Q404",
            f"adapter_config.json gives {site} the rank {rank}, but its factor in the file is {tuple(value.shape)}",
        )
    return F.pad(value, (0, most - rank) if dim == 1 else (0, 0, 0, most - rank)) if rank < most else value
