"""MoRA: y = base(x) + decompress(M compress(x)), M square [n, n], n = floor(sqrt((in + out) rank)): LoRA's parameters.

Jiang et al. 2024 (arXiv 2405.12130; code kongds/MoRA). M starts at zero; there is no scale. Inputs are cut into chunks
of n, the last one filled up with the first inputs, as in the code. The two variants that the code recommends:
  rotate (its type 6): every chunk is turned by its own angles, as RoPE turns positions, and M takes each to a chunk of
    the outputs; n is even. Outputs beyond the last chunk repeat the first, chunks beyond the last output are not
    used. The update has rank up to min(in, out).
  share (its type 1, for large ranks): chunks are summed, and the outputs repeat M's. The update has rank up to n.
The code rounds n to the nearest number instead, and lets M be larger than the layer. Left out: types 2 to 4, dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, QtuneError, QuantLinear, Source, one_of, trainable

VARIANTS = ("rotate", "share")
THETA = 10000.0  # RoPE's


class MoRA(Adapter):
    """A square matrix between a compression and its inverse, neither of them learned."""

    def __init__(self, base: QuantLinear, *, rank: int = 8, variant: str = "rotate") -> None:
        super().__init__(base)
        total, least = sum(base.shape), min(base.shape)
        size = math.isqrt(total * rank)
        if size > least:
            most = least * least // total
            raise QtuneError(
                "Q107",
                f"adapter.rank {rank} gives mora a matrix of {size} x {size}, beyond a layer of {base.shape[0]} x "
                f"{base.shape[1]}; legal: {f'1 to {most}' if most else 'none, leave the layer out'}",
            )
        self.variant, self.size = variant, size // 2 * 2 if variant == "rotate" else size
        self.M = trainable((self.size, self.size), base)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.zeros_(self.M)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        missing = -base.in_features % self.size
        chunks = torch.cat((x, x[..., :missing]), dim=-1) if missing else x
        chunks = chunks.unflatten(-1, (-1, self.size))
        if self.variant == "share":
            y = F.linear(chunks.sum(-2), self.M.to(x.dtype))
        else:
            used = chunks[..., : -(-base.out_features // self.size), :]
            y = F.linear(rotated(used), self.M.to(x.dtype)).flatten(-2)
        times = -(-base.out_features // y.shape[-1])
        return base(x) + torch.cat([y] * times, dim=-1)[..., : base.out_features]

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight, M = base.dequantize(torch.float32), self.M.float()
        out, width = base.shape
        count = -(-width // self.size)
        if self.variant == "share":
            dense = M.repeat(1, count)
        else:  # a row of M times a rotation is the row turned back
            dense = torch.block_diag(*rotated(M.unsqueeze(1).expand(-1, count, -1), back=True).unbind(1))
        first = dense[:, width:]  # where the last chunk holds the first inputs again
        dense[:, : first.shape[1]] += first
        for row in range(0, out, len(dense)):
            weight[row : row + len(dense)] += dense[: out - row, :width]
        return weight, None if base.bias is None else base.bias.float()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["variant"] not in VARIANTS:
            faults.append(str(one_of("adapter.variant", options["variant"], VARIANTS)))
        return faults


def rotated(chunks: Tensor, back: bool = False) -> Tensor:
    """chunks [..., count, n], chunk c turned by the angles c / THETA^(2 k / n) in the planes (k, k + n/2)."""
    count, n = chunks.shape[-2:]
    like: dict[str, Any] = {"device": chunks.device, "dtype": torch.promote_types(torch.float32, chunks.dtype)}
    angle = torch.outer(torch.arange(count, **like), THETA ** (torch.arange(0, n, 2, **like) / -n))
    cos, sin = angle.cos().to(chunks.dtype), angle.sin().to(chunks.dtype)
    one, two = chunks.chunk(2, dim=-1)
    sin = -sin if back else sin
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)
