"""Attention equals torch's in float64 within torch's own error, on every SIMD path, forward and gradient."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import cpu_kernels
from torch import Tensor

from qtune import ops
from qtune.errors import QtuneError
from qtune.ops.attention import flash_attention

qtune = torch.ops.qtune
PATHS = ("scalar", "avx2", "avx512", "neon", "avx512_bf16", "amx")
FLOATS = (torch.bfloat16, torch.float32, torch.float16)
NAMES = ("out", "dq", "dk", "dv")


def kernels():  # type: ignore[no-untyped-def]
    return cpu_kernels("attention")


@pytest.fixture(params=PATHS)
def simd(request: pytest.FixtureRequest) -> str:
    if request.param not in kernels().LIBRARY.simd_paths():
        pytest.skip(f"this machine has no {request.param}")
    return str(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(
    B: int, T: int, S: int, H: int, HK: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout; scores of q and k are a few units wide, as in a trained model."""
    shapes = ((T, H), (S, HK), (S, HK), (T, H))
    q, k, v, dout = (torch.randn(B, n, heads, D) for n, heads in shapes)
    return (q * 1.5).to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype)


def seen(T: int, S: int, mask: Tensor | None, causal: bool) -> Tensor:
    both = torch.ones(1, 1, T, S, dtype=torch.bool)
    both = both.tril(S - T) if causal else both
    return both if mask is None else both & mask


def theirs(q, k, v, dout, mask, causal, scale) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """torch's own attention and its gradient; a query that sees nothing gets 0."""
    q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v))
    visible = seen(q.shape[2], k.shape[2], mask, causal)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    out = torch.where(visible.any(-1, keepdim=True), out, 0.0)
    grads = torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2))
    return [t.detach().transpose(1, 2) for t in (out, *grads)]


def ours(q, k, v, dout, mask, causal, scale, simd) -> list[Tensor]:  # type: ignore[no-untyped-def]
    out, lse = kernels().attention(q, k, v, mask, causal, scale, simd)
    return [out, *kernels().attention_backward(dout, q, k, v, out, lse, mask, causal, scale, simd)]


def check(q, k, v, dout, mask, causal, scale, simd) -> None:  # type: ignore[no-untyped-def]
    """Our distance from float64 is at most twice torch's and some ulps: in norm, and at the worst element."""
    rest = mask, causal, scale
    exact = theirs(*(t.double() for t in (q, k, v, dout)), *rest)
    plain, own = theirs(q, k, v, dout, *rest), ours(q, k, v, dout, *rest, simd)
    ulp = torch.finfo(q.dtype).eps
    relative = (1, 2) if q.dtype == torch.float32 else (0.25, 0.5)  # few values of fp32 may be luckily right
    # what cancels to 0 leaves the rounding, in fp32, of what cancelled: at one element, and in dq and dk everywhere
    widest = max(q.abs().max(), k.abs().max()).item() * abs(scale) + 1
    noise = 2**-24 * widest * dout.float().norm(dim=-1).max().item() * v.float().norm(dim=-1).max().item()
    for name, e, p, o in zip(NAMES, exact, plain, own, strict=True):
        everywhere = noise / 8 if name in ("dq", "dk") else 0.0
        assert o.dtype == q.dtype and o.is_contiguous(), name
        assert not o.isnan().any(), name
        size, off, off_theirs = e.abs(), (o.double() - e).abs(), (p.double() - e).abs()
        sides = off_theirs.norm(), size.norm(), size.numel() ** 0.5
        assert off.norm() <= 2 * sides[0] + relative[0] * ulp * sides[1] + everywhere * sides[2], (name, simd)
        assert off.max() <= 2 * off_theirs.max() + relative[1] * ulp * size.max() + noise, (name, simd)


