"""MiSS: y = base(x) + D^T s, s_k = x_k + x_(k+rank) + x_(k+2 rank) + ...; D is one shard that all inputs share.

Kang & Yin 2024 (arXiv 2409.15371, first called Bone). D [rank, out] starts at zero and is all there is: rank * out
parameters, and s is kept for the backward instead of x. The update has rank up to `rank`. Where `rank` does not divide
the inputs, the last sums have one term fewer. Left out: PEFT's variants `bat` (needs a dense W) and `mini` (columns of
D repeat).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, PeftNames, QtuneError, QuantLinear, Source, trainable


class MiSS(Adapter):
    """One matrix, shared by groups of the inputs."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        peft_type="MISS",
        tensors={"D": "miss_block"},
        options={"rank": "r", "dropout": "miss_dropout"},
        conv1d=False,
        native=True,
    )

    def __init__(self, base: QuantLinear, *, rank: int = 64, dropout: float = 0.0) -> None:
        super().__init__(base)
        if rank > base.in_features:
            raise QtuneError(
                "Q107", f"adapter.rank {rank} is beyond a layer of {base.in_features} inputs; legal: 1 to that number"
            )
        self.D = trainable((rank, base.out_features), base)
        self.dropout = nn.Dropout(dropout)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.zeros_(self.D)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        rank = len(self.D)
        sums = F.pad(self.dropout(x), (0, -base.in_features % rank)).unflatten(-1, (-1, rank)).sum(-2)
        return base(x) + sums @ self.D.to(x.dtype)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight = base.dequantize(torch.float32)
        for part in weight.split(len(self.D), dim=1):
            part += self.D.float().T[:, : part.shape[1]]
        return weight, None if base.bias is None else base.bias.float()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if not 0 <= options["dropout"] < 1:
            faults.append(f"adapter.dropout must be at least 0 and below 1, not {options['dropout']}")
        return faults
