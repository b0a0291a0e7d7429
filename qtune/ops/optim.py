"""AdamW whose two states take a byte a value: one op, in place.

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,   p = p (1 - lr wd) - lr mhat / (sqrt(vhat) + eps)
    m ~ map8[code] * absmax[block],   v ~ unsigned8[code] * absmax[block],   blocks of 256 values

The update uses m and v in fp32, before they are stored. A stored value is the nearest of its map, a tie the lower code
(bitsandbytes' default and CUDA rule; its CPU library's 65536 equal bins cannot tell values below 1.5e-5 of absmax
apart). But a v above 0 is never stored as 0, as it is there: a small gradient after a large one would divide by next to
nothing, and the update be thousands of times too large (the zero point of arXiv 2309.01507). A bf16 parameter loses
updates below 2^-9 of it; with a seed it is rounded stochastically, up with the probability of what is cut off, so the
expectation is exact. Random bits come from a counter: (seed, place) decide. Sources: 8-bit optimizers (2110.02861),
AdamW (1711.05101). Left out: fp16 parameters round to nearest in any case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tables import dynamic8, unsigned8
from .registry import op

STATE_BLOCK = 256  # values that share one absmax
TINY = 1e-38  # floor of the absmax that a block is divided by
CHUNK = 1 << 20  # values the reference handles at a time
LOW32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B97F4A7C15


def _signed64(value: int) -> int:
    """The same 64 bits as an int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(x: Tensor, by: int) -> Tensor:
    """int64 >> by, with zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def random_bits(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of the places first..first+count-1, in int64; `first` is a multiple of 256.

    Block b of 256 places has the key splitmix64(seed + (b + 1) * golden ratio); its place j the hash `lowbias32` of
    key + j * golden ratio.
    """
    blocks = torch.arange(first // STATE_BLOCK + 1, (first + count - 1) // STATE_BLOCK + 2, device=device)
    z = blocks * _signed64(GOLDEN) + _signed64(seed)  # int64 wraps
    z = (z ^ _shifted(z, 30)) * _signed64(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed64(0x94D049BB133111EB)
    key = (z ^ _shifted(z, 31)) & LOW32
    x = key.unsqueeze(1) + torch.arange(STATE_BLOCK, device=device) * (GOLDEN >> 32)
    x = x.view(-1)[:count] & LOW32
    x = (((x ^ (x >> 16)) & LOW32) * 0x7FEB352D) & LOW32
    x = (((x ^ (x >> 15)) & LOW32) * _signed64(0x846CA68B)) & LOW32
    return x ^ (x >> 16)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, away from 0 with the probability of the part that is cut off; infinities and NaN as always."""
    raw = x.view(torch.int32).to(torch.int64) & LOW32
    up = ((raw + (bits & 0xFFFF)) >> 16) & 0xFFFF
    up = torch.where(up >= 1 << 15, up - (1 << 16), up).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), up, x.to(torch.bfloat16))


def _load(codes: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """Blocks of 256 -> fp32 [blocks, 256], the last one filled up."""
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % STATE_BLOCK))
    return values[padded.to(torch.int32)].view(-1, STATE_BLOCK) * absmax.unsqueeze(1)


def _store(state: Tensor, codes: Tensor, absmax: Tensor, values: Tensor, signed: bool) -> None:
    """[blocks, 256], zeros past the end -> codes and absmax, in place."""
    peak = state.abs().amax(dim=1).float()
    scaled = (state * (1.0 / peak.clamp(min=TINY)).unsqueeze(1)).clamp(-1, 1)
    middle = (values[:-1] + values[1:]) / 2
    nearest = torch.bucketize(scaled.float(), middle, out_int32=True)
    if not signed:  # code 0 is for 0 alone
        nearest = torch.maximum(nearest, (state > 0).to(torch.int32))
    codes.copy_(nearest.view(-1)[: codes.numel()])
    absmax.copy_(peak)


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
    """One update of param (contiguous, n values, fp32, bf16 or fp16) by grad (its shape), and of the states: codes
    uint8 [n], absmax fp32 [ceil(n/256)], all zeros at first. step counts from 1.

    seed: 0 rounds to nearest, else a bf16 param is rounded stochastically; it should differ from step to step and from
    param to param. A block whose gradient is not finite has states that are NaN from then on.
    """
    flat, wide = param.view(-1), torch.promote_types(param.dtype, torch.float32)
    map_m, map_v = dynamic8(param.device), unsigned8(param.device)
    size, root = -lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    gradient = grad.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        groups = slice(start // STATE_BLOCK, (start + CHUNK) // STATE_BLOCK)
        p, n = flat[part].to(wide), flat[part].numel()
        g = torch.nn.functional.pad(gradient[part].to(wide), (0, -n % STATE_BLOCK)).view(-1, STATE_BLOCK)
        m = _load(m_codes[part], m_absmax[groups], map_m) * beta1 + g * (1 - beta1)
        v = _load(v_codes[part], v_absmax[groups], map_v) * beta2 + g * g * (1 - beta2)
        if n % STATE_BLOCK:  # what filled the last block up
            m.view(-1)[n:], v.view(-1)[n:] = 0, 0
        down = (
            v.double().sqrt().to(wide)
        )  # rightly rounded; torch's fp32 root on the CPU is MKL's, now and then an ulp off
        change = (m * size) / (down * root + eps)
        p = p * (1 - lr * weight_decay) + change.view(-1)[:n]
        if seed and param.dtype == torch.bfloat16:
            p = round_stochastically(p, random_bits(seed, start, n, param.device))
        flat[part] = p
        _store(m, m_codes[part], m_absmax[groups], map_m, True)
        _store(v, v_codes[part], v_absmax[groups], map_v, False)


@op(adamw8_, mutates=("param", "m_codes", "m_absmax", "v_codes", "v_absmax"))
def _(param, grad, m_codes, m_absmax, v_codes, v_absmax, lr, beta1, beta2, eps, weight_decay, step, seed):  # type: ignore[no-untyped-def]
    return None
