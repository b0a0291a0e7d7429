"""BHRA: y = base(x) + dW x, dW_ij = W_ij o (B_ij A_ij): HiRA in each of b x b blocks, with factors of rank r/b.

Yu et al. 2025 (arXiv 2509.21637). The parameters of LoRA of rank r; where the blocks of W have rank r0, dW has rank up
to b r0 r, HiRA's up to r0 r. A [b, r/b, in]: row i of blocks has factors of its own for all columns; B [out, r], whose
columns are in b groups, one a column of blocks. As products of whole rows,
    dW_i = W_i o (B_i blockdiag(A_i1 ... A_ib))
costs what HiRA's does. b need not divide the sizes: the first blocks are then longer by one. As in HiRA each step makes
a dense W, inside `recompute`, and multiplies with dW beside the base: it takes about 2.5 times LoRA's time.
The text was not read beyond its beginning, and no code of the authors' was found. Ours are therefore b = 4, the start
(HiRA's of each block: A Kaiming-uniform by the block's width, B zero) and no scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, QtuneError, QuantLinear, Source, draw, recompute, trainable


class BHRA(Adapter):
    """Hadamard products of the blocks of W with low-rank matrices."""

    def __init__(self, base: QuantLinear, *, rank: int = 32, blocks: int = 4) -> None:
        super().__init__(base)
        if blocks > min(base.shape):
            raise QtuneError(
                "Q107",
                f"adapter.blocks {blocks} is beyond a layer of {base.shape[0]} x {base.shape[1]}; legal: 1 to "
                f"{min(base.shape)}",
            )
        self.A = trainable((blocks, rank // blocks, base.in_features), base)
        self.B = trainable((base.out_features, rank), base)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        bound = math.sqrt(len(self.A) / base.in_features)
        draw(self.A, nn.init.uniform_, -bound, bound)
        nn.init.zeros_(self.B)

    def rows(self, weight: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
        """W_i o (B_i A_i) of each row i of blocks, [rows, in]. weight [out, in]."""
        blocks = len(A)
        parts = zip(weight.tensor_split(blocks), B.tensor_split(blocks), A, strict=True)
        return [w * (b @ torch.block_diag(*a.tensor_split(blocks, dim=1))) for w, b, a in parts]

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        def branch(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            rows = self.rows(base.dequantize(x.dtype), A.to(x.dtype), B.to(x.dtype))
            return F.linear(x, torch.cat(rows))

        return base(x) + recompute(branch, x, self.A, self.B)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight = base.dequantize(torch.float32)
        weight += torch.cat(self.rows(weight, self.A.float(), self.B.float()))
        return weight, None if base.bias is None else base.bias.float()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults, rank, blocks = super().check(options), options["rank"], options["blocks"]
        if blocks < 1:
            faults.append(f"adapter.blocks must be at least 1, not {blocks}")
        elif rank % blocks:
            near = rank // blocks * blocks
            legal = ", ".join(str(r) for r in (near, near + blocks) if r)
            faults.append(f"adapter.rank of bhra must be a multiple of adapter.blocks {blocks} ({legal}), not {rank}")
        return faults
