"""RMS norm, SwiGLU and rotary positions: as close to float64 as transformers' code, on every SIMD path.

Errors are taken against transformers' own modules in float64; theirs in the dtype under test is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cpu_kernels import cpu_kernels
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qtune import backend, ops
from qtune.errors import QtuneError
from qtune.ops.layers import fused_rms_norm, fused_rotary, fused_swiglu

qtune = torch.ops.qtune
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotary")
WIDTHS = (1, 3, 7, 17, 33, 64, 127, 129, 576, 1000)


def kernels() -> Any:
    return cpu_kernels("layers")


@pytest.fixture(params=("reference", "scalar", "avx2", "avx512", "neon"))
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference, or one SIMD path, serves the ops."""
    path = request.param
    if path == "reference":
        monkeypatch.setattr(backend, "kernel", lambda name, device: None)
        return path
    if path not in kernels().LIBRARY.simd_paths():
        pytest.skip(f"this machine has no {path}")
    served = {name: partial(kernels().KERNELS[name], simd=path) for name in NAMES}
    monkeypatch.setattr(backend, "kernel", lambda name, device: served[name])
    return path


def at_most_twice(ours: Tensor, theirs: Tensor, exact: Tensor, scale: float = 0.0) -> None:
    """Each value: at most twice their error and a few units in the last place; `scale` is the size of what cancels."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    kind = torch.finfo(ours.dtype)
    units = (3 if ours.dtype == torch.float32 else 1) * kind.eps * exact.abs() + 2 * kind.smallest_normal * kind.eps
    allowed = 2 * (theirs.double() - exact).abs() + units + 4e-7 * scale
    assert bool(((ours.double() - exact).abs() <= allowed).all())


def gradients(call: Callable[..., Any], *inputs: Tensor, upstream: Any = None) -> tuple[Tensor, ...]:
    """Results and then d sum(result * upstream) / d inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return (*out, *torch.autograd.grad(out, leaves, upstream))


def three(call: Callable[..., Any], theirs: Callable[..., Any], inputs: tuple[Tensor, ...], scale: float = 0.0) -> None:
    """Compare ours with theirs and theirs in float64: results and gradients."""
    shapes = theirs(*inputs)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    upstream = [torch.randn_like(s) for s in shapes]
    exact = gradients(theirs, *(t.double() for t in inputs), upstream=[u.double() for u in upstream])
    for a, b, e in zip(
        gradients(call, *inputs, upstream=upstream), gradients(theirs, *inputs, upstream=upstream), exact, strict=True
    ):
        at_most_twice(a, b, e, scale)


# ---- RMS norm


