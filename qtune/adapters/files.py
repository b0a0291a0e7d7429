"""Adapter files: `adapter.safetensors` (`{site}.{parameter}`, what sites share once), `adapter.json` (method, digests).

The JSON is written last and holds the sha256 of the tensors' file, so that a mixed or cut-off pair is noticed. Loading
is strict: an adapter fits one set of packed weights, so other weights, another scheme, a missing, extra or mis-shaped
tensor are refused, all in one error, and the model is untouched unless everything fits.
Left out: the packed parts of a base that a start changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .. import __version__
from ..errors import QtuneError
from ..quant import QuantLinear
from ..safe_io import replacing, write_json
from .base import SHARED, Adapted, AdapterSpec, adapted_sites, build, install

FORMAT = 1
TENSORS, INFO = "adapter.safetensors", "adapter.json"
SHOWN = 8  # faults of a load that are listed in full


def save_adapter(model: nn.Module, spec: AdapterSpec, folder: str | Path, base_info: Mapping[str, Any]) -> None:
    """Write the adapter that `model` carries to `folder`, each file atomically.

    base_info: JSON values that say which base it is for. Raises QtuneError without an adapter or where writing fails.
    """
    sites = adapted_sites(model)
    if not sites:
        raise QtuneError("this model carries no adapter to save")
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter_tensors(model).items()}
    content = safetensors.torch.save(tensors, {"format": "pt"})
    info = {
        "format": FORMAT,
        "qtune": __version__,
        "adapter": spec.to_dict(),
        "base": dict(base_info),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "sites": {n: _identity(s.base) for n, s in sites.items()},
    }
    folder = Path(folder)
    with replacing(folder / TENSORS) as file:
        file.write(content)
    write_json(folder / INFO, info)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name in the file -> parameter or buffer of the adapter that `model` carries."""
    return _state(adapted_sites(model), getattr(model, SHARED, None))


def load_adapter(model: nn.Module, folder: str | Path, *, other_base: bool = False) -> dict[str, Adapted]:
    """Put the saved adapter on `model`, bit for bit and in the dtype it was saved in. Returns adapted modules by site.

    other_base: take it onto other weights or another scheme; names and shapes must fit all the same.
    Raises QtuneError with everything that does not fit; then the model is as before.
    """
    if adapted_sites(model):
        raise QtuneError("this model already carries an adapter; load the base again to put another one on it")
    info = read_adapter_json(folder)
    tensors = _read_tensors(Path(folder) / TENSORS, info)
    spec = AdapterSpec.from_dict(info["adapter"]).checked()
    bases, faults = _find_bases(model, info["sites"], other_base)
    sites, shared = build(bases, spec) if bases else ({}, None)
    expected = _state(sites, shared)
    faults += _compare(expected, tensors, set(info["sites"]) - set(bases))
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:SHOWN])
        raise QtuneError(f"the adapter in {folder} does not fit this model:{listed}{more}")
    for name, value in expected.items():
        value.data = tensors[name].to(value.device)
    for site in sites.values():
        site.adapter.prepare(site.base)
    return install(model, sites, shared)


def read_adapter_json(folder: str | Path) -> dict[str, Any]:
    """What `adapter.json` says: format, qtune, adapter, base, parameters, bytes, sha256, sites.

    Raises QtuneError where the file is absent, damaged or of another format.
    """
    path = Path(folder) / INFO
    try:
        info = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise QtuneError(
            f"cannot read {path}: {error.strerror or error}; a folder with an adapter holds {INFO} and {TENSORS}"
        ) from error
    except ValueError as error:
        raise QtuneError(f"{path} is no JSON text ({error}); is it cut off?") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise QtuneError(f"{path} has format {found!r}; this qtune reads format {FORMAT}")
    needed = {"adapter": dict, "base": dict, "bytes": int, "sha256": str, "sites": dict}
    wrong = [key for key, kind in needed.items() if not isinstance(info.get(key), kind)]
    if "sites" not in wrong and not all(
        isinstance(site, dict) and isinstance(site.get("magnitude"), float) for site in info["sites"].values()
    ):
        wrong.append("sites")
    if wrong:
        raise QtuneError(f"{path} lacks or garbles {', '.join(wrong)}")
    return info


def _read_tensors(path: Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QtuneError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) != info["bytes"]:
        raise QtuneError(f"{path} has {len(content)} bytes, {INFO} says {info['bytes']}: cut off, or of another save")
    if hashlib.sha256(content).hexdigest() != info["sha256"]:
        raise QtuneError(
            f"{path} is not the file that {INFO} was written for: its sha256 differs (damaged, or of another save)"
        )
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise QtuneError(f"{path} is no safetensors file: {error}") from error


def _find_bases(
    model: nn.Module, sites: Mapping[str, Any], other_base: bool
) -> tuple[dict[str, QuantLinear], list[str]]:
    """The model's layers of these names, and a fault for each that is absent or packed otherwise."""
    bases = {
        name: module for name, module in model.named_modules() if name in sites and isinstance(module, QuantLinear)
    }
    faults = [f"{name}: the model has no packed linear layer of this name" for name in sites if name not in bases]
    for name, base in () if other_base else bases.items():
        there, here = sites[name], _identity(base)
        if there.get("scheme") != here["scheme"]:
            faults.append(f"{name}: trained on {there.get('scheme')}, here the layer is {base.scheme}")
        elif there.get("digest") != here["digest"] or not isclose(there["magnitude"], here["magnitude"], rel_tol=1e-4):
            digests = f"digest {str(there.get('digest'))[:12]}, here {here['digest'][:12]}"
            faults.append(f"{name}: trained on other weights ({digests})")
    return bases, faults


def _identity(base: QuantLinear) -> dict[str, Any]:
    return {"scheme": str(base.scheme), "digest": base.digest(), "magnitude": base.magnitude()}


def _state(sites: Mapping[str, Adapted], shared: nn.Module | None) -> dict[str, Tensor]:
    """Name in the file -> the parameter or buffer itself; what the sites share is in it once."""
    own = set() if shared is None else {id(value) for value in shared.state_dict(keep_vars=True).values()}
    state = {
        f"{name}.{key}": value
        for name, site in sites.items()
        for key, value in site.adapter.state_dict(keep_vars=True).items()
        if id(value) not in own
    }
    if shared is not None:
        state.update({f"{SHARED}.{key}": value for key, value in shared.state_dict(keep_vars=True).items()})
    return state


def _compare(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], absent: set[str]) -> list[str]:
    """Faults between what an adapter needs and what its file holds; tensors of absent sites are not reported again."""
    faults = [f"{name}: missing from {TENSORS}" for name in expected if name not in tensors]
    for name, value in tensors.items():
        if name not in expected:
            if not any(name.startswith(f"{site}.") for site in absent):
                faults.append(f"{name}: in {TENSORS}, but the method has no such parameter")
        elif value.shape != expected[name].shape or not value.is_floating_point():
            wanted = f"{tuple(expected[name].shape)} floating point"
            faults.append(f"{name}: {tuple(value.shape)} {value.dtype} in {TENSORS}, the layer needs {wanted}")
    return faults
