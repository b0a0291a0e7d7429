"""PEFT import: the folder that PEFT wrote becomes our adapter, by the same table of names that the export uses.

What is refused by name, never left out in silence: settings of PEFT that change what an adapter computes and that we
have no form for, tensors that the config does not ask for, sites that it asks for and that have none. All that can be
known from the folder is known before a base is loaded. Pickle (`adapter_model.bin`) is never opened: it can run code.
Facts of the format: peft 0.21, `save_and_load.py`, `check_target_module_exists`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import METHODS, Adapted, Adapter, AdapterSpec, PeftNames
from .adapters.files import SHOWN
from .adapters.peft_names import FromPeft, matches_whole
from .adapters.sites import SHARED, build, install
from .checkpoint import Safetensors
from .errors import QtuneError, listed
from .model.source import fetched
from .peft import CONFIG, PREFIX, TENSORS, suffixes
from .quant import QuantLinear
from .safe_io import expanded

PICKLE = "adapter_model.bin"
ROWS = ".token_adapter.trainable_tokens_delta"
# What an adapter's config says of itself, of its start and of its training: nothing of it changes what is computed.
# Settings of the start that move the base are looked at in `_start`.
TOLD = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "runtime_config",
    "init_lora_weights", "init_weights", "init_ia3_weights", "init_vector_bank_bound", "init_logits_std",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "beta1", "beta2", "megatron_core",
    "qalora_group_size", "mini_r", "projection_prng_key", "trainable_token_indices",
}  # fmt: skip
STARTS = ("gaussian", "eva", "orthogonal")  # of init_lora_weights: they leave the base as it is


@dataclass(frozen=True)
class PeftFolder:
    """What a PEFT folder holds, as far as it can be known without a base. method: of ours; sites: site -> PEFT's name
    of a tensor -> tensor; shared: PEFT's name -> tensor; rows: name of a table -> rows of tokens."""

    folder: Path
    method: type[Adapter]
    config: Mapping[str, Any]
    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """The base that PEFT trained it on, as its config calls it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name.strip() else None


# ---- the folder


def find_peft(name: str) -> Path:
    """A PEFT folder, or that of a hub id in the hub's cache, fetched as far as it is not there. Raises QtuneError."""
    folder = expanded(name)
    return folder if folder.is_dir() else fetched(name)


