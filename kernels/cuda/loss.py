"""Cross entropy in Triton: losses and, in place of the logits, their gradient; one program a row of the vocabulary.

    loss = L - (1 - s) z[label] - s mean(z) + c L^2,  L = log(sum(exp(z)))
    dz = (1 + 2 c L) softmax(z) - (1 - s) onehot(label) - s / vocabulary

s, c: label smoothing and z-loss (ops/loss.py). The first walk over a row keeps a running maximum and sums relative to
it (online softmax, arXiv 1805.02867), the second writes: two reads and one write of the logits, one read without the
gradient. Left out: ignored labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import FLOATS, LIBRARY, Kernels, jit, launch, part, power_of_2, require, tl, together

__all__ = ["KERNELS", "LIBRARY", "cross_entropy_"]

BLOCK = 8192  # values of a row at a time, at most


@jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, labels, losses, vocab, row_stride, smoothing, z_loss,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocab)
    # before anything is written; the reductions below are barriers
    picked = tl.load(logits + label, mask=valid, other=float("nan")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    top, total, linear, shift = float("-inf"), 0.0, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        z = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        before, higher = shift, tl.maximum(top, tl.max(z, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        if SMOOTH:
            linear += start * (before - shift) + tl.sum(tl.where(at < vocab, z - shift, 0.0), 0)
        top = higher
    loss = tl.log(total) - (1.0 - smoothing) * (picked - top)
    level = tl.log(total) + top
    even = 0.0
    if SMOOTH:
        loss -= smoothing * (linear / vocab)
        even = smoothing / vocab
    tl.store(losses + row, loss + z_loss * level * level)
    if GRADIENT:
        # a wrong label poisons its row, and reads nothing outside of it
        share = tl.where(valid, (1.0 + 2.0 * z_loss * level) / total, float("nan"))
        tl.debug_barrier()
        for start in range(0, vocab, BLOCK):
            at = start + lanes
            z = tl.load(logits + at, mask=at < vocab, other=0.0).to(tl.float32)
            d = tl.exp(z - top) * share - even - tl.where(at == label, 1.0 - smoothing, 0.0)
            tl.store(logits + at, d.to(logits.dtype.element_ty), mask=at < vocab)


def cross_entropy_(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0, gradient: bool = True
) -> Tensor:
    """logits [rows, vocab], with `gradient` overwritten with theirs; labels int64 [rows] -> losses fp32 [rows].

    A label outside of the vocabulary fails the process as in torch: an assertion on the device, later, without a
    message.
    """
    rows, vocab = logits.shape
    require(
        [
            part("logits", logits, rows * vocab, *FLOATS),
            (
                labels.shape == (rows,) and labels.dtype == torch.int64,
                f"labels: {labels.dtype} {tuple(labels.shape)}; wanted int64 ({rows},)",
            ),
            together(logits, labels),
            (vocab > 0 or rows == 0, "an empty vocabulary"),
        ]
    )
    torch._assert_async(((labels >= 0) & (labels < vocab)).all(), "a label outside of the vocabulary")
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    work = logits if logits.stride(1) == 1 else logits.contiguous()
    block = min(power_of_2(vocab), BLOCK)
    warps = 16 if block == BLOCK else 4
    scalars, constants = (vocab, work.stride(0), smoothing, z_loss), {"SMOOTH": smoothing != 0, "GRADIENT": gradient}
    tensors = work, labels.contiguous(), losses
    launch(_cross_entropy, (rows,), logits, *tensors, *scalars, **constants, BLOCK=block, num_warps=warps)
    if gradient and work is not logits:
        logits.copy_(work)
    return losses


KERNELS: Kernels = {"cross_entropy_": cross_entropy_}
