"""NOLA: y = base(x) + s B A x, A = sum_i a_i A_i, B = sum_j b_j B_j, s = alpha/rank; only the numbers a and b learn.

Abbasi Koohpayegani et al. 2023 (arXiv 2310.02556; code UCDvision/NOLA). `basis` random matrices for A [rank, in] and as
many for B [out, rank]: a layer trains 2 `basis` values, whatever its rank and size. A_i and B_j are
U(-1, 1) / sqrt(basis), as the authors', by an integer hash of (seed, position): they are made again wherever they are
needed, in the backward too, a part at a time, and never kept. All layers of a size have the same ones. Start: b zero; a
N(0, 1/in), so that A begins as large as LoRA's (the authors add a frozen random matrix to A and begin with a at zero).

Making `basis` rank (in + out) random numbers costs more than the layer's product with a thousand tokens: about five
times a step of LoRA (a CPU, 1,024 tokens, 576 to 2,048 wide). Take it for the size of what is saved, not for speed.
PEFT reads it as a LoRA. Left out: coefficients in 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import PeftNames, QuantLinear, Source, draw, recompute, trainable
from .factored import Factored
from .vera import hashed

PART = 1 << 23  # numbers of the bases that are made at a time: 32 MiB in fp32


class NOLA(Factored):
    """Factors mixed from random matrices."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA", {}, {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    )

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 8,
        basis: int = 256,
        alpha: float = 16.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        self.a = trainable((basis,), base)
        self.b = trainable((basis,), base)
        self.scale, self.seed = alpha / rank, seed
        self.shapes = ((rank, base.in_features), (base.out_features, rank))
        self.dropout = nn.Dropout(dropout)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.a, nn.init.normal_, 0.0, base.in_features**-0.5)
        nn.init.zeros_(self.b)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pairs = zip((self.a, self.b), self.shapes, (2 * self.seed, 2 * self.seed + 1), strict=True)
        A, B = (mixed(values, shape, seed, dtype) for values, shape, seed in pairs)
        return A, B

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["basis"] < 1:
            faults.append(f"adapter.basis must be at least 1, not {options['basis']}")
        return faults


def mixed(values: Tensor, shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """The sum over i of values[i] times the i-th random matrix of `shape`, in `dtype`; summed in fp32 or wider."""
    wide, size = torch.promote_types(dtype, torch.float32), prod(shape)
    total = torch.zeros(size, dtype=wide, device=values.device)
    rows = max(1, PART // size)
    for first in range(0, len(values), rows):
        part = values[first : first + rows].to(wide) * len(values) ** -0.5
        total = total + recompute(partial(_part, first, size, seed), part)
    return total.view(*shape).to(dtype)


def _part(first: int, size: int, seed: int, values: Tensor) -> Tensor:
    """values [n] @ the random rows [n, size] from the first-th on: uniform in (-1, 1) in steps of 2^-15."""
    words = -(-size // 4)  # of 64 bits, that four numbers are taken from
    bits = hashed(len(values) * words, seed, values.device, first * words)
    rows = bits.view(torch.int16).view(len(values), -1)[:, :size].to(values.dtype)
    return (values @ rows + values.sum() / 2) * 2.0**-15  # a half step, so that their mean is zero
