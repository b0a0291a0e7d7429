"""Cross entropy in Triton: losses and, in place of the logits, their gradient; one program a row of the vocabulary.

    loss = log(sum(exp(z - max))) - (z[label] - max);  dz = softmax(z) - onehot(label)

The first walk over a row keeps a running maximum and a sum rescaled to it (online softmax, arXiv 1805.02867), the
second writes: two reads and one write of the logits. Left out: label smoothing, ignored labels, z-loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import FLOATS, LIBRARY, Kernels, jit, launch, part, power_of_2, require, tl, together

__all__ = ["KERNELS", "LIBRARY", "cross_entropy_"]

BLOCK = 8192  # values of a row at a time, at most


@jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, labels, losses, vocab, row_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    valid = (label >= 0) & (label < vocab)
    # before anything is written; the reductions below are barriers
    picked = tl.load(logits + label, mask=valid, other=float("nan")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    top, total = float("-inf"), 0.0
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        z = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        top = higher
    tl.store(losses + row, tl.log(total) - (picked - top))
    share = tl.where(valid, 1.0 / total, float("nan"))  # a wrong label poisons its row, and reads nothing outside of it
    tl.debug_barrier()
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        z = tl.load(logits + at, mask=at < vocab, other=0.0).to(tl.float32)
        d = tl.exp(z - top) * share - tl.where(at == label, 1.0, 0.0)
        tl.store(logits + at, d.to(logits.dtype.element_ty), mask=at < vocab)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [rows, vocab], overwritten with softmax - onehot; labels int64 [rows] -> losses fp32 [rows].

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
    scalars = (vocab, work.stride(0))
    launch(_cross_entropy, (rows,), logits, work, labels.contiguous(), losses, *scalars, BLOCK=block, num_warps=warps)
    if work is not logits:
        logits.copy_(work)
    return losses


KERNELS: Kernels = {"cross_entropy_": cross_entropy_}
