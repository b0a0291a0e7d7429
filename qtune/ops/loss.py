"""Cross entropy that turns the logits into their own gradient: no second tensor of the size of the vocabulary.

    loss = log sum_j exp(z_j) - z_label,   d loss / d z = softmax(z) - onehot(label)
Online softmax: Milakov and Gimelshein (arXiv 1805.02867). Arithmetic in fp32 (fp64 for fp64 input), gradients rounded
once. Left out: ignored labels, label smoothing, weights; the caller drops positions that are not trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import QtuneError
from .registry import op

CHUNK = 1 << 20  # logits a reference handles at a time, so that its temporaries stay small


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [rows, vocab], labels int64 [rows] -> losses [rows], fp32 (fp64 for fp64 logits); logits become
    d(sum of losses) / d logits, in their own dtype.

    A logit of -inf gets gradient 0; a row with a NaN, or of -inf alone, gets a NaN loss and NaN gradients. Raises
    QtuneError, before anything is written, for a label out of [0, vocab); on a GPU that is a device-side assertion.
    """
    rows, vocab = logits.shape
    if labels.device.type == "cpu" and rows and (int(labels.min()) < 0 or int(labels.max()) >= vocab):
        raise QtuneError(f"cross entropy: labels {int(labels.min())} to {int(labels.max())}; legal: 0 to {vocab - 1}")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(rows, dtype=wide, device=logits.device)
    step = max(1, CHUNK // max(1, vocab))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        label = labels[part].unsqueeze(1)
        shifted = logits[part].to(wide)
        shifted = shifted - shifted.amax(1, keepdim=True)
        at_label = shifted.gather(1, label)
        total = shifted.exp_().sum(1, keepdim=True)
        losses[part] = (total.log() - at_label).squeeze(1)
        shifted.div_(total).scatter_add_(1, label, torch.full_like(at_label, -1.0))
        logits[part] = shifted
    return losses


@op(cross_entropy_, mutates=("logits",))
def _(logits: Tensor, labels: Tensor) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=wide)
