"""The stock stack (transformers + PEFT + bitsandbytes) for the same recipe: a trace on meta, as of qtune's own.

What is traced is transformers' model as installed, with the stand-ins of `hf_modules` for the other two libraries, and
the usual loop: output = model(ids, labels=ids); output.loss.backward(); optimizer.step(); optimizer.zero_grad().

Two usages are known by name, which differ in who holds the model's output. "published": a loop that keeps `output`
through the step, as the scripts of the published measurements do; so the logits are alive in the backward, and with an
fp32 head the loss takes 16 bytes a token and vocabulary entry. "installed": transformers' Trainer, which keeps the loss
alone: 12 bytes. transformers' own loss is the same in 5.0 and 5.23.
Left out: autocast, data-dependent parts of LLM.int8(), what libraries below torch take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..adapters.base import ALL_LINEAR
from ..errors import QtuneError, one_of
from ..model.skeleton import empty, linear_sites
from ..quant import matches
from ..quant.scheme import DTYPES
from ..recipe import Recipe
from .devices import Device
from .hf_modules import Linear4, Linear8, LoRA, prepare
from .hf_optim import optimizer_of
from .layers import extended
from .models import Model, find_model
from .plan import Plan, Shape, check_shape, planned, refused_by_name, shapes_of, stored_as
from .standins import answers, on_meta, scratch_on
from .step_trace import MICRO_BATCHES
from .trace import AFTER, UPDATE, Joined, Segment, Trace, Tracer, followed, without_collector

STEPS = 2
HELD = "held by the output."  # by its loss or, through the loss, by the graph: a leaf and the leaf's gradient
KBIT = ("nf4", "nf4-double", "int8")
SCHEMES = (*KBIT, "float16", "bfloat16", "float32")
RELEASES = ("published", "installed")


@dataclass(frozen=True)
class HFSettings:
    """What decides the stock stack's memory.

    scheme: of the frozen linears, one of SCHEMES. rank: None: full fine-tuning. targets: names of adapted linears.
    rows x length: of the micro-batch; accumulate: micro-batches in a step. attention: "sdpa" or "eager". compute: dtype
    of 4-bit products.
    optimizer: "adamw", "adamw8bit", "paged-adamw8bit" (states of 1e5 values or more are outside of the allocator) or
    "none". release: see the module. loss: "cross-entropy", or "mean" of the logits.
    adapters: dtype. dropout: of the adapters. masters: fp32 copies of half-precision trained weights.
    prepared, inputs: prepare_model_for_kbit_training and enable_input_require_grads were called. masked: an attention
    mask of ones is given. expanded: keys and values are repeated for all query heads before the attention kernel.
    cached: use_cache is on. Of old releases: upcast: the model's forward makes the logits fp32 (transformers up to
    4.44); contiguous: q, k and v are copied before the attention kernel (4.38); buffered: bitsandbytes keeps the input
    of every 4-bit product, checkpointing or not (before 0.43.2, its PR 1270).
    """

    scheme: str
    rank: int | None
    targets: tuple[str, ...]
    rows: int
    length: int
    checkpointing: bool
    attention: str
    compute: str
    optimizer: str
    release: str = "published"
    accumulate: int = 1
    loss: str = "cross-entropy"
    adapters: str = "float32"
    dropout: float = 0.0
    masters: bool = False
    prepared: bool = True
    inputs: bool = True
    masked: bool = False
    expanded: bool = False
    cached: bool = False
    upcast: bool = False
    buffered: bool = False
    contiguous: bool = False


def hf_settings(recipe: Recipe, rows: int, length: int) -> HFSettings:
    """What a user would set up in the stock stack for a recipe. Raises QtuneError where it has no such thing."""
    scheme = {"nf4": "nf4", "fp4": "nf4", "int8": "int8", "dense": recipe.dtype}.get(recipe.scheme.name)
    if scheme is None:
        raise one_of("scheme of --stack hf", stored_as(recipe), ("nf4", "fp4", "int8", "dense"), "Q508")
    if scheme == "nf4" and recipe.scheme.to_dict()["double"]:
        scheme = "nf4-double"
    if recipe.adapter.method != "lora":
        raise one_of("adapter.method of --stack hf", recipe.adapter.method, ("lora",), "Q508")
    if recipe.tokens:
        raise QtuneError(
            "Q508", "tokens are given, and other stacks are planned without rows of tokens; leave `tokens` out"
        )
    if recipe.calibrate.codes != "nearest":
        raise one_of("calibrate.codes of --stack hf", recipe.calibrate.codes, ("nearest",), "Q508")
    spec = recipe.adapter.to_dict()
    return HFSettings(
        scheme=scheme, rank=spec["rank"], targets=tuple(spec["targets"]), rows=rows, length=length,
        accumulate=recipe.train.accumulate,
        checkpointing=recipe.train.checkpointing, attention="sdpa", compute=recipe.dtype,
        optimizer="adamw8bit" if recipe.train.optimizer == "adamw8" else "adamw", dropout=spec["dropout"],
    )  # fmt: skip


# ---- the model


def hf_model(config: Any, settings: HFSettings) -> Any:
    """The quantized, prepared and adapted model on meta."""
    config = type(config).from_dict(config.to_dict())
    config.use_cache, config._attn_implementation = settings.cached, "eager"
    kbit = settings.scheme in KBIT
    model = empty(config, DTYPES[settings.compute if kbit else settings.scheme], fused=True)
    if settings.attention == "sdpa" and (model._supports_sdpa or settings.release == "published"):
        model.config._attn_implementation = "sdpa"
        for module in model.modules():  # Gemma 2: 5.0 left it out under sdpa, 5.23 has no sdpa for it
            if getattr(module, "attn_logit_softcapping", None):
                module.attn_logit_softcapping = None  # type: ignore[assignment]
    if kbit:
        _quantize(model, settings)
        if settings.prepared:
            prepare(model)
    if settings.rank is None:
        model.requires_grad_(True)
    else:
        _adapt(model, settings)
    if settings.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if settings.rank is not None and settings.inputs:
            model.enable_input_require_grads()  # PeftModel does so, too, where checkpointing is on before
    return model.train()


def _quantize(model: Any, settings: HFSettings) -> None:
    compute, nested = DTYPES[settings.compute], settings.scheme == "nf4-double"
    for name, module in linear_sites(model).items():
        made = Linear8(module) if settings.scheme == "int8" else Linear4(module, compute, nested, settings.buffered)
        model.set_submodule(name, made)


def _adapt(model: Any, settings: HFSettings) -> None:
    assert settings.rank is not None
    head, found = model.get_output_embeddings(), False
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D | Linear4 | Linear8) or module is head:
            continue
        if ALL_LINEAR in settings.targets or any(matches(name, target) for target in settings.targets):
            adapted = LoRA(module, settings.rank, DTYPES[settings.adapters], settings.dropout)
            model.set_submodule(name, adapted)
            found = True
    if not found:
        raise QtuneError("Q109", f"adapter.targets {', '.join(settings.targets)} match no linear layer")


# ---- what CUDA does otherwise than meta


class Dropout(torch.autograd.Function):
    """native_dropout: the result and a mask of bools, which is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


