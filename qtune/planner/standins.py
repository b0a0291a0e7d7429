"""What the meta device lacks, as the target device would do it: the one place where other libraries are bent.

Attention: plain torch decomposes it on meta into the maths that no GPU runs; here the op is called that torch would
choose on the target (sdp_utils.cpp: flash, else memory-efficient, else maths), so that what is kept for the backward is
what is kept there. Values: a plan has none, so the few that steer a step are given: the number of trained tokens,
whether a batch is padded; any other question about a value is refused. Tensor.cpu, which meta refuses, is a copy where
the target's memory is not the host's. transformers' search for packed sequences, and torch's refusal to run its fused
AdamW on meta, are switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import QtuneError
from ..ops.registry import SCRATCH
from .devices import Device

ALIGN = (
    16  # elements: the memory-efficient kernel's rows of a mask begin at multiples of this many bytes / 2 (pad_bias)
)
WIDEST = 256  # head size that the flash kernel takes


class Untraceable(QtuneError):
    """A model asks for values, or for an op that meta does not have."""


class Attention:
    """Stands for F.scaled_dot_product_attention: the op that torch calls on the target. (A TorchFunctionMode would not
    do: `backward` is such a function itself, and in it a mode is switched off, recomputation and all.)"""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """q [B, H, T, D], k and v [B, HK, S, D] -> [B, H, T, D]."""
        kind = self.kernel(q, k, v, attn_mask, dropout_p, enable_gqa)
        aten = torch.ops.aten
        if kind == "cpu":
            mask = None if attn_mask is None else as_bias(attn_mask, q)
            out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale
            )[0]
            return out
        if kind == "flash":
            padded = -(q.shape[-1] // -8) * 8  # the kernel wants heads of a multiple of 8
            q, k, v = (t if t.shape[-1] == padded else F.pad(t, (0, padded - t.shape[-1])) for t in (q, k, v))
            out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
            return out
        if kind == "efficient":
            bias = None if attn_mask is None else _padded_bias(as_bias(attn_mask, q), q, k)
            keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
            out = aten._scaled_dot_product_efficient_attention(q, k, v, bias, keep, dropout_p, is_causal, scale=scale)[
                0
            ]
            return out
        bias = None if attn_mask is None else as_bias(attn_mask, q)
        return aten._scaled_dot_product_attention_math(
            q, k, v, bias, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]  # type: ignore[no-any-return]

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, gqa: bool) -> str:
        """cpu, flash, efficient or math, by the conditions of torch's sdp_utils.cpp. Left out: cuDNN's attention, which
        newer torch prefers on SM 9.0 and 10.0 (a plan for these says so)."""
        if self.device.kind == "cpu":
            plain = dropout == 0.0 and q.shape[-1] == v.shape[-1] and (mask is None or not mask.requires_grad)
            return "cpu" if plain else "math"
        ampere = self.device.capability >= (8, 0)
        half = q.dtype in (torch.float16, torch.bfloat16)
        same = q.shape[-1] == k.shape[-1] == v.shape[-1]
        if ampere and half and same and mask is None and q.shape[-1] <= WIDEST:
            return "flash"
        fits = q.dtype in (torch.float16, torch.float32) or (ampere and q.dtype == torch.bfloat16)
        aligned = all(t.shape[-1] * t.element_size() % 16 == 0 for t in (q, k, v))
        return "efficient" if fits and aligned and not gqa else "math"


def as_bias(mask: Tensor, q: Tensor) -> Tensor:
    """A bool mask as torch's attention turns it into one that is added, in q's dtype."""
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=q.dtype, device=mask.device), float("-inf"))


def _padded_bias(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Rows at aligned places, expanded to every head without a copy."""
    extra = -bias.shape[-1] % ALIGN
    if extra:
        bias = F.pad(bias, (0, extra))[..., : bias.shape[-1]]
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


# ---- values that a plan does not have


def answers(
    trained: int, padded: bool, device: Device | None = None
) -> Callable[[str, tuple[Any, ...], Callable[..., str]], Any]:
    """What a step asks of values, for a batch of `trained` trained positions, with padding or without; and what an op
    of `device` gives where meta gives a GPU's."""
    cpu = device is not None and device.kind == "cpu"

    def answer(op: str, args: tuple[Any, ...], maker: Callable[..., str]) -> Any:
        if op not in ASKED:
            return NotImplemented
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if not first.is_meta:
            return NotImplemented
        if op == "aten::_local_scalar_dense":
            return _value(first, maker(args), trained, padded)
        if op == "aten::index.Tensor":
            chosen = args[1][0]
            if chosen is None or chosen.dtype != torch.bool:
                return NotImplemented
            return first.new_empty((trained, *first.shape[chosen.dim() :]))
        if op == "aten::linalg_vector_norm":  # torch's own shape function takes a millisecond, for every gradient
            return first.new_empty(()) if len(args) < 3 or args[2] is None else NotImplemented
        if op == "aten::native_layer_norm":  # on a CPU its mean and deviation have the weight's dtype
            return _layer_norm(*args[:3]) if cpu and args[2] is not None else NotImplemented
        if op == "aten::nonzero":
            raise Untraceable("Q506", "asks where values are not zero")
        return None  # torch's fused AdamW writes in place

    return answer


