"""XGBLoRA: y = base(x) + s (sum of boosters B_k A_k so far + B A) x; each booster trains a few layers, drawn at random.

Zhang et al. 2024 (arXiv 2410.19694). A booster is a LoRA of rank 1 on a random `layers` share of the decoder layers (of
the sites, where none are numbered); the paper's best for Llama-3-8B is 11 of 32; alpha and `period` are ours. After
each `period` (steps, or below 1 a share of the run) it is added to the weight and the next is drawn, with new layers, A
anew, B zero and new states of the optimizer. Here what boosters learned is carried beside the packed base (carried.py:
`carry`). A [rank, in], B [out, rank]; rank of the update: at most the number of boosters that a layer got. The plan
counts as if every layer were chosen each time. Left out: the paper's penalty on the norms of A and B
(train.weight_decay is near).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import carried
from .base import Adapter, Changes, QuantLinear
from .relora import ReLoRA


class XGBLoRA(ReLoRA):
    """Weak learners, one after the other, on random layers."""

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 1,
        alpha: float = 2.0,
        dropout: float = 0.0,
        period: float = 0.05,
        layers: float = 0.34,
        carry: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            base, rank=rank, alpha=alpha, dropout=dropout, period=period, rewarm=0, prune=1, carry=carry, seed=seed
        )
        self.layers = layers
        self.chosen = True  # does this booster train it?

    def changed(self, x: Tensor, base: QuantLinear) -> Tensor:
        if self.chosen:
            return super().changed(x, base)
        y = base.product_plus(x, self.A.detach(), self.B.detach(), self.scale)  # B is zero, unless the site is full
        return carried.beside(y, x, self.carried_A, self.carried_B, self.scale)

    @classmethod
    def before_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        chosen = cls.choose(adapters, step, steps)
        for name, one in adapters.items():
            assert isinstance(one, XGBLoRA)
            one.chosen = one.A.is_meta or carried.layer_of(name) in chosen
        return super().before_step(adapters, step, steps)

    @classmethod
    def choose(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> set[str]:
        """The layers that the booster of this step trains."""
        one = next(iter(adapters.values()))
        assert isinstance(one, XGBLoRA)
        layers = sorted({carried.layer_of(name) for name in adapters})
        number = (step - 1) // carried.in_steps(one.period, steps)
        order = torch.randperm(len(layers), generator=carried.generator(one.seed, "booster", number))
        return {layers[place] for place in order[: max(1, round(one.layers * len(layers)))].tolist()}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if not 0 < options["layers"] <= 1:
            faults.append(
                f"adapter.layers must be a share of the layers above 0 and at most 1, not {options['layers']}"
            )
        return faults
