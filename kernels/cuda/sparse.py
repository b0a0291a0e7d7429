"""Products with a sparse weight S [out, in] in CSR, in Triton: gathers only, no atomics, so bit-reproducible.

    y = x S^T;   dx = dy S;   g[p] = sum over tokens dy[:, row(p)] x[:, col(p)]   for p in the pattern of S

Activations are transposed first, so that an entry of S meets a contiguous run of tokens. dx is y with the transposed
CSR, sorted by column at every call (stable: entries keep their order). Sums in fp32, rounded once. Nothing waits for
the GPU, so pointers and columns are not looked at before: one that points outside reads nothing and gives NaN.
Every entry reads its tokens from the cache: from about one entry in a hundred on a dense product would be faster.
Left out: that, blocks, a cached transposed pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import FLOATS, LIBRARY, Kernels, cdiv, jit, launch, part, power_of_2, require, tl, together

__all__ = ["KERNELS", "LIBRARY", "sampled_product", "sparse_matmul", "sparse_matmul_t"]

TOKENS = 256  # tokens of a program at most
ENTRIES = 8  # entries of S that a program handles at once


@jit
def _gather(  # type: ignore[no-untyped-def]
    xt, rows, cols, values, yt, entries, features, tokens,
    ENTRIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """yt[row] = sum over the row's entries p of values[p] * xt[cols[p]], for some tokens."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start, end = tl.load(rows + row).to(tl.int64), tl.load(rows + row + 1).to(tl.int64)
    start, last = tl.maximum(start, 0), tl.minimum(end, entries)
    total = tl.zeros((ENTRIES, TOKENS), tl.float32)
    for first in range(start, last, ENTRIES):
        p = first + tl.arange(0, ENTRIES)
        col = tl.load(cols + p, mask=p < last, other=0).to(tl.int64)
        value = tl.load(values + p, mask=p < last, other=0.0).to(tl.float32)
        legal = (col >= 0) & (col < features)
        inside = ((p < last) & legal)[:, None] & (token < tokens)[None, :]
        x = tl.load(xt + col[:, None] * tokens + token[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.where(legal, value, float("nan"))[:, None] * x
    y = tl.where(end > entries, float("nan"), tl.sum(total, 0))
    tl.store(yt + row * tokens + token, y.to(yt.dtype.element_ty), mask=token < tokens)


@jit
def _sampled(  # type: ignore[no-untyped-def]
    dyt, xt, row_of, cols, out, entries, out_features, in_features, tokens,
    ENTRIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out[p] = sum over tokens of dyt[row_of[p]] * xt[cols[p]]."""
    p = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    row = tl.load(row_of + p, mask=p < entries, other=0).to(tl.int64)
    col = tl.load(cols + p, mask=p < entries, other=0).to(tl.int64)
    legal = (row < out_features) & (col >= 0) & (col < in_features)
    total = tl.zeros((ENTRIES, TOKENS), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        inside = ((p < entries) & legal)[:, None] & (token < tokens)[None, :]
        dy = tl.load(dyt + row[:, None] * tokens + token[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(xt + col[:, None] * tokens + token[None, :], mask=inside, other=0.0).to(tl.float32)
        total += dy * x
    tl.store(out + p, tl.where(legal, tl.sum(total, 1), float("nan")), mask=p < entries)


# ---- wrappers


def _require(rows: Tensor, cols: Tensor, values: Tensor | None, *named: tuple[str, Tensor, int]) -> None:
    """One error for all that does not fit. named: activations and the size of their last axis."""
    require(
        [
            *(part(name, t, t.numel(), *FLOATS) for name, t, _ in named),
            *(
                (t.dim() > 0 and t.shape[-1] == size, f"{name} of shape {list(t.shape)}; wanted [..., {size}]")
                for name, t, size in named
            ),
            (
                rows.dim() == 1 and rows.numel() > 0 and rows.dtype in (torch.int32, torch.int64),
                f"row pointers {rows.dtype} {list(rows.shape)}; wanted int32 or int64 [out + 1]",
            ),
            (
                cols.dim() == 1 and cols.dtype in (torch.int16, torch.int32),
                f"columns {cols.dtype} {list(cols.shape)}; wanted int16 (unsigned) or int32 [nnz]",
            ),
            part("values", values, cols.numel(), *FLOATS),
            together(rows, cols, values, *(t for _, t, _ in named)),
        ]
    )


def _columns(cols: Tensor) -> Tensor:
    """cols as int32, int16 read as unsigned."""
    return cols.to(torch.int32) & 0xFFFF if cols.dtype == torch.int16 else cols.contiguous()


def _row_of(rows: Tensor, entries: int) -> Tensor:
    """int32 [entries]: the row of each entry; `out` where the pointers end before it."""
    place = torch.arange(entries, dtype=rows.dtype, device=rows.device)
    return torch.searchsorted(rows[1:].contiguous(), place, right=True, out_int32=True)


def _transposed(t: Tensor) -> Tensor:
    """[..., n] -> [n, tokens], contiguous."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1]).t().contiguous()


def _product(x: Tensor, rows: Tensor, cols: Tensor, values: Tensor) -> Tensor:
    """x [..., in], CSR of [out, in] -> [..., out]."""
    xt, out = _transposed(x), rows.numel() - 1
    features, tokens = xt.shape
    yt = torch.empty((out, tokens), dtype=x.dtype, device=x.device)
    block = min(power_of_2(tokens), TOKENS)
    sizes = (cols.numel(), features, tokens)
    launch(_gather, (out, cdiv(tokens, block)), x, xt, rows, cols, values, yt, *sizes, ENTRIES=ENTRIES, TOKENS=block)
    y = torch.empty((tokens, out), dtype=x.dtype, device=x.device)
    return y.copy_(yt.t()).view(*x.shape[:-1], out)


def sparse_matmul(x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, out_features: int) -> Tensor:
    """x [..., in], S in CSR -> x S^T [..., out] in x's dtype, contiguous."""
    _require(rows, cols, values, ("x", x, x.shape[-1] if x.dim() else 0))
    require([(rows.numel() == out_features + 1, f"{rows.numel()} row pointers for {out_features} rows")])
    return _product(x, rows.contiguous(), _columns(cols), values.contiguous())


def sparse_matmul_t(dy: Tensor, rows: Tensor, cols: Tensor, values: Tensor, in_features: int) -> Tensor:
    """dy [..., out], S in CSR -> dy S [..., in] in dy's dtype, contiguous."""
    _require(rows, cols, values, ("dy", dy, rows.numel() - 1))
    ordered, order = torch.sort(_columns(cols), stable=True)
    edges = torch.arange(in_features + 1, dtype=torch.int32, device=cols.device)
    pointers = torch.searchsorted(ordered, edges)
    return _product(dy, pointers, _row_of(rows, cols.numel())[order], values[order])


def sampled_product(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """dy [..., out], x [..., in] of one dtype, the pattern of S -> dy^T x at its places, fp32 [nnz]."""
    _require(rows, cols, None, ("dy", dy, rows.numel() - 1), ("x", x, x.shape[-1] if x.dim() else 0))
    fit = dy.shape[:-1] == x.shape[:-1] and dy.dtype == x.dtype
    require([(fit, f"dy {dy.dtype} {list(dy.shape)} and x {x.dtype} {list(x.shape)} differ in dtype or tokens")])
    dyt, xt, entries = _transposed(dy), _transposed(x), cols.numel()
    out = torch.empty(cols.shape, dtype=torch.float32, device=x.device)
    block = min(power_of_2(xt.shape[1]), TOKENS)
    sizes = (entries, dyt.shape[0], xt.shape[0], xt.shape[1])
    tensors = (dyt, xt, _row_of(rows, entries), _columns(cols), out)
    launch(_sampled, (cdiv(entries, ENTRIES),), x, *tensors, *sizes, ENTRIES=ENTRIES, TOKENS=block)
    return out


KERNELS: Kernels = {function.__name__: function for function in (sparse_matmul, sparse_matmul_t, sampled_product)}
