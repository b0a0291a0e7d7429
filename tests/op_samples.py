"""Small arguments for every op, a function for each family: what the laws of ops run over (test_op_laws.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Samples = dict[str, list[tuple[Any, ...]]]
qtune = torch.ops.qtune


def same(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits, so that NaN equals NaN and 0 differs from -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


class Packed:
    """One weight in one format: its ops with everything but their own arguments filled in."""

    def __init__(self, form: str, w: Tensor) -> None:
        self.form, self.shape = form, tuple(w.shape)
        if form == "int8":
            self.parts: tuple[Any, ...] = qtune.int8_pack(w)
            return
        kind, _, double = form.partition("-")
        codes, absmax = qtune.blockwise4_pack(w, kind, 64)
        nested, offset = None, None
        if double:
            offset = absmax.mean().reshape(1)
            absmax, nested = qtune.dynamic8_pack(absmax - offset)
        self.parts = (codes, absmax, nested, offset, kind, 64, self.shape)

    def _op(self, name: str) -> Any:
        return getattr(qtune, f"{'int8' if self.form == 'int8' else 'blockwise4'}_{name}")

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._op("unpack")(*self.parts, dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._op("rows")(ids, *self.parts, dtype)

    def matmul(self, x: Tensor, transpose: bool) -> Tensor:
        return self._op("matmul")(x, *self.parts, transpose)


def packed() -> Samples:
    """4-bit blocks and int8 rows."""
    double, single, int8 = (
        Packed("nf4-double", torch.randn(6, 70)),
        Packed("fp4", torch.randn(3, 5)),
        Packed("int8", torch.randn(6, 70)),
    )
    ids, x, y = torch.tensor([[0, 2], [1, 2]]), torch.randn(2, 3, 70), torch.randn(4, 6).bfloat16()
    return {
        "blockwise4_pack": [(torch.randn(3, 33), "nf4", 64), (torch.randn(4, 64).half(), "fp4", 32)],
        "dynamic8_pack": [(torch.randn(300),), (torch.randn(1),)],
        "blockwise4_unpack": [(*double.parts, torch.bfloat16), (*single.parts, torch.float32)],
        "blockwise4_rows": [(ids, *double.parts, torch.float16), (ids[0], *single.parts, torch.float32)],
        "blockwise4_matmul": [(x, *double.parts, False), (y, *double.parts, True), (x[0, 0, :5], *single.parts, False)],
        "int8_pack": [(torch.randn(4, 33),), (torch.randn(1, 1).bfloat16(),)],
        "int8_unpack": [(*int8.parts, torch.bfloat16)],
        "int8_rows": [(ids, *int8.parts, torch.float16)],
        "int8_matmul": [(x, *int8.parts, False), (y, *int8.parts, True)],
    }  # fmt: skip


def samples() -> Samples:
    """Arguments for every op, by its name."""
    families = (packed,)
    return {name: arguments for family in families for name, arguments in family().items()}
