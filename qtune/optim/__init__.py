"""Optimizers over adapters: what updates the trained parameters, in which buckets, where its states wait, and when.

bf16 has 8 bits of precision: an update below 1/256 of a weight vanishes when it is added in bf16. So with every rule
(`rules`) a bf16 parameter has an fp32 master, which is updated and written back rounded; adamw8 rounds stochastically
instead and keeps none.
"""

from .door import optimizer_of
from .schedule import SCHEDULES, lr_factor
from .update import Optimizer

__all__ = ["SCHEDULES", "Optimizer", "lr_factor", "optimizer_of"]
