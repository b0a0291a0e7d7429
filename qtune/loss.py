"""Cross entropy over a frozen head in chunks of tokens: the full logits never exist.

    loss = sum over trained positions of -log softmax(transform(head(h)))[label]
Each chunk's gradient is taken in the forward pass, in the place of its logits, and only d loss / d h [tokens, hidden]
is kept (Liger and Apple's CCE do likewise on GPUs). Positions that are not trained are dropped before the head.
`transform` is what a model's own forward does to its logits (Gemma's soft-capping ...). Label smoothing and z-loss are
of the transformed logits (ops/loss.py has the equations).

With hidden states of another pass over the same tokens, in which something else was left out by chance, at each
position  consistency (KL(p || q) + KL(q || p)) / 2  is added: p of this pass, q of the other, which is not
differentiated. R-Drop's divergence (Wu et al., 2106.14448), one of the two passes in the backward as in HiddenKey (Wang
et al., 2403.00812, section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401  (registers the ops)
from .sections import MemoryKeys, TrainKeys

IGNORED = -100  # the label of a position that is not trained (torch's and transformers' default)
CHUNK_ELEMENTS = 1 << 24  # logits of one chunk: 64 MiB in fp32
TILE_ELEMENTS = 1 << 20  # logits of which a divergence is taken at a time
ON_GPU = 512  # positions: with fewer, a GPU reads the head's weights longer than it multiplies with them

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossOptions:
    """chunk: positions whose logits are made at a time; None: by the vocabulary, at least `least`. label_smoothing: the
    part of each target that is spread evenly over the vocabulary. z_loss: times log(sum(exp(logits)))^2 is added at
    each trained position. consistency: times the divergence from another pass likewise.
    """

    chunk: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    consistency: float = 0.0
    least: int = 16

    def plain(self) -> LossOptions:
        """As evaluation reports it: the likelihood alone, in chunks of the same size."""
        return LossOptions(self.chunk, least=self.least)

    def rows(self, vocabulary: int) -> int:
        """Positions whose logits are made at a time."""
        return self.chunk or max(self.least, CHUNK_ELEMENTS // vocabulary)


def loss_options(train: TrainKeys, memory: MemoryKeys, kind: str) -> LossOptions:
    """What a recipe says of the loss. kind: of the device that computes."""
    least = ON_GPU if kind == "cuda" else LossOptions.least
    return LossOptions(memory.loss_chunk, train.label_smoothing, train.z_loss, train.consistency, least)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden [tokens, hidden], of another pass likewise or None, labels [tokens] -> summed loss, fp32 scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        other: Tensor | None,
        labels: Tensor,
        head: nn.Module,
        transform: Transform,
        chunk: int,
        options: LossOptions,
        *trained: nn.Parameter,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for start in range(0, hidden.shape[0], chunk):
            with torch.enable_grad():
                part = hidden[start : start + chunk].detach().requires_grad_()
                logits = transform(head(part))
                theirs = None
                if other is not None:
                    with torch.no_grad():
                        theirs = transform(head(other[start : start + chunk]))
                    total += options.consistency * divergence_(logits.detach(), theirs)
                # autograd counts the write: a transform or a head whose backward needs the logits that were would be
                # refused, not wrong
                rest = options.label_smoothing, options.z_loss, True
                total += torch.ops.qtune.cross_entropy_(logits.detach(), labels[start : start + chunk], *rest).sum()
                if theirs is not None:
                    logits.detach().add_(theirs, alpha=options.consistency)
                    del theirs
                grads = torch.autograd.grad(logits, (part, *trained), logits.detach(), allow_unused=True)
            grad[start : start + chunk] = grads[0]
            for into, g in zip(sums, grads[1:], strict=True):
                into += 0 if g is None else g  # None: of an adapter that is switched off
        # rounded once: added up in bf16, a chunk of many would be lost
        ctx.save_for_backward(grad, *(s.to(p.dtype) for s, p in zip(sums, trained, strict=True)))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad, *sums = ctx.saved_tensors
        return (grad * upstream, *[None] * 6, *(s * upstream for s in sums))


def cross_entropy_sum(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    vocabulary: int,
    transform: Transform,
    options: LossOptions = LossOptions(),
    other: Tensor | None = None,
) -> Tensor:
    """Summed next-token loss: hidden [batch, seq, hidden] at position t predicts labels [batch, seq] at t+1; -100 is
    not trained. other: hidden states of another pass, for options.consistency. Without gradients the logits are read
    once and not written."""
    target = labels[:, 1:].reshape(-1)
    kept = target != IGNORED
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])[kept]
    other = None if other is None else other[:, :-1].reshape(-1, other.shape[-1])[kept]
    target = target[kept]
    chunk = options.rows(vocabulary)
    if torch.is_grad_enabled():
        trained = [p for p in head.parameters() if p.requires_grad]
        return _ChunkedCrossEntropy.apply(hidden, other, target, head, transform, chunk, options, *trained)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for losses in chunked_losses(hidden, target, head, transform, chunk, options):
        total += losses.sum()
    return total


def divergence_(logits: Tensor, other: Tensor) -> Tensor:
    """logits of p, other of q [rows, vocabulary] -> sum of (KL(p || q) + KL(q || p)) / 2 over the rows, fp32 scalar;
    `other` becomes its gradient with regard to `logits`. Arithmetic in fp32."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    step = max(1, TILE_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        ratio = logits[part].log_softmax(1, torch.float32)
        p = ratio.exp()
        q = other[part].log_softmax(1, torch.float32)
        ratio -= q
        q.exp_()
        there = (p * ratio).sum(1, keepdim=True)
        total += (there.sum() - (q * ratio).sum()) / 2
        other[part] = ratio.sub_(there).add_(1).mul_(p).sub_(q).div_(2)
    return total


def chunked_losses(
    hidden: Tensor, labels: Tensor, head: nn.Module, transform: Transform, chunk: int, options: LossOptions
) -> Iterator[Tensor]:
    """hidden [tokens, hidden], labels [tokens] -> the losses fp32 [chunk] of one chunk after the other, without
    gradients."""
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = transform(head(hidden[part]))
        rest = options.label_smoothing, options.z_loss, False
        yield torch.ops.qtune.cross_entropy_(logits.detach(), labels[part], *rest)
        del logits  # the next chunk's take its place


def trained_tokens(labels: Tensor) -> int:
    """How many positions of labels [batch, seq] a loss is taken at (the first has no predecessor)."""
    return int((labels[:, 1:] != IGNORED).sum())


def logit_transform(config: Any) -> Transform:
    """What a model's own forward does after its head, read from its transformers config."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    divide = getattr(config, "logits_scaling", None)  # Granite
    scale = getattr(config, "logit_scale", None)  # Cohere

    def transform(logits: Tensor) -> Tensor:
        if divide is not None:
            logits = logits / divide
        if scale is not None:
            logits = logits * scale
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform
