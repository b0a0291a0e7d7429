"""MiLoRA: LoRA that starts as the last singular triplets of W; the base holds the rest, W - B A.

Wang et al. 2024 (arXiv 2406.09044): what matters least is trained, what matters most stays. The full SVD of the layer
is taken: the smallest values are nothing that a sketch finds. A root of S is in each factor; the scale alpha/rank is
folded in (alpha and rank are equal by default, the paper's setting).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from . import starts
from .base import QuantLinear, Source
from .lora import LoRA


class MiLoRA(LoRA):
    """Trains the minor part of the weight."""

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
        starts.put(self, *starts.halves(*starts.bottom(w, len(self.A))))
        starts.residual(self, base, w)
