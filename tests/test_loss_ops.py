"""Cross entropy in place: losses and gradients against torch in float64, by the reference and every SIMD path."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cpu_kernels import cpu_kernels
from torch import Tensor
from torch.nn import functional as F

from qtune import backend, ops
from qtune.errors import QtuneError

qtune = torch.ops.qtune
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")


def kernels() -> Any:
    return cpu_kernels("loss")


@pytest.fixture(params=("reference", "scalar", "avx2", "avx512", "neon"))
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference, or one SIMD path, serves the op."""
    path = request.param
    if path == "reference":
        monkeypatch.setattr(backend, "kernel", lambda name, device: None)
        return path
    if path not in kernels().LIBRARY.simd_paths():
        pytest.skip(f"this machine has no {path}")
    served = partial(kernels().cross_entropy_, simd=path)
    monkeypatch.setattr(backend, "kernel", lambda name, device: served)
    return path


def exact(
    logits: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """torch's losses and gradients, computed in `dtype`."""
    z = logits.detach().clone().to(dtype).requires_grad_()
    losses = F.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    if z_loss:
        losses = losses + z_loss * z.logsumexp(1).square()
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


def agrees(logits: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> None:
    """Losses no worse than twice torch's in fp32; gradients rounded once: half a unit of their dtype, and what fp32
    loses in z - max, in exp and, at the label, in p - 1. Without the gradient: the same losses, no logit touched."""
    options = {"smoothing": smoothing, "z_loss": z_loss}
    want, theirs = exact(logits, labels, **options), exact(logits, labels, torch.float32, **options)
    got, kept = logits.clone(), logits.clone()
    losses = qtune.cross_entropy_(got, labels, smoothing, z_loss, True)
    assert losses.dtype == torch.float32 and got.dtype == logits.dtype
    allowed = 2 * (theirs[0].double() - want[0]).abs() + 1.2e-7 * want[0].abs() + 3e-7
    assert bool(((losses.double() - want[0]).abs() <= allowed).all())
    kind, onehot = torch.finfo(logits.dtype), F.one_hot(labels, logits.shape[1]).double()
    share = logits.double().softmax(1)
    slope = 1 + 2 * z_loss * logits.double().logsumexp(1, keepdim=True).abs()
    in_fp32 = 1.2e-7 * (share * slope * (4 + share.clamp(min=1e-300).log().abs()) + 2 * onehot + smoothing)
    assert torch.equal(qtune.cross_entropy_(kept, labels, smoothing, z_loss, False), losses)
    assert torch.equal(kept, logits)
    tiny = 1.01 * kind.smallest_normal * kind.eps + 2e-45
    assert bool(((got.double() - want[1]).abs() <= 0.5 * kind.eps * want[1].abs() + in_fp32 + tiny).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 15, 16, 17, 33, 127, 129, 1000, 2047, 2048, 2049, 4100, 50257])
def test_against_torch_in_float64(vocab: int, dtype: torch.dtype, provider: str, poisoned: None) -> None:
    rows = 5 if vocab < 10000 else 2
    for scale in (0.1, 3.0, 20.0):
        logits = (torch.randn(rows, vocab) * scale + 10 * torch.randn(rows, 1)).to(dtype)
        agrees(logits, torch.randint(0, vocab, (rows,)))
    agrees(logits, logits.argmax(1))  # a loss near 0
    agrees(logits, logits.argmin(1))
    agrees(logits.sort(1).values, torch.arange(rows) % vocab)  # the maximum grows in every block
    agrees(logits.sort(1, descending=True).values, torch.arange(rows) % vocab)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 33, 4100])
def test_smoothing_and_z_loss_against_torch_in_float64(
    vocab: int, dtype: torch.dtype, provider: str, poisoned: None
) -> None:
    for smoothing, z_loss in ((0.1, 0.0), (0.0, 1e-2), (0.3, 1e-4), (0.9, 0.5)):
        logits = (torch.randn(4, vocab) * 3 + 10 * torch.randn(4, 1)).to(dtype)
        agrees(logits, torch.randint(0, vocab, (4,)), smoothing, z_loss)
        agrees(logits.sort(1).values, torch.arange(4) % vocab, smoothing, z_loss)  # the maximum grows in every block


def test_smoothing_of_masked_logits_is_infinite_as_in_torch(provider: str) -> None:
    for before in (0, 2100):  # the first block's all, or some behind it
        logits = torch.randn(2, 4200)
        logits[:, before : before + 2100] = -INF
        labels = torch.tensor([4199, 4190] if before == 0 else [0, 1])
        want, got = exact(logits, labels, smoothing=0.1), logits.clone()
        assert qtune.cross_entropy_(got, labels, 0.1).tolist() == want[0].tolist() == [INF, INF]
        torch.testing.assert_close(got.double(), want[1], rtol=1e-6, atol=1e-8)


def test_far_apart_logits(provider: str, poisoned: None) -> None:
    """Exponentials that vanish, denormal ones, and none that overflows."""
    steps = torch.cat((torch.arange(0, 120, 0.37), torch.tensor([3e38, 1e30, 150.0, 1000.0])))
    for peak in (0.0, 200.0, -200.0):
        logits = (peak - steps).repeat(4, 1)
        agrees(logits, torch.tensor([0, 5, 300, steps.numel() - 1]))
    big = torch.tensor([[3e38, -3e38, 3e38], [88.0, 89.0, 90.0]])
    agrees(big, torch.tensor([0, 1]))


