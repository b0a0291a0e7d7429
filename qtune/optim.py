"""AdamW over adapters with fp32 master weights, learning-rate groups and schedules.

bf16 has 8 bits of precision: an update below 1/256 of a weight vanishes when it is added in bf16. So by default the
optimizer keeps an fp32 master of each bf16 parameter, updates that, and writes it back rounded. The arithmetic is
torch's own AdamW (Loshchilov & Hutter, 1711.05101).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

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
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in parameters:
            wide = parameter.detach().float() if master_weights and parameter.dtype != torch.float32 else parameter
            self.pairs.append((parameter, wide))
            # vectors (magnitudes, scales) rest at a start that is not 0, so decay would pull them away from it
            groups.setdefault(((scales or {}).get(name, 1.0), wide.dim() > 1), []).append(wide)
        self.lr = lr
        options = [
            {"params": tensors, "scale": scale, "weight_decay": weight_decay * matrix}
            for (scale, matrix), tensors in groups.items()
        ]
        self.inner = torch.optim.AdamW(options, lr=lr, betas=betas)

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
        for group in self.inner.param_groups:
            group["lr"] = self.lr * factor * group["scale"]
        for parameter, wide in self.pairs:
            if wide is not parameter and parameter.grad is not None:
                wide.grad = parameter.grad.float()
                parameter.grad = None
        self.inner.step()
        for parameter, wide in self.pairs:
            if wide is not parameter:
                parameter.copy_(wide)
        self.drop_gradients()
