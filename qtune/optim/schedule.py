"""The learning rate over a run."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "linear", "cosine")


def lr_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Factor on the learning rate at 0-based `step` of `steps`. warmup: steps if >= 1, else a fraction of the run."""
    rising = min(steps, math.ceil(warmup if warmup >= 1 else warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0