def test_masked_entries_and_rows_that_mean_nothing(provider: str, poisoned: None) -> None:
    logits = torch.randn(7, 5000)
    logits[0, 1:] = -INF  # one entry is left
    logits[1, :2100] = -INF  # a whole block and more
    logits[2, 2100:] = -INF
    logits[3, ::2] = -INF
    logits[4, 4999] = float("nan")
    logits[5] = -INF
    logits[6, 7] = INF
    labels = torch.tensor([0, 4000, 3, 1, 0, 0, 7])
    want = exact(logits, labels)
    losses = qtune.cross_entropy_(logits, labels)
    torch.testing.assert_close(losses[:4].double(), want[0][:4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits[:4].double(), want[1][:4], rtol=1e-6, atol=1e-7)
    assert (logits[1, :2100] == 0).all() and losses[0] == 0 and (logits[0] == 0).all()
    assert losses[4:].isnan().all() and logits[4].isnan().all() and logits[5].isnan().all()
    assert not logits[:4].isnan().any()
    masked = torch.tensor([[0.0, -INF]])
    assert qtune.cross_entropy_(masked, torch.tensor([1])).item() == INF
    assert masked.tolist() == [[1.0, -1.0]]
    alone = torch.full((1, 40), float("nan"), dtype=torch.bfloat16)
    assert qtune.cross_entropy_(alone, torch.tensor([0])).isnan().all() and alone.isnan().all()


@pytest.mark.parametrize("wrong", [-100, -1, 70, 2**40])
def test_a_wrong_label_is_refused_before_anything_is_written(wrong: int, provider: str) -> None:
    logits = torch.randn(3, 70)
    before = logits.clone()
    with pytest.raises(QtuneError, match=f"labels .*{wrong}.*; legal: 0 to 69"):
        qtune.cross_entropy_(logits, torch.tensor([0, 1, wrong]))
    assert torch.equal(logits, before)


def test_views_and_nothing_at_all(provider: str) -> None:
    logits, labels = torch.randn(6, 90), torch.tensor([1, 0, 2, 0, 69, 0])
    want = logits[:, 10:80].clone()
    losses = qtune.cross_entropy_(want, labels)
    inside, edges = logits.clone(), logits.clone()
    assert torch.equal(qtune.cross_entropy_(inside[:, 10:80], labels), losses)  # rows apart
    edges[:, 10:80] = want
    assert torch.equal(inside, edges)
    turned = logits[:, 10:80].t().contiguous().t()
    like = torch.equal if provider != "reference" else torch.allclose  # torch sums as strides go
    assert like(qtune.cross_entropy_(turned, labels), losses)
    assert like(turned, want)
    every_second = torch.stack((labels, labels + 100), 1).view(-1)[::2]
    assert torch.equal(qtune.cross_entropy_(logits[:, 10:80], every_second), losses)
    assert qtune.cross_entropy_(torch.empty(0, 70), labels[:0]).shape == (0,)
    assert qtune.cross_entropy_(torch.empty(0, 0), labels[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_writes_its_rows_and_nothing_else(dtype: torch.dtype, provider: str) -> None:
    for vocab in (1, 3, 8, 15, 17, 31, 33, 2050):
        around = torch.full((4 * vocab + 128,), float("nan"), dtype=dtype)
        rows = around[64 : 64 + 4 * vocab].view(4, vocab)
        rows.copy_(torch.randn(4, vocab))
        qtune.cross_entropy_(rows, torch.arange(4) % vocab)
        assert around[:64].isnan().all() and around[64 + 4 * vocab :].isnan().all()
        assert not rows.isnan().any()


def test_rows_that_share_memory_are_refused_as_torch_does(provider: str) -> None:
    with pytest.raises(RuntimeError, match="single memory location"):
        qtune.cross_entropy_(torch.randn(1, 70).expand(3, 70), torch.tensor([1, 0, 2]))


def test_threads_change_nothing(provider: str) -> None:
    logits, labels, before, results = torch.randn(37, 5001), torch.randint(0, 5001, (37,)), torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            z = logits.clone()
            results.append((qtune.cross_entropy_(z, labels), z))
    finally:
        torch.set_num_threads(before)
    if provider != "reference":  # torch's own sums depend on the threads
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_it_is_an_op() -> None:
    assert "cross_entropy_" in ops.REFERENCES


def test_float64_stays_float64() -> None:
    logits, labels = torch.randn(4, 99, dtype=torch.float64), torch.randint(0, 99, (4,))
    want = exact(logits, labels)
    losses = qtune.cross_entropy_(logits, labels)
    torch.testing.assert_close(losses, want[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(logits, want[1], rtol=1e-13, atol=1e-13)
    z, (loss, slope) = logits.clone(), exact(logits, labels, smoothing=0.2, z_loss=0.1)
    torch.testing.assert_close(qtune.cross_entropy_(z, labels, 0.2, 0.1), loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(z, slope, rtol=1e-13, atol=1e-13)


def test_what_does_not_fit_is_refused_all_at_once() -> None:
    k = kernels()
    with pytest.raises(QtuneError, match=r"logits of torch.float64.*labels: 3 of torch.int32.*wanted 2 of torch.int64"):
        k.cross_entropy_(torch.randn(2, 8).double(), torch.ones(3, dtype=torch.int32))
    with pytest.raises(QtuneError, match="unknown SIMD path 'sse'"):
        k.cross_entropy_(torch.randn(2, 8), torch.ones(2, dtype=torch.int64), simd="sse")
