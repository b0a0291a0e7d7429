"""COLA, a chain of LoRAs: y = base(x) + s (sum of B_k A_k of the links before + B A) x; each link learns what is left.

Xia, Qin & Hazan 2024 (arXiv 2401.04151). The run is cut into `chain` equal parts: a LoRA is trained, tied to the weight
and the next one begins, A drawn anew, B zero, the optimizer's states as at the start. It is ReLoRA without what keeps a
long pretraining steady (states that stay in part, a learning rate that rises anew; the paper's abstract does not say
whether its schedule begins anew, and 3 links of rank 16 are ours). As there, the links are carried
beside the packed base (carried.py: `carry`). A [rank, in], B [out, rank]; rank of the update: at most chain x rank.
Left out: links of falling ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import QuantLinear
from .relora import ReLoRA


class CoLA(ReLoRA):
    """LoRAs trained one after the other."""

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        chain: int = 3,
        carry: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            base, rank=rank, alpha=alpha, dropout=dropout, period=1 / chain, rewarm=0, prune=1, carry=carry, seed=seed
        )

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["chain"] < 2:
            faults.append(f"adapter.chain must be at least 2 links, not {options['chain']}: one is lora")
        return faults
