"""AdamW over adapters with fp32 master weights, learning-rate groups and schedules; and with states of a byte a value.

bf16 has 8 bits of precision: an update below 1/256 of a weight vanishes when it is added in bf16. So by default AdamW
keeps an fp32 master of each bf16 parameter, updates that, and writes it back rounded; AdamW8 rounds stochastically
instead and keeps no master. The arithmetic is torch's own AdamW (Loshchilov & Hutter, 1711.05101); AdamW8's is the op
`adamw8_`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .adapters import adapted_sites
from .ops.optim import STATE_BLOCK
from .recipe import TrainKeys

SCHEDULES = ("constant", "linear", "cosine")
SMALL = 4096  # values below which AdamW8 keeps fp32 states, as bitsandbytes does
EPS = 1e-8
FUSED = ("cpu", "cuda", "mps", "meta")  # where torch has AdamW in one kernel; on meta the planner's trace stands for it


def lr_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Factor on the learning rate at 0-based `step` of `steps`. warmup: steps if >= 1, else a fraction of the run."""
    rising = min(steps, math.ceil(warmup if warmup >= 1 else warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


def decay_of(parameter: Tensor, weight_decay: float) -> float:
    """Vectors (magnitudes, scales) rest at a start that is not 0, so decay would pull them away from it."""
    return weight_decay if parameter.dim() > 1 else 0.0


class AdamW:
    """AdamW over named parameters; `scales` are factors on the learning rate by parameter name (LoRA+). Weight decay
    acts on matrices only."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        master_weights: bool = True,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self.pairs: list[tuple[nn.Parameter, Tensor]] = []  # (parameter, what the inner optimizer updates)
        self.lr, self.betas = lr, betas
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in parameters:
            wide = parameter.detach().float() if master_weights and parameter.dtype != torch.float32 else parameter
            self.pairs.append((parameter, wide))
            groups.setdefault(((scales or {}).get(name, 1.0), decay_of(parameter, weight_decay)), []).append(wide)
        options = [
            {"params": tensors, "scale": scale, "weight_decay": decay} for (scale, decay), tensors in groups.items()
        ]
        # one pass over memory in place of a dozen, and no temporaries of the parameters' size
        fused = all(wide.device.type in FUSED and wide.dtype != torch.float64 for _, wide in self.pairs) or None
        self.inner = torch.optim.AdamW(options, lr=lr, betas=betas, eps=EPS, fused=fused) if options else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter, _ in self.pairs]

    def drop_gradients(self) -> None:
        """Release all gradients without an update."""
        for parameter, wide in self.pairs:
            parameter.grad = wide.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at lr * factor, then the gradients are released."""
        masters = [pair for pair in self.pairs if pair[0] is not pair[1]]
        for parameter, wide in masters:
            if parameter.grad is not None:
                wide.grad = parameter.grad.float()
                parameter.grad = None
        if self.inner:
            for group in self.inner.param_groups:
                group["lr"] = self.lr * factor * group["scale"]
            self.inner.step()
        if masters:
            torch._foreach_copy_([parameter for parameter, _ in masters], [wide for _, wide in masters])
        self.drop_gradients()


@dataclass
class _State8:
    """A parameter, what the op updates (the parameter itself where it can be), and its states."""

    parameter: nn.Parameter
    target: Tensor
    scale: float
    decay: float
    steps: int = 0
    states: list[Tensor] = field(default_factory=list)  # m codes, m absmax, v codes, v absmax

    def __post_init__(self) -> None:
        n, device = self.target.numel(), self.target.device
        for _ in range(2):
            self.states.append(torch.zeros(n, dtype=torch.uint8, device=device))
            self.states.append(torch.zeros(-(n // -STATE_BLOCK), device=device))


class AdamW8(AdamW):
    """AdamW with two bytes of states a value in place of eight. bf16 parameters have no master: they are rounded
    stochastically, by bits that follow from `seed`, the step and the place alone. Parameters below 4096 values (fp32
    states, fp32 masters) are AdamW's; a parameter of fp16, which has no range to round in, keeps a master too."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        scales: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        named = list(parameters)
        small = [(name, parameter) for name, parameter in named if parameter.numel() < SMALL]
        super().__init__(small, lr=lr, betas=betas, weight_decay=weight_decay, scales=scales)
        self.seed, self.count, self._parameters = seed, 0, [parameter for _, parameter in named]
        self.large: list[_State8] = []
        for name, parameter in named:
            if parameter.numel() >= SMALL:
                direct = parameter.dtype != torch.float16 and parameter.is_contiguous()
                target = parameter if direct else parameter.detach().float().contiguous()
                scale = (scales or {}).get(name, 1.0)
                self.large.append(_State8(parameter, target, scale, decay_of(parameter, weight_decay)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return self._parameters

    def drop_gradients(self) -> None:
        """Release all gradients without an update."""
        super().drop_gradients()
        for one in self.large:
            one.parameter.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at lr * factor, then the gradients are released."""
        moved = [one for one in self.large if one.parameter.grad is not None]
        for one in moved:
            self.count, one.steps = self.count + 1, one.steps + 1
            seed = ((self.seed & 0x7FFFFF) << 40) + self.count  # never 0
            rates = self.lr * factor * one.scale, *self.betas, EPS, one.decay
            torch.ops.qtune.adamw8_(one.target, one.parameter.grad, *one.states, *rates, one.steps, seed)
            if one.target is not one.parameter:
                one.parameter.copy_(one.target)
        super().step(factor)


def optimizer_of(model: nn.Module, keys: TrainKeys) -> AdamW:
    """The optimizer that a recipe's `train` section asks for, over all trained parameters of an adapted model."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = {
        f"{site}.adapter.{name}": scale
        for site, one in adapted_sites(model).items()
        for name, scale in one.adapter.lr_scale().items()
    }
    if keys.optimizer == "adamw8":
        return AdamW8(
            named, lr=keys.lr, betas=keys.betas, weight_decay=keys.weight_decay, scales=scales, seed=keys.seed
        )
    return AdamW(
        named, lr=keys.lr, betas=keys.betas, weight_decay=keys.weight_decay, scales=scales,
        master_weights=keys.master_weights,
    )  # fmt: skip
