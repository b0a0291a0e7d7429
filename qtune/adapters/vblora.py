"""VB-LoRA: y = base(x) + B A x; every piece of A and B is a mixture, softmax over its top k, of one bank's vectors.

Li et al. 2024 (arXiv 2405.15179; code leo-yangli/VB-LoRA). The bank [vectors, length] is trained and shared by all
sites. A [rank, in] is laid out in pieces of `length` along its rows and B [out, rank] along its columns; a piece has
logits over the bank, logits_A [rank, in / length, vectors], logits_B [out / length, rank, vectors]. Logits learn
`logit_rate` times as fast as the bank (the paper: 1e-2 and 1e-3).

Start: bank U(-0.02, 0.02) and logits N(0, 0.1), as in PEFT (the authors' RoBERTa: 0.01), but as the identity, which
theirs is not: the bank's vectors sum to zero in groups of k (for k = 2: v and -v), and each piece of B begins as the
mean of one group.
Widths that `length` does not divide take one more piece, cut off; PEFT has no form of those.
Left out: saving the k largest logits alone, which cannot be trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import PeftNames, QuantLinear, Source, draw, recompute, trainable
from .factored import Factored, check_whole
from .vera import hashed_uniform

BOUND, SPREAD = 0.02, 0.1  # of the bank and of the logits at the start


class Bank(nn.Module):
    """The vectors of all sites; a seed gives the same ones on any machine."""

    def __init__(self, base: QuantLinear, vectors: int, length: int, topk: int, seed: int) -> None:
        super().__init__()
        values = hashed_uniform((vectors, length), seed, base.device) * BOUND
        groups = values[: vectors // topk * topk].view(-1, topk, length)
        groups -= groups.mean(1, keepdim=True)
        groups *= (topk / (topk - 1)) ** 0.5  # as long as they were
        groups[:, -1] = -groups[:, :-1].sum(1)  # to the last bit
        self.vectors = trainable((vectors, length), base, torch.float32)  # it sums the gradients of all sites
        with torch.no_grad():
            self.vectors.copy_(values)


class VBLoRA(Factored):
    """Factors put together from a bank of vectors."""

    peft: ClassVar[PeftNames | None] = PeftNames(
        peft_type="VBLORA",
        tensors={"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B"},
        options={
            "rank": "r",
            "vectors": "num_vectors",
            "length": "vector_length",
            "topk": "topk",
            "dropout": "vblora_dropout",
        },
        constants={"save_only_topk_weights": False},
        shared={"vectors": "vblora_vector_bank"},
        native=True,
    )

    def __init__(
        self,
        base: QuantLinear,
        *,
        shared: Bank,
        rank: int = 4,
        vectors: int = 256,
        length: int = 256,
        topk: int = 2,
        logit_rate: float = 10.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(base)
        self.bank, self.shape, self.scale = shared, base.shape, 1.0
        self.length, self.topk, self.logit_rate = length, topk, logit_rate
        out, width = (-(-size // length) for size in base.shape)
        self.logits_A = trainable((rank, width, vectors), base)
        self.logits_B = trainable((out, rank, vectors), base)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def shared(cls, bases: Sequence[QuantLinear], **options: Any) -> nn.Module | None:
        chosen = {n: options.get(n, cls.options()[n].default) for n in ("vectors", "length", "topk", "seed")}
        return Bank(bases[0], **chosen)

    def reset(self, base: QuantLinear, source: Source | None = None) -> None:
        draw(self.logits_A, nn.init.normal_, 0.0, SPREAD)
        draw(self.logits_B, _of_one_group, self.topk)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mixtures = partial(self._mixtures, dtype)  # the vectors that are picked are k times the values of A and B
        A = recompute(mixtures, self.logits_A).flatten(1)
        B = recompute(mixtures, self.logits_B).transpose(1, 2).flatten(0, 1)
        return _cut(A, 1, self.shape[1]), _cut(B, 0, self.shape[0])

    def _mixtures(self, dtype: torch.dtype, logits: Tensor) -> Tensor:
        """logits [..., vectors] -> [..., length]."""
        values, places = logits.to(dtype).topk(self.topk, dim=-1)
        return (F.embedding(places, self.bank.vectors.to(dtype)) * values.softmax(-1).unsqueeze(-1)).sum(-2)

    def lr_scale(self) -> dict[str, float]:
        return {} if self.logit_rate == 1.0 else {"logits_A": self.logit_rate, "logits_B": self.logit_rate}

    def peft_state(self) -> dict[str, Tensor]:
        check_whole(self.shape, "length", self.length, "VBLORA")
        return super(Factored, self).peft_state()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        faults = super().check(options)
        if options["length"] < 1:
            faults.append(f"adapter.length must be at least 1, not {options['length']}")
        if not 2 <= options["topk"] <= options["vectors"]:
            faults.append(
                f"adapter.topk must be 2 to adapter.vectors ({options['vectors']}), not {options['topk']}: of one "
                "vector alone the logits would learn nothing"
            )
        if options["logit_rate"] <= 0:
            faults.append(f"adapter.logit_rate must be above 0, not {options['logit_rate']}")
        return faults


def _cut(values: Tensor, dim: int, size: int) -> Tensor:
    """What is beyond `size` is let go of, not only hidden."""
    return values if values.shape[dim] == size else values.narrow(dim, 0, size).clone()


def _of_one_group(logits: Tensor, topk: int) -> None:
    """Normal ones [..., vectors], but those of one group in `topk` are equal and above all others."""
    nn.init.normal_(logits, 0.0, SPREAD)
    highest = logits.amax(-1, keepdim=True) + SPREAD
    groups = logits[..., : logits.shape[-1] // topk * topk].unflatten(-1, (-1, topk))
    chosen = groups.amax(-1).argmax(-1, keepdim=True)
    groups.scatter_(
        -2, chosen.unsqueeze(-1).expand(*chosen.shape, topk), highest.unsqueeze(-1).expand(*chosen.shape, topk)
    )