def norm_module(kind: str, width: int) -> tuple[nn.Module, float, bool]:
    """transformers' module, and its offset and cast_first."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    made = {"llama": LlamaRMSNorm, "gemma2": Gemma2RMSNorm, "gemma3": Gemma3RMSNorm}[kind](width, eps=1e-5)
    made.weight.data = torch.randn(width) + (1.0 if kind == "llama" else 0.0)
    return made.requires_grad_(False), 0.0 if kind == "llama" else 1.0, kind == "llama"


class InDouble:
    """transformers casts to fp32 whatever it gets: with this, its own code runs in float64."""

    def __enter__(self) -> None:
        self.float, self.to = Tensor.float, Tensor.to
        Tensor.float = lambda t, *a: t if t.dtype == torch.float64 else self.float(t, *a)  # type: ignore[method-assign]
        double = torch.float64
        Tensor.to = lambda t, *a, **k: t if t.dtype == double and a[:1] == (torch.float32,) else self.to(t, *a, **k)  # type: ignore[method-assign,assignment]

    def __exit__(self, *_: object) -> None:
        Tensor.float, Tensor.to = self.float, self.to  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_against_transformers(kind: str, dtype: torch.dtype, provider: str, poisoned: None) -> None:
    for width in WIDTHS:
        module, offset, cast_first = norm_module(kind, width)
        module.to(dtype)
        x = (torch.randn(2, 5, width) * torch.tensor([1e-3, 0.1, 1.0, 30.0, 0.0]).unsqueeze(1)).to(dtype)
        upstream = torch.randn_like(x)
        theirs = gradients(module, x, upstream=upstream)
        weight = module.weight.detach()
        ours = gradients(lambda t: fused_rms_norm(t, weight, 1e-5, offset, cast_first), x, upstream=upstream)  # noqa: B023
        with InDouble():
            exact = gradients(module.double(), x.double(), upstream=upstream.double())
        at_most_twice(ours[0], theirs[0], exact[0])
        rstd = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
        size = rstd * (upstream.double() * (module.weight + offset)).abs().amax(-1, keepdim=True)
        at_most_twice(ours[1], theirs[1], exact[1], size)  # type: ignore[arg-type]


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_of_another_dtype(wide: torch.dtype, provider: str, poisoned: None) -> None:
    for dtype in FLOATS:
        x, weight, dy = torch.randn(4, 37).to(dtype), torch.randn(37).to(wide), torch.randn(4, 37).to(dtype)
        for offset, cast_first in ((0.0, True), (1.0, False), (1.0, True)):
            got = qtune.rms_norm(x, weight, 1e-6, offset, cast_first)
            want = ops.REFERENCES["rms_norm"](x, weight, 1e-6, offset, cast_first)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got[0], want[0], rtol=2 * eps, atol=0)
            torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0)
            back = qtune.rms_norm_backward(dy, x, weight, want[1], offset)
            wanted = ops.REFERENCES["rms_norm_backward"](dy, x, weight, want[1], offset)
            torch.testing.assert_close(back, wanted, rtol=eps, atol=1e-5)


def test_a_trained_norm_weight_gets_its_gradient_and_a_wide_one_widens() -> None:
    x, module = torch.randn(3, 4, 33).bfloat16(), norm_module("llama", 33)[0]
    module.requires_grad_(True)
    for weight in (module.weight, nn.Parameter(module.weight.bfloat16())):
        module.weight = weight
        y, theirs = fused_rms_norm(x, weight, 1e-5, 0.0, True), module(x)
        assert torch.equal(y, theirs)
        grads = torch.autograd.grad(y.sum(), weight), torch.autograd.grad(theirs.sum(), weight)
        assert torch.equal(*[g[0] for g in grads])
    frozen = module.weight.detach().float()
    assert fused_rms_norm(x, frozen, 1e-5, 0.0, True).dtype == torch.float32
    assert fused_rms_norm(x, frozen, 1e-5, 1.0, False).dtype == torch.bfloat16


# ---- SwiGLU


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """LlamaMLP's act_fn(gate) * up."""
    from transformers.activations import ACT2FN

    return ACT2FN["silu"](gate) * up


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_swiglu_against_transformers(dtype: torch.dtype, provider: str, poisoned: None) -> None:
    for width in WIDTHS:
        gate, up = (torch.randn(3, width) * 4).to(dtype), torch.randn(3, width).to(dtype)
        three(fused_swiglu, plain_swiglu, (gate, up), 1.0)


def test_swiglu_of_every_bfloat16(provider: str, poisoned: None) -> None:
    """Denormals, infinities, NaN: as torch; finite ones correctly rounded but for what is within a hair of a tie."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    up = torch.ones_like(gate)
    got, exact = qtune.swiglu(gate, up), F.silu(gate.double())
    finite = gate.isfinite()
    assert torch.equal(got[~finite].isnan(), F.silu(gate.float())[~finite].isnan())
    assert got[gate == float("inf")].item() == float("inf")
    error = (got.double() - exact)[finite].abs()
    # torch's own silu vanishes below -88
    assert bool((error <= 0.501 * 2.0**-7 * exact[finite].abs() + (1e-36 if provider == "reference" else 1e-40)).all())
    if provider == "reference":
        return
    wide = gate.float()
    error = (qtune.swiglu(wide, up.float()).double() - exact)[finite].abs()
    assert bool((error <= 3 * 2.0**-23 * exact[finite].abs() + 2.0**-140).all())


def test_unlike_pairs_are_torchs_business() -> None:
    gate, up = torch.randn(4, 1).bfloat16(), torch.randn(4, 5)
    assert torch.equal(fused_swiglu(gate, up), F.silu(gate) * up)


# ---- rotary positions


def angles(batch: int, seq: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, seq, r] of different turns in the two halves too, so that a mix-up shows."""
    turn = torch.rand(batch, seq, r) * 6
    return turn.cos().to(dtype), turn.sin().to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memory", ["seq first", "heads first", "inside of more"])
