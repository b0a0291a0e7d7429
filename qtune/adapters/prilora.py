"""PRILoRA: y = base(x) + s B A x; the rank rises from layer to layer.

Benedek & Wolf 2024 (arXiv 2401.11316). Layer l = 0 ... L - 1 has the rank r (1 + spread (2 l / (L - 1) - 1)), rounded
and at least 1: with `rank` 8 and `spread` 0.5 from 4 to 12, at the parameters of LoRA with rank 8. The layer is the
first number in a site's name; where a site has none, its place among all sites counts. s = alpha / `rank` everywhere.
Start: A Kaiming-uniform, B zero. A [rank of the layer, in], B [out, rank of the layer].
Left out: the paper's second half, which sets the least important entries of A to zero from time to time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .base import Adapter, PeftNames, QuantLinear
from .lora import LoRA, patterns
from .sora import NAMES


class PRILoRA(LoRA):
    """LoRA of a rank that rises with depth."""

    peft: ClassVar[PeftNames | None] = NAMES

    def __init__(
        self, base: QuantLinear, *, rank: int = 8, alpha: float = 32.0, dropout: float = 0.0, spread: float = 0.5
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout)

    @classmethod
    def varied(cls, sites: Sequence[str], options: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        numbers = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in sites]
        layers = [place if number is None else int(number[1]) for place, number in enumerate(numbers)]
        first, last = min(layers, default=0), max(layers, default=0)
        found = {}
        for name, layer in zip(sites, layers, strict=True) if last > first else ():
            rank = options["rank"] * (1 + options["spread"] * (2 * (layer - first) / (last - first) - 1))
            rank = max(1, int(rank + 0.5))
            found[name] = {"rank": rank, "alpha": options["alpha"] * rank / options["rank"]}
        return found

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return patterns(adapters)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if not 0 <= options["spread"] < 1:
            faults.append(f"adapter.spread must be at least 0 and below 1, not {options['spread']}")
        return faults
