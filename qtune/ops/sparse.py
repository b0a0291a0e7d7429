"""Products with a sparse matrix S [out, in] of few, freely placed coefficients, as QWHA's spectrum is.

    y = x S^T        dx = dy S        d values[e] = sum over tokens of dy[:, i_e] x[:, j_e]

S is CSR: `rows` int32 or int64 [out + 1], the first coefficient of each row; `cols` [nnz], int32, or int16 whose bits
are an unsigned 16-bit number (in <= 65536): the dtype tells which; `values` [nnz]. Rows may be empty, columns come in
any order and may repeat in a row, where their coefficients add up. The references make S dense, some rows at a time.
Source: QWHA (arXiv 2509.17428). Left out: CSC, blocks, a gradient of a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import QtuneError
from .packed import CHUNK
from .registry import is_fp64, op

POINTERS, COLUMNS = (torch.int32, torch.int64), (torch.int16, torch.int32)


def columns(cols: Tensor) -> Tensor:
    """cols as int64, int16 read as unsigned."""
    return cols.to(torch.int64) & 0xFFFF if cols.dtype == torch.int16 else cols.to(torch.int64)


def _check(rows: Tensor, cols: Tensor, out_features: int, in_features: int, **named: tuple[Tensor, int]) -> None:
    """One QtuneError for all that does not fit. named: a tensor and the size its last axis must have."""
    faults = [
        f"{name} of shape {list(t.shape)}; wanted [..., {size}]"
        for name, (t, size) in named.items()
        if t.dim() == 0 or t.shape[-1] != size
    ]
    nnz = cols.numel()
    if rows.dtype not in POINTERS or rows.shape != (out_features + 1,):
        faults.append(f"row pointers {rows.dtype} {list(rows.shape)}; wanted int32 or int64 [{out_features + 1}]")
    elif int(rows[0]) != 0 or int(rows[-1]) != nnz or bool((rows[1:] < rows[:-1]).any()):
        faults.append(f"row pointers do not rise from 0 to {nnz}, the number of columns")
    if cols.dtype not in COLUMNS or cols.dim() != 1:
        faults.append(f"columns {cols.dtype} {list(cols.shape)}; wanted int16 (unsigned) or int32 [nnz]")
    elif nnz:
        least, most = (int(v) for v in columns(cols).aminmax())
        if least < 0 or most >= in_features:
            faults.append(f"columns {least} to {most}; wanted 0 to {in_features - 1}")
    if faults:
        raise QtuneError("Q603", f"sparse product: {'; '.join(faults)}")


def _dense(rows: Tensor, columns: Tensor, values: Tensor, first: int, last: int, in_features: int) -> Tensor:
    """Rows first..last-1 of S."""
    start, end = int(rows[first]), int(rows[last])
    counts = rows[first + 1 : last + 1] - rows[first:last]
    row = torch.repeat_interleave(torch.arange(last - first, device=rows.device), counts.long())
    dense = values.new_zeros((last - first) * in_features)
    return dense.index_add_(0, row * in_features + columns[start:end], values[start:end]).view(-1, in_features)


def _spans(count: int, width: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK // max(1, width))
    return [(first, min(first + step, count)) for first in range(0, count, step)]


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(map(is_fp64, tensors)) else torch.float32


def sparse_matmul(x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, out_features: int) -> Tensor:
    """x [..., in] -> x S^T [..., out], x's dtype; values x's dtype or fp32. Sums in fp32, rounded once.

    QtuneError for row pointers or columns that point outside.
    """
    width = x.shape[-1] if x.dim() else 0
    _check(rows, cols, out_features, width, x=(x, width), values=(values, cols.numel()))
    flat, wide, column = x.reshape(x.numel() // max(1, width), width), _wide(x, values), columns(cols)
    flat = flat if width else x.new_empty(x.shape[:-1].numel(), 0)
    y = torch.empty((flat.shape[0], out_features), dtype=x.dtype, device=x.device)
    for start, end in _spans(flat.shape[0], max(width, out_features)):
        part = flat[start:end].to(wide)
        for first, last in _spans(out_features, width):
            y[start:end, first:last] = part @ _dense(rows, column, values.to(wide), first, last, width).t()
    return y.view(*x.shape[:-1], out_features)


@op(sparse_matmul)
def _(x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def sparse_matmul_t(dy: Tensor, rows: Tensor, cols: Tensor, values: Tensor, in_features: int) -> Tensor:
    """dy [..., out] -> dy S [..., in], dy's dtype: the gradient of `sparse_matmul`, and as exact."""
    out_features = rows.numel() - 1
    _check(rows, cols, out_features, in_features, dy=(dy, out_features), values=(values, cols.numel()))
    wide, column, tokens = _wide(dy, values), columns(cols), dy.shape[:-1].numel()
    flat = dy.reshape(tokens, out_features)
    dx = torch.empty((tokens, in_features), dtype=dy.dtype, device=dy.device)
    for start, end in _spans(tokens, max(in_features, out_features)):
        part = flat[start:end].to(wide)
        total = part.new_zeros(end - start, in_features)
        for first, last in _spans(out_features, in_features):
            total += part[:, first:last] @ _dense(rows, column, values.to(wide), first, last, in_features)
        dx[start:end] = total
    return dx.view(*dy.shape[:-1], in_features)


