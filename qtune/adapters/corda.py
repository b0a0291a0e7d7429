"""CorDA: LoRA that starts from W seen through its inputs: W C = U S V^T, B A = U_r S_r V_r^T C^-1.

Yang et al. 2024 (arXiv 2406.05223). The base holds the rest, W - B A. C is the second moment of the inputs plus
`damping` times the mean of its diagonal. `mode` "ipm" (instruction-previewed) takes the largest values, to learn what
the calibration text is about; "kpm" (knowledge-preserved) the smallest, by a full SVD, to keep it. A root of S is in
each factor; the scale alpha/rank is folded in (equal by default). The authors double the damping until a numerical
inverse is accurate; here V^T C^-1 comes from a Cholesky factor, and what is wrong with it stays in the residual. They
also scale each text's inputs by their maximum; here each token counts alike. B A is the same for any multiple of C, but
B has its root and A the inverse: how far one learning rate moves each is another than with the authors' C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from . import starts
from .base import QuantLinear, Source, one_of
from .lora import LoRA

MODES = ("ipm", "kpm")


class CorDA(LoRA):
    """Starts from the directions that calibration text uses most, or least."""

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
        mode: str = "ipm",
        damping: float = 0.01,
        svd: str = "fast",
        niter: int = 4,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, plus=plus, freeze_a=freeze_a)
        starts.check_rank(base, rank)
        self.mode, self.damping, self.svd = mode, damping, (svd, niter)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight", "gram"})

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        w, rank = starts.weight_of(source), len(self.A)
        c = starts.damped(starts.checked_gram(base, source), self.damping)
        u, s, vh = starts.top(w, rank, *self.svd, c) if self.mode == "ipm" else starts.bottom(w, rank, c)
        B, A = starts.halves(u, s, vh)
        starts.put(self, B, torch.cholesky_solve(A.T, starts.root(c)).T)
        starts.residual(self, base, w)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options) + starts.faults(options)
        return faults + ([] if options["mode"] in MODES else [str(one_of("adapter.mode", options["mode"], MODES))])
