"""(IA)3: y = s * base(x), or y = base(s * x) at feed-forward sites; s is a learned vector of ones at the start.

Liu et al. 2022 (arXiv 2205.05638): keys and values are scaled at the output, the feed-forward block at the input of its
last layer, which is where its activations are. As in PEFT the output's scale covers the bias. s stays fp32: bf16 cannot
hold 1.003.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Adapter, FromPeft, PeftNames, QtuneError, QuantLinear, Source, matches, trainable
from .peft_names import matches_whole

FEEDFORWARD = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "w2")


class IA3(Adapter):
    """One scale a channel."""

    targets: ClassVar[tuple[str, ...]] = ("k_proj", "v_proj", "down_proj")
    peft: ClassVar[PeftNames | None] = PeftNames(
        peft_type="IA3", tensors={"scale": "ia3_l"}, options={}, native=True, reads=("feedforward_modules",)
    )

    def __init__(self, base: QuantLinear, *, feedforward: tuple[str, ...] = FEEDFORWARD) -> None:
        super().__init__(base)
        self.on_inputs = any(matches(base.name, pattern) for pattern in feedforward)
        self.scale = trainable((base.in_features if self.on_inputs else base.out_features,), base, torch.float32)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        # x + (s - 1) x: in bf16 a scale below 1.004 would round to 1
        change = (self.scale - 1).to(x.dtype)
        if self.on_inputs:
            return base(torch.addcmul(x, x, change))
        y = base(x)
        return torch.addcmul(y, y, change)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight, scale = base.dequantize(torch.float32), self.scale.float()
        bias = None if base.bias is None else base.bias.float()
        if self.on_inputs:
            return weight.mul_(scale), bias
        return weight.mul_(scale.unsqueeze(1)), None if bias is None else bias * scale

    def peft_state(self) -> dict[str, Tensor]:
        return {"ia3_l": self.scale.unsqueeze(0 if self.on_inputs else 1)}

    def peft_lists(self) -> tuple[str, ...]:
        return ("feedforward_modules",) if self.on_inputs else ()

    @classmethod
    def peft_config(cls, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {"feedforward_modules": []}  # unless sites are in it

    @classmethod
    def from_peft(cls, given: FromPeft) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """A site scales its inputs where PEFT takes it for a feed-forward one; its tensor must be one row then, else
        one column."""
        listed = given.config.get("feedforward_modules") or []
        if isinstance(listed, str):
            inputs = [site for site in given.sites if matches_whole(listed, site, "feedforward_modules")]
        elif isinstance(listed, list) and all(isinstance(end, str) for end in listed):
            inputs = [site for site in given.sites if site.endswith(tuple(listed))]
        else:
            raise QtuneError("Q417", f"adapter_config.json: feedforward_modules is {listed!r}; legal: names of layers")
        short = isinstance(listed, list) and all(
            any(matches(site, end) for end in listed) == (site in inputs) for site in given.sites
        )
        sites = {}
        for site, found in given.sites.items():
            scale, dim = found["ia3_l"], 0 if site in inputs else 1
            flat = scale.dim() == 2 and scale.shape[dim] == 1
            sites[site] = {"scale": scale.select(dim, 0) if flat else scale}
        return {"feedforward": tuple(listed if short else inputs)}, sites