def test_rotary_against_transformers(memory: str, dtype: torch.dtype, provider: str, poisoned: None) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

    for batches, seq, dim, r in ((1, 5, 64, 64), (2, 7, 10, 6), (2, 1, 80, 32), (1, 3, 96, 96), (2, 4, 80, 80)):
        cos, sin = angles(batches, seq, r, dtype)
        q, k = torch.randn(2, seq, 3, dim).to(dtype), torch.randn(2, seq, 1, dim).to(dtype)
        if memory == "inside of more":
            q, k = torch.cat((q, k, k), 2).split((3, 2), 2)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if memory == "heads first":
            q, k = q.contiguous(), k.contiguous()
        theirs = llama if r == dim else phi3

        def exactly(a: Tensor, b: Tensor, theirs: Any = theirs, cos: Tensor = cos, sin: Tensor = sin) -> Any:
            return theirs(a, b, cos.to(a.dtype), sin.to(a.dtype))

        three(lambda a, b: fused_rotary(a, b, cos, sin), exactly, (q, k), 4.0)  # noqa: B023
        for turned in fused_rotary(q, k, cos, sin):
            assert turned.transpose(1, 2).is_contiguous()
        other = fused_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        for a, b in zip(other, fused_rotary(q, k, cos, sin), strict=True):
            assert torch.equal(a, b.transpose(1, 2))
            assert a.is_contiguous()


@pytest.mark.parametrize("r", [0, 2, 6, 30, 34, 66])
def test_rotary_inverse_is_the_transpose(r: int, provider: str, poisoned: None) -> None:
    cos, sin = angles(2, 3, r, torch.float32)
    x, y = torch.randn(2, 3, 4, 67), torch.randn(2, 3, 4, 67)
    there = (y.double() * qtune.rotary(x, cos, sin, False).double()).sum()
    back = (qtune.rotary(y, cos, sin, True).double() * x.double()).sum()
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-4)
    assert torch.equal(qtune.rotary(x, cos, sin, True)[..., r:], x[..., r:])


def test_rotary_takes_fp32_angles_and_any_strides(provider: str, poisoned: None) -> None:
    cos, sin = angles(2, 5, 8, torch.float32)
    x = torch.randn(2, 5, 3, 12).bfloat16()
    want = ops.REFERENCES["rotary"](x.float(), cos, sin, False).bfloat16()
    strided = (cos.transpose(1, 2).contiguous().transpose(1, 2), sin.repeat(1, 1, 2)[..., :8])
    for a, b in ((cos, sin), strided):
        assert torch.equal(qtune.rotary(x, a, b, False), want)
    assert torch.equal(qtune.rotary(x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), cos, sin, False), want)
    one = qtune.rotary(x, cos[:1].expand(2, -1, -1), sin[:1].expand(2, -1, -1), False)
    assert torch.equal(one, qtune.rotary(x, cos[:1], sin[:1], False))
    q, k = fused_rotary(x, x, cos, sin, unsqueeze_dim=2)  # transformers' product widens: so do we
    assert q.dtype == k.dtype == (x * cos.unsqueeze(2)[..., :1]).dtype == torch.float32


# ---- around all of them


