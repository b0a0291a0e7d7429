"""EVA: LoRA whose A starts as the directions in which its inputs vary most, and B at zero: it starts as the identity.

Paischer et al. 2024 (arXiv 2410.07170): the rows of A are the top right singular vectors of the inputs, here the top
eigenvectors of their second moments G = mean of x x^T (PEFT subtracts the mean of the inputs first; the paper's
equation does not). Left out: giving layers ranks by explained variance, and whitening.
`svd` and `niter`: the fast SVD and its iterations, or the full one (starts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import starts
from .base import QuantLinear, Source
from .lora import LoRA


class EVA(LoRA):
    """A looks where calibration text has its variance."""

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        plus: float = 1.0,
        freeze_a: bool = False,
        svd: str = "fast",
        niter: int = 4,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, plus=plus, freeze_a=freeze_a)
        starts.check_rank(base, rank)
        self.svd = (svd, niter)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"gram"})

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        self.A.data.copy_(starts.top(starts.checked_gram(base, source), len(self.A), *self.svd)[2])
        nn.init.zeros_(self.B)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return super().check(options) + starts.faults(options)