def read_peft(folder: Path) -> PeftFolder:
    """Read and check a PEFT folder. Raises QtuneError for files that are absent or damaged, for a method or a setting
    that we have no form for, and for tensors that are no finite numbers."""
    config = _read_config(folder)
    method = _method_of(config, folder / CONFIG)
    names = method.peft
    assert names is not None
    found = PeftFolder(folder, method, config)
    ends = sorted(names.tensors.values(), key=len, reverse=True)
    unknown, wild = [], []
    for name, value in _tensors(folder):
        inner = name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
        outer = name.removeprefix("base_model.")
        end = next((end for end in ends if inner.endswith(f".{end}")), None)
        if not value.is_floating_point() or not torch.isfinite(value).all():
            wild.append(name)
        if outer in names.shared.values():
            found.shared[outer] = value
        elif inner.endswith(ROWS):
            found.rows[inner.removesuffix(ROWS)] = value
        elif end is not None:
            found.sites.setdefault(inner.removesuffix(f".{end}"), {})[end] = value
        else:
            unknown.append(name)
    if unknown:
        raise QtuneError(
            "Q418",
            f"{folder / TENSORS} holds {listed(unknown, SHOWN)}: PEFT's {names.peft_type} as qtune takes it has only "
            f"{', '.join(ends)} at linear layers",
        )
    if wild:
        raise QtuneError("Q417", f"{folder / TENSORS}: {listed(wild, SHOWN)} holds NaN, infinity, or no fractions")
    whole = {*names.tensors.values()}
    lacking = [f"{site}.{end}" for site, tensors in found.sites.items() for end in sorted(whole - {*tensors})]
    lacking += [f"base_model.{theirs}" for theirs in names.shared.values() if theirs not in found.shared]
    if lacking or not found.sites:
        raise QtuneError("Q417", f"{folder / TENSORS} lacks {listed(lacking, SHOWN) or 'every tensor'}")
    return found


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    if not (folder / TENSORS).is_file():
        raise QtuneError(
            "Q417",
            f"{folder} has no {TENSORS}. A pickle file ({PICKLE}) can run code when it is opened and is never read "
            "here: if you trust where it comes from, load it with PEFT and save it again, which writes the other file",
        )
    try:
        file = Safetensors(folder, TENSORS.removesuffix(".safetensors"))
    except QtuneError as error:
        raise QtuneError("Q417", str(error)) from error
    return ((name, file.read(name)) for name in file.entries)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise QtuneError("Q417", f"cannot read {path}, which a PEFT folder has: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise QtuneError("Q417", f"{path} is no JSON text ({error})") from error
    if not isinstance(config, dict):
        raise QtuneError("Q417", f"{path} holds no JSON object")
    return config


def _method_of(config: Mapping[str, Any], path: Path) -> type[Adapter]:
    """Our method of a config. Raises QtuneError where we have none, and with every setting that we have no form for."""
    tables = {method: method.peft for method in METHODS.values() if method.peft and "peft" in vars(method)}
    native = {method: names for method, names in tables.items() if names.native}
    fitting = [(m, n) for m, n in native.items() if n.peft_type == config.get("peft_type")]
    if not fitting:
        able = ", ".join(sorted({names.peft_type for names in native.values()}))
        raise QtuneError("Q418", f"{path}: peft_type is {config.get('peft_type')!r}; qtune takes {able}")
    # the method with the most constants that hold: LORA with use_dora is DoRA
    method, names = max(fitting, key=lambda pair: _holds(config, pair[1]) * (1 + len(pair[1].constants)))
    known = {*TOLD, *names.options.values(), *names.constants, *names.reads}
    wrong = [f"{key} is {_short(config.get(key))}, and only {json.dumps(value)} can be taken in"
             for key, value in names.constants.items() if (config.get(key) or False) != value]  # fmt: skip
    wrong += [f"{key} is {_short(value)}" for key, value in config.items() if key not in known and _is_on(value)]
    wrong += _start(config)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        wrong.append(f"task_type is {_short(config['task_type'])}, and qtune trains causal language models")
    if wrong:
        raise QtuneError("Q418", f"{path} asks for what qtune has no form for: {'; '.join(wrong)}")
    return method


def _holds(config: Mapping[str, Any], names: PeftNames) -> bool:
    return all((config.get(key) or False) == value for key, value in names.constants.items())


def _is_on(value: Any) -> bool:
    """Does a setting that we do not know do anything?"""
    return bool(value) and value != "none"


def _start(config: Mapping[str, Any]) -> list[str]:
    """Faults of starts that moved the base: PEFT does it again when it loads the adapter."""
    keys = ("init_lora_weights", "init_weights")
    return [
        f"{key} is {_short(config[key])}: this start changed the weights of the base. In PEFT, save the adapter with "
        "path_initial_model_for_weight_conversion, which makes a plain one of it"
        for key in keys
        if isinstance(config.get(key), str) and config[key] not in STARTS
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- on a model


def take_peft(model: nn.Module, found: PeftFolder) -> tuple[AdapterSpec, dict[str, Adapted]]:
    """Put the adapter of a PEFT folder on `model`, in place and in the dtypes of its file. Returns its spec and the
    adapted modules by site.

    Raises QtuneError with all that does not fit, or that the config says otherwise than the tensors; then the model is
    as before.
    """
    names = found.method.peft
    assert names is not None
    linear = [name for name, m in model.named_modules() if isinstance(m, QuantLinear | nn.Linear)]
    bases = {n: m for n, m in model.named_modules() if n in found.sites and isinstance(m, QuantLinear)}
    faults = [f"{n}: {_no_site(model, n)}" for n in found.sites if n not in bases]
    asked = set(_targeted(found.config, linear))
    faults += [f"{n}: in {TENSORS}, but target_modules leaves it out" for n in bases if n not in asked]
    faults += [f"{n}: target_modules asks for it, {TENSORS} lacks it" for n in linear if n in asked - {*found.sites}]
    if not names.conv1d:
        faults += [f"{n}: PEFT's {names.peft_type} takes no Conv1D" for n, base in bases.items() if base.conv1d]
    _raise(found, faults)
    options, values = found.method.from_peft(FromPeft(found.config, {n: found.sites[n] for n in bases}))
    spec = AdapterSpec(found.method.method, tuple(suffixes(bases, linear)), options).checked()
    sites, shared = build(bases, spec, any_scheme=True)
    expected: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, site in sites.items():
        site.adapter.resize(_sizes(site.adapter, values[name]))
        own = dict(site.adapter.named_parameters()) | dict(site.adapter.named_buffers())
        expected |= {f"{name}.{ours}": own[ours] for ours in values[name]}
        tensors |= {f"{name}.{ours}": value for ours, value in values[name].items()}
    for ours, theirs in names.shared.items():
        expected[f"{SHARED}.{ours}"], tensors[f"{SHARED}.{ours}"] = getattr(shared, ours), found.shared[theirs]
    _raise(found, [
        f"{name}: {tuple(tensors[name].shape)} in the file, the layer needs {tuple(value.shape)}"
        for name, value in expected.items() if tensors[name].shape != value.shape
    ])  # fmt: skip
    for name, value in expected.items():
        value.data = tensors[name].clone(memory_format=torch.contiguous_format).to(value.device)
    for site in sites.values():
        site.adapter.prepare(site.base)
    return spec, install(model, sites, shared)


def _sizes(adapter: Adapter, values: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of what grows, as the file has them."""
    return {what: values[n].shape[dim] for n, (dim, what) in adapter.grows.items() if values[n].dim() > dim}


def _no_site(model: nn.Module, name: str) -> str:
    """Why there is no site of this name."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return "the base has no such layer"
    if isinstance(module, nn.Linear):
        return "adapters go on packed layers only, and this one is dense: give scheme.embeddings for the head"
    return f"it is {type(module).__name__}, and adapters go on linear layers only"


def _targeted(config: Mapping[str, Any], linear: Sequence[str]) -> Iterator[str]:
    """The layers that PEFT puts the adapter on, of those that are linear."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    left_out = _names(config, "exclude_modules")
    patterns = _names(config, "layers_pattern")
    wanted = "all-linear" if targets == "all-linear" else _names(config, "target_modules")
    places = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(places, list) or not all(type(n) is int for n in places):
        raise QtuneError("Q417", f"{CONFIG}: layers_to_transform is {_short(layers)}; legal: numbers of layers")
    for name in linear:
        if _names_it(left_out, name, "exclude_modules"):
            continue
        if wanted == "all-linear":
            if name.rpartition(".")[2] not in ("lm_head", "embed_out"):
                yield name
        elif _names_it(wanted, name, "target_modules") and (
            not places or isinstance(wanted, str) or _layer(name, patterns) in places
        ):
            yield name


def _names(config: Mapping[str, Any], key: str) -> str | list[str]:
    """A key that holds a regular expression or a list of names."""
    value = config.get(key) or []
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(n, str) for n in value)):
        raise QtuneError("Q417", f"{CONFIG}: {key} is {_short(value)}; legal: a list of names, or a pattern")
    return value


def _names_it(names: str | list[str], site: str, key: str) -> bool:
    if isinstance(names, str):
        return matches_whole(names, site, key)
    return any(site == name or site.endswith(f".{name}") for name in names)


def _layer(site: str, patterns: str | list[str]) -> int | None:
    """The number of the layer that a site is in: the first behind a name, or behind one of `patterns`."""
    ends = [patterns] if isinstance(patterns, str) else patterns
    for whole in [rf"(?:^|.*?\.){end}\.(\d+)\." for end in ends] or [r".*?\.[^.]*\.(\d+)\."]:
        try:
            found = re.match(whole, site)
        except re.error as error:
            raise QtuneError("Q417", f"{CONFIG}: layers_pattern holds no pattern: {error}") from None
        if found:
            return int(found[1])
    return None


def _raise(found: PeftFolder, faults: Sequence[str]) -> None:
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        text = "".join(f"\n  {fault}" for fault in faults[:SHOWN])
        raise QtuneError("Q404", f"the adapter in {found.folder} does not fit this base:{text}{more}")
