"""PiSSA: LoRA that starts as the top singular triplets of W; the base holds the rest, W - B A.

Meng et al. 2024 (arXiv 2404.02948). On a quantized base it is QPiSSA: `iterations` times, B A = the top triplets of
W - Q (of W at first), then Q = quantize(W - B A), as in the authors' loop, which ends on the quantization; the best
iterate is kept. `refit` ends on one more SVD of W - Q instead, where that leaves less: the error can only fall.
B A is what the rounded factors give, so that what rounding takes from them stays in the residual.
alpha and rank are equal by default, the paper's setting; any other scale is folded into the factors, and changes only
how fast they learn. No dropout: it would drop the largest part of the weight.
`svd` and `niter`: the fast SVD and its iterations, or the full one (starts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from . import starts
from .base import PeftNames, QuantLinear, Source
from .lora import NAMES, LoRA


class PiSSA(LoRA):
    """Trains the principal part of the weight."""

    bound: ClassVar[float | None] = 1.0
    peft: ClassVar[PeftNames | None] = replace(
        NAMES, options={ours: theirs for ours, theirs in NAMES.options.items() if ours != "dropout"}, native=False
    )

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 16.0,
        rslora: bool = False,
        plus: float = 1.0,
        freeze_a: bool = False,
        iterations: int = 1,
        refit: bool = False,
        svd: str = "fast",
        niter: int = 4,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, rslora=rslora, plus=plus, freeze_a=freeze_a)
        starts.check_rank(base, rank)
        self.iterations, self.refit, self.svd = iterations, refit, (svd, niter)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight"})

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        w, best = starts.weight_of(source), starts.Best()
        several = self.iterations > 1 or self.refit
        for iteration in range(self.iterations):
            self._split(starts.error_of(base, w) if iteration else w)
            starts.residual(self, base, w)
            if several:
                best.offer(self, base, starts.subtract(self, starts.error_of(base, w)))
        if several:
            best.restore(self, base)
        if self.refit:
            error = starts.error_of(base, w)
            self._split(error)
            best.offer(self, base, starts.subtract(self, error))
            best.restore(self, base)

    def _split(self, m: Tensor) -> None:
        """Take the top triplets of m [out, in]."""
        starts.put(self, *starts.halves(*starts.top(m, len(self.A), *self.svd)))

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return super().check({**options, "dropout": 0.0}) + starts.faults(options, iterations=1)
