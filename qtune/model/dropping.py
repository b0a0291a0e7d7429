"""Keys and hidden values that training leaves out by chance: HiddenKey (Wang et al. 2024, arXiv 2403.00812).

    drop_keys     softmax(scale q k^T + m) with m = -inf in the columns of dropped keys: DropKey, by columns
    drop_hidden   what an MLP gives, each value 0 by that chance and else divided by 1 - chance: HiddenCut, by elements
A key is dropped for all queries of a head (of all heads that share it), anew in each forward pass in training mode, and
a query of which every key is dropped sees them all. As the authors found it right for decoders (appendix E), the upper
half of the layers drops alone. The place of HiddenCut, before the residual is added, is that of its own code (Chen et
al., 2106.00149). The paper's third part, a divergence between two passes, is in `loss`.

No mask [seq, seq] is made: query and key get WIDER dimensions more, of which the first is 1 in a query and in a key 0,
or where it is dropped a number that takes BELOW off the logit. That goes through whatever attention the model has in
transformers' registry, packed rows too. Left out: attention that a model computes by itself (soft caps, sinks).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from ..errors import QtuneError
from . import apart
from .layerwise import decoder_layers

NAME = "qtune_dropped"  # of an attention in transformers' registry, before the name of the one that it calls
INNER = (*apart.INNER, *(f"{apart.NAME}_{inner}" for inner in apart.INNER))
MLPS = ("mlp", "block_sparse_moe", "feed_forward")  # what decoder layers call theirs
BESIDE = ("shared_mlp", "experts")  # another of theirs, whose outputs are added to those of the first
WIDER = 8  # dimensions: kernels want heads of a multiple
BELOW = 500.0  # exp(-BELOW) is 0 in fp32 whatever the other logits are, and near BELOW fp32 still has five digits
KEYS, HIDDEN = "qtune_drop_keys", "qtune_drop_hidden"  # the chance of a module; the hook of an MLP


def begin(model: PreTrainedModel, keys: float, hidden: float) -> None:
    """From now on, drop by these chances in training mode. Raises QtuneError for a model that cannot."""
    layers = decoder_layers(model)[1]
    upper = layers[len(layers) // 2 :]
    if keys:
        _watch(model)
    for layer in upper if keys else ():
        for module in layer.modules():  # whichever of them calls the attention
            setattr(module, KEYS, keys)
    for layer in upper if hidden else ():
        mlps = _modules(layer, MLPS)
        if not mlps or _modules(layer, BESIDE):
            raise QtuneError(
                "Q430",
                f"train.drop_hidden is {hidden:g}, and {type(model).__name__} has no MLP that qtune knows in its "
                f"layers{', but several side by side' if mlps else ''}; legal: 0",
            )
        setattr(mlps[0], HIDDEN, mlps[0].register_forward_hook(partial(_cut, hidden)))


def _modules(layer: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Those of a layer's modules that have one of these names."""
    return [found for name in names if isinstance(found := getattr(layer, name, None), nn.Module)]


def end(model: nn.Module) -> None:
    """Undo `begin`; the attention stays one that could drop."""
    for module in model.modules():
        module.__dict__.pop(KEYS, None)
        if hook := module.__dict__.pop(HIDDEN, None):
            hook.remove()


def _watch(model: PreTrainedModel) -> None:
    """Put the attention that drops before the one that the model has."""
    inner = model.config._attn_implementation
    if inner.startswith(NAME):
        return
    if inner not in INNER or not model._supports_attention_backend:
        raise QtuneError(
            "Q430",
            f"{type(model).__name__} computes its attention by itself (kind {inner!r}), so that train.drop_keys cannot "
            "reach its keys; legal: 0",
        )
    apart.put_before(model, NAME, _dropped)


def _dropped(
    inner: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """query [batch, heads, seq, dim], key and value with as many or fewer heads -> [batch, seq, heads, dim]."""
    attend, chance = AttentionInterface()[inner], getattr(module, KEYS, 0.0)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not (chance and module.training):
        return attend(module, query, key, value, attention_mask, scaling=scale, **options)  # type: ignore[no-any-return]
    width = value.shape[-1]
    if width == key.shape[-1]:  # kernels want values as wide as keys
        value = F.pad(value, (0, WIDER))
    more = key.new_zeros(*key.shape[:-1], WIDER)
    more[..., 0].bernoulli_(chance).mul_(max(-BELOW / scale, -6e4))  # fp16 ends at 65,504
    query, key = F.pad(query, (0, WIDER), value=1.0), torch.cat((key, more), -1)
    out, weights = attend(module, query, key, value, attention_mask, scaling=scale, **options)
    return out[..., :width], weights


def _cut(chance: float, mlp: nn.Module, args: Any, given: Any) -> Any:
    """What an MLP gives, first of several where it does, with values left out: [..., hidden] in its own dtype."""
    if not mlp.training:
        return None
    y, *rest = given if isinstance(given, tuple) else (given,)
    kept = torch.empty_like(y, dtype=torch.bool).bernoulli_(1 - chance)  # a byte a value, on every device
    y = (y * kept).mul_(1 / (1 - chance))
    return (y, *rest) if isinstance(given, tuple) else y
