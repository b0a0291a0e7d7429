"""An adapter leaves alone: as PEFT reads it, as a LoRA whatever its method is, as the GGUF file that llama.cpp adds to
a model. Each is measured against what was trained where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bnb
from .adapters import METHODS, AdapterSpec, adapted_sites
from .adapters.files import kept_layers, starts_elsewhere
from .adapters.lora import LoRA
from .errors import QtuneError, one_of
from .export import KEEP_BASE, on_original, prompts_of
from .gguf import write_adapter
from .lora_form import Cut, to_lora
from .model.gguf_names import gguf_architecture, gguf_places
from .peft import to_peft
from .runs import Run
from .screen import Screen
from .verify import Reference, in_dtype, logits_of
from .vocabulary import rows_of


def export_peft(run: Run, out: Path, screen: Screen, keep_base: str | None = None) -> float | None:
    """Write a run's adapter as PEFT reads it. keep_base: see `base_for`.

    Returns KL(trained || original with the export), nats a token, where the two differ. Raises QtuneError.
    """
    spec, name = run.recipe.adapter, run.recipe.model
    if base_for(run, keep_base) == "trained":
        to_peft(run.model, spec, out, name)
        tell_peft(run, out, screen)
        return None
    prompts = prompts_of(run)
    with in_dtype(run.model, torch.float32):
        trained = logits_of(run.model, prompts)
    model = on_original(run, run.recipe.dtype, screen)
    if starts_elsewhere(run.model):
        spec = _doubled(spec)
    to_peft(model, spec, out, name)
    tell_peft(run, out, screen)
    with in_dtype(model, torch.float32):
        return float(Reference(prompts, trained, 0.0).kl(logits_of(model, prompts)).mean())


def base_for(run: Run, keep_base: str | None) -> str:
    """The base that an adapter leaves for: `trained`, as it is for the packed base that it was trained on; `original`,
    what it learned, for the weights before quantization. Without a word the first, unless no other tool has the base:
    its codes are the run's own, or it is not in 4 bits of bitsandbytes and the start is no identity."""
    if keep_base not in (None, *KEEP_BASE):
        raise one_of("--keep-base", keep_base, KEEP_BASE)
    own = bool(kept_layers(run.model))
    foreign = starts_elsewhere(run.model) and not all(
        site.base.scheme.name in bnb.SCHEMES for site in adapted_sites(run.model).values()
    )  # on the original weights a start counts twice, and that is the base that other tools have
    keep_base = keep_base or ("original" if own or foreign else "trained")
    if keep_base == "trained" and own:
        raise QtuneError(
            "Q806",
            f"the codes of this run's base are its own ({run.recipe.adapter.method}, codes "
            f"{run.recipe.calibrate.codes}), and no other tool has them: export with --keep-base original, or merge",
        )
    return keep_base


def tell_peft(run: Run, out: Path, screen: Screen) -> None:
    """Where there are new tokens, their tokenizer, and what PEFT leaves to its user."""
    own = rows_of(run.model)
    if own is None:
        return
    run.tokenizer.save_pretrained(out)
    if own.table.shape[0] > own.table.count:
        screen.line(
            f"note: the vocabulary is longer than the base's: call model.resize_token_embeddings({own.table.shape[0]}) "
            "on the base before PEFT loads the adapter (AutoPeftModelForCausalLM does so itself)", "yellow",
        )  # fmt: skip


def _doubled(spec: AdapterSpec) -> AdapterSpec:
    """The spec of `Learned`: twice the rank, and alpha so that the scale stays."""
    options = spec.resolved()
    if METHODS[spec.method].peft is None or "alpha" not in options:
        return spec  # has no form in PEFT, which `to_peft` says
    factor = 2**0.5 if options["rslora"] else 2.0
    return replace(spec, options=options | {"rank": 2 * options["rank"], "alpha": factor * options["alpha"]})


@dataclass(frozen=True)
class Left:
    """What a LoRA holds of what was trained. keep_base: the base that it goes on; cuts: by layer; lost: of all layers
    together, as a share of the change's norm; kl: KL(trained || the LoRA on its base), nats a token."""

    keep_base: str
    cuts: tuple[Cut, ...]
    lost: float
    kl: float


def export_lora(
    run: Run, out: Path, screen: Screen, keep_base: str | None = None, rank: int | None = None,
    error: float | None = None,
) -> Left:  # fmt: skip
    """Write a run's adapter, of any method, as a LoRA that PEFT reads. rank, error: see `to_lora`. Raises QtuneError
    for a change that is none of the weights alone."""

    def write(model: Any, spec: AdapterSpec) -> None:
        to_peft(model, spec, out, run.recipe.model)
        tell_peft(run, out, screen)

    return _as_lora(run, screen, base_for(run, keep_base), rank, error, write)


def export_gguf(
    run: Run, out: Path, screen: Screen, keep_base: str | None = None, rank: int | None = None,
    error: float | None = None,
) -> Left:  # fmt: skip
    """Write a run's adapter, of any method, as the GGUF file of a LoRA that llama.cpp reads. As `export_lora`."""
    if rows_of(run.model) is not None:
        raise QtuneError("Q812", "an adapter of llama.cpp has no rows of tokens: merge instead")
    places = gguf_places(run.model, list(adapted_sites(run.model)))

    def write(model: Any, spec: AdapterSpec) -> None:
        tensors: dict[str, Tensor] = {}
        alpha = spec.options["alpha"]
        for name, site in adapted_sites(model).items():
            lora, place = site.adapter, places[name]
            assert isinstance(lora, LoRA)
            tensors[f"{place.name}.lora_a"] = lora.A
            tensors[f"{place.name}.lora_b"] = place.rows(lora.B * (len(lora.A) / alpha))  # llama.cpp: alpha / rank
        write_adapter(out, gguf_architecture(model.config), alpha, tensors)

    return _as_lora(run, screen, base_for(run, keep_base), rank, error, write)


def _as_lora(
    run: Run, screen: Screen, keep_base: str, rank: int | None, error: float | None,
    write: Callable[[Any, AdapterSpec], None],
) -> Left:  # fmt: skip
    prompts = prompts_of(run)
    with in_dtype(run.model, torch.float32):
        trained = logits_of(run.model, prompts)
    model = run.model if keep_base == "trained" else on_original(run, run.recipe.dtype, screen)
    with screen.bar("factors", len(adapted_sites(model))) as advance:
        spec, cuts = to_lora(model, run.recipe.adapter.targets, rank, error, advance)
    write(model, spec)
    with in_dtype(model, torch.float32):
        kl = float(Reference(prompts, trained, 0.0).kl(logits_of(model, prompts)).mean())
    size = sum(cut.norm**2 for cut in cuts)
    lost = (sum((cut.lost * cut.norm) ** 2 for cut in cuts) / size) ** 0.5 if size else 0.0
    return Left(keep_base, tuple(cuts), lost, kl)
