"""HRA: W' = W H_1 ... H_r with Householder reflections H_i = I - 2 u_i u_i^T / ||u_i||^2, so y = base(H_1 ... H_r x).

Yuan et al. 2024 (arXiv 2405.17484). The reflections act on x in compact form (UT transform, Joffrain et al. 2006), with
unit columns u_i:
    H_1 ... H_r = I - U T U^T,  T^-1 = I/2 + strictly upper part of U^T U
so a step costs two products of rank r and keeps x once instead of r times. Start: equal pairs u_1 = u_2, u_3 = u_4 ...
cancel, hence an even rank; their length, which sets the step size, is PEFT's.
Left out: the orthogonality penalty, and Gram-Schmidt, which divides by zero at this start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Adapter, FromPeft, PeftNames, QuantLinear, Source, draw, trainable


class HRA(Adapter):
    """A chain of reflections of the input."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        peft_type="HRA",
        tensors={"u": "hra_u"},
        options={"rank": "r"},
        constants={"apply_GS": False},
        conv1d=False,
        native=True,
    )

    def __init__(self, base: QuantLinear, *, rank: int = 8) -> None:
        super().__init__(base)
        self.u = trainable((rank, base.in_features), base)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        bound = math.sqrt(2 / self.u.shape[0])
        draw(self.u.data[::2], nn.init.uniform_, -bound, bound)
        self.u.data[1::2] = self.u.data[::2]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U^T and (U T)^T, both [rank, in] in `dtype`; the triangular system is solved in fp32 or wider."""
        U = F.normalize(self.u.to(torch.promote_types(torch.float32, dtype)), dim=1)
        inverse = torch.triu(U @ U.T, 1) + 0.5 * torch.eye(len(U), dtype=U.dtype, device=U.device)
        UT = torch.linalg.solve_triangular(inverse.T, U, upper=False)
        return U.to(dtype), UT.to(dtype)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        U, UT = self.factors(x.dtype)
        return base(x - F.linear(x, U) @ UT)

    @torch.no_grad()
    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        U, UT = self.factors(torch.float32)
        return U, base.dequantize(torch.float32) @ UT.T, -1.0

    def peft_state(self) -> dict[str, Tensor]:
        return {"hra_u": self.u.T.contiguous()}

    @classmethod
    def from_peft(cls, given: FromPeft) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        options, sites = super().from_peft(given)
        return options, {site: {"u": u.T if (u := found["u"]).dim() == 2 else u} for site, found in sites.items()}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["rank"] % 2:
            faults.append(
                f"adapter.rank of hra must be even (2, 4, 6, ...: pairs start as the identity), not {options['rank']}"
            )
        return faults
