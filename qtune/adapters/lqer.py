"""LQER: LoRA that starts as the rank-r correction of the quantization error E = W - Q, seen channel by channel.

Zhang et al. 2024 (arXiv 2402.02446): E D = U S V^T, B A = U_r S_r V_r^T D^-1, with D a diagonal of how large each input
channel is. `data` True is their L2QER, with D the root mean square of a channel, as QERA (Zhang et al. 2024, arXiv
2410.06040, theorem 2) derives it, where L2QER took the mean magnitude; QERA's exact form is what method cloq computes.
B is then fitted again under the whole G (starts.fit), so that the error of the outputs can only fall. `data` False is
LQER, the plain SVD of E. The base stays as it is. The scale alpha/rank is folded in (equal by default).
Left out: 8-bit factors and activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from . import starts
from .base import QuantLinear, Scheme, Source
from .lora import LoRA

FLOOR = 1e-4  # of the average channel: LQER's code clamps its diagonal there


class LQER(LoRA):
    """Starts from the error of quantization, large channels first."""

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
        data: bool = True,
        svd: str = "fast",
        niter: int = 4,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, plus=plus, freeze_a=freeze_a)
        starts.check_rank(base, rank)
        self.data, self.svd = data, (svd, niter)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight", "gram"} if options["data"] else {"weight"})

    @classmethod
    def refuses(cls, scheme: Scheme, options: Mapping[str, Any]) -> str:
        return starts.without_error(scheme)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        error = starts.error_of(base, starts.weight_of(source))
        if not self.data:
            starts.put(self, *starts.halves(*starts.top(error, len(self.A), *self.svd)))
            return
        gram = starts.checked_gram(base, source)
        size = starts.channels(gram, FLOOR)
        B, A = starts.halves(*starts.top(error, len(self.A), *self.svd, size))
        starts.put(self, B, A / size)
        starts.refit(self, error, gram)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return super().check(options) + starts.faults(options)
