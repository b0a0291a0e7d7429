"""Which scheme each layer takes, so that the error of all is least within so many bytes.

A knapsack with one choice a layer, which LQ-LoRA (Guo et al., 2311.12023) gives to a solver of integer programs. Here
it is solved exactly by a dynamic programme: layer after layer, of all ways to pack the layers so far those are kept
that no other way undercuts in bytes without a larger error. What is beaten so far stays beaten whatever follows, so
the best way is always among them. There are no more of them than different sums of bytes: few, of layers of few shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def least_error(options: Sequence[Sequence[tuple[int, float]]], room: int) -> list[int]:
    """The place of the option that each layer takes. options: of each layer (bytes, error); room: bytes of all.

    Raises ValueError where even the smallest options need more.
    """
    rest = [0]  # bytes that the layers from here on take at least
    for choices in reversed(options):
        rest.append(rest[-1] + min(nbytes for nbytes, _ in choices))
    rest.reverse()
    if rest[0] > room:
        raise ValueError(f"{rest[0]} bytes are the least, {room} are allowed")
    nbytes, errors = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each way that is kept: its option here, the way before
    for choices, later in zip(options, rest[1:], strict=True):
        before = len(nbytes)
        sizes, added = (torch.tensor(column) for column in zip(*choices, strict=True))
        nbytes = (nbytes + sizes.unsqueeze(1)).flatten()
        errors = (errors + added.double().unsqueeze(1)).flatten()
        order = (nbytes + later <= room).nonzero()[:, 0]
        order = order[torch.argsort(errors[order], stable=True)]
        order = order[torch.argsort(nbytes[order], stable=True)]  # by bytes, among equals by error
        least = torch.cummin(errors[order], 0).values
        better = torch.ones(len(order), dtype=torch.bool)
        better[1:] = errors[order][1:] < least[:-1]
        kept = order[better]
        nbytes, errors = nbytes[kept], errors[kept]
        steps.append(((kept // before).to(torch.int8), (kept % before).to(torch.int32)))
    way, chosen = len(nbytes) - 1, []  # the most bytes, the least error
    for option, previous in reversed(steps):
        chosen.append(int(option[way]))
        way = int(previous[way])
    return chosen[::-1]
