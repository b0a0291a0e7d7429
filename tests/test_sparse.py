"""Sparse products: against a dense matrix in fp64 on every SIMD path; structures, gradients, threads, wrong indices."""

from __future__ import annotations

import pytest
import torch
from cpu_kernels import cpu_kernels
from torch import Tensor

from qtune.errors import QtuneError
from qtune.ops.sparse import sampled_product, sparse_linear, sparse_matmul, sparse_matmul_t

qtune = torch.ops.qtune
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# tokens, out, in, coefficients
SHAPES = (
    (1, 1, 1, 1), (3, 7, 17, 40), (33, 129, 33, 900), (127, 17, 1000, 600), (129, 70, 70, 0), (65, 3, 5, 200),
    (40, 300, 2, 7), (300, 64, 96, 1500), (0, 4, 5, 6), (5, 0, 4, 0), (16, 16, 16, 256), (2, 1, 65536, 900),
)  # fmt: skip


def kernels():  # type: ignore[no-untyped-def]
    return cpu_kernels("sparse")


@pytest.fixture(params=("scalar", "avx2", "avx512", "neon"))
def simd(request: pytest.FixtureRequest) -> str:
    if request.param not in kernels().LIBRARY.simd_paths():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def structure(out: int, width: int, nnz: int, long_rows: bool, narrow: bool) -> tuple[Tensor, Tensor]:
    """Places at random: rows of any length, many of them empty, columns unsorted and sometimes twice in a row."""
    row = torch.randint(0, max(1, out), (nnz,))
    row = torch.where(row % 5 == 3, row * 0, row).sort().values
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=out)[:out].cumsum(0)])
    cols = torch.randint(0, width, (nnz,))
    if nnz > 1:
        cols[0] = width - 1
        cols[1] = cols[0]
    return rows.to(torch.int64 if long_rows else torch.int32), cols.to(torch.int16 if narrow else torch.int32)


