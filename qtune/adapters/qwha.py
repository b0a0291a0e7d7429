"""QWHA: y = base(x) + c F H x, F [out, in] sparse, H the orthonormal Walsh-Hadamard transform, c = s / sqrt(in out).

Jeon, Lee et al. 2025 (arXiv 2509.17428; code vantaa89/qwha). F has rank (in + out) values, LoRA's number, at places
that the start chooses for good (`allocation.py`), so that W - W_q - c F H is least on calibration text; s = 4000 is the
step size only, the start does not depend on it. On the token side, as x H^T F^T: nothing dense is made, and q/k/v and
gate/up share one transform (`transforms.py`). A base that is not quantized has no error: there the places come from the
weight itself, and the values are zero. data=false: no calibration text, G = I.
Ours: `transform=none` (plain sparse: the control, and for any width) and `rounds` of exchange. The paper: magnitude,
activation, rounds=0. The authors' code: energy, weight, rounds=0.
Left out: PEFT has no form of it. A weight plus delta, formed for the moment instead of the sparse product: 1.1 to 13
times slower at 64 to 4,096 tokens, forward, on layers of 7B shape (a CPU with AMX).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import sparse_linear
from .allocation import ALLOCATIONS, SELECTIONS, Rule, check_budget, fit, is_dense
from .base import Adapter, QuantLinear, Source, trainable
from .transforms import check_size, shared_transform, transform

ROWS = 1 << 24  # weights that a merge turns back at a time


class QWHA(Adapter):
    """Sparse update in the basis of a transform of the inputs, started from the quantization error."""

    bound: ClassVar[float | None] = 1.0
    basis: ClassVar[str] = "transform"  # the option that names it
    transforms: ClassVar[tuple[str, ...]] = ("hadamard", "none")
    rows: Tensor
    cols: Tensor

    def __init__(
        self,
        base: QuantLinear,
        *,
        rank: int = 16,
        scale: float = 4000.0,
        transform: str = "hadamard",
        select: str = "magnitude",
        allocate: str = "activation",
        temperature: float = 1.0,
        refine: bool = True,
        rounds: int = 4,
        data: bool = True,
    ) -> None:
        super().__init__(base)
        out, width = base.shape
        total = check_budget(rank, out, width)
        check_size(width, transform, "; adapter.transform=none takes any width")
        self.transform, self.data = transform, data
        self.rule = Rule(select, allocate, temperature, refine, rounds)
        self.scale = scale / math.sqrt(width * out)
        self.values = trainable((total,), base)
        like: dict[str, Any] = {"device": base.device}
        self.register_buffer("rows", torch.zeros(out + 1, dtype=torch.int32, **like))
        self.register_buffer("cols", torch.zeros(total, dtype=torch.int16 if width <= 1 << 16 else torch.int32, **like))

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> frozenset[str]:
        return frozenset({"weight", "gram"} if options["data"] else {"weight"})

    @torch.no_grad()
    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        assert source is not None
        error = source.weight.to(base.device, torch.float32, copy=True)
        if not is_dense(base):
            error -= base.dequantize(torch.float32)
        f = transform(error, self.transform)
        del error
        rows, cols, values = fit(f, self._gram(source, f), self.values.numel(), self.rule, self._store, self.scale)
        self.rows.copy_(rows)
        self.cols.copy_(cols.to(self.cols.dtype))  # int16 keeps the lower 16 bits
        self.values.copy_(torch.zeros_like(values) if is_dense(base) else values)

    def _gram(self, source: Source, f: Tensor) -> Tensor | None:
        """The inputs' second moments in the transform's basis, T G T^T."""
        if not self.data or source.gram is None:
            return None
        once = transform(source.gram.to(f), self.transform)
        return transform(once.t().contiguous(), self.transform)

    def _store(self, values: Tensor) -> Tensor:
        return values.to(self.values.dtype)

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        moved = shared_transform(x, self.transform)
        delta = sparse_linear(moved, self.rows, self.cols, self.values.to(moved.dtype), base.out_features, self.scale)
        return base.shift(base.product(x) + delta)

    @torch.no_grad()
    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight = base.dequantize(torch.float32)
        row = torch.repeat_interleave(
            torch.arange(base.out_features, device=weight.device), self.rows.diff().long(), output_size=len(self.cols)
        )
        place, values = row * base.in_features + (self.cols.long() & 0xFFFF), self.values.float() * self.scale
        step = max(1, ROWS // base.in_features)
        for first in range(0, base.out_features, step):
            part = weight[first : first + step]
            start, end = int(self.rows[first]), int(self.rows[first + len(part)])
            dense = weight.new_zeros(part.numel())
            dense[place[start:end] - first * base.in_features] = values[start:end]
            part += transform(dense.view_as(part), self.transform, inverse=True)
        return weight, None if base.bias is None else base.bias.float()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        for name, legal in (
            ("select", SELECTIONS),
            ("allocate", ALLOCATIONS),
            ("transform", cls.transforms),
            ("variant", cls.transforms),
        ):
            if name in options and options[name] not in legal:
                faults.append(f"adapter.{name} must be one of {', '.join(legal)}, not {options[name]!r}")
        for name in ("scale", "temperature"):
            if not 0 < options[name] < math.inf:
                faults.append(f"adapter.{name} must be above 0, not {options[name]}")
        if options["rounds"] < 0:
            faults.append(f"adapter.rounds must be at least 0, not {options['rounds']}")
        return faults
