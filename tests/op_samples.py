"""Small arguments for every op, a function for each family: what the laws of ops run over (test_op_laws.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtune import ops

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
        "blockwise4_matmul": [
            (x, *double.parts, False), (y, *double.parts, True), (x[0, 0, :5], *single.parts, False),
            (x, *double.parts, False, torch.randn(2, 3, 4), torch.randn(6, 4)),
            (y, *double.parts, True, y[:, :3], torch.randn(3, 70).bfloat16()),
        ],
        "int8_pack": [(torch.randn(4, 33),), (torch.randn(1, 1).bfloat16(),)],
        "int8_unpack": [(*int8.parts, torch.bfloat16)],
        "int8_rows": [(ids, *int8.parts, torch.float16)],
        "int8_matmul": [(x, *int8.parts, False), (y, *int8.parts, True)],
    }  # fmt: skip


def grouped() -> Samples:
    """Groups of few bits: integers, NormalFloat with and without double quantization; rows that 32 does not divide."""
    ids, x, y = torch.tensor([[0, 2], [1, 2]]), torch.randn(2, 3, 70), torch.randn(4, 6).bfloat16()
    int3 = (*qtune.grouped_int_pack(torch.randn(6, 70), 3, 64), None, None, 3, 64, (6, 70))
    codes, absmax = qtune.grouped_nf_pack(torch.randn(6, 70), 2, 32)
    single = (codes, absmax, None, None, None, 2, 32, (6, 70))
    offset = absmax.mean().reshape(1)
    codes8, nested = qtune.dynamic8_pack((absmax - offset).view(-1))
    double = (codes, codes8.view(absmax.shape), None, nested, offset, 2, 32, (6, 70))
    return {
        "grouped_int_pack": [(torch.randn(3, 33), 4, 64), (torch.randn(4, 64).half(), 2, 32)],
        "grouped_nf_pack": [(torch.randn(3, 33), 3, 64), (torch.randn(1, 5).bfloat16(), 2, 128)],
        "grouped_unpack": [(*int3, torch.bfloat16), (*single, torch.float32), (*double, torch.float16)],
        "grouped_rows": [(ids, *int3, torch.float16), (ids[0], *double, torch.float32)],
        "grouped_matmul": [
            (x, *int3, False), (y, *double, True),
            (x, *single, False, torch.randn(2, 3, 4), torch.randn(6, 4)),
            (y, *int3, True, y[:, :3], torch.randn(3, 70).bfloat16()),
        ],
    }  # fmt: skip


def layers() -> Samples:
    """RMS norm, SwiGLU, rotary positions, and the loss."""
    x, w, g, u = torch.randn(2, 3, 33), torch.randn(33), torch.randn(3, 37).half(), torch.randn(3, 37).half()
    heads, angles = torch.randn(2, 4, 3, 10).bfloat16().transpose(1, 2), torch.randn(1, 3, 8)
    turn = (heads, angles.cos().bfloat16(), angles.sin().bfloat16())
    labels = torch.tensor([4, 0, 69])
    return {
        "rms_norm": [(x, w, 1e-6, 0.0, True), (x.bfloat16(), w.bfloat16(), 1e-5, 1.0, False)],
        "rms_norm_backward": [(x, x + 1, w, torch.rand(2, 3) + 0.5, 0.0), (x.half(), x.half(), w, x[..., 0] ** 2, 1.0)],
        "swiglu": [(g, u), (x[..., ::2], x[..., ::2])],
        "swiglu_backward": [(g, u, g + 1), (x, x, x)],
        "rotary": [(*turn, False), (*turn, True), (torch.randn(2, 3, 1, 8), angles.cos(), angles.sin(), False)],
        "cross_entropy_": [
            (torch.randn(3, 70), labels), (torch.randn(3, 70).bfloat16(), labels, 0.1, 1e-3, True),
            (torch.randn(3, 70), labels, 0.0, 0.0, False),
        ],
    }  # fmt: skip


def optim() -> Samples:
    """AdamW with 8-bit states: a full block and a rest; stochastic rounding."""

    def one(dtype: torch.dtype, grad: torch.dtype, seed: int) -> tuple[Any, ...]:
        states = [t for _ in range(2) for t in (torch.randint(0, 256, (303,), dtype=torch.uint8), torch.rand(2))]
        rates = (1e-3, 0.9, 0.999, 1e-8, 0.1)
        return (torch.randn(3, 101).to(dtype), torch.randn(3, 101).to(grad), *states, *rates, 3, seed)

    return {"adamw8_": [one(torch.float32, torch.float16, 0), one(torch.bfloat16, torch.bfloat16, 5)]}


def transforms() -> Samples:
    """Hadamard transforms and sparse products."""
    x, y, values = torch.randn(2, 3, 44), torch.randn(5, 24).bfloat16(), torch.randn(7)
    base = ops.hadamard_matrix(44)
    rows, cols = torch.tensor([0, 3, 3, 7]), torch.tensor([5, 0, 43, 1, 1, 2, 9], dtype=torch.int16)
    short, dy = (rows.int(), cols.int()), torch.randn(2, 3, 3)
    return {
        "hadamard": [(x, 0.5, False), (x[:, :0], 2.0, True), (y, 1.0, True)],
        "hadamard_kronecker": [(x, base, 0.5, False), (torch.randn(2, 88).half(), base, 1.0, True)],
        "sparse_matmul": [(x, rows, cols, values, 3), (x.half(), *short, values.half(), 3)],
        "sparse_matmul_t": [(dy, rows, cols, values, 44), (dy.bfloat16(), *short, values, 44)],
        "sampled_product": [(dy, x, rows, cols), (dy.bfloat16(), x.bfloat16(), *short)],
    }


def attention() -> Samples:
    """Grouped heads, causal and masked, with a query that sees nothing; a strided q."""
    mask = torch.rand(1, 1, 5, 7) < 0.7
    mask[:, :, 2] = False
    q, k, v = torch.randn(2, 4, 5, 8).transpose(1, 2), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    both = (q, k, v, mask.expand(2, 1, 5, 7), False, 0.3), (q.bfloat16(), k.bfloat16(), v.bfloat16(), None, True, 0.5)
    douts = [torch.randn(2, 5, 4, 8).to(args[0].dtype) for args in both]
    return {
        "attention": list(both),
        "attention_backward": [(d, *a[:3], *qtune.attention(*a), *a[3:]) for d, a in zip(douts, both, strict=True)],
    }  # fmt: skip


def samples() -> Samples:
    """Arguments for every op, by its name."""
    families = (packed, grouped, layers, optim, transforms, attention)
    return {name: arguments for family in families for name, arguments in family().items()}
