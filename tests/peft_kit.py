"""Tiny models beside their packed twins, for tests that hold our adapters to PEFT's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtune.quant import Dense, QuantLinear, Scheme

FP32 = Dense("float32")


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(7)
    common: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, **common)).eval()
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, attention_bias=True, **common)
    model = LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    return model


def packed(model: PreTrainedModel, scheme: Scheme = FP32) -> PreTrainedModel:
    """Every linear layer replaced by a QuantLinear."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, Conv1D)) or name == "lm_head":
            continue
        conv1d = isinstance(module, Conv1D)
        weight = module.weight.data.T.contiguous() if conv1d else module.weight.data
        out, width = weight.shape
        bias = module.bias is not None
        base = QuantLinear(width, out, scheme, bias=bias, dtype=torch.float32, name=name, conv1d=conv1d)
        base.set_weight(weight)
        if base.bias is not None:
            base.bias.data.copy_(module.bias.data)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    return model


@torch.no_grad()
def base_of(ours: PreTrainedModel, family: str) -> PreTrainedModel:
    """The model with the weights that our bases hold, whatever packing and the start made of them."""
    model = tiny(family)
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            weight = module.dequantize()
            model.get_submodule(name.removesuffix(".base")).weight.copy_(weight.T if module.conv1d else weight)
    return model


def ids() -> Tensor:
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
