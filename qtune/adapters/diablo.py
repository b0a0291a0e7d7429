"""DiaBlo: y = base(x) + D x, D block-diagonal; its N blocks are learned as they are and start at zero.

Gurses et al. 2025 (arXiv 2506.03230; code ziyangjoy/DiaBlo). N = min(blocks, in, out); block n takes the n-th part of
the inputs to the n-th part of the outputs, in one batched product. No product of two factors: no start to choose, and
D has rank up to min(in, out). in * out / N parameters: N = 64 at 4096 x 4096 are those of LoRA of rank 32.
Ours, where N divides a side not: the first parts are longer by one, so that each input and output has its block. The
published code makes all parts as long as the first, and outputs beyond the last input's block get nothing.
blocks [N, longest part of out, longest part of in]: shorter parts leave a row or a column without use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, QuantLinear, Source, trainable


class DiaBlo(Adapter):
    """Diagonal blocks of a dense update."""

    def __init__(self, base: QuantLinear, *, blocks: int = 64, dropout: float = 0.0) -> None:
        super().__init__(base)
        self.parts = min(blocks, *base.shape)
        self.blocks = trainable((self.parts, *(-(-size // self.parts) for size in base.shape)), base)
        self.dropout = nn.Dropout(dropout)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.zeros_(self.blocks)

    def long(self, size: int) -> int:
        """How many of a side's parts are of the full length; the others are shorter by one."""
        return size % self.parts or self.parts

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        dropped, long = self.dropout(x), self.long(base.in_features)
        split = long * self.blocks.shape[2]
        parts = dropped[..., :split].unflatten(-1, (long, -1))
        if long < self.parts:
            short = dropped[..., split:].unflatten(-1, (self.parts - long, -1))
            parts = torch.cat((parts, F.pad(short, (0, 1))), dim=-2)
        y = torch.einsum("...ni,noi->...no", parts, self.blocks.to(x.dtype))
        long = self.long(base.out_features)
        if long < self.parts:
            y = torch.cat((y[..., :long, :].flatten(-2), y[..., long:, :-1].flatten(-2)), dim=-1)
        else:
            y = y.flatten(-2)
        return base(x) + y

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight, row, col = base.dequantize(torch.float32), 0, 0
        for n, block in enumerate(self.blocks.float()):
            height, width = (full - (n >= self.long(size)) for full, size in zip(block.shape, base.shape, strict=True))
            weight[row : row + height, col : col + width] += block[:height, :width]
            row, col = row + height, col + width
        return weight, None if base.bias is None else base.bias.float()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["blocks"] < 1:
            faults.append(f"adapter.blocks must be at least 1, not {options['blocks']}")
        if not 0 <= options["dropout"] < 1:
            faults.append(f"adapter.dropout must be at least 0 and below 1, not {options['dropout']}")
        return faults
