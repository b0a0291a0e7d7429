"""What a transformers layer computes between its products, by our ops: RMSNorm, SwiGLU, rotary embedding, attention.

transformers writes these as chains of elementwise torch calls, each of which reads, writes and keeps a tensor (RMSNorm
keeps three in fp32). `fuse` gives a module the class of a faster twin, a subclass of its own class with another
`forward`: names, parameters and the library's classes stay as they are. A twin is taken only where, on random numbers,
the module computes what the reference of our op computes, to the bit for norms; anything else keeps its own code. Left
out: GeGLU, LayerNorm, fused gate-and-up projections, rotary embeddings that interleave.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .. import backend
from ..ops import REFERENCES, flash_attention, fused_rms_norm, fused_rotary, fused_swiglu
from ..quant.linear import autocast

FAST = ("avx512", "avx512_bf16", "amx")  # paths of our attention kernel that beat torch's
LARGEST = 256  # head size that it takes
ATTENTION = "qtune"  # our attention's name in transformers' registry
MORE = ("position_bias", "cache", "softcap", "s_aux")  # what a call may ask for beyond it
ROTARY = "apply_rotary_pos_emb"  # what the modelling files of transformers call theirs


def fuse(model: nn.Module) -> dict[str, int]:
    """Give each module of `model` that has a faster twin its class, in place. Returns how many, by kind: norm, mlp,
    rotary. Doing it again changes nothing."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        for kind, find in FINDERS.items():
            twin = find(type(module), type(getattr(module, "act_fn", None)))
            if twin and (kind != "norm" or _has_a_weight_alone(module)):
                module.__class__ = twin
                counts[kind] += 1
                break
    return dict(counts)


