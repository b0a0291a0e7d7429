"""NF4 and FP4: 4-bit codes in blocks of the flattened weight, with one absmax a block, optionally quantized again
(QLoRA, arXiv 2305.14314).

    w = table[code] * absmax[block];  double: absmax = map8[code8] * nested_absmax[block of 256] + nested_offset
Bits per weight: 4 + 32/block, with double quantization 4 + 8/block + 32/(256 block); 4.5 and 4.127 at block 64.
Parts are bit-equal to bitsandbytes'; nested_offset is the mean of absmax, whose last bits depend on the number of
threads that summed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import tables
from ..errors import QtuneError
from ..ops import block_scales
from .scheme import Grid, Layout, Parts, Scheme


def double_parts(absmax: Tensor) -> Parts:
    """Scales of blocks, fp32 of any shape -> their parts under double quantization."""
    offset = absmax.mean()
    codes, nested = torch.ops.qtune.dynamic8_pack((absmax - offset).view(-1))
    return {
        "absmax": codes.view(absmax.shape),
        "nested_absmax": nested,
        "nested_offset": offset.reshape(1),
    }


@dataclass(frozen=True)
class Blockwise4(Scheme):
    """What NF4 and FP4 share; `name` is the kind of code table."""

    name: ClassVar[str] = "_blockwise4"
    block: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block not in tables.BLOCKS:
            raise QtuneError(
                "Q108",
                f"scheme {self.name}: block must be one of {', '.join(map(str, tables.BLOCKS))}, not {self.block!r}",
            )

    def layout(self, shape: Sequence[int]) -> Layout:
        n = prod(shape)
        blocks = -(n // -self.block)
        layout: Layout = {
            "codes": (torch.uint8, ((n + 1) // 2,)),
            "absmax": (torch.uint8 if self.double else torch.float32, (blocks,)),
        }
        if self.double:
            layout["nested_absmax"] = (torch.float32, (-(blocks // -tables.NESTED_BLOCK),))
            layout["nested_offset"] = (torch.float32, (1,))
        return layout

    def identity(self) -> tuple[str, ...]:
        # doubly quantized scales hang on nested_offset, a sum whose last bits depend on the number of threads
        return ("codes",) if self.double else ("codes", "absmax")

    def magnitude(self, parts: Parts) -> float:
        return float(parts["nested_offset"]) if self.double else 0.0

    def pack(self, w: Tensor) -> Parts:
        codes, absmax = torch.ops.qtune.blockwise4_pack(w.contiguous(), self.name, self.block)
        if not self.double:
            return {"codes": codes, "absmax": absmax}
        return {"codes": codes, **double_parts(absmax)}

    def _scales(self, parts: Parts) -> tuple[Any, ...]:
        return (
            parts["codes"],
            parts["absmax"],
            parts.get("nested_absmax"),
            parts.get("nested_offset"),
            self.name,
            self.block,
        )

    def unpack(self, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.ops.qtune.blockwise4_unpack(*self._scales(parts), shape, dtype)

    def rows(self, ids: Tensor, parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.ops.qtune.blockwise4_rows(ids, *self._scales(parts), shape, dtype)

    def matmul(
        self,
        x: Tensor,
        parts: Parts,
        shape: Sequence[int],
        transpose: bool,
        inner: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        return torch.ops.qtune.blockwise4_matmul(x, *self._scales(parts), shape, transpose, inner, factor)

    def grid(self, parts: Parts, shape: Sequence[int]) -> Grid:
        order = torch.tensor(tables.ASCENDING[self.name], device=parts["codes"].device)
        scales = block_scales(parts["absmax"], parts.get("nested_absmax"), parts.get("nested_offset"))
        scale = scales.repeat_interleave(self.block)[: prod(shape)].view(*shape)
        table = tables.table(self.name, scale.device)[order]
        return Grid(table, scale, scale.new_zeros(1, 1).expand(*shape))

    def with_codes(self, parts: Parts, codes: Tensor, shape: Sequence[int]) -> Parts:
        order = torch.tensor(tables.ASCENDING[self.name], dtype=torch.uint8, device=codes.device)
        own = order.index_select(0, codes.flatten().int())
        if own.numel() % 2:
            own = torch.cat((own, parts["codes"][-1:] & 15))  # behind the end: as it was packed
        pairs = own.view(-1, 2)
        return {**parts, "codes": pairs[:, 0] << 4 | pairs[:, 1]}


@dataclass(frozen=True)
class NF4(Blockwise4):
    """4-bit NormalFloat: quantiles of the normal distribution."""

    name: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class FP4(Blockwise4):
    """4-bit float: sign, two exponent bits, one mantissa bit."""

    name: ClassVar[str] = "fp4"
