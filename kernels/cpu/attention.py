"""Attention and its gradient on the CPU: ctypes wrappers of attention.cpp, for fp32, bf16 and fp16 and heads up to 256.

Functions take the ops' own arguments; `simd` forces a path, for tests. Beside the usual ones there are avx512_bf16 and
amx, which serve bf16 only (other dtypes then take the avx512 path). Left out: wider heads, several masks per head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .library import DTYPES, FLAG, POINTER, REAL, Library, fits, pointer, require, simd_number

WIDEST = 256  # values of a head: what the kernel's blocks on the stack hold


def _self_test(library: ctypes.CDLL) -> bool:
    """One query, one key: the result is the value, and lse the score."""
    numbers = (ctypes.c_int64 * 21)(1, 1, 1, 1, 1, 1, *[1] * 15)
    size = ctypes.c_int64()
    library.qtune_attention_scratch(numbers, 0, 0, 0, 1, -1, ctypes.byref(size))
    scratch = (ctypes.c_char * (size.value + 64))()
    aligned = ctypes.addressof(scratch) + -ctypes.addressof(scratch) % 64
    one = ctypes.c_float * 1
    out, lse = one(), one()
    qkv = (one(2.0), one(3.0), one(5.0))
    library.qtune_attention(numbers, *qkv, None, 0, 1, 0.5, out, lse, aligned, 1, -1)
    return (out[0], lse[0]) == (5.0, 3.0)


_P, _F = POINTER, FLAG
LIBRARY = Library(
    "attention.cpp",
    ("attention_task.h", "attention_tile.h", "attention_path.h", "amx.h", "simd.h", "simd_x86.h"),
    {
        "qtune_attention_scratch": (_P, _F, _F, _F, _F, _F, _P),
        "qtune_attention": (_P, _P, _P, _P, _P, _F, _F, REAL, _P, _P, _P, _F, _F),
        "qtune_attention_backward": (_P, _P, _P, _P, _P, _P, _P, _P, _F, _F, REAL, _P, _P, _P, _P, _F, _F),
    },
    _self_test,
)


# ---- the ops


def _dense(t: Tensor) -> Tensor:
    """t with its last dimension contiguous; the others may have any strides."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **like_q: Tensor) -> None:
    """One error for all that does not fit."""
    four = q.dim() == k.dim() == 4
    (B, T, H, D), (S, HK) = (q.shape, k.shape[1:3]) if four else ((0, 0, 0, 0), (0, 0))
    same = [(t.shape == q.shape and fits(t, q.numel(), q.dtype), f"{name}: {tuple(t.shape)} of {t.dtype}; wanted q's")
            for name, t in like_q.items()]  # fmt: skip
    require([
        (four, f"q of {q.dim()}, k of {k.dim()} dimensions; wanted 4"),
        (fits(q, q.numel(), *DTYPES), f"q of {q.dtype} on {q.device}; legal: {list(DTYPES)} on cpu"),
        (fits(k, k.numel(), q.dtype) and fits(v, v.numel(), q.dtype), f"k, v of {k.dtype}, {v.dtype}; wanted q's"),
        (not four or k.shape == v.shape == (B, S, HK, D),
         f"k {tuple(k.shape)}, v {tuple(v.shape)}, q {tuple(q.shape)}"),
        (not four or (H % HK == 0 if HK else H == 0), f"{H} query heads, {HK} key heads: no multiple"),
        (not four or 0 < D <= WIDEST, f"heads of {D}; legal: 1 to {WIDEST}"),
        (mask is None or (mask.dtype == torch.bool and mask.device.type == "cpu" and mask.dim() == 4
                          and mask.shape[0] in (1, B) and tuple(mask.shape[1:]) == (1, T, S)),
         f"mask {mask.dtype if mask is not None else ''} {tuple(mask.shape) if mask is not None else ''}; "
         f"wanted bool [1 or {B}, 1, {T}, {S}]"),
        *same,
    ])  # fmt: skip


