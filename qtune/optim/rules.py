"""Rules of update, each a torch.optim.Optimizer over tensors that it may write to.

    adamw      torch's own, in one kernel (Loshchilov & Hutter, 1711.05101)
    adamw8     its two states in a byte a value: the op `adamw8_` (2110.02861)
    lion       p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g),  m <- b2 m + (1 - b2) g   (Chen et al., 2302.06675)
    adafactor  torch's own (Shazeer & Stern, 1804.04235): second moments of rows and columns only, no first

On CUDA adamw8 is our Triton kernel of the same op: bitsandbytes' takes no bf16 parameter that is rounded
stochastically, and stores a small second moment as 0. Lion is written out here because no library that we need has it:
torch has none, bitsandbytes is there for CUDA only. Adafactor's step is lr itself, as users of adapters set it
(scale_parameter off): relative to the size of the parameter it would hardly move B, which starts at 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.optim import STATE_BLOCK

RULES = ("adamw", "adamw8", "lion", "adafactor")
BETAS = {"adamw": (0.9, 0.999), "adamw8": (0.9, 0.999), "lion": (0.9, 0.99)}  # the papers'; adafactor has none
SMALL = 4096  # values below which adamw8 is adamw, as bitsandbytes does
EPS = 1e-8
FUSED = ("cpu", "cuda", "mps", "meta")  # where torch has AdamW in one kernel; on meta the planner's trace stands for it
# Adafactor's floors. Of a gradient's root mean square: torch's 1.2e-7 is a gradient that real models have. Of a
# parameter's: 1, so that a step is lr itself.
FLOORS = (1e-15, 1.0)

Group = Mapping[str, Any]  # params, weight_decay; for adamw8 also places


def rule_of(name: str, parameter: Tensor) -> str:
    """The rule that serves a parameter where `name` is asked for."""
    return "adamw" if name == "adamw8" and parameter.numel() < SMALL else name


def made(rule: str, groups: list[Group], lr: float, betas: tuple[float, float], seed: int, count: int) -> Any:
    """The torch.optim.Optimizer of a rule. seed, and count of all parameters: see AdamW8."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    if rule == "adamw8":
        return AdamW8(groups, lr, betas, seed, count)
    if rule == "lion":
        return Lion(groups, lr, betas)
    if rule == "adafactor":
        return torch.optim.Adafactor([dict(group) for group in groups], lr=lr, eps=FLOORS)
    # one pass over memory in place of a dozen, and no temporaries of the parameters' size
    fused = all(t.device.type in FUSED and t.dtype != torch.float64 for t in tensors) or None
    return torch.optim.AdamW([dict(group) for group in groups], lr=lr, betas=betas, eps=EPS, fused=fused)


def with_states(inner: Any) -> None:
    """Make the states of a rule now, and not at its first step, by a step of nothing."""
    for group in inner.param_groups:
        group["lr"] = 0.0
    for group in inner.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.zeros_like(tensor)
            inner.step()
            tensor.grad = None
            step = inner.state[tensor].get("step")
            if isinstance(step, Tensor):
                step.zero_()
            elif step is not None:
                inner.state[tensor]["step"] = 0


@lru_cache
def state_bytes(rule: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of the states that a rule keeps for a parameter, of more than one value each: made once and counted."""
    tensor = torch.zeros(shape, dtype=dtype)
    inner = made(
        rule, [{"params": [tensor], "places": [0], "weight_decay": 0.0}], 1.0, BETAS.get(rule, (0.0, 0.0)), 0, 1
    )
    with_states(inner)
    return sum(
        value.nbytes for value in inner.state[tensor].values() if isinstance(value, Tensor) and value.numel() > 1
    )


class _Rule(torch.optim.Optimizer):
    """A rule of our own: one parameter after the other."""

    def __init__(self, groups: Iterable[Group], lr: float, betas: tuple[float, float]) -> None:
        super().__init__([dict(group) for group in groups], {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of each parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group, index)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        raise NotImplementedError


class Lion(_Rule):
    """The sign of the momentum: one state, in the parameter's dtype."""

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        if not state:
            state["m"] = torch.zeros_like(p)
        first, second = group["betas"]
        change = state["m"].lerp(grad, 1 - first).sign_()
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])
        state["m"].lerp_(grad, 1 - second)


class AdamW8(_Rule):
    """AdamW with two bytes of states a value in place of eight.

    A bf16 parameter is rounded stochastically, by bits that follow from `seed`, the step and the parameter's place
    among `count` alone (`places` of its group), so not from the order of updates.
    """

    def __init__(self, groups: Iterable[Group], lr: float, betas: tuple[float, float], seed: int, count: int) -> None:
        super().__init__(groups, lr, betas)
        self.seed, self.count = seed, count

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        if not state:
            state["step"] = 0
            for name in ("m", "v"):
                state[name] = torch.zeros(p.numel(), dtype=torch.uint8, device=p.device)
                state[f"{name}_absmax"] = torch.zeros(-(p.numel() // -STATE_BLOCK), device=p.device)
        state["step"] += 1
        drawn = (state["step"] - 1) * self.count + group["places"][index] + 1
        seed = ((self.seed & 0x7FFFFF) << 40) + drawn  # never 0
        states = state["m"], state["m_absmax"], state["v"], state["v_absmax"]
        rates = group["lr"], *group["betas"], EPS, group["weight_decay"]
        torch.ops.qtune.adamw8_(p, grad, *states, *rates, state["step"], seed)