@contextmanager
def as_on_cuda(device: Device, settings: HFSettings) -> Iterator[None]:
    """softmax(half, dtype=float32) is one kernel on CUDA (SoftMax.cpp), elsewhere half is made fp32 first; dropout
    keeps a mask of bools there (native_dropout), elsewhere one in x's dtype. The settings' changes of attention."""
    softmax, attention, dropout = F.softmax, F.scaled_dot_product_attention, F.dropout

    def one_kernel(x: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
        if device.kind == "cuda" and x.dtype == torch.float16 and dtype == torch.float32:
            return torch._softmax(x, dim, True)
        return softmax(x, dim, dtype=dtype)

    def fused(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if device.kind == "cuda" and training and 0 < p < 1:
            return Dropout.apply(x)  # type: ignore[no-any-return]
        return dropout(x, p, training, inplace)

    def changed(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        if settings.contiguous:
            q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
        if settings.expanded and k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            given["enable_gqa"] = False
        return attention(q, k, v, **given)

    with (
        patch.object(F, "softmax", one_kernel),
        patch.object(F, "dropout", fused),
        patch.object(F, "scaled_dot_product_attention", changed),
    ):
        yield


# ---- the step


def hf_trace(config: Any, settings: HFSettings, device: Device) -> Trace:
    """The trace of two steps on a device; optimizer states are there throughout the second. Raises Untraceable."""
    return hf_traced(config, settings, device)[0]


def hf_traced(config: Any, settings: HFSettings, device: Device) -> tuple[Trace, Any]:
    """`hf_trace`, and the whole model whose parameters it names."""
    whole = hf_model(config, settings)
    passes = extended(
        lambda: hf_model(config, settings), lambda model, layers: _passes(model, layers, settings, device)
    )
    return _steps(whole, passes, settings, device), whole


def _tracer(settings: HFSettings, device: Device) -> Tracer:
    given = answers(settings.rows * (settings.length - 1), False)

    return Tracer(("meta",), scratch=scratch_on(device), answer=given)


def _batch(settings: HFSettings) -> dict[str, Tensor]:
    ids = torch.empty(settings.rows, settings.length, dtype=torch.int64, device="meta")
    return {"input_ids": ids} | ({"attention_mask": torch.empty_like(ids)} if settings.masked else {})


def _passes(model: Any, layers: nn.ModuleList, settings: HFSettings, device: Device) -> tuple[Trace, int]:
    """Forward and backward of a step's micro-batches; after the first, gradients are there."""
    tracer = _tracer(settings, device)
    batch = _batch(settings)
    with without_collector(), on_meta(device), as_on_cuda(device, settings):
        _adopt(tracer, model, batch)
        first = len(tracer.trace.events)
        with followed(tracer, model, layers), tracer:
            for _ in range(min(MICRO_BATCHES, settings.accumulate)):
                labels = {} if settings.loss == "mean" else {"labels": batch["input_ids"]}
                output = model(**batch, **labels)
                if settings.upcast:
                    output.logits = output.logits.float()
                loss = output.logits.mean() if settings.loss == "mean" else output.loss
                if settings.release == "installed":
                    output = None
                loss.backward()
                if settings.accumulate > 1:
                    del output, loss
            tracer.enter(Segment(UPDATE))
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    tracer.name(parameter.grad, "gradients", name)
            return tracer.stop(), first


def _adopt(tracer: Tracer, model: nn.Module, batch: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        adapter = parameter.requires_grad and "lora_" in name
        tracer.adopt(parameter, "adapters" if adapter else "weights", name)
    for name, buffer in model.named_buffers():
        tracer.adopt(buffer, "weights", name)
    for tensor in batch.values():
        tracer.adopt(tensor, "batch")


def _load(tracer: Tracer, model: nn.Module, settings: HFSettings) -> None:
    """from_pretrained packs weight after weight on the device, then half becomes fp32, weight after weight. The holes
    that this leaves are where later blocks go."""
    half: dict[nn.Parameter, Tensor] = {}
    names = {tensor: name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for module in model.modules():
        dense = None
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.requires_grad or tensor in half:
                continue
            if isinstance(module, Linear4 | Linear8) and tensor is module.weight:
                dense = torch.empty(module.shape, dtype=DTYPES[settings.compute], device="meta")
            if settings.prepared and isinstance(tensor, nn.Parameter) and tensor.dtype == torch.float32:
                half[tensor] = torch.empty_like(tensor, dtype=DTYPES[settings.compute])
            else:
                tracer.adopt(tensor, "weights", names[tensor])
        del dense
    for parameter in list(half):
        tracer.adopt(parameter, "weights", names[parameter])
        del half[parameter]


def _steps(whole: Any, gradients: Trace, settings: HFSettings, device: Device) -> Trace:
    """Two steps of the whole model: `gradients` is the first half of each, the optimizer's is traced here."""
    tracer = _tracer(settings, device)
    joined = Joined(tracer.trace)
    for block in gradients.alive(len(gradients.events)):
        gradients.names.setdefault(block, f"{HELD}{block}")
    trained = [(name, parameter) for name, parameter in whole.named_parameters() if parameter.requires_grad]
    with without_collector(), on_meta(device):
        batch = _batch(settings)
        if settings.scheme in KBIT:
            with tracer:
                _load(tracer, whole, settings)
        _adopt(tracer, whole, batch)
        with tracer:
            update = optimizer_of([parameter for _, parameter in trained], settings.optimizer, settings.masters)
            for _ in range(STEPS):
                tracer.trace.last_step = len(tracer.trace.events)
                made = joined.insert(gradients)
                held = []
                for name, block in made.items():
                    if name.startswith(HELD):
                        held.append(torch.empty(0, device="meta"))
                        tracer.follow(held[-1], block)
                for name, parameter in trained:
                    if name in made:
                        parameter.grad = torch.empty_like(parameter)
                        tracer.follow(parameter.grad, made[name])
                tracer.enter(Segment(UPDATE))
                update.step()
                held.clear()
                for _, parameter in trained:
                    parameter.grad = None
                tracer.enter(Segment(AFTER))
    return tracer.stop()


def plan_stack(
    recipe: Recipe,
    device: Device,
    *,
    model: Model | None = None,
    shape: Shape | None = None,
    budget: int | None = None,
    release: str = "published",
) -> Plan:
    """The plan of the same training by transformers + PEFT + bitsandbytes, in their usual set-up. release: published
    (as the releases behind most published measurements) or installed. Raises QtuneError where they cannot do it."""
    started = time.perf_counter()
    model = model or find_model(recipe.model)
    shape = shape or shapes_of(recipe)[0]
    if shape.lengths:
        raise QtuneError(
            "Q508", "train.packing is true, and other stacks are planned with padded micro-batches; legal: false"
        )
    check_shape(shape, model)
    settings = replace(hf_settings(recipe, shape.rows, shape.length), release=release)
    with refused_by_name(model):
        trace, whole = hf_traced(type(model.config).from_dict(model.config.to_dict()), settings, device)
    return planned(model, recipe, device, f"hf:{release}", shape, trace, whole, budget, time.perf_counter() - started)