def _numbers(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None) -> Any:
    """Sizes and strides, in the order of the C++ source."""
    B, T, H, D = q.shape
    strides = [number for t in (q, k, v, dout) for number in t.stride()[:3]]
    shared = mask is None or mask.shape[0] == 1 or mask.stride(0) == 0
    strides += [0 if shared else mask.stride(0), *mask.stride()[2:]] if mask is not None else [0, 0, 0]
    return (ctypes.c_int64 * 21)(B, T, k.shape[1], H, k.shape[2], D, *strides)


def _scratch(numbers: Any, dtype: int, mask: Tensor | None, backward: bool, threads: int, simd: int) -> Tensor:
    size = ctypes.c_int64()
    how = dtype, mask is not None, backward, threads, simd
    LIBRARY.call("qtune_attention_scratch", numbers, *how, ctypes.byref(size))
    return torch.empty(size.value, dtype=torch.uint8)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, simd: str = "auto"
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k, v [B, S, HK, D], mask bool [B or 1, 1, T, S] -> out [B, T, H, D], lse fp32 [B, H, T]."""
    _check(q, k, v, mask)
    (B, T, H, _), path, threads = q.shape, simd_number(simd), torch.get_num_threads()
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((B, H, T), dtype=torch.float32)
    if not out.numel() or not k.numel():
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = _dense(q), _dense(k), _dense(v)
    numbers, dtype = _numbers(q, k, v, q, mask), DTYPES[q.dtype]
    scratch = _scratch(numbers, dtype, mask, False, threads, path)
    sources, results = map(pointer, (q, k, v, mask)), map(pointer, (out, lse, scratch))
    LIBRARY.call("qtune_attention", numbers, *sources, dtype, causal, scale, *results, threads, path)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    simd: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse: what `attention` returned -> dq, dk, dv, contiguous, in the shapes of q, k, v."""
    _check(q, k, v, mask, dout=dout, out=out)
    (B, T, H, _), path, threads = q.shape, simd_number(simd), torch.get_num_threads()
    fitting = lse.shape == (B, H, T) and fits(lse, B * H * T, torch.float32)
    require([(fitting, f"lse {tuple(lse.shape)} of {lse.dtype}; wanted fp32 {(B, H, T)}")])
    results = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
    if not q.numel() or not k.numel():
        return results[0].zero_(), results[1].zero_(), results[2].zero_()
    dout, q, k, v, out, lse = _dense(dout), _dense(q), _dense(k), _dense(v), out.contiguous(), lse.contiguous()
    numbers, dtype = _numbers(q, k, v, dout, mask), DTYPES[q.dtype]
    scratch = _scratch(numbers, dtype, mask, True, threads, path)
    sources = map(pointer, (dout, q, k, v, out, lse, mask))
    goals = map(pointer, (*results, scratch))
    LIBRARY.call("qtune_attention_backward", numbers, *sources, dtype, causal, scale, *goals, threads, path)
    return results[0], results[1], results[2]


def _scratch_of(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None, backward: bool) -> dict[str, int]:
    """Bytes of the scratch; `_scratch` in the form that the planner asks in, for tensors on any device."""
    numbers, threads, size = _numbers(q, k, v, dout, mask), torch.get_num_threads(), ctypes.c_int64()
    how = DTYPES[q.dtype], mask is not None, backward, threads, simd_number("auto")
    LIBRARY.call("qtune_attention_scratch", numbers, *how, ctypes.byref(size))
    return {"temporary": size.value}


KERNELS: dict[str, Callable[..., Any]] = {"attention": attention, "attention_backward": attention_backward}
SCRATCH: dict[str, Callable[..., dict[str, int]]] = {
    "attention": lambda q, k, v, mask, causal, scale: _scratch_of(q, k, v, q, mask, False),
    "attention_backward": lambda dout, q, k, v, out, lse, mask, causal, scale: _scratch_of(q, k, v, dout, mask, True),
}
