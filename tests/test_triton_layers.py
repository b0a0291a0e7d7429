"""The Triton kernels of layers, loss, Hadamard and sparse ops: compiled for every target, right where they can run.

Oracles are torch in fp64 on the CPU. Where no GPU is, Triton's interpreter runs the kernels in fp32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_kit import TARGETS, compile_all, places, recorded, true

from qtune import ops
from qtune.errors import QtuneError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}  # bytes that a block may have
NAMES = ("hadamard", "layers", "loss", "sparse")


def on(name: str) -> Any:
    """Parametrize with (module, device, dtype): fp32 in the interpreter, every dtype on a GPU."""
    cases = [
        pytest.param(module, device, dtype, id=f"{'gpu' if device == 'cuda' else 'interpreter'}-{dtype}")
        for module, device in places(name)
        for dtype in (FLOATS if device == "cuda" else FLOATS[:1])
    ]
    return pytest.mark.parametrize(("module", "device", "dtype"), cases)


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` returns NaN, with NaN around it that nothing may write into."""
    real, made = torch.empty, []

    def empty(*sizes: Any, **options: Any) -> Tensor:
        size, device = sizes[0], torch.device(options.get("device") or "cpu")
        if device.type == "meta" or options.get("dtype") not in FLOATS or not isinstance(size, torch.Size | tuple):
            return real(*sizes, **options)
        n = prod(size)
        whole = torch.full((n + 128,), float("nan"), **options)
        made.append((whole, n))
        return whole[64 : 64 + n].view(size)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    assert all(whole[:64].isnan().all() and whole[64 + n :].isnan().all() for whole, n in made)


def check(got: Tensor, exact: Tensor, theirs: Tensor, ulps: float = 4, terms: float = 0.0) -> None:
    """No further from the exact values than twice torch in the same dtype, and some ulps of them, of their root mean
    square and of `terms`, the size of what cancels in them."""
    assert got.dtype == theirs.dtype
    assert got.shape == exact.shape
    assert got.is_contiguous()
    if not exact.numel():
        return
    eps = torch.finfo(theirs.dtype).eps
    got, theirs, exact = (t.detach().cpu().double() for t in (got, theirs, exact))
    size = exact.abs() + exact.square().mean().sqrt() + terms
    wrong = ~((got - exact).abs() <= 2 * (theirs - exact).abs().max() + ulps * eps * size)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} wrong, the first at {wrong.nonzero()[:3].tolist()}"


def gradients(function: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)
    return torch.autograd.grad(function(*inputs), inputs, upstream)


def moved(t: Tensor, device: str) -> Tensor:
    """A copy of t's memory on `device`, seen through t's strides, which `to` does not always keep."""
    memory = t.new_empty(0).set_(t.untyped_storage()).to(device, copy=True)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


