"""The modules that transformers + PEFT + bitsandbytes put in a model, on meta: what they hold, save and cast.

Storage and autograd behaviour are written after the sources of bitsandbytes 0.50.2 (nn/modules.py, functional.py,
autograd/_functions.py, backends/default/ops.py) and PEFT 0.21.2 (tuners/lora/layer.py and bnb.py, utils/other.py);
neither is imported. No value is ever computed. Left out: bitsandbytes' fused 4-bit kernel for few tokens, whose forward
makes no dense weight (its backward always does), and the columns of outliers of LLM.int8().
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

BLOCK, OUTER = 64, 256  # values a scale, scales a scale of scales: quantize_4bit's defaults
LEVELS, DYNAMIC = 16, 256  # entries of NF4's table and of the table of 8-bit scales
THRESHOLD = 6.0  # BitsAndBytesConfig.llm_int8_threshold: above it a value is an outlier


def _table(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(_table(*shape, dtype=dtype), requires_grad=False)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """[out, in] of a linear layer of any kind."""
    if isinstance(layer, Linear4 | Linear8):
        return layer.shape
    assert isinstance(layer.weight, Tensor)
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


class Linear4(nn.Module):
    """bitsandbytes' Linear4bit with blocks of 64. nested: double quantization. buffered: products keep their input."""

    def __init__(self, linear: nn.Module, compute: torch.dtype, nested: bool, buffered: bool = False) -> None:
        super().__init__()
        self.buffered = buffered
        self.shape, self.compute, self.nested = shape_of(linear), compute, nested
        values = self.shape[0] * self.shape[1]
        scales = -(values // -BLOCK)
        self.weight = _frozen(-(values // -2), 1, dtype=torch.uint8)
        self.bias = linear.bias
        self.register_buffer("absmax", _table(scales, dtype=torch.uint8 if nested else torch.float32))
        self.register_buffer("code", _table(LEVELS))
        if nested:
            self.register_buffer("outer", _table(-(scales // -OUTER)))
            self.register_buffer("outer_code", _table(DYNAMIC))
            self.register_buffer("offset", _table())

    def dense(self) -> Tensor:
        """dequantize_4bit: a fresh weight in the compute dtype; nested scales are made fp32 first."""
        if self.nested:
            assert isinstance(self.absmax, Tensor) and isinstance(self.offset, Tensor)
            absmax = torch.empty_like(self.absmax, dtype=torch.float32)
            absmax = absmax + self.offset
            return _table(*self.shape, dtype=self.compute)
        return _table(*self.shape, dtype=self.compute)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if bias is not None:
            if bias.dtype != self.compute:
                bias.data = bias.data.to(self.compute)
            bias = bias.to(self.compute)
        out: Tensor = MatMul4.apply(x.to(self.compute), bias, self)
        return out.to(x.dtype)


class MatMul4(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: nothing is kept but the packed weight, which is unpacked again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4) -> Tensor:
        ctx.layer, ctx.kept = (
            layer,
            x if layer.buffered else None,
        )  # a plain attribute: no hook of checkpointing sees it
        return F.linear(x, layer.dense(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.matmul(grads[0], ctx.layer.dense().to(grads[0].dtype)), None, None


class Linear8(nn.Module):
    """bitsandbytes' Linear8bitLt with frozen int8 weights: codes and one fp32 scale a row."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.shape = shape_of(linear)
        self.weight = _frozen(*self.shape, dtype=torch.int8)
        self.bias = linear.bias
        self.register_buffer("scale", _table(self.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        out: Tensor = MatMul8.apply(x, self.bias, self)
        return out


class MatMul8(torch.autograd.Function):
    """bitsandbytes' MatMul8bitLt: x becomes fp16, then int8, and x itself is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear8) -> Tensor:
        ctx.layer, ctx.kept, ctx.shape = layer, x, x.shape
        x = x.reshape(-1, x.shape[-1])
        half = x.to(torch.float16)
        _scales, codes = _table(len(half)), torch.empty_like(half, dtype=torch.int8)
        _outliers = half.abs() >= THRESHOLD
        del half, _outliers
        sums = _table(len(codes), len(layer.weight), dtype=torch.int32)
        out = torch.empty_like(sums, dtype=torch.float16)  # the kernel writes fp16, cast where x is not
        if bias is not None and bias.dtype != torch.float16:
            out.add_(bias)
        return out.to(x.dtype).reshape(*ctx.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        dense = ctx.layer.weight.to(ctx.kept.dtype, copy=True).mul_(ctx.layer.scale.unsqueeze(1).mul(1.0 / 127.0))
        return torch.matmul(grad.to(ctx.kept.dtype), dense).view(ctx.shape), None, None


class LoRA(nn.Module):
    """PEFT's layer around a dense, 4-bit or 8-bit one."""

    def __init__(self, base: nn.Module, rank: int, dtype: torch.dtype, dropout: float) -> None:
        super().__init__()
        self.base_layer = base
        size_out, size_in = shape_of(base)
        self.lora_A = nn.Linear(size_in, rank, bias=False, device="meta", dtype=dtype)
        self.lora_B = nn.Linear(rank, size_out, bias=False, device="meta", dtype=dtype)
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The product, by a scale that costs the same whatever it is."""
        result: Tensor = self.base_layer(x)
        dtype = result.dtype
        if isinstance(self.base_layer, Linear4):
            result = result.clone()
        x = x.to(self.lora_A.weight.dtype)
        low: Tensor = self.lora_B(self.lora_A(self.dropout(x))) * 2.0
        if isinstance(self.base_layer, Linear4 | Linear8):
            low = low.to(dtype)
            return result + low
        return (result + low).to(dtype)


def prepare(model: nn.Module) -> None:
    """PEFT's prepare_model_for_kbit_training: every half-precision parameter becomes fp32."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
