"""Where random numbers come from: torch's generators of the CPU and of the device. Nothing else in qtune draws any but
the order of the data, which follows from seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a computation on `device` may draw from, by the kind of their device."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        found["mps"] = torch.mps.get_rng_state()
    return found


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Put back what `random_states` gave. Returns the kinds of this device that were not among them."""
    torch.set_rng_state(states["cpu"].clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"].clone())
    return [kind for kind in (device.type,) if kind not in (*states, "meta")]


@contextmanager
def replayed(states: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
    """In here the random numbers of then are drawn once more; afterwards those of now go on."""
    now = random_states(device)
    set_random_states(states, device)
    try:
        yield
    finally:
        set_random_states(now, device)