# ---- compiled for every target


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Name -> (module, wrapper, arguments): sizes as in models, on meta."""
    f32, x, row = torch.float32, meta(512, 4096, dtype=dtype), meta(4096, dtype=dtype)
    short, gate = meta(512, 32, 128, dtype=dtype), meta(512, 28672, dtype=dtype)
    heads, angles = meta(2, 32, 64, 128, dtype=dtype).transpose(1, 2), meta(1, 64, 128, dtype=f32)
    base, loss_of = meta(28, 28, dtype=torch.int8), (meta(64, 128256, dtype=dtype), meta(64, dtype=torch.int64))
    csr = (meta(4097, dtype=torch.int64), meta(10000, dtype=torch.int16), meta(10000, dtype=f32))
    return {
        "rms_norm": ("layers", "rms_norm", x, row, 1e-6, 0.0, True),
        "rms_norm, heads": ("layers", "rms_norm", short, row[:128], 1e-6, 1.0, False),
        "rms_norm, wide": ("layers", "rms_norm", meta(4, 16384, dtype=dtype), meta(16384, dtype=f32), 1e-6, 0.0, True),
        "rms_norm_backward": ("layers", "rms_norm_backward", x, x, row, meta(512, dtype=f32), 1.0),
        "swiglu": ("layers", "swiglu", *gate.chunk(2, -1)),
        "swiglu_backward": ("layers", "swiglu_backward", gate[:, 14336:], *gate.chunk(2, -1)),
        "rotary": ("layers", "rotary", heads, angles, angles, False),
        "rotary, in part": ("layers", "rotary", heads, angles[..., :96], angles[..., :96], True),
        "cross_entropy_": ("loss", "cross_entropy_", *loss_of),
        "cross_entropy_, more": ("loss", "cross_entropy_", *loss_of, 0.1, 1e-4, True),
        "cross_entropy_, losses": ("loss", "cross_entropy_", *loss_of, 0.0, 0.0, False),
        "hadamard": ("hadamard", "hadamard_kronecker", x, base[:1, :1], 1.0, False),
        "hadamard, heads": ("hadamard", "hadamard_kronecker", short, base[:1, :1], 1.0, False),
        "hadamard, 2^15": ("hadamard", "hadamard_kronecker", meta(4, 1 << 15, dtype=dtype), base[:1, :1], 1.0, False),
        "hadamard, 28 * 2^9": ("hadamard", "hadamard_kronecker", meta(4, 14336, dtype=dtype), base, 1.0, True),
        "sparse_matmul": ("sparse", "sparse_matmul", x, *csr, 4096),
        "sparse_matmul_t": ("sparse", "sparse_matmul_t", x, *csr, 4096),
        "sampled_product": ("sparse", "sampled_product", x, x, *csr[:2]),
    }  # fmt: skip


COMPILED = {  # a dtype of each target's users; bf16 on 7.5, which has none, has to compile all the same
    75: (torch.float16, torch.bfloat16),
    80: (torch.bfloat16,),
    86: (torch.float16,),
    89: (torch.bfloat16,),
    90: (torch.bfloat16,),
    120: (torch.float32,),
}
ENDS = {75: (torch.float16,), 120: (torch.float32,)}  # for another size of a kernel


@pytest.mark.parametrize("name", calls(torch.float32))
def test_compiles_for_every_target_and_fits_into_shared_memory(name: str) -> None:
    assert tuple(COMPILED) == TARGETS
    for target, dtypes in (ENDS if "," in name else COMPILED).items():
        for dtype in dtypes:
            module, function, *arguments = calls(dtype)[name]
            compiled = compile_all(recorded(getattr(true(module), function), *arguments), (target,))[target]
            assert all(kernel.metadata.shared <= SHARED[target] for kernel in compiled), target


def test_every_kernel_is_an_op() -> None:
    for name in NAMES:
        importlib.import_module(f"qtune.ops.{name}")
        assert set(true(name).KERNELS) <= set(ops.REFERENCES)


# ---- RMS norm


def norm(x: Tensor, weight: Tensor, offset: float, cast_first: bool = False) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    if cast_first:
        return (weight + offset) * n.to(x.dtype)
    return (n * (weight.to(wide.dtype) + offset)).to(x.dtype)


@on("layers")
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 33), (70, 64), (3, 1000), (2, 4097), (0, 8)], ids=str)
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False), (1.0, True)])
def test_rms_norm(module, device, dtype, shape, offset, cast_first) -> None:  # type: ignore[no-untyped-def]
    x, dy, w = (torch.randn(s).to(dtype) for s in (shape, shape, shape[-1:]))
    y, rstd = module.rms_norm(moved(x, device), moved(w, device), 1e-5, offset, cast_first)
    check(y, norm(x.double(), w.double(), offset), norm(x, w, offset, cast_first))
    exact = torch.rsqrt(x.double().square().mean(-1) + 1e-5)
    check(rstd, exact, exact.float())
    got = module.rms_norm_backward(moved(dy, device), moved(x, device), moved(w, device), rstd, offset)
    exact = gradients(lambda x: norm(x, w.double(), offset), dy.double(), x.double())[0]
    terms = float((dy * (w + offset)).abs().max() * rstd.max()) if x.numel() == 1 else 0.0
    check(got, exact, gradients(lambda x: norm(x, w, offset), dy, x)[0], terms=terms)


@on("layers")
def test_rms_norm_of_views_and_of_mixed_dtypes(module, device, dtype) -> None:  # type: ignore[no-untyped-def]
    wide, w = torch.randn(5, 3, 80).to(dtype), torch.randn(40)
    for x in (wide[..., 20:60], wide[..., ::2], wide.transpose(0, 1)[..., :40]):
        y, rstd = module.rms_norm(moved(x, device), moved(w, device), 1e-5, 0.0, False)
        check(y, norm(x.double(), w.double(), 0.0), norm(x, w, 0.0))
        dy = x.flip(0)
        got = module.rms_norm_backward(moved(dy, device), moved(x, device), moved(w, device), rstd, 0.0)
        exact = gradients(lambda x: norm(x, w.double(), 0.0), dy.double(), x.double())[0]
        check(got, exact, gradients(lambda x: norm(x, w, 0.0), dy, x)[0])


# ---- SwiGLU


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@on("layers")
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 33), (2, 3, 1000), (4099,), (0, 4)], ids=str)
def test_swiglu(module, device, dtype, shape) -> None:  # type: ignore[no-untyped-def]
    gate, up, dy = (3 * torch.randn(shape).to(dtype) for _ in range(3))
    there = [moved(t, device) for t in (gate, up, dy)]
    check(module.swiglu(*there[:2]), silu_times(gate.double(), up.double()), silu_times(gate, up))
    exact, theirs = gradients(silu_times, dy.double(), gate.double(), up.double()), gradients(silu_times, dy, gate, up)
    for values in zip(module.swiglu_backward(there[2], *there[:2]), exact, theirs, strict=True):
        check(*values)


@on("layers")
def test_swiglu_of_the_halves_of_one_tensor_and_of_extremes(module, device, dtype) -> None:  # type: ignore[no-untyped-def]
    both = torch.randn(5, 2, 2 * 37).to(dtype)
    gate, up = both.chunk(2, -1)
    for pair in ((gate, up), (gate.transpose(0, 1), up.transpose(0, 1)), (both[..., ::2], both[..., 1::2])):
        there = [moved(t, device) for t in pair]
        check(module.swiglu(*there), silu_times(*(t.double() for t in pair)), silu_times(*pair))
        for values in zip(
            module.swiglu_backward(there[1], *there),
            gradients(silu_times, pair[1].double(), *(t.double() for t in pair)),
            gradients(silu_times, pair[1], *pair),
            strict=True,
        ):
            check(*values)
    far = torch.tensor([-1e4, -100.0, -88.8, 0.0, 88.8, 1e4], dtype=dtype)
    one = torch.ones_like(far)
    check(
        module.swiglu(moved(far, device), moved(one, device)),
        silu_times(far.double(), one.double()),
        silu_times(far, one),
    )
    slope = module.swiglu_backward(moved(one, device), moved(far, device), moved(one, device))[0]
    check(slope, gradients(silu_times, one.double(), far.double(), one.double())[0], far.sign().clamp(min=0))


# ---- rotary positions


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r, (cos, sin) = cos.shape[-1], (t.unsqueeze(2) for t in (cos, sin))
    low, high = x[..., :r].chunk(2, -1)
    return torch.cat((x[..., :r] * cos + torch.cat((-high, low), -1) * sin, x[..., r:]), -1)


@on("layers")
@pytest.mark.parametrize(
    ("batch", "seq", "heads", "dim", "r"),
    [(1, 1, 1, 2, 2), (2, 3, 5, 10, 6), (1, 7, 3, 64, 64), (3, 2, 33, 48, 48), (2, 3, 4, 130, 128), (1, 2, 3, 5, 0)],
)
def test_rotary(module, device, dtype, batch, seq, heads, dim, r) -> None:  # type: ignore[no-untyped-def]
    for x in (
        torch.randn(batch, seq, heads, dim),
        torch.randn(batch, heads, seq, dim).transpose(1, 2),
        torch.randn(batch, seq, 3, heads, dim + 4)[:, :, 1, :, 2:-2],
        torch.randn(1, seq, 1, dim).expand(batch, seq, heads, dim),
        torch.randn(batch, seq, dim, heads).transpose(2, 3),
    ):
        x = x.to(dtype) if x.stride(1) else x
        for angles, batches in ((dtype, 1), (torch.float32, batch)):
            cos, sin = (torch.randn(batches, seq, r).to(angles) for _ in range(2))  # no rotation: a transpose differs
            there = [moved(t, device) for t in (x, cos, sin)]
            exact, theirs = turn(*(t.double() for t in (x, cos, sin))), turn(x, cos.to(dtype), sin.to(dtype))
            check(module.rotary(*there, False), exact, theirs)
            c, s = cos.double(), sin.double()
            exact = gradients(lambda x, c=c, s=s: turn(x, c, s), x.double(), x.double())[0]
            check(module.rotary(*there, True), exact, theirs=exact.to(dtype), ulps=8)


# ---- cross entropy


def loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return losses + z_loss * logits.logsumexp(1).square() if z_loss else losses


@on("loss")
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 2), (5, 7), (2, 33), (4, 1000), (3, 8192), (3, 17001), (0, 5)])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_cross_entropy(module, device, dtype, rows, vocab, size) -> None:  # type: ignore[no-untyped-def]
    around = torch.full((rows + 2, vocab + 6), float("nan"), dtype=dtype, device=device)
    logits = (torch.randn(rows, vocab) * size).to(dtype)
    labels = torch.randint(0, vocab, (2 * rows,))[::2]
    inside = around[1:-1, 3:-3]
    inside.copy_(logits)
    losses = module.cross_entropy_(inside, moved(labels, device))
    wide = torch.ones(rows, dtype=torch.float64)
    check(losses, loss(logits.double(), labels), loss(logits.float(), labels), terms=1.0)
    exact = gradients(lambda z: loss(z, labels), wide, logits.double())[0]
    theirs = gradients(lambda z: loss(z.float(), labels), wide.float(), logits)[0]
    check(inside.contiguous(), exact, theirs, terms=torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
    inside.fill_(float("nan"))
    assert around.isnan().all()
    other = moved(logits.t().contiguous().t(), device)  # a column after the other
    assert torch.equal(module.cross_entropy_(other, moved(labels, device)), losses)


@on("loss")
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3)])
@pytest.mark.parametrize("vocab", [1, 33, 17001])
def test_smoothing_and_z_loss(module, device, dtype, vocab, smoothing, z_loss) -> None:  # type: ignore[no-untyped-def]
    logits, labels = (torch.randn(3, vocab) * 3 + 5).to(dtype), torch.randint(0, vocab, (3,))
    z, kept, there, options = moved(logits, device), moved(logits, device), moved(labels, device), (smoothing, z_loss)
    losses = module.cross_entropy_(z, there, *options, True)
    check(losses, loss(logits.double(), labels, *options), loss(logits.float(), labels, *options), terms=1.0)
    wide = torch.ones(3, dtype=torch.float64)
    exact = gradients(lambda z: loss(z, labels, *options), wide, logits.double())[0]
    theirs = gradients(lambda z: loss(z.float(), labels, *options), wide.float(), logits)[0]
    check(z, exact, theirs, terms=torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
    assert torch.equal(module.cross_entropy_(kept, there, *options, False), losses)
    assert torch.equal(kept.cpu(), logits)


@on("loss")
def test_cross_entropy_with_infinities_and_nan(module, device, dtype) -> None:  # type: ignore[no-untyped-def]
    logits = torch.randn(5, 9000).to(dtype)
    logits[0, :8500] = float("-inf")  # more than a block
    logits[1, 7:] = float("-inf")
    logits[2, 8999] = float("nan")
    logits[3] = float("-inf")
    labels = torch.tensor([8600, 3, 0, 1, 2])
    there, exact = moved(logits, device), logits.double()
    losses = module.cross_entropy_(there, moved(labels, device)).cpu()
    assert losses.isnan().tolist() == [False, False, True, True, False]
    assert there.cpu()[2:4].isnan().all()
    keep = [0, 1, 4]
    check(losses[keep], loss(exact[keep], labels[keep]), loss(logits.float()[keep], labels[keep]))
    slope = gradients(lambda z: loss(z, labels[keep]), torch.ones(3, dtype=torch.float64), exact[keep])[0]
    check(there.cpu()[keep], slope, slope.to(dtype))


def test_a_label_outside_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """An assertion of torch; were it switched off, a row of NaN and no read outside. On a GPU it would end CUDA."""
    module, _ = places("loss")[0]
    with pytest.raises(RuntimeError, match="a label outside of the vocabulary"):
        module.cross_entropy_(torch.randn(2, 7), torch.tensor([0, 7]))
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    logits = torch.randn(4, 7)
    losses = module.cross_entropy_(logits, torch.tensor([0, 7, -1, 2**40]))
    assert losses.isnan().tolist() == logits.isnan().all(1).tolist() == [False, True, True, True]


# ---- Hadamard


def transform(x: Tensor, base: Tensor) -> Tensor:
    """x (base (x) H_{2^m})^T by its definition."""
    order, n = base.shape[0], x.shape[-1]
    y, step = x.reshape(-1, order, n // order), 1
    while step < n // order:
        pairs = y.view(-1, order, n // order // (2 * step), 2, step)
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2)
        y, step = y.view(-1, order, n // order), 2 * step
    return torch.einsum("kj,rjc->rkc", base.to(x.dtype), y).reshape(x.shape)


@on("hadamard")
@pytest.mark.parametrize(
    ("order", "inner", "rows"),
    [(1, 1, 3), (1, 2, 7), (1, 64, 33), (1, 512, 5), (1, 4096, 3), (1, 1 << 15, 2), (2, 1, 3), (3, 16, 5),
     (4, 8192, 1), (12, 1, 4), (20, 2, 3), (28, 64, 2), (12, 512, 2), (5, 4, 0)],
)  # fmt: skip
@pytest.mark.parametrize("transpose", [False, True])
def test_hadamard(module, device, dtype, order, inner, rows, transpose) -> None:  # type: ignore[no-untyped-def]
    base = (torch.randint(0, 2, (order, order)) * 2 - 1).to(torch.int8)  # any signs: not symmetric
    x = torch.randn(rows, order * inner).to(dtype)
    got = module.hadamard_kronecker(moved(x, device), moved(base, device), 0.37, transpose)
    exact = transform(x.double(), base.t() if transpose else base) * 0.37
    check(got, exact, exact.to(dtype), ulps=8)


@on("hadamard")
def test_hadamard_of_views_and_of_large_pieces_in_parts(module, device, dtype, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    base, wide = torch.tensor([[1, 1, -1], [1, -1, 1], [1, 1, 1]], dtype=torch.int8), torch.randn(3, 4, 200).to(dtype)
    for largest in (module.LARGEST, 8):
        monkeypatch.setattr(module, "LARGEST", largest)
        for x in (wide[..., 4:52], wide[..., ::2][..., :48], wide.transpose(0, 1)[..., :48]):
            for transpose in (False, True):
                exact = transform(x.double(), base.t() if transpose else base)
                got = module.hadamard_kronecker(moved(x, device), moved(base, device), 1.0, transpose)
                check(got, exact, exact.to(dtype), ulps=8)


# ---- sparse


def pattern(out: int, into: int, nnz: int, unsigned: bool, pointers: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Row pointers, columns (some twice, in any order) and the row of each entry; the first and last row are empty."""
    row = torch.randint(1, out - 1, (nnz,)).sort().values
    rows = torch.searchsorted(row, torch.arange(out + 1)).to(pointers)
    cols = torch.randint(0, into, (nnz,), dtype=torch.int32)
    cols[:1] = into - 1  # beyond 2^15, where there are so many
    return rows, cols.to(torch.int16) if unsigned else cols, row


