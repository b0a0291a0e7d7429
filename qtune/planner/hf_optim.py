"""The optimizers of the stock stack, on meta: which states they make, and what a step takes beside them.

torch's AdamW is torch's own, with its foreach loop, which is what CUDA tensors get. bitsandbytes' 8-bit AdamW, after
optim/optimizer.py of 0.50.2: two uint8 states and an fp32 scale per 256 values of each, fp32 states below 4,096 values;
paged ones of 1e5 values or more lie in managed memory, which no allocator of torch counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import one_of

BLOCK, SMALL, PAGED = 256, 4096, 100_000  # values a scale; fewest with 8-bit, with paged states


class Optimizer(Protocol):
    """What a step needs."""

    def step(self) -> None:
        """Update the weights."""


def optimizer_of(parameters: Sequence[nn.Parameter], name: str, masters: bool) -> Optimizer:
    """adamw, adamw8bit, paged-adamw8bit or none, over the trained parameters. masters: see `Masters`."""
    if masters:
        return Masters(parameters, name)
    if name == "adamw":
        return _Torch(parameters)
    if name in ("adamw8bit", "paged-adamw8bit"):
        return EightBit(parameters, name.startswith("paged"))
    if name == "none":
        return EightBit((), False)
    raise one_of("optimizer", name, ("adamw", "adamw8bit", "paged-adamw8bit", "none"), "Q508")


class _Torch:
    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.inner = torch.optim.AdamW(parameters, foreach=True)

    def step(self) -> None:
        self.inner.step()


class EightBit:
    """bitsandbytes' AdamW8bit; its kernels need nothing beside the states."""

    def __init__(self, parameters: Sequence[nn.Parameter], paged: bool) -> None:
        self.parameters, self.paged = parameters, paged
        self.states: list[Tensor] = []

    def step(self) -> None:
        """The first one makes the states."""
        if self.states:
            return
        for parameter in self.parameters:
            count = parameter.numel()
            small = count < SMALL
            if not (self.paged and count >= PAGED):
                dtype = torch.float32 if small else torch.uint8
                self.states += [torch.zeros_like(parameter, dtype=dtype) for _ in range(2)]
            if not small:
                scales = -(count // -BLOCK)
                self.states += [torch.zeros(scales, dtype=torch.float32, device="meta") for _ in range(2)]


class Masters:
    """Half-precision weights trained in fp32 copies: every gradient is made fp32 before the inner step."""

    def __init__(self, parameters: Sequence[nn.Parameter], name: str) -> None:
        self.parameters = parameters
        self.masters = [nn.Parameter(p.detach().clone().float()) for p in parameters]
        self.inner = optimizer_of(self.masters, name, False)

    def step(self) -> None:
        """Gradients to the copies, the inner step, and back."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.detach().float()
        self.inner.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None
            with torch.no_grad():
                parameter.data.copy_(master.data)
