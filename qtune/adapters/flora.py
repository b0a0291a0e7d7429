"""FLORA: y = base(x) + (sum over finished cycles of B_k A_k + B A) x, A random and frozen, drawn anew each `period`.

Hao, Cao & Mou 2024 (arXiv 2402.03293): a LoRA whose A stays is a random projection of W's gradient, G A^T, and another
A for each cycle makes the sum of high rank. The entries of A have the variance 1/rank, so that A^T A is the identity on
average: no alpha, and learning rates are those of full training (the authors' are times the RMS of W). At a new A the
optimizer's mean M moves along, to M A A'^T, as the paper has it; its length stays, for it grows by the root of in/rank,
which the authors' clipping bounds and AdamW would take as a step. The mean of squares becomes its row's average. States
without B's shape (adamw8, Adafactor) begin anew. Only B [out, rank] is trained, and x is not kept, x A^T is.
Products of finished cycles are carried beside the packed base (carried.py: `carry`). `period`: steps, or below 1 a
share of the run; the authors: 1,000 steps.
Left out: projections of the left side, compressed sums of gradients over micro-batches (LoRA's B is one already), and
what needs W's whole gradient: the authors' code divides by its squares before it projects, and adds some of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import carried
from .base import Change, QuantLinear, Source, draw, replace_values
from .relora import ReLoRA


class Flora(ReLoRA):
    """A compressed gradient, with another projection from time to time."""

    def __init__(
        self, base: QuantLinear, *, rank: int = 16, period: float = 0.25, carry: int = 256, seed: int = 0
    ) -> None:
        super().__init__(base, rank=rank, alpha=rank, period=period, rewarm=0, carry=carry, seed=seed)
        self.freeze_a = True
        A = self.A.detach()
        del self.A
        self.register_buffer("A", A)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.A, nn.init.normal_, 0.0, len(self.A) ** -0.5)
        nn.init.zeros_(self.B)

    def anew(self, site: str, step: int) -> dict[nn.Parameter, Change]:
        """A drawn anew, B zero, the optimizer's mean moved to the new A."""
        drawn = torch.randn(self.A.shape, generator=carried.generator(self.seed, step, site))
        new = drawn.mul_(len(drawn) ** -0.5).to(self.A)
        wide = torch.promote_types(new.dtype, torch.float32)
        turn = self.A.data.to(wide) @ new.to(wide).T
        replace_values(self.A, new)
        return {self.B: Change(torch.zeros_like, partial(moved, turn=turn), row_means)}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return super().check({**options, "dropout": 0.0})


def moved(mean: Tensor, turn: Tensor) -> Tensor:
    """mean [out, rank] times turn [rank, rank], as long as before."""
    new = mean @ turn.to(mean)
    return new * (mean.norm() / new.norm().clamp(min=torch.finfo(new.dtype).tiny))


def row_means(squares: Tensor) -> Tensor:
    return squares.mean(1, keepdim=True).expand_as(squares).clone()
