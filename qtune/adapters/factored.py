"""What methods share whose update is a product B A of small factors that each step makes from fewer values.

A and B are made anew in each forward pass, so that whatever they are made of is learned through them; the product with
the base, the merge and the form of a plain LoRA, in which PEFT takes it, follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import QtuneError
from .base import Adapter, QuantLinear

SEEDS = 1 << 22  # of an integer hash: what is left of 63 bits beside 2^40 numbers for each of two matrices


class Factored(Adapter, register=False):
    """y = base(x) + scale B A x, dropout on the inputs of A; a method says what A and B are."""

    scale: float
    dropout: nn.Dropout

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of this site in `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        A, B = self.factors(x.dtype)
        if not (self.dropout.p and self.training):
            return base.shift(base.product_plus(x, A, B, self.scale))
        inner = F.linear(self.dropout(x), A) * self.scale
        return base.shift(base.product(x) + F.linear(inner, B))

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        return *self.factors(torch.float32), self.scale

    def peft_state(self) -> dict[str, Tensor]:
        """The factors in fp32, as PEFT's LoRA holds them."""
        A, B = self.factors(torch.float32)
        return {"lora_A.weight": A, "lora_B.weight": B}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if not 0 <= options["dropout"] < 1:
            faults.append(f"adapter.dropout must be at least 0 and below 1, not {options['dropout']}")
        if options.get("alpha", 1) <= 0:
            faults.append(f"adapter.alpha must be above 0, not {options['alpha']}")
        if not 0 <= options.get("seed", 0) < SEEDS:
            faults.append(f"adapter.seed must be 0 to {SEEDS - 1}, not {options['seed']}")
        return faults


def check_most(base: QuantLinear, option: str, value: int, most: int) -> None:
    """Raises QtuneError for an option beyond what a layer of this size takes."""
    if value > most:
        size = f"{base.out_features} x {base.in_features}"
        legal = f"legal: 1 to {most}" if most else "there is no legal one"
        raise QtuneError("Q107", f"adapter.{option} {value} is beyond a layer of {size}; {legal}")


def check_whole(shape: tuple[int, int], option: str, value: int, peft_type: str) -> None:
    """Raises QtuneError where PEFT has no form of an adapter since `value` does not divide the layer's sizes."""
    if any(size % value for size in shape):
        raise QtuneError(
            "Q806",
            f"PEFT's {peft_type} takes only sizes that adapter.{option} divides, and {value} does not divide "
            f"{shape[0]} x {shape[1]}: merge instead",
        )