def answers_of_weights() -> Callable[[str, tuple[Any, ...], Callable[..., str]], Any]:
    """What a start or a merge asks of values: norms, and where the rows of a sparse matrix begin, which is unknown."""
    known = answers(1, False)

    def answer(op: str, args: tuple[Any, ...], maker: Callable[..., str]) -> Any:
        if op == "aten::_local_scalar_dense" and args[0].is_meta and args[0].dtype == torch.int32:
            return 0
        return known(op, args, maker)

    return answer


def _layer_norm(x: Tensor, shape: Any, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*x.shape[: -len(shape)], *[1] * len(shape))
    return x.new_empty(x.shape), x.new_empty(rows, dtype=weight.dtype), x.new_empty(rows, dtype=weight.dtype)


def _value(scalar: Tensor, made_by: str, trained: int, padded: bool) -> Any:
    if scalar.dtype.is_floating_point:
        return 1.0  # a loss, a gradient's norm
    if scalar.dtype == torch.bool and made_by in ALL:
        return not padded  # transformers asks whether a mask is all ones
    if scalar.dtype == torch.int64 and made_by == "aten::sum":
        return trained
    raise Untraceable("Q506", f"asks for a value that {made_by or 'an op'} computes")


ASKED = (
    "aten::_local_scalar_dense",
    "aten::index.Tensor",
    "aten::linalg_vector_norm",
    "aten::native_layer_norm",
    "aten::nonzero",
    "aten::_fused_adamw_",
)
ALL = ("aten::all", "aten::eq.Scalar")


# ---- what ops take beside their results


def scratch_on(device: Device) -> Callable[[str, tuple[Any, ...]], Mapping[str, int]]:
    """The declared scratch of each op on a target."""

    def scratch(name: str, args: tuple[Any, ...]) -> Mapping[str, int]:
        if name.startswith("qtune::"):
            declared = SCRATCH.get(name[7:])
            return declared(device.kind, *args) if declared else {}
        found = ATEN.get(name)
        return found(device, args) if found else {}

    return scratch


def _flash_backward(device: Device, args: tuple[Any, ...]) -> Mapping[str, int]:
    """mha_bwd of torch's flash_api.cpp: dq accumulates in fp32 and the row sums too, rows rounded up to 128, heads to
    32 (64 above 128); with fewer key heads, dk and dv of every query head before they are summed."""
    q, k = args[1], args[2]
    batch, heads, seq, dim = q.shape
    rows, wide = -(seq // -128) * 128, -(dim // -(32 if dim <= 128 else 64)) * (32 if dim <= 128 else 64)
    total = batch * heads * rows * (wide + 1) * 4
    if k.shape[1] != heads:
        total += 2 * batch * k.shape[2] * heads * dim * k.element_size()
    return {"temporary": total}


def _efficient_backward(device: Device, args: tuple[Any, ...]) -> Mapping[str, int]:
    """_efficient_attention_backward of attention_backward.cu and kernel_backward.h: row sums of gradient x output, one
    fp32 a query; for fp32 the product is made first, for half the gradient of q accumulates in fp32 blocks of 64."""
    q = args[1]
    batch, heads, seq, dim = q.shape
    total = batch * heads * seq * 4
    if q.dtype == torch.float32:
        return {"temporary": total + batch * heads * seq * dim * 4}
    return {"temporary": total + batch * heads * -(seq // -64) * 64 * -(dim // -64) * 64 * 4}


def _chosen(device: Device, args: tuple[Any, ...]) -> Mapping[str, int]:
    """A bool mask as an index becomes int64 places first, in each of its dimensions."""
    mask = args[1][0] if args[1] else None
    if mask is None or mask.dtype != torch.bool:
        return {}
    return {"temporary": 8 * mask.dim() * mask.numel()}


def _softmax_backward(device: Device, args: tuple[Any, ...]) -> Mapping[str, int]:
    """softmax_backward_cuda_out of SoftMax.cu multiplies the gradient by the output first."""
    grad, output = args[:2]
    width = max(grad.element_size(), output.element_size())
    return {"temporary": grad.numel() * width} if device.kind == "cuda" else {}


ATEN: dict[str, Callable[[Device, tuple[Any, ...]], Mapping[str, int]]] = {
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::index.Tensor": _chosen,
}


def _to_host(device: Device) -> Callable[[Tensor], Tensor]:
    """Tensor.cpu, which meta refuses: itself where the target is a CPU, else as much of the host's memory."""
    real = Tensor.cpu

    def cpu(self: Tensor) -> Tensor:
        if not self.is_meta:
            return real(self)
        return self if device.kind == "cpu" else torch.empty(self.shape, dtype=self.dtype, device="cpu")

    return cpu


@contextmanager
def on_meta(device: Device) -> Iterator[None]:
    """Everything above that needs no tracer, while a model on meta runs as on `device`."""
    with (
        patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None),
        patch("torch.optim.adam._device_dtype_check_for_fused", lambda *args, **kwargs: None),
        patch("torch.nn.functional.scaled_dot_product_attention", Attention(device)),
        patch("torch.Tensor.cpu", _to_host(device)),
    ):
        yield
