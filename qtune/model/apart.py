"""Several examples end to end in one row, none of which sees another: block-diagonal attention without its mask.

The attention of a row is that of its examples one by one, so that nothing of the size of the row squared is ever there,
and what a kernel skips for being causal stays skipped. The lengths reach the attention in place of the mask, as a
tensor [1, 1, 1, examples]: transformers hands on any mask of four dimensions as it is. Left out: models whose attention
transformers does not look up in its registry, or that mix tokens in another way (refused by `keep_apart`, and whatever
else does not keep examples apart by `LanguageModel.check`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..errors import QtuneError
from .fused import ATTENTION

NAME = "qtune_apart"  # of an attention in transformers' registry, before the name of the one that it calls
INNER = ("sdpa", ATTENTION)
KINDS = {"full_attention", "sliding_attention"}  # of layers, whose attention is what it is called with


def told(lengths: Sequence[int]) -> Tensor:
    """The lengths as attention gets them: int32 [1, 1, 1, examples], on the CPU, where they are read."""
    return torch.tensor([[[list(lengths)]]], dtype=torch.int32, device="cpu")


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Positions of the tokens, each example from 0 on: int64 [1, sum of lengths]."""
    return torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)


def keep_apart(model: PreTrainedModel) -> None:
    """Let a model attend within each example of a packed row; rows that are not packed go on as before.

    Raises QtuneError for a model whose attention cannot be told.
    """
    inner = model.config._attn_implementation
    if inner.startswith(NAME):
        return
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - KINDS
    if inner not in INNER or kinds:
        what = f"layers of {', '.join(sorted(kinds))}" if kinds else f"attention of the kind {inner!r}"
        raise QtuneError(
            "Q703",
            f"{type(model).__name__} has {what}, which cannot keep packed examples apart; set train.packing to false",
        )
    put_before(model, NAME, _apart)


def put_before(model: PreTrainedModel, name: str, attend: Callable[..., tuple[Tensor, Any]]) -> None:
    """From now on the model's attention is attend(inner, module, ...), `inner` the name in transformers' registry of
    the one that it had, whose masks it gets."""
    inner = model.config._attn_implementation
    AttentionInterface.register(f"{name}_{inner}", partial(attend, inner))
    AttentionMaskInterface.register(f"{name}_{inner}", AttentionMaskInterface()[inner])
    model.set_attn_implementation(f"{name}_{inner}")


def _apart(
    inner: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, seq, dim], key and value with as many or fewer heads -> [1, seq, heads, dim]."""
    attend = AttentionInterface()[inner]
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return attend(module, query, key, value, attention_mask, *rest, **options)  # type: ignore[no-any-return]
    lengths = attention_mask.flatten().tolist()
    out = [
        attend(module, q, k, v, _within(q, options.get("sliding_window")), *rest, **options)[0]
        for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(out, 1), None


def _within(query: Tensor, window: int | None) -> Tensor | None:
    """The mask of an example longer than the window of its layer: bool [1, 1, seq, seq]; else none."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    back = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    return ((back >= 0) & (back < window))[None, None]
