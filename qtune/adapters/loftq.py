"""LoftQ: LoRA that starts as the best rank-r correction of the quantization error W - Q.

Li et al. 2023 (arXiv 2310.08659), for any scheme: `iterations` times, quantize W - B A, then B A = the top singular
triplets of W - Q, a root of S in each factor. With 1 the base stays as it is (whatever chose its codes); with more, the
base is packed anew and becomes the run's own. The alternation need not fall in each step: the best iterate is kept.
The scale alpha/rank is folded into the factors (the authors' code and PEFT leave it out: with alpha = 2 rank nothing of
the error is corrected). alpha and rank are equal by default, as in the paper, which has no scale.
`svd` and `niter`: the fast SVD and its iterations, or the full one (starts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from . import starts
from .base import QuantLinear, Scheme, Source
from .lora import LoRA


class LoftQ(LoRA):
    """Starts from the error of quantization."""

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
        iterations: int = 1,
        svd: str = "fast",
        niter: int = 4,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, plus=plus, freeze_a=freeze_a)
        starts.check_rank(base, rank)
        self.iterations, self.svd = iterations, (svd, niter)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight"})

    @classmethod
    def refuses(cls, scheme: Scheme, options: Mapping[str, Any]) -> str:
        return starts.without_error(scheme)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        w, best = starts.weight_of(source), starts.Best()
        for iteration in range(self.iterations):
            if iteration:
                starts.residual(self, base, w)
            error = starts.error_of(base, w)
            starts.put(self, *starts.halves(*starts.top(error, len(self.A), *self.svd)))
            if self.iterations > 1:
                best.offer(self, base, starts.subtract(self, error))
        if self.iterations > 1:
            best.restore(self, base)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return super().check(options) + starts.faults(options, iterations=1)
