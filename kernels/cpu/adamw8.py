"""AdamW with 8-bit states on the CPU: ctypes wrapper of adamw8.cpp, bit-equal to the reference in qtune/ops/optim.py.

The function takes the op's own arguments; `simd` (scalar, avx2, avx512) forces a path, for tests.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtune.tables import dynamic8, unsigned8

from .library import DTYPES, FLAG, POINTER, SIZE, Library, fits, part, require, simd_number

CPU = torch.device("cpu")
STATE_BLOCK = 256
FIRST_BIN, LAST_BIN = 0x3380, 0x3F80  # upper halves of 2^-24 and 1 in fp32
NEVER = 1 << 16  # above every lower half


def bins(values: Tensor) -> Tensor:
    """int32 [2, bins]: for an ascending map of 256 values in [-1, 1], what adamw8.cpp reads for x >= 0 and for x < 0:
    the code before the bin's midpoint, seen from 0, and 256 times the first lower half of |x| past it."""
    middle = (values[:-1] + values[1:]) / 2
    edges = torch.arange(FIRST_BIN, LAST_BIN + 1, dtype=torch.int32) << 16
    result = torch.empty((2, edges.numel()), dtype=torch.int32)
    for half, sign in enumerate((1.0, -1.0)):
        bits = middle[middle * sign > 0].abs().view(torch.int32)
        place = (bits >> 16) - FIRST_BIN
        assert place.unique().numel() == place.numel() and (not place.numel() or int(place.min()) > 0)
        past = torch.full((edges.numel(),), NEVER, dtype=torch.int32)
        past[place.long()] = (bits & 0xFFFF) + 1 - half  # a tie goes to the lower code: below 0 that is the one past it
        base = torch.bucketize(edges.view(torch.float32) * sign, middle, right=bool(half), out_int32=True)
        result[half] = past * 256 + base
    return result


@functools.cache
def _maps() -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The addresses of both maps and their bins; and the tensors behind them."""
    kept = dynamic8(CPU), bins(dynamic8(CPU)), unsigned8(CPU), bins(unsigned8(CPU))
    return tuple(t.data_ptr() for t in kept), kept


def _self_test(library: ctypes.CDLL) -> bool:
    """A first step of size 0.1 moves two parameters by 0.1 against their gradients, and fills both maps."""
    p, g = (ctypes.c_float * 2)(1.0, 1.0), (ctypes.c_float * 2)(1.0, -1.0)
    m, v = (ctypes.c_uint8 * 2)(), (ctypes.c_uint8 * 2)()
    peaks = (ctypes.c_float * 2)()
    scalars = (ctypes.c_float * 8)(0.9, 0.1, 0.99, 0.01, -1.0, 10.0, 1e-8, 1.0)
    states = m, ctypes.byref(peaks), v, ctypes.byref(peaks, 4)
    library.qtune_adamw8(p, 0, g, 0, 2, *states, *_maps()[0], scalars, 0, 1, -1)
    return abs(p[0] - 0.9) < 1e-6 and abs(p[1] - 1.1) < 1e-6 and (m[0], m[1], v[0], v[1]) == (255, 0, 255, 255)


_P, _S, _F = POINTER, SIZE, FLAG
LIBRARY = Library(
    "adamw8.cpp",
    ("adamw8_x86.h", "simd.h", "simd_x86.h"),
    {"qtune_adamw8": (_P, _F, _P, _F, _S, _P, _P, _P, _P, _P, _P, _P, _P, _P, _S, _F, _F)},
    _self_test,
)
_Scalars = ctypes.c_float * 8


def _plain(t: Tensor, numel: int, dtype: torch.dtype) -> bool:
    """A contiguous CPU tensor of `numel` values of `dtype`?"""
    return t.dtype is dtype and t.numel() == numel and t.is_cpu and t.is_contiguous()


def _refuse(param: Tensor, grad: Tensor, states: tuple[Tensor, ...], n: int, blocks: int, step: int) -> None:
    """Raises one QtuneError for all that does not fit."""
    m_codes, m_absmax, v_codes, v_absmax = states
    require([
        (fits(param, n, *DTYPES), f"parameter of {param.dtype} on {param.device}; legal: {list(DTYPES)} on cpu"),
        (grad.shape == param.shape and fits(grad, n, *DTYPES), f"gradient {list(grad.shape)} of {grad.dtype} on "
         f"{grad.device}; wanted {list(param.shape)} of {list(DTYPES)} on cpu"),
        (all(t.is_contiguous() for t in (param, *states)), "parameter and states must be contiguous"),
        part("m codes", m_codes, n, torch.uint8),
        part("m scales", m_absmax, blocks, torch.float32),
        part("v codes", v_codes, n, torch.uint8),
        part("v scales", v_absmax, blocks, torch.float32),
        (step >= 1, f"step {step}: steps count from 1"),
    ])  # fmt: skip


def adamw8_(
    param: Tensor,
    grad: Tensor,
    m_codes: Tensor,
    m_absmax: Tensor,
    v_codes: Tensor,
    v_absmax: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
    simd: str = "auto",
) -> None:
    """One update of param, codes and scales, in place; see the reference for what the arguments mean."""
    n = param.numel()
    blocks = -(n // -STATE_BLOCK)
    states = m_codes, m_absmax, v_codes, v_absmax
    if not (
        step >= 1
        and param.dtype in DTYPES
        and _plain(param, n, param.dtype)
        and grad.dtype in DTYPES
        and grad.is_cpu
        and grad.shape == param.shape
        and all(_plain(codes, n, torch.uint8) for codes in states[::2])
        and all(_plain(absmax, blocks, torch.float32) for absmax in states[1::2])
    ):
        _refuse(param, grad, states, n, blocks, step)
    grad = grad.contiguous()  # this name keeps the memory alive for the call
    size, root = -lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    scalars = _Scalars(beta1, 1 - beta1, beta2, 1 - beta2, size, root, eps, 1 - lr * weight_decay)
    values = param.data_ptr(), DTYPES[param.dtype], grad.data_ptr(), DTYPES[grad.dtype], n
    rest = scalars, seed, torch.get_num_threads(), simd_number(simd)
    LIBRARY.call("qtune_adamw8", *values, *(t.data_ptr() for t in states), *_maps()[0], *rest)


KERNELS: dict[str, Callable[..., Any]] = {"adamw8_": adamw8_}
