"""Cross entropy that turns the logits into their own gradient: no second tensor of the size of the vocabulary.

    loss = (1 - s) (L - z_label) + s mean_j (L - z_j) + c L^2,   L = log sum_j exp(z_j)
    d loss / d z = (1 + 2 c L) softmax(z) - (1 - s) onehot(label) - s / vocabulary
s: label smoothing as torch's cross_entropy defines it (Szegedy et al., 1512.00567). c: z-loss, which keeps L near 0
(PaLM, 2204.02311, section 5, c = 1e-4; OLMo 2, 2501.00656, c = 1e-5). Online softmax: Milakov and Gimelshein
(1805.02867). Arithmetic in fp32 (fp64 for fp64 input), gradients rounded once. Left out: ignored labels, weights; the
caller drops positions that are not trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import QtuneError
from .registry import op

CHUNK = 1 << 20  # logits a reference handles at a time, so that its temporaries stay small


def cross_entropy_(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0, gradient: bool = True
) -> Tensor:
    """logits [rows, vocab], labels int64 [rows] -> losses [rows], fp32 (fp64 for fp64 logits); with `gradient` the
    logits become d(sum of losses) / d logits, in their own dtype, else they are only read.

    A logit of -inf gets no softmax, and with smoothing an infinite loss, as in torch; a row with a NaN, or of -inf
    alone, gets a NaN loss and NaN gradients. Raises QtuneError, before anything is written, for a label out of
    [0, vocab); on a GPU that is a device-side assertion.
    """
    rows, vocab = logits.shape
    if labels.device.type == "cpu" and rows and (int(labels.min()) < 0 or int(labels.max()) >= vocab):
        raise QtuneError(
            "Q222", f"cross entropy: labels {int(labels.min())} to {int(labels.max())}; legal: 0 to {vocab - 1}"
        )
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(rows, dtype=wide, device=logits.device)
    step = max(1, CHUNK // max(1, vocab))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        label = labels[part].unsqueeze(1)
        shifted = logits[part].to(wide)
        top = shifted.amax(1, keepdim=True)
        shifted = shifted - top
        at_label = shifted.gather(1, label)
        mean = shifted.mean(1, keepdim=True) if smoothing else 0.0
        total = shifted.exp_().sum(1, keepdim=True)
        log = total.log()
        loss = log - (1 - smoothing) * at_label - smoothing * mean if smoothing else log - at_label
        log += top
        losses[part] = (loss + z_loss * log.square() if z_loss else loss).squeeze(1)
        if gradient:
            shifted.mul_((1 + 2 * z_loss * log) / total) if z_loss else shifted.div_(total)
            if smoothing:
                shifted.sub_(smoothing / vocab)
            logits[part] = shifted.scatter_add_(1, label, torch.full_like(at_label, smoothing - 1.0))
    return losses


@op(cross_entropy_, mutates=("logits",))
def _(logits: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0, gradient: bool = True) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[0], dtype=wide)
