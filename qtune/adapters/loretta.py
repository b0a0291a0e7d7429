"""LoRETTA: y = base(x) + s B A x, s = alpha/rank; A and B are tensor trains of small cores (LoRETTA_rep).

Yang et al. 2024 (arXiv 2402.11417; code yifanycc/loretta). A^T [in, rank] and B [out, rank] are each the contraction of
cores [t, d_i, t] with t = `tensor_rank` (1 at both ends), the product of whose d_i is width * rank. The sum of
t_i-1 d_i t_i values: 1,160 for a 768 x 768 layer at rank 8 and t = 5, where LoRA has 12,288. The d_i are the authors'
where their table has the size; some of those cut the rank of the factors down to t. Elsewhere they are prime factors
put together up to 16, and the last one holds `rank` times as small a divisor of the width as keeps the full rank.
Start: A as large as LoRA's; the last core of B zero, the identity (the authors start from a random product).
PEFT reads it as a LoRA. Left out: LoRETTA_adp, which is an adapter behind a block, and the norms that they train too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import PeftNames, QuantLinear, Source, draw, trainable
from .factored import Factored

LARGEST = 16  # of a core's dimension, where it can be chosen
TABLE = {  # (width, rank) -> dimensions, as in the authors' code
    (768, 8): (8, 8, 12, 8), (1024, 8): (4, 8, 8, 8, 4), (1280, 8): (4, 8, 8, 8, 5), (1536, 8): (4, 8, 8, 8, 6),
    (1600, 8): (5, 8, 8, 8, 5), (2304, 8): (8, 8, 8, 4, 9), (4096, 8): (16, 16, 8, 4, 4), (5120, 8): (8, 8, 10, 8, 8),
    (8192, 8): (4, 16, 16, 16, 4), (768, 16): (8, 16, 12, 8), (1024, 16): (4, 8, 16, 8, 4),
    (1280, 16): (4, 8, 16, 8, 5), (1536, 16): (4, 8, 16, 8, 6), (1600, 16): (5, 8, 16, 8, 5),
    (2304, 16): (8, 8, 8, 8, 9), (4096, 16): (16, 16, 16, 4, 4), (5120, 16): (8, 16, 10, 8, 8),
    (8192, 16): (4, 16, 16, 16, 8),
}  # fmt: skip


class LoRETTA(Factored):
    """LoRA whose factors are tensor trains."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        "LORA", {}, {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    )

    def __init__(
        self, base: QuantLinear, *, rank: int = 8, tensor_rank: int = 5, alpha: float = 16.0, dropout: float = 0.0
    ) -> None:
        super().__init__(base)
        self.rank, self.scale = rank, alpha / rank
        self.A, self.B = (_cores(width, rank, tensor_rank, base) for width in (base.in_features, base.out_features))
        self.dropout = nn.Dropout(dropout)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        for train, variance in ((self.A, 1 / (3 * base.in_features)), (self.B, 1.0)):
            paths = prod(len(core) for core in train)  # products that a value of the factor is the sum of
            for core in train:
                draw(core, nn.init.normal_, 0.0, (variance / paths) ** (0.5 / len(train)))
        nn.init.zeros_(self.B[-1])

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = (reduce(_joined, [core.to(dtype) for core in train]).view(-1, self.rank) for train in (self.A, self.B))
        return A.t(), B

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["tensor_rank"] < 1:
            faults.append(f"adapter.tensor_rank must be at least 1, not {options['tensor_rank']}")
        return faults


def dimensions(width: int, rank: int, tensor_rank: int) -> tuple[int, ...]:
    """d_1 ... d_n with the product width * rank."""
    if (width, rank) in TABLE:
        return TABLE[width, rank]
    least = min(rank, width)
    kept = next(d for d in range(1, width + 1) if width % d == 0 and d * tensor_rank >= least)
    found: list[int] = []
    for prime in _primes(width // kept):
        fits = [i for i, d in enumerate(found) if d * prime <= LARGEST]
        if fits:
            found[fits[0]] *= prime
        else:
            found.append(prime)
    return (*found, kept * rank)


def _primes(n: int) -> list[int]:
    """The prime factors of n, falling."""
    found, prime = [], 2
    while n > 1:
        if prime * prime > n:
            prime = n
        while n % prime == 0:
            found.append(prime)
            n //= prime
        prime += 1
    return found[::-1]


def _cores(width: int, rank: int, tensor_rank: int, base: QuantLinear) -> nn.ParameterList:
    shape = dimensions(width, rank, tensor_rank)
    ends = [1, *(tensor_rank for _ in shape[1:]), 1]
    return nn.ParameterList(trainable((ends[i], d, ends[i + 1]), base) for i, d in enumerate(shape))


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """[1, m, t] and [t, d, u] -> [1, m d, u]."""
    return (left[0] @ right.flatten(1)).view(1, -1, right.shape[2])