@op(sparse_matmul_t)
def _(dy: Tensor, rows: Tensor, cols: Tensor, values: Tensor, in_features: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], in_features))


def sampled_product(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """dy [..., out], x [..., in] of one dtype -> dy^T x at S's places, fp32 [nnz] (fp64 for fp64)."""
    out_features, in_features = rows.numel() - 1, x.shape[-1] if x.dim() else 0
    _check(rows, cols, out_features, in_features, dy=(dy, out_features), x=(x, in_features))
    tokens, wide, column = x.shape[:-1].numel(), _wide(dy, x), columns(cols)
    if dy.shape[:-1] != x.shape[:-1] or dy.dtype != x.dtype:
        raise QtuneError(
            "Q603", f"dy {dy.dtype} {list(dy.shape)} and x {x.dtype} {list(x.shape)} differ in dtype or tokens"
        )
    left, right = dy.reshape(tokens, out_features), x.reshape(tokens, in_features)
    result = torch.zeros(cols.shape, dtype=wide, device=x.device)
    for start, end in _spans(tokens, max(in_features, out_features)):
        part, other = left[start:end].to(wide), right[start:end].to(wide)
        for first, last in _spans(out_features, in_features):
            product = part[:, first:last].t() @ other
            a, b = int(rows[first]), int(rows[last])
            row = torch.repeat_interleave(
                torch.arange(last - first, device=x.device), rows[first : last + 1].diff().long()
            )
            result[a:b] += product.view(-1).index_select(0, row * in_features + column[a:b])
    return result


@op(sampled_product)
def _(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    return x.new_empty(cols.shape, dtype=torch.float64 if is_fp64(x) else torch.float32)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, out_features: int, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, rows, cols, values)
        ctx.scale = scale
        y: Tensor = torch.ops.qtune.sparse_matmul(x, rows, cols, _scaled(values, scale), out_features)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:  # type: ignore[override]
        x, rows, cols, values = ctx.saved_tensors
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.qtune.sparse_matmul_t(dy, rows, cols, _scaled(values, ctx.scale), x.shape[-1])
        if ctx.needs_input_grad[3]:
            dvalues = torch.ops.qtune.sampled_product(dy, x, rows, cols).mul_(ctx.scale).to(values.dtype)
        return dx, None, None, dvalues, None, None


def _scaled(values: Tensor, scale: float) -> Tensor:
    """For the moment of a product, in the dtype it sums in: kept for the backward are the values alone."""
    return values if scale == 1.0 else values.to(_wide(values)) * scale


def sparse_linear(
    x: Tensor, rows: Tensor, cols: Tensor, values: Tensor, out_features: int, scale: float = 1.0
) -> Tensor:
    """scale x S^T, `sparse_matmul` with gradients for x and values; x and S are saved, nothing dense."""
    y: Tensor = _Linear.apply(x, rows, cols, values, out_features, scale)
    return y
