"""RMS norm, SwiGLU and rotary positions on the CPU: ctypes wrappers of layers.cpp, for fp32, bf16 and fp16.

Functions take the ops' own arguments; `simd` (scalar, avx2, avx512, neon) forces a path, for tests. A call costs some
microseconds, as small models make many of them: what fits is seen by one condition, faults are put into words after.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import DTYPES, FLAG, POINTER, REAL, SIZE, Library, fits, require, simd_number


def _self_test(library: ctypes.CDLL) -> bool:
    """By hand: a row of twos has rstd 1/2 and comes out as its weight; silu(0) is 0; half a turn changes the sign."""
    Row = ctypes.c_float * 3
    row, weight, out, rstd = Row(2, 2, 2), Row(1, -3, 0.5), Row(), Row()
    library.qtune_rms_norm(row, weight, 0, 0, 1, 3, 0.0, 0.0, 1, out, rstd, 1, -1)
    normed = (*out, rstd[0])
    library.qtune_swiglu(None, Row(), row, 0, 3, out, None, 1, -1)
    gated = tuple(out)
    minus, zero, turned = Row(-1, -1), Row(), Row()
    library.qtune_rotary(row, minus, zero, 0, 0, _Shape(1, 1, 1, 3, 2, 1, 3, 3, 3, 2, 2), 0, turned, 1, -1)
    return (normed, gated, tuple(turned)) == ((1, -3, 0.5, 0.5), (0, 0, 0), (-2, -2, 2))


_P, _S, _F, _R = POINTER, SIZE, FLAG, REAL
_Shape = ctypes.c_int64 * 11
LIBRARY = Library(
    "layers.cpp",
    ("layers_body.h", "layers_exp.h", "layers_lanes.h", "simd.h", "simd_x86.h"),
    {
        "qtune_rms_norm": (_P, _P, _F, _F, _S, _S, _R, _R, _F, _P, _P, _F, _F),
        "qtune_rms_norm_backward": (_P, _P, _P, _P, _F, _F, _S, _S, _R, _P, _F, _F),
        "qtune_swiglu": (_P, _P, _P, _F, _S, _P, _P, _F, _F),
        "qtune_rotary": (_P, _P, _P, _F, _F, _P, _F, _P, _F, _F),
    },
    _self_test,
)


def _refuse(*parts: tuple[str, Tensor, tuple[int, ...], torch.dtype | None]) -> None:
    """One error for all of (name, tensor, wanted shape, wanted dtype or None for any) that do not fit."""
    checks = []
    for name, t, shape, dtype in parts:
        holds = fits(t, t.numel(), *(DTYPES if dtype is None else (dtype,))) and tuple(t.shape) == shape
        wanted = f"{list(shape)} of {dtype or list(DTYPES)} on cpu"
        checks.append((holds, f"{name}: {list(t.shape)} of {t.dtype} on {t.device}; wanted {wanted}"))
    require(checks)


# ---- RMS norm


def _norm_weight(x: Tensor, weight: Tensor, offset: float, cast_first: bool) -> tuple[Tensor, float]:
    """The weight in x's dtype or fp32, and what is still to be added to it."""
    if cast_first and offset:  # the sum is rounded to the weight's dtype first
        weight, offset = weight + offset, 0.0
    return (weight if weight.dtype == x.dtype else weight.float()).contiguous(), offset


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, simd: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x [..., h], weight [h] -> y like x, rstd fp32 [...]."""
    shape, dtype = x.shape, x.dtype
    h = shape[-1]
    if not (dtype in DTYPES and x.is_cpu and weight.is_cpu and weight.dtype in DTYPES and weight.shape == (h,)):
        _refuse(("x", x, tuple(shape), None), ("weight", weight, (h,), None))
    weight, offset = _norm_weight(x, weight, offset, cast_first)
    wide, x = weight.dtype != dtype, x.contiguous()
    y, rstd = torch.empty(shape, dtype=dtype), torch.empty(shape[:-1], dtype=torch.float32)
    size = DTYPES[dtype], wide, rstd.numel(), h
    sources, results = (x.data_ptr(), weight.data_ptr()), (y.data_ptr(), rstd.data_ptr())
    numbers = eps, offset, cast_first
    LIBRARY.call("qtune_rms_norm", *sources, *size, *numbers, *results, torch.get_num_threads(), simd_number(simd))
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, simd: str = "auto") -> Tensor:
    """dy, x [..., h], weight [h], rstd fp32 [...] -> dx like x."""
    shape, dtype = x.shape, x.dtype
    h = shape[-1]
    if not (
        dtype in DTYPES and dy.dtype == dtype and weight.dtype in DTYPES and rstd.dtype == torch.float32
        and x.is_cpu and dy.is_cpu and weight.is_cpu and rstd.is_cpu
        and dy.shape == shape and weight.shape == (h,) and rstd.shape == shape[:-1]
    ):  # fmt: skip
        rest = ("weight", weight, (h,), None), ("rstd", rstd, tuple(shape[:-1]), torch.float32)
        _refuse(("x", x, tuple(shape), None), ("dy", dy, tuple(shape), dtype), *rest)
    weight, offset = _norm_weight(x, weight, offset, False)
    dy, x, rstd, dx = dy.contiguous(), x.contiguous(), rstd.contiguous(), torch.empty(shape, dtype=dtype)
    sources = dy.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr()
    size = DTYPES[dtype], weight.dtype != dtype, rstd.numel(), h, offset
    LIBRARY.call("qtune_rms_norm_backward", *sources, *size, dx.data_ptr(), torch.get_num_threads(), simd_number(simd))
    return dx


# ---- SwiGLU


def swiglu(gate: Tensor, up: Tensor, simd: str = "auto") -> Tensor:
    """gate, up of one shape and dtype -> silu(gate) * up."""
    shape, dtype = gate.shape, gate.dtype
    if not (dtype in DTYPES and up.dtype == dtype and gate.is_cpu and up.is_cpu and up.shape == shape):
        _refuse(("gate", gate, tuple(shape), None), ("up", up, tuple(shape), dtype))
    gate, up, y = gate.contiguous(), up.contiguous(), torch.empty(shape, dtype=dtype)
    sources = None, gate.data_ptr(), up.data_ptr(), DTYPES[dtype], y.numel()
    LIBRARY.call("qtune_swiglu", *sources, y.data_ptr(), None, torch.get_num_threads(), simd_number(simd))
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, simd: str = "auto") -> tuple[Tensor, Tensor]:
    """dy, gate, up of one shape and dtype -> dgate, dup."""
    shape, dtype = gate.shape, gate.dtype
    if not (
        dtype in DTYPES and up.dtype == dtype and dy.dtype == dtype and gate.is_cpu and up.is_cpu and dy.is_cpu
        and up.shape == shape and dy.shape == shape
    ):  # fmt: skip
        goal = tuple(shape)
        _refuse(("gate", gate, goal, None), ("up", up, goal, dtype), ("dy", dy, goal, dtype))
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    sources = dy.data_ptr(), gate.data_ptr(), up.data_ptr(), DTYPES[dtype], dgate.numel()
    results = dgate.data_ptr(), dup.data_ptr()
    LIBRARY.call("qtune_swiglu", *sources, *results, torch.get_num_threads(), simd_number(simd))
    return dgate, dup


# ---- rotary positions


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, simd: str = "auto") -> Tensor:
    """x [batch, seq, heads, dim], cos, sin [batch or 1, seq, r] in x's dtype or fp32 -> y like x, contiguous."""
    (batch, seq, heads, dim), dtype, (batches, positions, r) = x.shape, x.dtype, cos.shape
    angles = cos.dtype
    if not (
        dtype in DTYPES and (angles == dtype or angles == torch.float32) and sin.dtype == angles
        and x.is_cpu and cos.is_cpu and sin.is_cpu and sin.shape == cos.shape
        and positions == seq and (batches == 1 or batches == batch) and r <= dim and not r % 2
    ):  # fmt: skip
        _refuse_rotary(x, cos, sin)
    if x.stride(3) != 1:
        x = x.contiguous()
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=dtype)
    shape = _Shape(batch, seq, heads, dim, r, batches, *x.stride()[:3], *cos.stride()[:2])
    sources = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), DTYPES[dtype], angles != dtype
    LIBRARY.call("qtune_rotary", *sources, shape, inverse, y.data_ptr(), torch.get_num_threads(), simd_number(simd))
    return y


def _refuse_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    (batch, seq, _, dim), shape = x.shape, tuple(cos.shape)
    require([
        (fits(x, x.numel(), *DTYPES), f"x of {x.dtype} on {x.device}; legal: {list(DTYPES)} on cpu"),
        (fits(cos, cos.numel(), x.dtype, torch.float32), f"cos of {cos.dtype}; legal: {x.dtype}, torch.float32 on cpu"),
        (sin.dtype == cos.dtype and tuple(sin.shape) == shape, f"sin {list(sin.shape)} of {sin.dtype} is not like cos"),
        (shape[0] in (1, batch), f"cos has {shape[0]} sequences; legal: 1, {batch}"),
        (shape[1] == seq, f"cos has {shape[1]} positions, x {seq}"),
        (shape[2] <= dim and shape[2] % 2 == 0, f"cos has {shape[2]} angles; legal: even numbers up to {dim}"),
    ])  # fmt: skip


KERNELS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "rotary": rotary,
}