def unfuse(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        if own := getattr(module, "unfused", None):
            module.__class__ = own


def _blank(own: type[nn.Module]) -> nn.Module:
    return own.__new__(own)


def _twin(own: Any, forward: Any) -> type[nn.Module]:
    def reduce(self: Any, protocol: Any) -> Any:  # copies and pickles are of the class that has a name
        return _blank, (own,), self.__dict__

    body = {"forward": forward, "unfused": own, "__doc__": own.__doc__, "__reduce_ex__": reduce}
    return type(f"Fused{own.__name__}", (own,), body)


# ---- RMSNorm


@cache
def _norm(own: Any, _: type) -> type[nn.Module] | None:
    """The twin of an RMSNorm class whose output is, bit for bit, that of one of the op's four forms."""
    if not own.__name__.endswith("RMSNorm") or hasattr(own, "unfused"):
        return None
    try:
        with torch.device("cpu"):  # a skeleton is built under "meta"
            norm: Any = own(48)
        epsilon = next(name for name in ("variance_epsilon", "eps") if isinstance(getattr(norm, name, None), float))
        setattr(norm, epsilon, 0.1)  # so that a norm that reads it from elsewhere is found out
        x, weight = _random(5, 48), _random(48)
        norm = norm.to(torch.bfloat16)
        with torch.no_grad():
            norm.weight.copy_(weight)
            y = norm(x)
    except (TypeError, AttributeError, StopIteration, RuntimeError):
        return None  # made or called in another way: not one that we know
    for offset in (0.0, 1.0):
        for cast_first in (True, False):
            like, _ = REFERENCES["rms_norm"](x, weight, 0.1, offset, cast_first)
            if torch.equal(like, y):

                def forward(self: Any, x: Tensor, offset: float = offset, cast_first: bool = cast_first) -> Tensor:
                    return fused_rms_norm(x, self.weight, getattr(self, epsilon), offset, cast_first)

                return _twin(own, forward)
    return None


def _has_a_weight_alone(norm: nn.Module) -> bool:
    """What a class computes may depend on the module: Gemma 3n and 4 make norms without a weight, xLSTM with a bias."""
    tensors = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    return list(tensors) == ["weight"] and tensors["weight"].dim() == 1


# ---- gated MLP


@cache
def _mlp(own: Any, activation: type) -> type[nn.Module] | None:
    """The twin of a class that computes down(silu(gate(x)) * up(x)), with this class of activation."""
    if not issubclass(activation, nn.Module) or hasattr(own, "unfused"):
        return None
    x = _random(4, 8).float()
    try:
        parts: Any = SimpleNamespace(
            gate_proj=lambda x: x * 2, up_proj=lambda x: x + 1, down_proj=lambda h: h * 3, act_fn=activation()
        )
        y = own.forward(parts, x)
    except (TypeError, AttributeError):
        return None  # it has other parts
    if not isinstance(y, Tensor) or not torch.equal(y, torch.nn.functional.silu(x * 2) * (x + 1) * 3):
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(fused_swiglu(self.gate_proj(x), self.up_proj(x)))

    return _twin(own, forward)


# ---- rotary embedding


@cache
def _rotary(own: Any, _: type) -> type[nn.Module] | None:
    """The twin of an attention class whose `forward` calls the usual rotary function of its file: the same code, with
    that one name bound to our function."""
    code = own.forward
    if not isinstance(code, FunctionType) or ROTARY not in code.__code__.co_names or hasattr(own, "unfused"):
        return None
    theirs = code.__globals__.get(ROTARY)
    known = ["q", "k", "cos", "sin", "unsqueeze_dim"]
    if theirs is None or list(inspect.signature(theirs).parameters) not in (known, known[:4]):
        return None
    q, k, cos, sin = _random(2, 3, 5, 16), _random(2, 1, 5, 16), _random(1, 5, 16), _random(1, 5, 16)
    try:
        same = all(
            torch.allclose(a, b, rtol=1e-5, atol=1e-6)
            for a, b in zip(
                theirs(q.float(), k.float(), cos.float(), sin.float()),
                fused_rotary(q.float(), k.float(), cos.float(), sin.float()),
                strict=True,
            )
        )
    except (TypeError, RuntimeError, ValueError):
        return None
    if not same:
        return None
    forward = FunctionType(
        code.__code__, {**code.__globals__, ROTARY: fused_rotary}, code.__name__, code.__defaults__, code.__closure__
    )
    forward.__kwdefaults__ = code.__kwdefaults__
    return _twin(own, forward)


FINDERS: dict[str, Callable[[Any, Any], type[nn.Module] | None]] = {"norm": _norm, "mlp": _mlp, "rotary": _rotary}


def _random(*shape: int) -> Tensor:
    """bf16, the same at every call; drawn beside torch's global generator, on the CPU whatever the default device."""
    drawn = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)
    return drawn.bfloat16()


# ---- attention


def use_own_attention(model: PreTrainedModel, device: torch.device) -> bool:
    """On a CPU with AVX-512, take our attention kernel in place of torch's fused one. device: where the model runs.
    Returns whether the model has it now.

    Without AVX-512 torch's is as fast beyond short sequences. A model that was not going to use torch's (for it does
    something more: soft-capping, sinks) keeps what it has.
    """
    has = model.config._attn_implementation
    if has == ATTENTION:
        return True
    if device.type != "cpu" or has != "sdpa" or not backend.kernel("attention", "cpu"):
        return False
    if backend.simd("attention") not in FAST:
        return False
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(ATTENTION)
    return True


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, seq, dim], key and value likewise, with fewer heads -> [batch, seq, heads, dim].

    What transformers' own function for torch's attention computes; a call that asks for more than ours does goes there.
    """
    more = bool(dropout) or query.shape[-1] > LARGEST or any(rest.get(name) is not None for name in MORE)
    more = more or value.shape[-1] != key.shape[-1]  # latent attention (DeepSeek)
    if more or (attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1)):
        return AttentionInterface()["sdpa"](  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **rest
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal and attention_mask is None and query.shape[2] > 1)
    if causal and key.shape[2] > query.shape[2]:  # the places of a static cache that are not filled yet
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (autocast(x).transpose(1, 2) for x in (query, key, value))
    return flash_attention(q, k, v, attention_mask, causal, scale), None
