"""`qtune merge --gguf`: base + adapter as one GGUF file, verified before it takes its name.

Written tensor by tensor through the package `gguf` from the same merged fp32 weights as a plain checkpoint. Verified as
that one is: each layer as it lies in the file against the adapter's own forward, and the file as it is read, in fp32,
against base + adapter on real prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapted, adapted_sites
from .errors import QtuneError, one_of
from .export import MergeReport, merged_entries, prompts_of, verified_as
from .gguf import write
from .memory.layers import device_of
from .model import load
from .model.gguf_out import ELSE, KINDS, architecture_of, header, tensors
from .model.loading import packed_sites
from .model.source import open_source, read_gguf
from .quant import Dense
from .runs import Run
from .screen import Screen
from .verify import Reference, Verification, compared, in_dtype, layer_error, logits_of, worst_layer

ROUNDED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.bfloat16}
WIDER = {"q8_0": 4.0}  # half a step of 8 bits is about so much more than bf16's rounding: max / 254 against w / 512
UNSAID = ("rope_parameters", "head_dim", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
"""What transformers does not read of a GGUF header, and llama.cpp does or has fixed."""


def check_gguf(out: Path, kind: str, overwrite: bool) -> None:
    """Raises QtuneError for what is known to be wrong before anything is loaded."""
    if kind not in KINDS:
        raise one_of("--gguf", kind, KINDS)
    if out.suffix.lower() != ".gguf":
        raise QtuneError("Q801", f"--out {out} is no name of a GGUF file; give one that ends in .gguf")
    if out.exists() and (out.is_dir() or not overwrite):
        raise QtuneError("Q801", f"{out} exists already; choose another --out, or give --overwrite")


def merge_gguf(
    run: Run, out: Path, kind: str = "f16", *, screen: Screen | None = None, overwrite: bool = False
) -> MergeReport:
    """Write base + adapter of a run to the GGUF file `out`, its matrices as `kind` (f32, f16, bf16, q8_0), and verify
    it.

    Raises QtuneError for an architecture or a tokenizer that cannot be said, and where verification fails; the file
    stays as `<out>.unverified`.
    """
    screen = screen or Screen(quiet=True)
    check_gguf(out, kind, overwrite)
    source, model = open_source(run.recipe.model), run.model
    architecture_of(model.config)
    prompts = prompts_of(run)
    reference = Reference.of(model, prompts, ROUNDED[kind])
    reference = Reference(prompts, reference.logits, reference.wander * WIDER.get(kind, 1.0))
    fields = header(model, source, run.tokenizer, run.folder.resolve().name, kind)

    def write_to(partial: Path) -> MergeReport:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = list(tensors(model, source, merged_entries(model, torch.float32)))
        with screen.bar("merging", 1) as advance:
            nbytes = write(partial, fields, made, kind)
            advance(1)
        return MergeReport(out, kind, "trained", nbytes, _verify(run, partial, reference, kind))

    return verified_as(out, write_to, otherwise=ELSE)


def _verify(run: Run, path: Path, reference: Reference, kind: str) -> Verification:
    """The file as it is read, in fp32, against base + adapter."""
    source, config = read_gguf(path), run.model.config
    for key in UNSAID:
        if hasattr(config, key):
            setattr(source.config, key, getattr(config, key))
    written = load(source, Dense("float32"), dtype=torch.float32, device=device_of(run.model))
    error, worst = _layers(run.model, written, kind)
    with in_dtype(written, torch.float32):
        logits = logits_of(written, reference.prompts)
    return compared(reference, logits, len(adapted_sites(run.model)), error, worst)


def _layers(model: Any, written: Any, kind: str) -> tuple[float, str]:
    """Largest error of a layer as a fraction of its bound, and which layer; NaN wins."""
    layers = packed_sites(written)

    def error(name: str, site: Adapted, x: Tensor) -> float:
        layer: Any = layers[name] if name in layers else written.get_submodule(name)  # a head is no packed layer
        weight: Tensor = layer.dequantize(torch.float32).cpu() if name in layers else layer.weight.float().cpu()
        bias = None if layer.bias is None else layer.bias.float().cpu()
        moved = _half_steps(weight) if kind == "q8_0" else None
        return layer_error(site, weight, bias, x, ROUNDED[kind], moved)

    return worst_layer(adapted_sites(model), error)


def _half_steps(weight: Tensor) -> Tensor:
    """How far Q8_0 may have moved each weight [out, in]: half of max|w| / 127 of its block of 32, and the scale's own
    rounding to fp16."""
    if weight.shape[1] % 32:
        return weight.abs() * torch.finfo(torch.float16).eps
    blocks = weight.view(len(weight), -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    return (largest / 254 + blocks.abs() * torch.finfo(torch.float16).eps).view_as(weight)
