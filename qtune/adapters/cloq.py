"""CLoQ: LoRA that starts as the rank-r correction of W - Q with the least error of the outputs on calibration text.

Deng et al. 2025 (arXiv 2501.18475): with G + damping = L L^T, E = W - Q and E L = U S V^T, the minimum over rank-r
matrices of tr((E - B A) G (E - B A)^T) is B A = U_r S_r V_r^T L^-1. The base stays as it is, whatever chose its codes.
A has a root of S; B is then fitted again under the undamped G to A as it was rounded (starts.fit), which takes back
what the rounding of A and the damping cost. The scale alpha/rank is folded in (equal by default, the paper has none).
`damping`: of the mean of G's diagonal. `svd` and `niter`: the fast SVD and its iterations, or the full one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from . import starts
from .base import QuantLinear, Scheme, Source
from .lora import LoRA


class CLoQ(LoRA):
    """Starts from the error that calibration text sees."""

    bound: ClassVar[float | None] = 1.0

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
        damping: float = 0.01,
        svd: str = "fast",
        niter: int = 4,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, plus=plus, freeze_a=freeze_a)
        starts.check_rank(base, rank)
        self.damping, self.svd = damping, (svd, niter)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight", "gram"})

    @classmethod
    def refuses(cls, scheme: Scheme, options: Mapping[str, Any]) -> str:
        return starts.without_error(scheme)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        gram = starts.checked_gram(base, source)
        error, low = starts.error_of(base, starts.weight_of(source)), starts.root(starts.damped(gram, self.damping))
        B, A = starts.halves(*starts.top(error, len(self.A), *self.svd, low))
        starts.put(self, B, torch.linalg.solve_triangular(low, A, upper=False, left=False))
        starts.refit(self, error, gram)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return super().check(options) + starts.faults(options)
