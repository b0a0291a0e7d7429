"""O-LoRA, tasks one after another: y = base(x) + s (sum of B_k A_k of earlier tasks + B A) x, A orthogonal to all A_k.

Wang et al. 2023 (arXiv 2310.14152). A task is a run; the next one begins with `qtune train RECIPE --from RUN`: what the
run learned is carried, frozen, beside the base (carried.py), A is drawn anew, B is zero, so that the model starts as
the run left it. Added to the loss: `penalty` times the sum of |A_k A^T| over all rows of earlier tasks and sites: 0.5
in the authors' code, at rank 8 on q and v (it grows with rank^2 and sites), 0 to 5 on many tasks; their lambda_2 times
the norms of A and B is left out. A [rank, in], B [out, rank]; the rank of the update is at most rank times the number
of tasks. Beyond `carry` the factors of earlier tasks are cut to that rank, as one product's, so that other rows of the
same span stand in the penalty; a task for which there is no room without loss is refused. A first run is LoRA.
Not to be mixed up with olora, which starts from a QR decomposition of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import carried
from .base import Adapter, QuantLinear


class ContinualLoRA(carried.CarryingLoRA):
    """LoRA whose inputs are kept apart from those of the tasks before."""

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        penalty: float = 0.5,
        carry: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout, carry=carry, seed=seed)
        self.weight = penalty

    def penalty(self) -> Tensor | None:
        if not len(self.carried_A) or not self.weight:
            return None
        return self.weight * (self.carried_A.float() @ self.A.float().T).abs().sum()

    @classmethod
    def taken_over(cls, adapters: Mapping[str, Adapter]) -> None:
        full = []
        for name, one in adapters.items():
            assert isinstance(one, ContinualLoRA)
            if not carried.carry_on(one.carried_A, one.carried_B, one.A.data, one.B.data, one.carry):
                full.append(f"{name} ({one.carry})")
                continue
            one.A.data.copy_(carried.kaiming(one.A.shape, one.seed, len(one.carried_A), name))
            one.B.data.zero_()
        carried.refuse_full(full)

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        for one in adapters.values():
            assert isinstance(one, ContinualLoRA)
            one.resize({"carried": min(one.carry, one.A.shape[1], one.B.shape[0])})

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options) + carried.cycle_faults(options)
        if options.get("penalty", 0) < 0:
            faults.append(f"adapter.penalty must be at least 0, not {options['penalty']}")
        return faults