def padding(B: int, T: int, S: int) -> Tensor:
    """The last sequences are shorter; expanded, so with strides of 0."""
    lengths = torch.linspace(S, max(1, S // 3), B).long()
    return (torch.arange(S) < lengths.unsqueeze(1))[:, None, None].expand(B, 1, T, S)


def window(T: int, S: int, width: int) -> Tensor:
    query, key = torch.arange(T).unsqueeze(1) + S - T, torch.arange(S)
    return ((key <= query) & (key > query - width))[None, None]


def blind(B: int, T: int, S: int) -> Tensor:
    """Random, and some queries see nothing, some keys are seen by none."""
    mask = torch.rand(B, 1, T, S) < 0.6
    mask[:, :, ::3] = False
    mask[..., 1::5] = False
    return mask


# ---- against torch


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [8, 16, 40, 64, 80, 96, 128, 256, 1, 7])
def test_every_width_of_head(D: int, dtype: torch.dtype, simd: str, poisoned: None) -> None:
    for causal in (False, True):
        check(*inputs(1, 97, 97, 2, 1, D, dtype), None, causal, D**-0.5, simd)


@pytest.mark.parametrize("T", [1, 3, 7, 17, 33, 63, 64, 65, 127, 129, 300])
@pytest.mark.parametrize("heads", [(6, 2), (2, 2), (3, 1)], ids=str)
def test_every_length(T: int, heads: tuple[int, int], simd: str, poisoned: None) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, dout = inputs(2, T, T, *heads, 32, dtype)
        check(q, k, v, dout, None, True, 0.2, simd)
        check(q, k, v, dout, padding(2, T, T), True, 0.2, simd)


@pytest.mark.parametrize("sizes", [(1, 130), (70, 200), (200, 70), (130, 1), (65, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_other_numbers_of_keys_than_of_queries(sizes: tuple[int, int], causal: bool, simd: str, poisoned: None) -> None:
    """With more queries than keys, causality leaves the first ones without any key."""
    T, S = sizes
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, dout = inputs(2, T, S, 4, 2, 32, dtype)
        check(q, k, v, dout, None, causal, 0.2, simd)
        check(q, k, v, dout, blind(2, T, S), causal, 0.2, simd)


@pytest.mark.parametrize("width", [1, 5, 64, 100])
def test_sliding_windows(width: int, simd: str, poisoned: None) -> None:
    """Blocks before the window are skipped, blocks inside are whole, blocks on its edges are not."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, dout = inputs(2, 330, 330, 2, 1, 32, dtype)
        check(q, k, v, dout, window(330, 330, width), False, 0.2, simd)
        check(q, k, v, dout, window(330, 330, width).expand(2, 1, 330, 330), True, 0.2, simd)


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_any_scale(scale: float, simd: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check(*inputs(1, 130, 130, 2, 1, 32, dtype), blind(1, 130, 130), True, scale, simd)


def test_scores_that_grow_along_the_keys_and_that_are_huge(simd: str, poisoned: None) -> None:
    """The running maximum has to follow; exponentials would overflow without it."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, dout = inputs(1, 400, 400, 2, 1, 32, dtype)
        rising = (k.float() + torch.arange(400).view(1, -1, 1, 1) * 0.1).to(dtype)
        check((q.float().abs()).to(dtype), rising, v, dout, None, False, 0.2, simd)
        check((q * 20).to(dtype), (k * 20).to(dtype), v, dout, None, True, 1.0, simd)


def test_lse_and_queries_that_see_nothing(simd: str, poisoned: None) -> None:
    for dtype in FLOATS:
        q, k, v, dout = inputs(2, 90, 140, 4, 2, 24, dtype)
        mask = blind(2, 90, 140)
        out, lse = kernels().attention(q, k, v, mask, True, 0.3, simd)
        grads = kernels().attention_backward(dout, q, k, v, out, lse, mask, True, 0.3, simd)
        visible = seen(90, 140, mask, True)
        scores = q.double().transpose(1, 2) @ k.double().transpose(1, 2).repeat_interleave(2, 1).transpose(2, 3) * 0.3
        exact = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
        nothing = ~visible.any(-1).expand(2, 4, 90)
        assert lse.dtype == torch.float32 and lse.shape == (2, 4, 90)
        assert torch.equal(lse == float("-inf"), nothing)
        assert (lse.double() - exact)[~nothing].abs().max() < 1e-5
        assert out.transpose(1, 2)[nothing].eq(0).all()
        assert grads[0].transpose(1, 2)[nothing].eq(0).all()
        unseen = ~visible.any(2).expand(2, 2, 140)
        assert unseen.any()
        assert all(g.transpose(1, 2)[unseen].eq(0).all() for g in grads[1:])


def test_hidden_keys_and_their_values_do_not_matter(simd: str) -> None:
    """Not even in the last bit."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v, dout = inputs(1, 100, 150, 2, 1, 32, dtype)
        mask = padding(2, 100, 150)[1:]
        hidden = ~mask[0, 0, 0]
        before = ours(q, k, v, dout, mask, False, 0.2, simd)
        k[:, hidden], v[:, hidden] = 1e4, -1e4
        assert all(torch.equal(a, b) for a, b in zip(before, ours(q, k, v, dout, mask, False, 0.2, simd), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value: float, simd: str) -> None:
    """A query of NaN has no score to compare: it must not pass for one that sees nothing, whose result is 0."""
    for dtype in FLOATS:
        for T, S in ((3, 3), (65, 130)):
            for which in range(3):
                q, k, v, dout = inputs(1, T, S, 2, 1, 8, dtype)
                (q, k, v)[which][0, 1, 0, 2] = value
                mask = (torch.rand(1, 1, T, S) < 0.7).index_fill(3, torch.tensor([1]), True)
                exact = ops.REFERENCES["attention"](q.double(), k.double(), v.double(), mask, False, 0.3)[0]
                assert not exact.isfinite().all()
                out, *grads = ours(q, k, v, dout, mask, False, 0.3, simd)
                assert torch.equal(out.isnan(), exact.isnan())
                assert torch.equal(out.isinf(), exact.isinf())
                if which == 0:
                    assert grads[0][0, 1, 0].isnan().all() and grads[1].isnan().any() and grads[2].isnan().any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_of_any_layout(dtype: torch.dtype, simd: str, poisoned: None) -> None:
    """Heads before positions, q, k and v in one row, an odd stride, a transposed mask, an expanded dout."""
    q, k, v, dout = inputs(2, 70, 70, 4, 4, 32, dtype)
    mask = blind(2, 70, 70)
    want = ours(q, k, v, dout, mask, True, 0.2, simd)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, dout)]
    row = torch.cat([t.flatten(2) for t in (q, k, v)], 2)
    fused = [t.unflatten(2, (4, 32)) for t in row.split(128, 2)]
    odd = [F.pad(t, (0, 1))[..., :32] for t in (q, k, v, dout)]
    scattered = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v, dout)]
    flipped = mask.transpose(2, 3).contiguous().transpose(2, 3)
    for some in (turned, [*fused, dout], odd, scattered):
        for m in (mask, flipped):
            got = ours(*some, m, True, 0.2, simd)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    ones = torch.ones((), dtype=dtype).expand(dout.shape)
    got, want = (ours(q, k, v, t, None, True, 0.2, simd) for t in (ones, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("sizes", [(2, 600, 3, 1), (1, 2100, 4, 1), (8, 49, 9, 3), (1, 64, 2, 2)], ids=str)
def test_threads_do_not_change_the_result(sizes: tuple[int, int, int, int], poisoned: None) -> None:
    """One thread takes whole heads in small waves, many share the heads in large waves: the sums are the same."""
    B, T, H, HK = sizes
    q, k, v, dout = inputs(B, T, T, H, HK, 64, torch.bfloat16)
    results = []
    for n in (1, 3, 8):
        torch.set_num_threads(n)
        results.append(ours(q, k, v, dout, None, True, 0.125, "auto"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    if T > 2000:  # several waves on every number of threads
        check(q, k, v, dout, None, True, 0.125, "auto")


def test_products_of_torch_between_ours_stay_right() -> None:
    """Both set up the tiles of AMX, each for itself."""
    a, b = torch.randn(130, 200).bfloat16(), torch.randn(200, 170).bfloat16()
    q, k, v, dout = inputs(1, 130, 130, 2, 1, 64, torch.bfloat16)
    product, attended = a @ b, ours(q, k, v, dout, None, True, 0.125, "auto")
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        assert torch.equal(a @ b, product)
        got = ours(q, k, v, dout, None, True, 0.125, "auto")
        assert all(torch.equal(x, y) for x, y in zip(got, attended, strict=True))


# ---- the references, the function with a gradient


@pytest.mark.parametrize("causal", [False, True])
def test_references_in_float64_are_torchs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qtune.ops.attention"], "CHUNK", 5000)  # several chunks of queries
    for T, S, mask in ((50, 50, None), (30, 70, blind(2, 30, 70)), (70, 30, padding(2, 70, 30))):
        q, k, v, dout = (t.double() for t in inputs(2, T, S, 6, 2, 12, torch.float32))
        out, lse = ops.REFERENCES["attention"](q, k, v, mask, causal, 0.3)
        own = [out, *ops.REFERENCES["attention_backward"](dout, q, k, v, out, lse, mask, causal, 0.3)]
        for name, a, b in zip(NAMES, own, theirs(q, k, v, dout, mask, causal, 0.3), strict=True):
            assert (a - b).abs().max() < 1e-12, name


def test_references_round_once() -> None:
    q, k, v, dout = inputs(1, 40, 40, 2, 1, 32, torch.bfloat16)
    out, lse = ops.REFERENCES["attention"](q, k, v, None, True, 0.2)
    own = [out, *ops.REFERENCES["attention_backward"](dout, q, k, v, out, lse, None, True, 0.2)]
    exact = theirs(*(t.double() for t in (q, k, v, dout)), None, True, 0.2)
    assert (own[0].double() - exact[0]).abs().max() <= 2**-8 * exact[0].abs().max()
    for a, b, most in zip(own, exact, (2e-3, 1e-2, 1e-2, 2e-3), strict=True):  # dq and dk see the rounded out
        assert (a.double() - b).norm() < most * b.norm()


def test_flash_attention_has_the_right_gradient() -> None:
    mask = blind(1, 9, 11)
    parts = [torch.randn(1, n, h, 4, dtype=torch.float64, requires_grad=True) for n, h in ((9, 4), (11, 2), (11, 2))]
    torch.autograd.gradcheck(lambda q, k, v: flash_attention(q, k, v, mask, True, 0.4), parts)


def test_flash_attention_keeps_what_its_gradient_needs_and_no_more() -> None:
    q, k, v, dout = inputs(2, 64, 64, 4, 2, 32, torch.bfloat16)
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = flash_attention(q, k, v.requires_grad_(), None, True, 0.2)
        assert sum(kept) == sum(t.numel() * 2 for t in (q, k, v, out)) + 2 * 4 * 64 * 4
        kept.clear()
        with torch.no_grad():
            assert flash_attention(q, k, v, None, True, 0.2).grad_fn is None
        assert flash_attention(q, k, v.detach(), None, True, 0.2).grad_fn is None
        assert not kept
    out.backward(dout)
    assert v.grad is not None and q.grad is None and k.grad is None


# ---- faults


def test_nothing_to_do(simd: str) -> None:
    k = kernels()
    for B, T, S, H, HK in ((0, 3, 3, 2, 1), (2, 0, 5, 2, 1), (2, 3, 0, 2, 1), (1, 2, 2, 0, 0)):
        q, keys = torch.randn(B, T, H, 8), torch.randn(B, S, HK, 8)
        out, lse = k.attention(q, keys, keys, None, True, 1.0, simd)
        assert out.eq(0).all() and lse.eq(float("-inf")).all() and lse.shape == (B, H, T)
        dq, dk, dv = k.attention_backward(out, q, keys, keys, out, lse, None, True, 1.0, simd)
        assert dq.eq(0).all() and dk.eq(0).all() and dv.eq(0).all()


def test_wrong_arguments_are_one_error() -> None:
    k = kernels()
    q, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 2, 8)
    mask = torch.ones(1, 1, 4, 5, dtype=torch.bool)
    with pytest.raises(QtuneError, match=r"no multiple.*wanted bool \[1 or 1, 1, 4, 4\]"):
        k.attention(q, keys, keys, mask, True, 1.0)
    with pytest.raises(QtuneError, match="heads of 264; legal: 1 to 256"):
        k.attention(*[torch.randn(1, 2, 1, 264)] * 3, None, True, 1.0)
    with pytest.raises(QtuneError, match=r"k, v of torch.bfloat16.*v \(1, 3, 1, 8\)"):
        k.attention(q, keys[:, :, :1].bfloat16(), keys[:, :3, :1], None, True, 1.0)
    one = keys[:, :, :1]
    with pytest.raises(QtuneError, match="dout: .*out: .*"):
        k.attention_backward(q[:, :2], q, one, one, q.bfloat16(), torch.zeros(1, 3, 4), None, True, 1.0)
    with pytest.raises(QtuneError, match="lse"):
        k.attention_backward(q, q, one, one, q, torch.zeros(1, 4, 3), None, True, 1.0)
    with pytest.raises(QtuneError, match="SIMD path"):
        k.attention(q, one, one, None, True, 1.0, "sse9")


def test_a_process_without_tiles_takes_another_path() -> None:
    """The bf16 and AMX paths answer for this library alone; the others keep what they chose."""
    ask = (
        "from qtune.kernels.cpu import attention, blockwise4 as b; own = set(attention.LIBRARY.simd_paths());"
        "assert not {'amx', 'avx512_bf16'} & set(b.LIBRARY.simd_paths()); assert set(b.LIBRARY.simd_paths()) <= own"
    )
    kernels()
    subprocess.run([sys.executable, "-c", "import qtune\n" + ask], check=True)
