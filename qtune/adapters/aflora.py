"""AFLoRA: y = base(x) + b * B (d * A x); all four learn, and a score freezes the matrices one after the other.

Liu et al. 2024 (arXiv 2403.13269). Of each matrix A [rank, in] and B [out, rank] two averages over time are kept for
every entry: I of |gradient| (`beta1`) and U of |gradient's size - I| (`beta2`); the matrix's score is the mean of I U.
Behind step t the matrices of least score are frozen until they are the share 1 - (1 - (t - t_init) / (end - t_init))^3
of all: none up to `t_init`, all from end on, `t_final` before the last step (steps, or below 1 shares of the run).
A frozen matrix stays frozen; its averages and the optimizer's states go, and with A the inputs are no longer kept for
the backward. d [rank] and b [out] are trained to the end. Start: A and B Kaiming-uniform, d 0.1, b zero, as VeRA's.
A plan counts the first steps, in which all is trained. PEFT reads it as a LoRA of A and b * B * d.
The authors' code differs: it averages |gradient| over 10 steps first, holds a matrix's score against a quantile of the
scores of all entries, and in its runs on GLUE never trains the matrices of square layers (those of attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Adapter, Change, Changes, PeftNames, QtuneError, QuantLinear, Source, draw, replace_values, trainable
from .factored import Factored

MATRICES = ("A", "B")


class AFLoRA(Factored):
    """Two learned vectors around two matrices that are learned for a while."""

    peft: ClassVar[PeftNames | None] = PeftNames("LORA", {}, {"rank": "r", "dropout": "lora_dropout"})
    # [2, ...]: I and U of a matrix that is trained, nothing of one that is frozen
    grows: ClassVar[Mapping[str, tuple[int, str]]] = MappingProxyType({"seen_A": (0, "A"), "seen_B": (0, "B")})

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 4,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        t_init: float = 0.1,
        t_final: float = 0.4,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        super().__init__(base)
        self.A = trainable((rank, base.in_features), base)
        self.B = trainable((base.out_features, rank), base)
        self.d = trainable((rank,), base)
        self.b = trainable((base.out_features,), base)
        for name in MATRICES:
            shape = self.get_parameter(name).shape
            self.register_buffer(f"seen_{name}", torch.zeros(2, *shape, dtype=torch.float32, device=base.device))
        self.scale, self.d_initial = 1.0, d_initial
        self.t_init, self.t_final, self.betas = t_init, t_final, (beta1, beta2)
        self.dropout = nn.Dropout(dropout)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        for name in MATRICES:
            draw(self.get_parameter(name), nn.init.kaiming_uniform_)
            self.get_buffer(f"seen_{name}").zero_()
        nn.init.constant_(self.d, self.d_initial)
        nn.init.zeros_(self.b)

    def frozen(self, name: str) -> bool:
        """Is the matrix `name` trained no more?"""
        return not len(self.get_buffer(f"seen_{name}"))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = (self.get_parameter(name).to(dtype) for name in MATRICES)
        A, B = A.detach() if self.frozen("A") else A, B.detach() if self.frozen("B") else B
        # both vectors at B: with A frozen its product with x is all that is kept
        return A, self.b.to(dtype).unsqueeze(1) * B * self.d.to(dtype)

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        one = next(iter(adapters.values()))
        assert isinstance(one, AFLoRA)
        return {"lora_alpha": len(one.A)}

    # ---- in time

    def times(self, steps: int) -> tuple[int, int]:
        """The last step behind which all is trained, the first behind which all is frozen. QtuneError where there are
        none between."""
        first, settle = (int(t * steps) if t < 1 else int(t) for t in (self.t_init, self.t_final))
        if first >= steps - settle:
            raise QtuneError(
                "Q107",
                f"adapter.t_init {self.t_init} and adapter.t_final {self.t_final} leave none of {steps} steps to "
                "freeze matrices in; together they must be less than the run",
            )
        return first, steps - settle

    @classmethod
    @torch.no_grad()
    def see_gradients(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> None:
        for one in adapters.values():
            assert isinstance(one, AFLoRA)
            for name in MATRICES:
                grad = one.get_parameter(name).grad
                if grad is not None and not one.frozen(name):
                    mean, doubt = one.get_buffer(f"seen_{name}")
                    size = grad.abs().to(mean.dtype)
                    mean.lerp_(size, 1 - one.betas[0])
                    doubt.lerp_(size.sub_(mean).abs_(), 1 - one.betas[1])

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Mapping[str, Adapter], step: int, steps: int) -> Changes:
        sites = [one for one in adapters.values() if isinstance(one, AFLoRA)]
        trained = [(one, name) for one in sites for name in MATRICES if not one.frozen(name)]
        matrices = len(MATRICES) * len(sites)
        due = int(fraction(step, *sites[0].times(steps)) * matrices + 1e-9) - (matrices - len(trained))
        if due <= 0 or sites[0].A.is_meta:
            return {}
        seen = [one.get_buffer(f"seen_{name}") for one, name in trained]
        scores = torch.stack([(mean * doubt).mean() for mean, doubt in seen]).tolist()
        changes: dict[nn.Parameter, Change] = {}
        for place in sorted(range(len(trained)), key=lambda i: scores[i])[:due]:
            one, name = trained[place]
            replace_values(seen[place], seen[place][:0].clone())
            changes[one.get_parameter(name)] = Change(lambda values: values)  # without moments: they are let go of
        return changes

    @classmethod
    def worst(cls, adapters: Mapping[str, Adapter], steps: int | None) -> None:
        """All is trained, as at the start."""
        for one in adapters.values():
            assert isinstance(one, AFLoRA)
            if steps is not None:
                one.times(steps)
            one.resize(dict.fromkeys(MATRICES, 2))

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        for name in ("beta1", "beta2"):
            if not 0 <= options[name] < 1:
                faults.append(f"adapter.{name} must be at least 0 and below 1, not {options[name]}")
        for name in ("t_init", "t_final"):
            if options[name] < 0:
                faults.append(f"adapter.{name} must be at least 0, not {options[name]}")
        return faults


def fraction(step: int, first: int, end: int) -> float:
    """The share of all matrices that are frozen behind a step (the paper's cubic schedule)."""
    if step <= first:
        return 0.0
    return 1 - (1 - (min(step, end) - first) / (end - first)) ** 3