def layer(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """All three in a row: x [2, 6, 24]."""
    y = fused_rms_norm(x, weight, 1e-6, 0.0, True)
    y = fused_swiglu(y, y * 2 + 1).view(2, 6, 3, 8).transpose(1, 2)
    q, k = fused_rotary(y, y[:, :1], cos, sin)
    return (q * k).transpose(1, 2).reshape(2, 6, 24)


def layer_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(2, 6, 24, dtype=dtype), torch.rand(24, dtype=dtype) + 0.5, *angles(1, 6, 8, dtype)


def test_gradcheck() -> None:
    x, *rest = layer_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda t: layer(t, *rest), (x.requires_grad_(),))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_compiles_without_a_break(dtype: torch.dtype) -> None:
    x, *rest = layer_inputs(dtype)
    torch.compiler.reset()
    compiled = torch.compile(lambda t: layer(t, *rest), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        gradients(lambda t: layer(t, *rest).sum(), x), gradients(lambda t: compiled(t).sum(), x), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_without_gradients_and_on_meta(reentrant: bool) -> None:
    x, *rest = layer_inputs()
    plain = gradients(lambda t: layer(t, *rest).square().sum(), x)
    again = gradients_of_checkpoint(x, rest, reentrant)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(x, *rest).square().sum(), plain[0])
    meta = layer(*(t.to("meta") for t in (x, *rest)))
    assert meta.shape == x.shape and meta.dtype == x.dtype and meta.device.type == "meta"


def gradients_of_checkpoint(x: Tensor, rest: list[Tensor], reentrant: bool) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    out = checkpoint(layer, x, *rest, use_reentrant=reentrant).square().sum()
    out.backward()
    assert x.grad is not None
    return out, x.grad


def test_what_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def run(call: Callable[[], Any]) -> set[int]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            call()
        return {t.data_ptr() for t in kept}

    x, weight = torch.randn(4, 33, requires_grad=True), torch.randn(33)
    memory = run(lambda: fused_rms_norm(x, weight, 1e-6, 0.0, True))
    assert {x.data_ptr(), weight.data_ptr()} <= memory
    assert sorted(t.numel() for t in kept) == [4, 33, 4 * 33]
    assert run(lambda: fused_swiglu(x, x + 1)) > {x.data_ptr()} and len(kept) == 2
    cos, sin = angles(1, 4, 8, torch.float32)
    heads = torch.randn(1, 2, 4, 8, requires_grad=True)
    assert run(lambda: fused_rotary(heads, heads, cos, sin)) == {cos.data_ptr(), sin.data_ptr()}


def test_threads_change_nothing(provider: str) -> None:
    before, results = torch.get_num_threads(), []
    x, w, g, u = torch.randn(301, 577), torch.randn(577), torch.randn(3, 40001), torch.randn(3, 40001)
    turn = (torch.randn(2, 129, 9, 64), *angles(1, 129, 64, torch.float32))
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            y, rstd = qtune.rms_norm(x, w, 1e-6, 0.0, True)
            back = qtune.rms_norm_backward(y, x, w, rstd, 0.0)
            pair = qtune.swiglu_backward(u, g, u)
            results.append((y, rstd, back, qtune.swiglu(g, u), *pair, qtune.rotary(*turn, False)))
    finally:
        torch.set_num_threads(before)
    if provider != "reference":  # torch's own sums depend on the threads
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0, 7), (3, 1)], ids=str)
def test_empty_and_tiny(shape: tuple[int, ...], provider: str) -> None:
    x, w = torch.randn(shape), torch.ones(shape[-1])
    y, rstd = qtune.rms_norm(x, w, 1e-6, 0.0, True)
    assert y.shape == qtune.rms_norm_backward(y, x, w, rstd, 0.0).shape == x.shape
    assert rstd.shape == shape[:-1]
    assert [t.shape for t in (qtune.swiglu(x, x), *qtune.swiglu_backward(x, x, x))] == [x.shape] * 3
    assert qtune.rotary(torch.ones(2, 0, 3, 8), *angles(1, 0, 8, torch.float32), False).shape == (2, 0, 3, 8)


def test_views_are_read_as_their_values(provider: str) -> None:
    x, w = torch.randn(33, 6).t(), torch.randn(66)[::2]
    y, rstd = qtune.rms_norm(x, w, 1e-6, 0.0, True)
    like = torch.equal if provider != "reference" else partial(torch.allclose, atol=1e-6)  # torch sums as strides go
    assert like(y, qtune.rms_norm(x.contiguous(), w.contiguous(), 1e-6, 0.0, True)[0])
    spread = torch.ones(1, 1).expand(6, 33)
    back = qtune.rms_norm_backward(spread, x, w, rstd, 0.0)
    assert like(back, qtune.rms_norm_backward(spread.contiguous(), x.contiguous(), w.contiguous(), rstd, 0.0))
    assert like(qtune.swiglu(x, x.flip(1)), qtune.swiglu(x.contiguous(), x.flip(1).contiguous()))


