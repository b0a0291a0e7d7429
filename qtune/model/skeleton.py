"""The model without its weights: transformers' own modules on the meta device, linear layers replaced by QuantLinear.

Buffers that no checkpoint stores (rotary frequencies, Gemma's embedding scale) are computed for real, by the
initialisation that transformers itself runs after reading a checkpoint; they are filled with NaN first, so that a
forgotten one is an error, not noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import QtuneError
from ..quant import QuantEmbedding, QuantLinear, Scheme, Storage
from .experts import ExpertLinear, split, stacked
from .source import reason_of


@dataclass
class Origin:
    """Where a loaded model comes from: `model.qtune`. notes: what the user must know (dense experts, tensors left
    unread)."""

    source: str
    scheme: Storage
    embeddings: Scheme | None
    dtype: torch.dtype
    kind: str
    notes: list[str] = field(default_factory=list)


def empty(config: Any, dtype: torch.dtype, *, fused: bool = False) -> PreTrainedModel:
    """transformers' causal model of `config` on the meta device, in `dtype`, not yet packed. fused: experts stay as
    transformers has them."""
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # what a size of 0 or a text for a number raises differs from class to class
        what = f"transformers {transformers.__version__} makes no model of this {type(config).__name__}"
        raise QtuneError("Q303", f"{what}: {reason_of(error)}") from error
    if not fused:
        split(model)
    return model.eval().requires_grad_(False)


def build(
    config: Any, scheme: Storage, *, embeddings: Scheme | None = None, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """The packed model of `config` on the meta device, as `load` would fill it: for planning. Buffers are on meta,
    too."""
    model = empty(config, dtype)
    plain = dtypes_of(model, dtype)
    ties = dict(model.all_tied_weights_keys)
    replace(model, scheme.resolve(linear_sizes(model)).of, embeddings, dtype)
    for name, parameter in list(model.named_parameters()):
        if name in plain and parameter.dtype != plain[name]:
            parameter.data = parameter.data.to(plain[name])
    for name, owner in ties.items():
        table, tied = (model.get_submodule(n.rpartition(".")[0]) for n in (owner, name))
        if isinstance(table, QuantEmbedding):
            tied.packed = table.packed
    return model


def dtypes_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name -> dtype of every tensor that stays plain: the skeleton's, or fp32 where transformers insists on it."""
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    rules = [(re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in plan.items()]
    return {
        name: next((kept for rule, kept in rules if rule.search(name)), t.dtype)
        for name, t in model.state_dict().items()
    }


# ---- buffers ----


def unsaved_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, its buffer's name, full name) of every buffer that checkpoints do not store."""
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(name) is not None:
                yield module, name, f"{path}.{name}" if path else name


def compute_buffers(model: PreTrainedModel) -> None:
    """Give every unsaved buffer its real value, on the CPU. Runs while parameters are on meta, where their
    initialisation is free."""
    poisoned = {}
    for module, name, full in unsaved_buffers(model):
        buffer = module._buffers[name]
        assert buffer is not None
        value: float | bool = torch.nan if buffer.dtype.is_floating_point else False
        if not buffer.dtype.is_floating_point and buffer.dtype != torch.bool:
            value = torch.iinfo(buffer.dtype).min
        module._buffers[name] = torch.full(buffer.shape, value, dtype=buffer.dtype, device="cpu")
        poisoned[full] = (module, name, value)
    for module in model.modules():
        module._is_hf_initialized = isinstance(module, nn.Linear)  # type: ignore[assignment]  # which has no buffers
    model.initialize_weights()
    missed = [full for full, (module, name, value) in poisoned.items() if _poisoned(module._buffers[name], value)]
    if missed:
        raise QtuneError(
            "Q303",
            f"transformers {transformers.__version__} does not initialise these buffers of "
            f"{type(model).__name__}: {', '.join(missed)}",
        )


def _poisoned(buffer: torch.Tensor | None, value: float | bool) -> bool:
    if buffer is None or buffer.dtype == torch.bool:
        return False
    return bool((torch.isnan(buffer) if buffer.dtype.is_floating_point else buffer == value).any())


# ---- sites ----


def linear_sites(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that are packed: nn.Linear and Conv1D, except the output head, tied ones and those that transformers
    keeps in fp32."""
    head = model.get_output_embeddings()
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    kept = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    pattern = re.compile("|".join(rf"(^|\.)({name})(\.|$)" for name in kept)) if kept else None
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, ExpertLinear, Conv1D)
        and module is not head
        and f"{name}.weight" not in tied
        and not (pattern and pattern.search(name))
    }


def linear_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Name -> number of weights of the layers that are packed."""
    return {name: module.weight.numel() for name, module in linear_sites(model).items()}  # type: ignore[union-attr,operator]


def replace(
    model: PreTrainedModel,
    scheme_of: Callable[[str], Scheme],
    embeddings: Scheme | None,
    dtype: torch.dtype,
    head: Scheme | None = None,
) -> None:
    """Put QuantLinear (meta) in place of every site, and with `embeddings` QuantEmbedding in place of the input table
    and QuantLinear of the head.

    head: a scheme for the output head alone, where a checkpoint holds it packed.
    """
    sites = linear_sites(model)
    if embeddings is not None:
        _replace_embeddings(model, embeddings, dtype)
    elif head is not None:
        _replace_head(model, head, dtype)
    for name, module in sites.items():
        model.set_submodule(name, _linear(name, module, scheme_of(name), dtype))


def _linear(name: str, module: nn.Module, scheme: Scheme, dtype: torch.dtype) -> QuantLinear:
    assert isinstance(module.weight, torch.Tensor)
    conv1d = isinstance(module, Conv1D)
    size_out, size_in = reversed(module.weight.shape) if conv1d else module.weight.shape
    layer = QuantLinear(
        size_in, size_out, scheme, bias=module.bias is not None, dtype=dtype, device="meta", name=name, conv1d=conv1d
    )
    layer.routed = bool(getattr(module, "routed", False))
    return layer


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _replace_head(model: PreTrainedModel, scheme: Scheme, dtype: torch.dtype) -> None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise QtuneError(
            "Q312", f"the output head of {type(model).__name__} is {type(head).__name__}; only nn.Linear can be packed"
        )
    name = _name_of(model, head)
    model.set_submodule(name, _linear(name, head, scheme, dtype))


def _replace_embeddings(model: PreTrainedModel, scheme: Scheme, dtype: torch.dtype) -> None:
    table = model.get_input_embeddings()
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    scaled = type(table).__name__.endswith("ScaledWordEmbedding") and isinstance(scale, int | float)
    if not isinstance(table, nn.Embedding) or not (type(table) is nn.Embedding or scaled):
        raise QtuneError(
            "Q312",
            f"the input embedding of {type(model).__name__} is {type(table).__name__}, which cannot be packed: "
            "its forward pass is its own; leave embeddings unset",
        )
    if table.max_norm is not None:
        raise QtuneError(
            "Q312",
            f"the input embedding of {type(model).__name__} renormalises its rows (max_norm), so it cannot be packed",
        )
    name = _name_of(model, table)
    packed = QuantEmbedding(
        table.num_embeddings, table.embedding_dim, scheme, padding_idx=table.padding_idx,
        scale=float(scale) if scaled and scale is not None else None, dtype=dtype, device="meta", name=name,
    )  # fmt: skip
    model.set_submodule(name, packed)
    if model.get_output_embeddings() is not None:
        _replace_head(model, scheme, dtype)


def dense_experts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Class of fused experts that could not be split -> number and bytes of its weights, which no scheme packs."""
    found: dict[str, tuple[int, int]] = {}
    for module in model.modules():
        for weight in stacked(module).values():
            count, size = found.get(type(module).__name__, (0, 0))
            found[type(module).__name__] = count + 1, size + weight.numel() * weight.element_size()
    return found
