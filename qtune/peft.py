"""PEFT export: the folder that `PeftModel.from_pretrained` loads, written from each method's table of PEFT's names.

PEFT itself is not needed. The weights are the trained ones, so the loaded adapter computes the same on the same base
weights; on others (the unquantized checkpoint, another quantizer) it differs by the quantization error. That includes
DoRA's magnitude, which is a norm of the packed rows. The way back: peft_import.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .adapters import METHODS, Adapted, AdapterSpec, PeftNames, adapted_sites
from .adapters.sites import SHARED
from .errors import QtuneError
from .safe_io import replacing, write_json
from .vocabulary import Built, rows_of

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # the model inside of PEFT's two wrappers


def to_peft(model: nn.Module, spec: AdapterSpec, folder: str | Path, base_model: str) -> None:
    """Write the adapter that `model` carries for PEFT. base_model: hub id or folder of the base, for PEFT's config.

    Raises QtuneError for a method that PEFT cannot express, naming those that it can.
    """
    sites = adapted_sites(model)
    names = METHODS[spec.checked().method].peft
    if not sites:
        raise QtuneError("Q405", "this model carries no adapter to export")
    if names is None:
        able = ", ".join(sorted(name for name, method in METHODS.items() if method.peft is not None))
        raise QtuneError(
            "Q806", f"PEFT has no form for an adapter of method {spec.method}; it has one for {able}: merge instead"
        )
    conv1d = [name for name, site in sites.items() if site.base.conv1d]
    if conv1d and not names.conv1d:
        raise QtuneError(
            "Q806",
            f"PEFT's {names.peft_type} takes no Conv1D layers, which the base has at {', '.join(conv1d)}: merge "
            "instead",
        )
    if routed := [name for name, site in sites.items() if site.base.routed]:
        raise QtuneError(
            "Q806",
            "PEFT has no adapter for one expert's matrix, only for fused ones as a whole "
            f"({', '.join(routed[:3])} ...): merge instead, or train without experts in adapter.targets",
        )
    own = rows_of(model)
    if own is not None and (names.peft_type != "LORA" or getattr(own.head.base, "bias", None) is not None):
        what = f"beside {names.peft_type}" if names.peft_type != "LORA" else "of a head with a bias"
        raise QtuneError("Q806", f"PEFT trains no rows of tokens {what}: merge instead")
    shared = getattr(model, SHARED, None)
    tensors = {
        f"{PREFIX}{n}.{key}": value for n, site in sites.items() for key, value in site.adapter.peft_state().items()
    }
    tensors |= {f"base_model.{theirs}": getattr(shared, ours) for ours, theirs in names.shared.items()}
    tensors |= (
        {}
        if own is None
        else {f"{PREFIX}{path}.token_adapter.trainable_tokens_delta": rows for path, rows in _places(own).items()}
    )
    folder = Path(folder)
    with replacing(folder / TENSORS) as file:
        file.write(safetensors.torch.save({n: _plain(value) for n, value in tensors.items()}, {"format": "pt"}))
    config = _config(model, sites, spec, names, base_model)
    if own is not None:
        ids = [token.id for token in own.table.tokens]
        config["trainable_token_indices"] = {path.rpartition(".")[2]: ids for path in _places(own)}
    write_json(folder / CONFIG, config)


def _places(own: Built) -> dict[str, Tensor]:
    """Where in the model PEFT puts rows of tokens -> the rows; a tied head takes the table's."""
    return dict(zip(own.names, own.tensors().values(), strict=False))


def _plain(value: Tensor) -> Tensor:
    """A copy of its own: two names may not share memory in a file."""
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _config(
    model: nn.Module, sites: Mapping[str, Adapted], spec: AdapterSpec, names: PeftNames, base_model: str
) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    options = spec.resolved()
    everything = [name for name, _ in _modules(model)]
    lists: dict[str, set[str]] = {}
    for name, site in sites.items():
        for key in site.adapter.peft_lists():
            lists.setdefault(key, set()).add(name)
    listed = {key: suffixes(members, everything) for key, members in lists.items()}
    rest = set(sites).difference(*lists.values())
    return {
        "peft_type": names.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **({"fan_in_fan_out": any(site.base.conv1d for site in sites.values())} if names.conv1d else {}),
        **{theirs: options[ours] for ours, theirs in names.options.items()},
        **names.constants,
        **METHODS[spec.method].peft_config({name: site.adapter for name, site in sites.items()}),
        **listed,
        "target_modules": sorted({*suffixes(rest, everything), *(s for found in listed.values() for s in found)}),
    }


def _modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules that the model has without its adapters."""
    inside = tuple(f"{name}." for name in adapted_sites(model))
    return ((name, module) for name, module in model.named_modules() if name and not name.startswith(inside))


def suffixes(sites: Collection[str], everything: Iterable[str]) -> list[str]:
    """The shortest dotted ends of names that match these sites and nothing else in `everything`: PEFT uses endswith."""
    others = [name for name in everything if name not in set(sites)]
    found = set()
    for site in sites:
        parts = site.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found.add(next((end for end in ends if not any(name.endswith(end) for name in others)), site))
    return sorted(found)
