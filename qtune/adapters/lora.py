"""LoRA: y = base(x) + s B A x, s = alpha/rank, or alpha/sqrt(rank) with rslora.

Hu et al. 2021 (arXiv 2106.09685); rsLoRA 2312.03732; LoRA+ 2402.12354 (`plus`: B learns `plus` times as fast as A).
Start: A Kaiming-uniform, B zero. A [rank, in], B [out, rank]. Left out: LoRA on embeddings.

`freeze_a` is LoRA-FA (2308.03303): only B is trained, so that x is not kept for A's gradient, x A^T is enough. The
paper's second version corrects B's gradient by (A A^T)^-1 / s^2, as PEFT's create_lorafa_optimizer does at every step.
Here A starts with orthogonal rows, as long as Kaiming's are on average: the correction is then one number, which AdamW
and Lion do not see. Methods with a start of their own keep theirs (singular vectors are orthogonal too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, FromPeft, PeftNames, QuantLinear, Source, draw, trainable
from .peft_names import padded

NAMES = PeftNames(
    peft_type="LORA",
    tensors={"A": "lora_A.weight", "B": "lora_B.weight"},
    options={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
    native=True,
    reads=("rank_pattern", "alpha_pattern"),
)


class LoRA(Adapter):
    """Low-rank update beside the base."""

    peft: ClassVar[PeftNames | None] = NAMES

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rslora: bool = False,
        plus: float = 1.0,
        freeze_a: bool = False,
    ) -> None:
        super().__init__(base)
        self.A = trainable((rank, base.in_features), base)
        self.B = trainable((base.out_features, rank), base)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.plus, self.freeze_a = plus, freeze_a
        self.dropout = nn.Dropout(dropout)
        self.thaw()

    def thaw(self) -> None:
        super().thaw()
        self.A.requires_grad_(not self.freeze_a)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        if self.freeze_a:
            draw(self.A, _orthogonal_rows)
        else:
            draw(self.A, nn.init.kaiming_uniform_, math.sqrt(5))
        nn.init.zeros_(self.B)

    def changed(self, x: Tensor, base: QuantLinear) -> Tensor:
        """x (W + s B A)^T, dropout on the low-rank branch only; without the bias. x [..., in] -> [..., out]."""
        if not (self.dropout.p and self.training):
            return base.product_plus(x, self.A, self.B, self.scale)
        inner = F.linear(self.dropout(x), self.A.to(x.dtype)) * self.scale
        return base.product(x) + F.linear(inner, self.B.to(x.dtype))

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        return base.shift(self.changed(x, base))

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        return self.A, self.B, self.scale

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        """Ranks and alphas where they differ from site to site, as those of a change that was cut do."""
        ranks = {len(one.A) for one in adapters.values() if isinstance(one, LoRA)}
        return patterns(adapters) if len(ranks) > 1 else {}

    @classmethod
    def from_peft(cls, given: FromPeft) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Sites of other ranks get zeros up to the largest one, and B of other scales is multiplied: what is computed
        is the same."""
        options, sites = super().from_peft(given)
        power = 0.5 if options.get("rslora") else 1.0
        ranks = {site: given.at(site, "rank_pattern", options["rank"]) for site in sites}
        alphas = {site: given.at(site, "alpha_pattern", options["alpha"]) for site in sites}
        scales = {site: alphas[site] / max(ranks[site], 1) ** power for site in sites}
        most, common = max(ranks.values()), next(iter(scales.values()))
        if any(given.config.get(key) for key in ("rank_pattern", "alpha_pattern")):
            options |= {"rank": most, "alpha": common * most**power}
        for site, found in sites.items():
            found["A"] = padded(found["A"], 0, ranks[site], most, site)
            found["B"] = padded(found["B"], 1, ranks[site], most, site)
            if scales[site] != common and common > 0:
                found["B"] = found["B"].float() * (scales[site] / common)
        return options, sites

    def lr_scale(self) -> dict[str, float]:
        return {} if self.plus == 1.0 else {"B": self.plus}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if not 0 <= options["dropout"] < 1:
            faults.append(f"adapter.dropout must be at least 0 and below 1, not {options['dropout']}")
        faults += [
            f"adapter.{name} must be above 0, not {options[name]}"
            for name in ("alpha", "plus")
            if options.get(name, 1) <= 0
        ]
        return faults


def _orthogonal_rows(values: Tensor) -> None:
    """Rows [rank, in] at right angles, of the length that Kaiming-uniform ones have on average."""
    values.copy_(nn.init.orthogonal_(torch.empty(values.shape, device=values.device), 3**-0.5))


def patterns(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """What PEFT's LoRA is told of factors whose ranks differ: rank and alpha of each site."""
    found: dict[str, tuple[int, float]] = {}
    for name, one in adapters.items():
        assert isinstance(one, LoRA)
        found[name] = len(one.A), one.scale * len(one.A)
    rank, alpha = next(iter(found.values()))
    config: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    if len(set(found.values())) > 1:
        config["rank_pattern"] = {name: r for name, (r, _) in found.items()}
        config["alpha_pattern"] = {name: a for name, (_, a) in found.items()}
    return config
