"""AdamW with 8-bit states on CUDA through Triton: the twin of `adamw8_` in qtune/ops/optim.py, bit-equal in fp32.

One pass over parameter, gradient and states: a program holds two blocks of 256 values, so a block's absmax is a
reduction within it. The nearest code is found by bisection of the 255 midpoints, from L1. Random bits are the
reference's: splitmix64 for a block, lowbias32 for a value. Left out: several parameters in one launch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtune.tables import dynamic8, unsigned8

from .launch import FLOATS, LIBRARY, Kernels, cdiv, fits, jit, launch, part, require, tl, together

__all__ = ["KERNELS", "LIBRARY"]

STATE_BLOCK = 256  # values that share one absmax
TINY = 1e-38  # floor of the absmax that a block is divided by
ROWS = 2  # blocks a program

# ---- kernels


@jit
def _random(seed, block, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """32 random bits for each value of blocks `block` [rows] (uint64) -> uint32 [rows, BLOCK]."""
    z = (block + 1) * 0x9E3779B97F4A7C15 + seed
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    key = (z ^ (z >> 31)).to(tl.uint32)
    x = key[:, None] + tl.arange(0, BLOCK).to(tl.uint32)[None, :] * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _nearest(state, middle, TINY: tl.constexpr, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """[rows, BLOCK] -> codes and absmax: the number of midpoints below a value's share of its block's absmax."""
    peak = tl.max(tl.abs(state), 1)
    floor = tl.full(peak.shape, TINY, tl.float32)  # a bare TINY, below fp32's normal range, would be taken as fp64
    share = state * tl.div_rn(tl.zeros_like(peak) + 1.0, tl.maximum(peak, floor))[:, None]
    share = tl.minimum(tl.maximum(share, -1.0), 1.0)
    code = tl.zeros(state.shape, tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(tl.load(middle + code + ((128 >> bit) - 1)) < share, 128 >> bit, 0)
    if not SIGNED:  # code 0 is for 0 alone
        code = tl.maximum(code, (state > 0).to(tl.int32))
    return code.to(tl.uint8), peak


@jit(do_not_specialize=["seed"])
def _update(  # type: ignore[no-untyped-def]
    param, grad, m_codes, m_absmax, v_codes, v_absmax, signed, unsigned, signed_middle, unsigned_middle, n, seed,
    beta1, rest1, beta2, rest2, eps, keep, size, root,
    TINY: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks a program."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, start = tl.arange(0, ROWS), first * BLOCK
    left = n - start
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, there = place < left, row * BLOCK < left
    p = tl.load(param + start + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + start + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(signed + tl.load(m_codes + start + place, mask=inside, other=0).to(tl.int32))
    v = tl.load(unsigned + tl.load(v_codes + start + place, mask=inside, other=0).to(tl.int32))
    m = m * tl.load(m_absmax + first + row, mask=there, other=0.0)[:, None] * beta1 + g * rest1
    v = v * tl.load(v_absmax + first + row, mask=there, other=0.0)[:, None] * beta2 + g * g * rest2
    m, v = tl.where(inside, m, 0.0), tl.where(inside, v, 0.0)
    p = p * keep + tl.div_rn(m * size, tl.sqrt_rn(v) * root + eps)
    if STOCHASTIC:
        random = _random(seed, (first + row).to(tl.uint64), BLOCK)
        up = (p.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) & 0xFFFF0000
        p = tl.where(tl.abs(p) < float("inf"), up.to(tl.float32, bitcast=True), p)
    tl.store(param + start + place, p.to(param.dtype.element_ty), mask=inside)
    code, peak = _nearest(m, signed_middle, TINY, True)
    tl.store(m_codes + start + place, code, mask=inside)
    tl.store(m_absmax + first + row, peak, mask=there)
    code, peak = _nearest(v, unsigned_middle, TINY, False)
    tl.store(v_codes + start + place, code, mask=inside)
    tl.store(v_absmax + first + row, peak, mask=there)


# ---- the op


def _middle(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


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
) -> None:
    """One update of param (contiguous, n values, fp32, bf16 or fp16) and of the states (contiguous; codes uint8 [n],
    absmax fp32 [ceil(n/256)]) by grad; see the op."""
    n = param.numel()
    blocks, states = cdiv(n, STATE_BLOCK), (m_codes, m_absmax, v_codes, v_absmax)
    require([
        (fits(param, n, *FLOATS), f"param of {param.dtype} on {param.device}; legal: {list(FLOATS)}"),
        (all(t.is_contiguous() for t in (param, *states)), "param or a state is not contiguous"),
        (step >= 1, f"step {step} is below 1"),
        part("grad", grad, n, *FLOATS),
        part("m's codes", m_codes, n, torch.uint8),
        part("v's codes", v_codes, n, torch.uint8),
        part("m's absmax", m_absmax, blocks, torch.float32),
        part("v's absmax", v_absmax, blocks, torch.float32),
        together(param, grad, *states),
    ])  # fmt: skip
    signed, unsigned = dynamic8(param.device), unsigned8(param.device)
    tables = signed, unsigned, _middle(signed), _middle(unsigned)
    size, root = -lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    factors = (beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, size, root)
    options = {"STOCHASTIC": bool(seed) and param.dtype == torch.bfloat16, "TINY": TINY, "BLOCK": STATE_BLOCK}
    parts = param, grad.contiguous(), *states, *tables, n, seed, *map(float, factors)
    launch(_update, (cdiv(blocks, ROWS),), param, *parts, **options, ROWS=ROWS, sanitize_overflow=False)


KERNELS: Kernels = {"adamw8_": adamw8_}
