"""The Walsh-Hadamard transform in Triton: butterflies in registers, one read and one write of memory for 2^m values.

    y = scale x (base (x) H_{2^m})^T,   base [K, K] of 1 and -1, given by the op

A stage adds and subtracts neighbours and puts the pair's place on top, which turns the bits of the index by one: after
m stages all are back in order. As many stages as a thread holds bits run without an exchange, so that 4096 values
cross shared memory three times. For K > 1 a program sums the K pieces of a row for some rows of the base (K / TILE
reads, mostly from the cache) before its butterflies. Beyond 2^14 the base takes the higher bits: a piece has to fit
into 64 KiB of shared memory. Left out: tensor cores, whose fp32 is too coarse or too slow for a second factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import FLOATS, LIBRARY, Kernels, cdiv, jit, launch, part, power_of_2, require, tl, together

__all__ = ["KERNELS", "LIBRARY", "hadamard_kronecker"]

LARGEST = 1 << 14  # values of one piece
TILE = {False: 1024, True: 2048}  # values of a program where a piece is smaller, for K = 1 and for K > 1
MOST = 16  # pieces of a program for K > 1: every thread holds their signs


@jit
def _hadamard(  # type: ignore[no-untyped-def]
    x, base, y, rows, x_row, k_row, k_col, scale, K,
    SEVERAL: tl.constexpr, MANY: tl.constexpr, INNER: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """SEVERAL: K > 1, a program is MANY pieces of one row's result; else it is MANY rows."""
    c = tl.arange(0, INNER)
    if SEVERAL:
        row = tl.program_id(0).to(tl.int64)
        piece = tl.program_id(1) * MANY + tl.arange(0, MANY)
        t = tl.zeros((MANY, INNER), tl.float32)
        for j in tl.range(0, K, loop_unroll_factor=4):  # K is 2 or 4k: four loads under way
            sign = tl.load(base + piece * k_row + j * k_col, mask=piece < K, other=0).to(tl.float32)
            t += sign[:, None] * tl.load(x + row * x_row + j * INNER + c).to(tl.float32)[None, :]
        inside = (piece < K)[:, None] & (c >= 0)[None, :]
        into = (row * K + piece)[:, None] * INNER + c[None, :]
    else:
        row = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
        inside = (row < rows)[:, None] & (c >= 0)[None, :]
        into = row[:, None] * INNER + c[None, :]
        t = tl.load(x + row[:, None] * x_row + c[None, :], mask=inside, other=0.0).to(tl.float32)
        t *= tl.load(base).to(tl.float32)
    for _ in tl.static_range(BITS):
        a, b = tl.split(tl.reshape(t, (MANY, INNER // 2, 2)))
        t = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (MANY, INNER))
    tl.store(y + into, (t * scale).to(y.dtype.element_ty), mask=inside)


def _doubled(base: Tensor) -> Tensor:
    """base (x) H_2, without a copy from the host."""
    order = base.shape[0]
    top = base.repeat_interleave(2, 1)
    low = torch.stack((base, -base), 2).view(order, 2 * order)
    return torch.stack((top, low), 1).view(2 * order, 2 * order)


def hadamard_kronecker(x: Tensor, base: Tensor, scale: float, transpose: bool) -> Tensor:
    """x [..., n], base int8 [K, K] of 1 and -1, n = K 2^m -> scale x (base (x) H_{2^m})^T, or with `transpose` without
    the T; contiguous, rounded once."""
    n, order = x.shape[-1], base.shape[0]
    inner = n // max(order, 1)
    require(
        [
            part("x", x, x.numel(), *FLOATS),
            (base.shape == (order, order) and base.dtype == torch.int8, f"base: {base.dtype} {tuple(base.shape)}"),
            (inner > 0 and inner * order == n and inner & (inner - 1) == 0, f"size {n} is no {order} times 2^m"),
            together(x, base),
        ]
    )
    flat = x.reshape(-1, n)
    flat = flat if flat.stride(1) == 1 or n < 2 else flat.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    base = base.t() if transpose else base
    while inner > LARGEST:
        base, inner = _doubled(base), inner // 2
    rows, order = flat.shape[0], base.shape[0]
    several = order > 1
    many = max(1, TILE[several] // inner)
    if several:
        many = min(many, power_of_2(order), MOST)
    grid = (rows, cdiv(order, many)) if several else (cdiv(rows, many), 1)
    options = {"SEVERAL": several, "MANY": many, "INNER": inner, "BITS": inner.bit_length() - 1}
    warps = max(1, many * inner // (1024 if several or inner > 4096 else 2048))  # fewest exchanges in the compiled code
    tensors, scalars = (flat, base, y), (rows, flat.stride(0), base.stride(0), base.stride(1), float(scale), order)
    # the sums of +-x are the same fused
    launch(_hadamard, grid, x, *tensors, *scalars, **options, num_warps=warps, enable_fp_fusion=True)
    return y


KERNELS: Kernels = {"hadamard_kronecker": hadamard_kronecker}
