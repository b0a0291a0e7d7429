"""INT4, INT3, INT2, NF3 and NF2: codes of few bits with one scale for each group of 32, 64 or 128 weights of a row.

    int:  w = scale * (code - zero)     scale bf16, rounded up so that nothing is clipped; zero fp16, not rounded to an
                                        integer: min and max of a group need no common step (as GPTQ's and QWHA's bases)
    nf:   w = absmax * level[code]      NormalFloat by LoftQ's (arXiv 2310.08659) and bitsandbytes' construction
Bits per weight at group 64: int4 4.5, int3 3.5, int2 2.5 (32 bits a group); nf3 3.127, nf2 2.127 with double
quantization (arXiv 2305.14314; 8 bits a group and 32 per 256 groups), 3.5 and 2.5 without. A row is padded to units of
32 codes (ops/grouped.py). NF's codes are chosen by the exact absmax: the stored 8-bit one hangs on a sum over all
groups, whose last bits differ from machine to machine. Left out: symmetric integers, groups across rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import tables
from ..errors import QtuneError
from ..ops.grouped import group_scales, pack_codes, spread
from .blockwise4 import double_parts
from .scheme import Grid, Layout, Parts, Scheme


@dataclass(frozen=True)
class Grouped(Scheme):
    """What all five share."""

    name: ClassVar[str] = "_grouped"
    bits: ClassVar[int]
    group: int = 64

    def __post_init__(self) -> None:
        if type(self.group) is not int or self.group not in tables.GROUPS:
            raise QtuneError(
                "Q108",
                f"scheme {self.name}: group must be one of {', '.join(map(str, tables.GROUPS))}, not {self.group!r}",
            )

    def _sizes(self, shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of the codes and of what each group has one of."""
        return (shape[0], tables.row_bytes(shape[1], self.bits)), (shape[0], -(shape[1] // -self.group))

    def _parts(self, parts: Parts) -> tuple[Any, ...]:
        """The first arguments of the ops."""
        nested = parts.get("nested_absmax"), parts.get("nested_offset")
        scale = parts["scale"] if "scale" in parts else parts["absmax"]
        return parts["codes"], scale, parts.get("zero"), *nested, self.bits, self.group

    def unpack(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.ops.qtune.grouped_unpack(*self._parts(parts), shape, dtype)

    def rows(self, ids: Tensor, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.ops.qtune.grouped_rows(ids, *self._parts(parts), shape, dtype)

    def matmul(
        self,
        x: Tensor,
        parts: Parts,
        shape: Sequence[int],
        transpose: bool,
        inner: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        return torch.ops.qtune.grouped_matmul(x, *self._parts(parts), shape, transpose, inner, factor)

    def grid(self, parts: Parts, shape: Sequence[int]) -> Grid:
        codes, scale, zero, absmax, offset, *_ = self._parts(parts)
        scales = group_scales(scale, absmax, offset)
        # a product of 8 and 11 bits: exact in fp32, as that of scale and code is
        shift = torch.zeros_like(scales) if zero is None else -(scales * zero.float())
        table = tables.levels(self.bits, zero is None, codes.device)
        return Grid(table, spread(scales, self.group, shape[1]), spread(shift, self.group, shape[1]))

    def with_codes(self, parts: Parts, codes: Tensor, shape: Sequence[int]) -> Parts:
        return {**parts, "codes": pack_codes(codes, self.bits)}


@dataclass(frozen=True)
class Integer(Grouped):
    """Integers with a float zero point."""

    name: ClassVar[str] = "_integer"

    def layout(self, shape: Sequence[int]) -> Layout:
        codes, groups = self._sizes(shape)
        return {"codes": (torch.uint8, codes), "scale": (torch.bfloat16, groups), "zero": (torch.float16, groups)}

    def largest(self) -> float:
        # a group's range is up to twice this, and its scale is rounded up: fp32 holds both, and every value
        return torch.finfo(torch.float32).max / 4

    def pack(self, w: Tensor) -> Parts:
        codes, scale, zero = torch.ops.qtune.grouped_int_pack(w.contiguous(), self.bits, self.group)
        return {"codes": codes, "scale": scale, "zero": zero}


@dataclass(frozen=True)
class NormalFloat(Grouped):
    """Quantiles of the normal distribution; `double`: the absmax of each group is stored in 8 bits."""

    name: ClassVar[str] = "_normalfloat"
    double: bool = True

    def layout(self, shape: Sequence[int]) -> Layout:
        codes, groups = self._sizes(shape)
        layout: Layout = {
            "codes": (torch.uint8, codes),
            "absmax": (torch.uint8 if self.double else torch.float32, groups),
        }
        if self.double:
            layout["nested_absmax"] = (torch.float32, (-(groups[0] * groups[1] // -tables.NESTED_BLOCK),))
            layout["nested_offset"] = (torch.float32, (1,))
        return layout

    def identity(self) -> tuple[str, ...]:
        return ("codes",) if self.double else ("codes", "absmax")  # as NF4's

    def magnitude(self, parts: Parts) -> float:
        return float(parts["nested_offset"]) if self.double else 0.0

    def pack(self, w: Tensor) -> Parts:
        codes, absmax = torch.ops.qtune.grouped_nf_pack(w.contiguous(), self.bits, self.group)
        if not self.double:
            return {"codes": codes, "absmax": absmax}
        return {"codes": codes, **double_parts(absmax)}


@dataclass(frozen=True)
class INT4(Integer):
    """4-bit integers: 4.5 bits per weight at group 64."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class INT3(Integer):
    """3-bit integers: 3.5 bits per weight at group 64."""

    name: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class INT2(Integer):
    """2-bit integers: 2.5 bits per weight at group 64."""

    name: ClassVar[str] = "int2"
    bits: ClassVar[int] = 2


@dataclass(frozen=True)
class NF3(NormalFloat):
    """3-bit NormalFloat: 3.127 bits per weight at group 64, 3.5 without double quantization."""

    name: ClassVar[str] = "nf3"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class NF2(NormalFloat):
    """2-bit NormalFloat: 2.127 bits per weight at group 64, 2.5 without double quantization."""

    name: ClassVar[str] = "nf2"
    bits: ClassVar[int] = 2
