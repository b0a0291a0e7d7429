"""OLoRA: LoRA that starts as the first part of W = Q R, B = Q[:, :r], A = R[:r]; the base holds the rest, W - B A.

Büyükakyüz 2024 (arXiv 2406.01775). Without pivoting the first columns of Q come from the first columns of W alone, and
R[:r] = Q[:, :r]^T W, so nothing more is decomposed. The scale alpha/rank is folded into the factors (PEFT lets it
multiply the product; alpha and rank are equal by default, which is the same).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from . import starts
from .base import QuantLinear, Source
from .lora import LoRA


class OLoRA(LoRA):
    """Starts with orthonormal columns in B."""

    bound: ClassVar[float | None] = 1.05

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
        plus: float = 1.0,
        freeze_a: bool = False,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, plus=plus, freeze_a=freeze_a)
        starts.check_rank(base, rank)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight"})

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        w = starts.weight_of(source)
        q = torch.linalg.qr(w[:, : len(self.A)]).Q
        starts.put(self, q, q.T @ w)
        starts.residual(self, base, w)