def dense(rows: Tensor, cols: Tensor, values: Tensor, row: Tensor, into: int) -> Tensor:
    s = torch.zeros(rows.numel() - 1, into, dtype=values.dtype)
    return s.index_put_((row, cols.long() & 0xFFFF), values, accumulate=True)


@on("sparse")
@pytest.mark.parametrize(
    ("lead", "out", "into", "nnz"),
    [
        ((1,), 3, 1, 1),
        ((2, 3), 5, 7, 12),
        ((33,), 17, 9, 100),
        ((300,), 6, 9, 40),
        ((2,), 4, 40000, 9),
        ((7,), 3, 4, 0),
        ((0,), 5, 4, 9),
    ],
)
@pytest.mark.parametrize(("unsigned", "pointers"), [(True, torch.int64), (False, torch.int32)])
def test_sparse_products(module, device, dtype, lead, out, into, nnz, unsigned, pointers) -> None:  # type: ignore[no-untyped-def]
    rows, cols, row = pattern(out, into, nnz, unsigned, pointers)
    x, dy = torch.randn(*lead, into).to(dtype), torch.randn(*lead, out).to(dtype)
    place = moved(rows, device), moved(cols, device)
    for values in (torch.randn(nnz), torch.randn(nnz).to(dtype)):
        exact = dense(rows, cols, values.double(), row, into)
        y = module.sparse_matmul(moved(x, device), *place, moved(values, device), out)
        check(y, x.double() @ exact.t(), (x.double() @ exact.t()).to(dtype), ulps=8)
        if device == "cpu" and into > 1000:
            continue  # a program for each column: too many for the interpreter
        dx = module.sparse_matmul_t(moved(dy, device), *place, moved(values, device), into)
        check(dx, dy.double() @ exact, (dy.double() @ exact).to(dtype), ulps=8)
        assert torch.equal(dx, module.sparse_matmul_t(moved(dy, device), *place, moved(values, device), into))
    product = dy.double().reshape(-1, out).t() @ x.double().reshape(-1, into)
    exact = product[row, cols.long() & 0xFFFF]
    check(module.sampled_product(moved(dy, device), moved(x, device), *place), exact, exact.float(), ulps=8)


