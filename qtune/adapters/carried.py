"""What methods share that write what they learned into the base from time to time, and begin anew.

Written into packed codes most of it would be rounded away (a delta of 3 % of an NF4 weight to 4 % of itself), so that
it is carried beside the base, in factors that are not trained: s carried_B carried_A, with LoRA's scale s, in the
model's compute dtype, in which they are what the model had learned, bit for bit. They grow by the rank of each cycle.
Beyond `carry` (or the layer's smaller side) the factors are cut to that rank: a QR of each and the SVD of the small
core between them, never a dense [out, in]. Where that would lose more than LOST of the carried delta, the site begins
no new cycle: its factors train on as they are, and the run is told. So a site never carries more than is planned.

A cycle's length is given in steps, or below 1 as a share of the run. Random values come from the CPU's generator,
seeded by what is asked for (seed, step, site), so that a resumed run draws the same ones on any device.
"""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import QtuneError, listed
from .base import PeftNames, QuantLinear, replace_values
from .lora import LoRA
from .starts import of_product

LOST = 0.005  # of the norm of what is carried: what one cut may lose; the rest of 1 % is for rounding to the dtype
GROWS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {"carried_A": (0, "carried"), "carried_B": (1, "carried")}
)  # Adapter.grows of a method that carries factors


def make_room(adapter: nn.Module, base: QuantLinear) -> None:
    """Give an adapter the buffers carried_A [0, in] and carried_B [out, 0]."""
    like: dict[str, Any] = {"dtype": base.dtype, "device": base.device}
    adapter.register_buffer("carried_A", torch.empty(0, base.in_features, **like))
    adapter.register_buffer("carried_B", torch.empty(base.out_features, 0, **like))


class CarryingLoRA(LoRA, register=False):
    """A LoRA beside what it carries: y = base(x) + s (carried_B carried_A + B A) x."""

    peft: ClassVar[PeftNames | None] = None
    grows: ClassVar[Mapping[str, tuple[int, str]]] = GROWS
    carried_A: Tensor
    carried_B: Tensor

    def __init__(
        self, base: QuantLinear, *, rank: int, alpha: float, dropout: float, carry: int, seed: int
    ) -> None:  # fmt: skip
        super().__init__(base, rank=rank, alpha=alpha, dropout=dropout)
        make_room(self, base)
        self.carry, self.seed = carry, seed

    def changed(self, x: Tensor, base: QuantLinear) -> Tensor:
        return beside(super().changed(x, base), x, self.carried_A, self.carried_B, self.scale)

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        return torch.cat((self.A, self.carried_A)), torch.cat((self.B, self.carried_B), 1), self.scale


@torch.no_grad()
def carry_on(carried_A: Tensor, carried_B: Tensor, A: Tensor, B: Tensor, most: int) -> bool:
    """Let the carried factors carry B A too, at a rank of at most `most` and of the layer's smaller side.

    A [rank, in], B [out, rank]. False, and nothing is done, where that would lose more than LOST.
    """
    A, B = torch.cat((carried_A, A)), torch.cat((carried_B, B), 1)
    rank = min(most, A.shape[1], B.shape[0])
    if len(A) > rank:
        A, B, lost = cut(A, B, rank)
        if not lost <= LOST:
            return False
    replace_values(carried_A, A.to(carried_A.dtype))
    replace_values(carried_B, B.to(carried_B.dtype))
    return True


def cut(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """fp32 factors of the best product of this rank, and what of B A's norm it loses. A [n, in], B [out, n]."""
    u, s, vh = of_product(A, B)
    root = s[:rank].sqrt()
    lost = s[rank:].norm() / s.norm().clamp(min=torch.finfo(s.dtype).tiny)
    return (vh[:rank] * root.unsqueeze(1)).contiguous(), u[:, :rank] * root, float(lost)


def beside(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale x A^T B^T, for factors that are not trained: neither x nor x A^T is kept. x [..., in], y [..., out]."""
    if not len(A):
        return y
    return y + F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def tell_full(method: str, full: Sequence[str]) -> None:
    """Warn that at these sites, each told with its `carry`, no new cycle begins."""
    if full:
        more = f" and {len(full) - 3} more" if len(full) > 3 else ""
        warnings.warn(
            f"{method}: at {', '.join(full[:3])}{more} adapter.carry does not hold what was learned to "
            f"{1 - LOST:.1%}: no new cycle begins there, the factors train on; a larger carry takes more",
            stacklevel=2,
        )


def refuse_full(full: Sequence[str]) -> None:
    """Raises QtuneError where at these sites, each told with its `carry`, one more task is not held."""
    if full:
        raise QtuneError(
            "Q416", f"adapter.carry does not hold one more task without loss at {listed(full, 3)}: merge the run and "
            "begin a new chain on the merged model, or begin it anew with a larger adapter.carry",
        )  # fmt: skip


# ---- cycles


def in_steps(given: float, steps: int) -> int:
    """A number of steps, or below 1 a share of `steps`, in steps; at least 1."""
    return max(1, math.ceil(given * steps - 1e-9) if given < 1 else int(given))


def begins(step: int, length: int) -> bool:
    """Does a cycle of `length` begin at this 1-based step, other than the first?"""
    return step > 1 and (step - 1) % length == 0


def most_restarts(period: float, steps: int | None) -> int | None:
    """How often a cycle begins anew in a run of `steps`, of any length where that is None; None: there is no bound."""
    if steps is not None:
        return (steps - 1) // in_steps(period, steps)
    return math.ceil(1 / period - 1e-9) - 1 if period < 1 else None


def cycle_faults(options: Mapping[str, Any], least: str | None = "rank") -> list[str]:
    """Faults of `period`, of `seed`, and of a `carry` below the option `least`, where there are such options."""
    found, period = [], options.get("period", 1)
    if not (0 < period < 1 or (period >= 1 and period == int(period))):
        found.append(f"adapter.period must be a share of the run above 0 and below 1, or whole steps, not {period}")
    if options.get("seed", 0) < 0:
        found.append(f"adapter.seed must be at least 0, not {options['seed']}")
    low = options[least] if least else 1
    if options.get("carry", low) < low:
        what = f"adapter.{least}, {low}" if least else low
        found.append(f"adapter.carry must be at least {what}, not {options['carry']}")
    return found


# ---- random values and layers


def generator(*what: object) -> torch.Generator:
    """A generator on the CPU seeded by what is asked for."""
    return torch.Generator().manual_seed(zlib.crc32(".".join(map(str, what)).encode()))


def kaiming(shape: Sequence[int], *what: object) -> Tensor:
    """fp32 on the CPU, Kaiming-uniform as LoRA's A, by `generator(*what)`."""
    return nn.init.kaiming_uniform_(torch.empty(*shape), math.sqrt(5), generator=generator(*what))


def layer_of(site: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.down_proj`: the decoder layer; the site itself where there is none."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", site)
    return found[0] if found else site
