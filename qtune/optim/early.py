"""Early: parameters are updated while the backward pass runs, so that never more than a layer's gradients are there.

As LOMO (2306.09782) and torchtune do it, but by decoder layer: a layer's gradients are whole once the first gradient of
another layer comes, whatever pieces they came in (recomputed layers, tiles); then one norm is read, one update made,
and they are released. What belongs to no layer, or to several, waits for the end of the backward. So nothing may be
known of the whole gradient first: no clipping, no second micro-batch. A gradient that is not finite stops all updates
from then on; those of the layers above it have been made.
"""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import QtuneError
from .update import Bucket, Optimizer


class Early(Optimizer):
    """An Optimizer whose update runs in the backward that follows `begin`; without `begin` it is a plain one."""

    early = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.home = {parameter: bucket for bucket in self.buckets.values() for parameter, _ in bucket.pairs}
        self._end()
        for parameter in self.parameters:  # the model must not keep the optimizer alive
            parameter.register_post_accumulate_grad_hook(partial(_arrived, weakref.ref(self)))

    def _end(self) -> None:
        self.factor: float | None = None  # None: no step is on
        self.stopped = False
        self.norms: list[float] = []
        self.open: Bucket | None = None
        self.done: set[int] = set()

    def begin(self, factor: float | None) -> None:
        self._end()
        self.factor = factor

    def arrived(self, parameter: nn.Parameter) -> None:
        """A gradient is there, or a part of it."""
        if self.factor is None:
            return
        if self.stopped:
            parameter.grad = None
            return
        bucket = self.home[parameter]
        if id(parameter) in self.done:
            raise QtuneError(
                "Q708",
                f"the gradient of {self.names[parameter]} came in parts, with those of other layers between them; "
                "set train.update_in_backward to false",
            )
        if bucket is self.buckets.get(""):
            return
        if self.open is not bucket:
            self._close(self.factor)
        self.open = bucket

    def _close(self, factor: float) -> None:
        """Update the layer whose gradients are whole."""
        bucket, self.open = self.open, None
        if bucket is None:
            return
        norm = _norm(bucket)
        self.norms.append(norm)
        self.stopped = not math.isfinite(norm)
        if self.stopped:
            super().drop_gradients()
            return
        self.done |= {id(parameter) for parameter, _ in bucket.pairs if parameter.grad is not None}
        self._update([bucket], factor)

    def norm(self, limit: float) -> float:
        """As Optimizer's; a limit is legal only where no step is on."""
        if self.factor is None:
            return super().norm(limit)
        assert math.isinf(limit), "the gradient is not there to be clipped"
        rest = [_norm(bucket) for bucket in self.buckets.values() if bucket.gradients()]
        return math.sqrt(sum(norm**2 for norm in (*self.norms, *rest)))

    def drop_gradients(self) -> None:
        """Release what is left, and end the step."""
        super().drop_gradients()
        self._end()

    def step(self, factor: float) -> None:
        """Update what waited for the end."""
        self._update([bucket for bucket in self.buckets.values() if bucket.gradients()], factor)
        self._end()


def _arrived(optimizer: weakref.ref[Early], parameter: nn.Parameter) -> None:
    found = optimizer()
    if found is not None:
        found.arrived(parameter)


def _norm(bucket: Bucket) -> float:
    return float(torch.nn.utils.get_total_norm(bucket.gradients()))