@on("sparse")
def test_sparse_products_of_views(module, device, dtype) -> None:  # type: ignore[no-untyped-def]
    rows, cols, row = pattern(6, 9, 20, False, torch.int64)
    values, wide = torch.randn(40)[::2], torch.randn(5, 4, 30).to(dtype)
    x, dy, place = (
        wide.transpose(0, 1)[..., 1:28:3],
        wide.transpose(0, 1)[..., :6],
        (moved(rows, device), moved(cols, device)),
    )
    s = dense(rows, cols, values.double(), row, 9)
    y = module.sparse_matmul(moved(x, device), *place, moved(values, device), 6)
    check(y, x.double() @ s.t(), (x.double() @ s.t()).to(dtype), ulps=8)
    dx = module.sparse_matmul_t(moved(dy, device), *place, moved(values, device), 9)
    check(dx, dy.double() @ s, (dy.double() @ s).to(dtype), ulps=8)
    exact = (dy.double().reshape(-1, 6).t() @ x.double().reshape(-1, 9))[row, cols.long()]
    check(module.sampled_product(moved(dy, device), moved(x, device), *place), exact, exact.float(), ulps=8)


@on("sparse")
def test_a_column_or_pointer_that_points_outside_gives_nan(module, device, dtype) -> None:  # type: ignore[no-untyped-def]
    rows, cols = torch.tensor([0, 2, 4, 7]), torch.tensor([0, 1, 5, 2, -1], dtype=torch.int32)  # 3 rows, 5 entries
    x, dy, values = torch.ones(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.ones(5)
    there = [moved(t, device) for t in (rows, cols)]
    y = module.sparse_matmul(moved(x, device), *there, moved(values, device), 3).cpu()
    assert y.isnan().tolist() == [[False, True, True]] * 2
    assert y[:, 0].tolist() == [2, 2]
    g = module.sampled_product(moved(dy, device), moved(x, device), *there).cpu()
    assert g.isnan().tolist() == [False, False, True, False, True]


# ---- refusals


def test_what_does_not_fit_is_refused_all_at_once() -> None:
    layers, hadamard, cross = (places(name)[0][0] for name in ("layers", "hadamard", "loss"))
    x, w = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(QtuneError, match=r"x: 24 of torch.float64.*weight \(7,\) for rows of 8"):
        layers.rms_norm(x.double(), w[:7], 1e-5, 0.0, True)
    with pytest.raises(QtuneError, match=r"dy \(2, 8\) for x \(3, 8\).*rstd torch.float64 \(3,\)"):
        layers.rms_norm_backward(x[:2], x, w, torch.ones(3).double(), 0.0)
    with pytest.raises(QtuneError, match=r"shapes differ.*dtypes differ"):
        layers.swiglu(x, x[:2].half())
    with pytest.raises(QtuneError, match=r"cos \(1, 3, 6\) for x .*6 values to turn, of 5"):
        layers.rotary(torch.randn(1, 2, 3, 5), torch.randn(1, 3, 6), torch.randn(1, 3, 6), False)
    with pytest.raises(QtuneError, match=r"labels: torch.int32 \(2,\); wanted int64 \(3,\)"):
        cross.cross_entropy_(x, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(QtuneError, match=r"base: torch.float32 \(3, 3\).*size 8 is no 3 times 2\^m"):
        hadamard.hadamard_kronecker(x, torch.ones(3, 3), 1.0, False)
    sparse = places("sparse")[0][0]
    with pytest.raises(QtuneError, match=r"dy of shape \[3, 8\]; wanted.*columns torch.int64.*values: 2 of .*wanted 3"):
        sparse.sparse_matmul_t(x, torch.arange(4), torch.zeros(3, dtype=torch.int64), torch.ones(2), 5)
    with pytest.raises(QtuneError, match="differ in dtype or tokens"):
        sparse.sampled_product(x, x[:2], torch.arange(9), torch.zeros(3, dtype=torch.int32))
    for name in NAMES:
        assert places(name)[0][0].LIBRARY.why_not() == "TRITON_INTERPRET is set"