def writers(n: int, dtype: torch.dtype, provider: str) -> list[Callable[[int], None]]:
    """Every function of the library on three rows of n values, given the address that it writes to."""
    k = kernels()
    call, number, path = k.LIBRARY.call, k.DTYPES[dtype], k.simd_number(provider)
    x, w, rstd, other = torch.randn(3, n).to(dtype), torch.randn(n).to(dtype), torch.ones(3), torch.empty(3, n)
    rows, shape = x.data_ptr(), k._Shape(1, 3, 1, n, n, 1, 3 * n, n, n, 3 * n, n)
    size, end = (number, 0, 3, n), (1, path)

    def norm(out: int) -> None:
        call("qtune_rms_norm", rows, w.data_ptr(), *size, 1e-6, 0.0, 1, out, rstd.data_ptr(), *end)

    def norm_backward(out: int) -> None:
        call("qtune_rms_norm_backward", rows, rows, w.data_ptr(), rstd.data_ptr(), *size, 0.0, out, *end)

    def gated(out: int) -> None:
        call("qtune_swiglu", None, rows, rows, number, x.numel(), out, None, *end)

    def dgate(out: int) -> None:
        call("qtune_swiglu", rows, rows, rows, number, x.numel(), out, other.data_ptr(), *end)

    def dup(out: int) -> None:
        call("qtune_swiglu", rows, rows, rows, number, x.numel(), other.data_ptr(), out, *end)

    def turned(out: int) -> None:
        call("qtune_rotary", rows, rows, rows, number, 0, shape, 0, out, *end)

    return [norm, norm_backward, gated, dgate, dup, turned]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_writes_its_output_and_nothing_else(dtype: torch.dtype, provider: str) -> None:
    if provider == "reference":
        pytest.skip("torch writes for the reference")
    for n in (2, 6, 14, 16, 18, 30, 32, 34, 66):
        for write in writers(n, dtype, provider):
            around = torch.full((3 * n + 128,), float("nan"), dtype=dtype)
            write(around[64:].data_ptr())
            assert around[:64].isnan().all()
            assert around[64 + 3 * n :].isnan().all()
            assert not around[64 : 64 + 3 * n].isnan().any()


def test_what_does_not_fit_is_refused_all_at_once() -> None:
    k, x = kernels(), torch.randn(2, 8)
    with pytest.raises(QtuneError, match=r"x: .*float64.*weight: \[7\] .*wanted \[8\]"):
        k.rms_norm(x.double(), torch.ones(7), 1e-6, 0.0, True)
    with pytest.raises(QtuneError, match=r"dy: \[2, 7\].*rstd: \[3\]"):
        k.rms_norm_backward(x[:, :7], x, torch.ones(8), torch.ones(3), 0.0)
    with pytest.raises(QtuneError, match=r"up: \[2, 8\] of torch.float16.*wanted \[2, 8\] of torch.float32"):
        k.swiglu(x, x.half())
    with pytest.raises(QtuneError, match=r"up: \[8\].*dy: \[1, 8\]"):
        k.swiglu_backward(x[:1], x, x[0])
    heads = torch.randn(2, 3, 1, 8)
    with pytest.raises(QtuneError, match=r"cos of torch.float16.*is not like cos.*3 sequences.*4 positions.*9 angles"):
        k.rotary(heads, torch.ones(3, 4, 9).half(), torch.ones(3, 4, 8), False)
    with pytest.raises(QtuneError, match="unsqueeze_dim 3; legal: 1, 2"):
        fused_rotary(heads, heads, torch.ones(1, 3, 8), torch.ones(1, 3, 8), 3)
    with pytest.raises(QtuneError, match="unknown SIMD path 'sse'"):
        k.swiglu(x, x, "sse")