def places(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    row = torch.repeat_interleave(torch.arange(rows.numel() - 1), rows.diff().long())
    return row, torch.tensor([c % 65536 for c in cols.tolist()], dtype=torch.int64)


def dense(rows: Tensor, cols: Tensor, values: Tensor, width: int) -> Tensor:
    s = torch.zeros(rows.numel() - 1, width, dtype=torch.float64)
    return s.index_put_(places(rows, cols), values.double(), accumulate=True)


def close(got: Tensor, left: Tensor, right: Tensor, count: int) -> bool:
    """got ~ left @ right: one rounding of the result, and of fp32 sums of `count` products in any order."""
    want, size = left @ right, left.abs() @ right.abs()
    return within(got, want, size, count)


def within(got: Tensor, want: Tensor, size: Tensor, count: int) -> bool:
    ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    allowed = want.abs() * ulp * 1.01 + size * (count**0.5 + 4) * 2.0**-23 + 2.0**-24
    return got.shape == want.shape and bool(((got.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("long_rows", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_are_those_of_the_dense_matrix(dtype, shape, narrow, long_rows, poisoned) -> None:  # type: ignore[no-untyped-def]
    k = kernels()
    tokens, out, width, nnz = shape
    rows, cols = structure(out, width, nnz, long_rows, narrow)
    x, dy = torch.randn(tokens, width).to(dtype), torch.randn(tokens, out).to(dtype)
    for values in (torch.randn(nnz), torch.randn(nnz).to(dtype)):
        s = dense(rows, cols, values, width)
        ys, dxs = [sparse_matmul(x, rows, cols, values, out)], [sparse_matmul_t(dy, rows, cols, values, width)]
        for path in k.LIBRARY.simd_paths():
            ys.append(k.sparse_matmul(x, rows, cols, values, out, path))
            dxs.append(k.sparse_matmul_t(dy, rows, cols, values, width, path))
        assert all(close(y, x.double(), s.t(), nnz) and y.dtype == dtype for y in ys)
        assert all(close(dx, dy.double(), s, nnz) and dx.dtype == dtype for dx in dxs)
    row, col = places(rows, cols)
    products = [sampled_product(dy, x, rows, cols)]
    products += [k.sampled_product(dy, x, rows, cols, path) for path in k.LIBRARY.simd_paths()]
    want, size = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()
    assert all(within(p, want[row, col], size[row, col], tokens) and p.dtype == torch.float32 for p in products)


def test_small_whole_numbers_come_out_exactly(simd: str, poisoned: None) -> None:
    """No rounding, so nothing is lost, doubled or misplaced, in any block of tokens or tile of rows."""
    k, (rows, cols) = kernels(), structure(83, 211, 3000, False, True)
    values = torch.randint(-4, 5, (3000,)).float()
    for tokens in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 257):
        x, dy = torch.randint(-4, 5, (tokens, 211)).bfloat16(), torch.randint(-4, 5, (tokens, 83)).float()
        s = dense(rows, cols, values, 211)
        assert torch.equal(k.sparse_matmul(x.float(), rows, cols, values, 83, simd).double(), x.double() @ s.t())
        assert torch.equal(k.sparse_matmul(x, rows, cols, values, 83, simd), (x.double() @ s.t()).bfloat16())
        assert torch.equal(k.sparse_matmul_t(dy, rows, cols, values, 211, simd).double(), dy.double() @ s)
        for a, b in ((dy, x.float()), (dy.bfloat16(), x), (dy.half(), x.half())):
            want = (dy.double().t() @ x.double())[places(rows, cols)]
            assert torch.equal(k.sampled_product(a, b, rows, cols, simd).double(), want)


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_threads_change_no_bit(tokens: int, simd: str, poisoned: None) -> None:
    k, before = kernels(), torch.get_num_threads()
    rows, cols = structure(150, 400, 5000, False, True)
    x, dy, values = torch.randn(tokens, 400).bfloat16(), torch.randn(tokens, 150).bfloat16(), torch.randn(5000)
    results = []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            y, dx = (
                k.sparse_matmul(x, rows, cols, values, 150, simd),
                k.sparse_matmul_t(dy, rows, cols, values, 400, simd),
            )
            results.append((y, dx, k.sampled_product(dy, x, rows, cols, simd)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_columns_above_32767_and_tokens_in_any_shape() -> None:
    rows, cols = torch.tensor([0, 1, 3]), torch.tensor([40000, 65535, 40000], dtype=torch.int32)
    x, values = torch.randn(2, 3, 65536), torch.tensor([2.0, 1.0, -1.0])
    want = torch.stack((2 * x[..., 40000], x[..., 65535] - x[..., 40000]), -1)
    for where in (cols, cols.to(torch.int16)):
        assert torch.equal(qtune.sparse_matmul(x, rows, where, values, 2), want)
        assert torch.equal(sparse_matmul(x, rows, where, values, 2), want)
    turned = x.transpose(0, 1)
    assert torch.equal(qtune.sparse_matmul(turned, rows, cols, values, 2), want.transpose(0, 1))
    assert torch.equal(qtune.sparse_matmul(x[0, 0], rows, cols, values, 2), want[0, 0])


def test_a_nan_stays_with_its_token_and_feature(simd: str) -> None:
    rows, cols, values = torch.tensor([0, 1, 2]), torch.tensor([0, 1], dtype=torch.int16), torch.ones(2)
    x = torch.zeros(70, 2).bfloat16()
    x[33, 0] = float("nan")
    x[69, 1] = float("inf")
    y = kernels().sparse_matmul(x, rows, cols, values, 2, simd)
    assert y[33, 0].isnan()
    assert y[69, 1].isinf()
    assert y.float().nan_to_num(posinf=0).abs().sum() == 0
    assert y.isfinite().sum() == 138


# ---- gradients


def test_gradients() -> None:
    rows, cols = structure(6, 9, 20, True, True)
    x, values = torch.randn(2, 3, 9).double().requires_grad_(), torch.randn(20).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: sparse_linear(a, rows, cols, v, 6), (x, values))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_the_kernels(dtype: torch.dtype) -> None:
    rows, cols = structure(60, 90, 700, False, True)
    x, dy = torch.randn(2, 50, 90).to(dtype).requires_grad_(), torch.randn(2, 50, 60).to(dtype)
    values = torch.randn(700).to(dtype).requires_grad_()
    sparse_linear(x, rows, cols, values, 60).backward(dy)
    assert x.grad is not None
    assert values.grad is not None
    s, flat, tokens = (
        dense(rows, cols, values.detach(), 90),
        x.detach().reshape(100, 90).double(),
        dy.view(100, 60).double(),
    )
    assert close(x.grad.view(100, 90), tokens, s, 60)
    assert values.grad.dtype == dtype
    place = places(rows, cols)
    assert within(values.grad, (tokens.t() @ flat)[place], (tokens.abs().t() @ flat.abs())[place], 100)


def test_nothing_dense_is_saved_and_frozen_parts_cost_nothing() -> None:
    rows, cols = structure(60, 90, 700, False, True)
    x, values, sizes = torch.randn(5, 90, requires_grad=True), torch.randn(700), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        y = sparse_linear(x, rows, cols, values, 60)
    assert max(sizes) <= 700
    y.sum().backward()
    assert values.grad is None


# ---- what is refused


@pytest.mark.parametrize("provider", ["reference", "kernel"])
def test_wrong_structures_are_refused_before_memory_is_touched(provider: str) -> None:
    product, back, sampled = (
        (sparse_matmul, sparse_matmul_t, sampled_product)
        if provider == "reference"
        else (kernels().sparse_matmul, kernels().sparse_matmul_t, kernels().sampled_product)
    )
    x, dy, values = torch.randn(4, 10), torch.randn(4, 3), torch.randn(5)
    good = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 9, 1, 1, 3], dtype=torch.int16)
    product(x, *good, values, 3)
    narrow = torch.tensor([0, 10, 1, 1, 3], dtype=torch.int16)
    for rows, cols, fault in (
        ([0, 3, 2, 5], good[1], "do not rise from 0 to 5"),
        ([1, 2, 2, 5], good[1], "do not rise"),
        ([0, 2, 2, 6], good[1], "do not rise"),
        ([0, 2, 2, 4], good[1], "do not rise"),
        ([0, 9, 9, 5], good[1], "do not rise"),
        ([-1, 2, 2, 5], good[1], "do not rise"),
        ([0, 2, 2, 5], narrow, "columns 0 to 10; wanted 0 to 9"),
        ([0, 2, 2, 5], narrow.int() - 1, "columns -1 to 9; wanted 0 to 9"),
        ([0, 2, 2, 5], -narrow, "columns 0 to 65535|columns 0 to 65533|columns 0 to 655"),
        ([0, 3, 2, 5], narrow, "do not rise.*columns 0 to 10"),
        ([0, 2, 5], good[1], r"row pointers torch.int\d+ \[3\]|wanted \[..., 2\]"),
        ([0, 2, 2, 5], good[1].long(), "columns torch.int64"),
    ):
        for dtype in (torch.int32, torch.int64):
            with pytest.raises(QtuneError, match=fault):
                product(x, torch.tensor(rows, dtype=dtype), cols, values, 3)
            with pytest.raises(QtuneError, match=fault):
                back(dy, torch.tensor(rows, dtype=dtype), cols, values, 10)
            with pytest.raises(QtuneError, match=fault):
                sampled(dy, x, torch.tensor(rows, dtype=dtype), cols)
    with pytest.raises(QtuneError, match=r"values.*5"):
        product(x, *good, values[:4], 3)
    with pytest.raises(QtuneError, match=r"dy of shape \[4, 4\]"):
        back(torch.randn(4, 4), *good, values, 10)
    with pytest.raises(QtuneError, match="differ in dtype or tokens"):
        sampled(dy[:3], x, *good)
