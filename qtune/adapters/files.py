"""Adapter files: `adapter.safetensors` (`{site}.{parameter}`, what sites share once), `adapter.json` (method, digests).

The JSON is written last and holds the sha256 of the tensors' file, so that a mixed or cut-off pair is noticed (a run
has a whole one in its checkpoints then: qtune/state.py). Loading is strict: an adapter fits one set of packed weights,
so other weights, another scheme, a missing, extra or mis-shaped tensor are refused, all in one error, and the model is
untouched unless everything fits.
An adapter that does not start as the identity has its first values beside it (`start.safetensors`): what was learned
is the difference. Rows of new tokens (qtune/vocabulary.py) are tensors among the others; the JSON names their tokens.
`kept` counts layers whose codes are the run's own; they lie in files of the run (qtune/runs.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import isclose
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from ..errors import QtuneError
from ..quant import QuantLinear
from ..safe_io import replacing, write_json
from ..version import version
from ..vocabulary import Built, Token, build_rows, install_rows, rows_of
from .base import Adapted, Adapter, AdapterSpec, Start
from .mixture import packed_layers
from .sites import SHARED, adapted_sites, build, install, refuse_adapted

FORMAT = 1
Digest = Callable[[QuantLinear, bool], str]  # of a layer's codes, of all of them (True) or of what the scheme names
TENSORS, INFO, FIRST = "adapter.safetensors", "adapter.json", "start.safetensors"
SHOWN = 8  # faults of a load that are listed in full


def save_adapter(
    model: nn.Module,
    spec: AdapterSpec,
    folder: str | Path,
    base_info: Mapping[str, Any],
    *,
    run: str | Path | None = None,
    sites: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter that `model` carries to `folder`, each file atomically.

    base_info: JSON values that say which base it is for. run: the folder that holds its first values, if another.
    sites: what `describe_sites` said of the model, whose base has not changed since. Raises QtuneError without an
    adapter or where writing fails.
    """
    described = describe_sites(model) if sites is None else sites
    if not described:
        raise QtuneError("Q405", "this model carries no adapter to save")
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter_tensors(model).items()}
    content = safetensors.torch.save(tensors, {"format": "pt"})
    info = {
        "format": FORMAT,
        "qtune": version(),
        "adapter": spec.to_dict(),
        "base": dict(base_info),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "kept": len(kept_layers(model)),
        "first": _digest(Path(folder if run is None else run) / FIRST),
        "sites": described,
    } | describe_tokens(model)
    folder = Path(folder)
    with replacing(folder / TENSORS) as file:
        file.write(content)
    write_json(folder / INFO, info)


def describe_sites(model: nn.Module) -> dict[str, Any]:
    """What adapter.json says of each site. It reads all the codes of the bases, so say it once where there are many
    saves."""
    sites = adapted_sites(model).items()
    return {name: _identity(site.base, _digest_of) | _started(site.start) for name, site in sites}


def describe_tokens(model: nn.Module) -> dict[str, Any]:
    """What adapter.json says of tokens with rows of their own; nothing where there are none."""
    own = rows_of(model)
    return {} if own is None else {"tokens": [{"text": t.text, "id": t.id} for t in own.table.tokens]}


def is_whole_pair(folder: str | Path) -> bool:
    """Are there both files in `folder`, and of the same save?"""
    try:
        content, info = (Path(folder) / TENSORS).read_bytes(), read_adapter_json(folder)
    except (OSError, QtuneError):
        return False
    return len(content) == info["bytes"] and hashlib.sha256(content).hexdigest() == info["sha256"]


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _started(start: Start | None) -> dict[str, Any]:
    return {} if start is None else {"start": asdict(start)}


def kept_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Name in the checkpoint -> layer whose codes are the run's own: what packing the base gives would be others."""
    return {m.name: m for m in model.modules() if isinstance(m, QuantLinear) and m.own}


def starts_elsewhere(model: nn.Module) -> bool:
    """Does the adapter that `model` carries start as something else than the identity?"""
    return any(site.start is not None or site.adapter.bound is not None for site in adapted_sites(model).values())


def save_first(model: nn.Module, folder: str | Path) -> None:
    """Write the values that the adapter has now, before training, unless it starts as the identity."""
    if starts_elsewhere(model):
        tensors = {name: value.detach().cpu().contiguous() for name, value in _adapters(model).items()}
        with replacing(Path(folder) / FIRST) as file:
            file.write(safetensors.torch.save(tensors, {"format": "pt"}))


def load_first(model: nn.Module, folder: str | Path, adapter: str | Path) -> None:
    """Give the adapter that `model` carries its values from before training. folder: of the run; adapter: where its
    adapter.json lies, which knows the file.

    Raises QtuneError where the run does not hold them, or holds others' names or shapes.
    """
    fill_first(adapted_sites(model), getattr(model, SHARED, None), folder, adapter)


def fill_first(sites: Mapping[str, Adapted], shared: nn.Module | None, folder: str | Path, adapter: str | Path) -> None:
    """As `load_first`, of adapters that are in no model."""
    path = Path(folder) / FIRST
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != read_adapter_json(adapter).get("first"):
            raise QtuneError("Q403", f"{path} is not the file that {INFO} was written for: its sha256 differs")
        tensors = safetensors.torch.load(content)
    except OSError as error:
        raise QtuneError(
            "Q403", f"cannot read {path}, which holds the adapter's first values: {error.strerror or error}"
        ) from error
    except safetensors.SafetensorError as error:
        raise QtuneError("Q403", f"{path} is no safetensors file: {error}") from error
    expected = _state(sites, shared)
    if faults := _compare(expected, tensors, set(), FIRST):
        raise QtuneError("Q404", f"{path} does not fit the adapter: {'; '.join(faults[:SHOWN])}")
    _fill(expected, tensors)
    for site in sites.values():
        site.adapter.prepare(site.base)


def _fill(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        if value.is_meta:  # of a model without weights: the tensor itself takes the place
            real = tensors[name]
            swap_tensors(value, nn.Parameter(real, value.requires_grad) if isinstance(value, nn.Parameter) else real)
        else:
            value.data = tensors[name].to(value.device)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name in the file -> parameter or buffer of the adapter that `model` carries, and its rows of new tokens."""
    own = rows_of(model)
    return _adapters(model) | ({} if own is None else own.tensors())


def _adapters(model: nn.Module) -> dict[str, Tensor]:
    return _state(adapted_sites(model), getattr(model, SHARED, None))


def load_adapter(model: nn.Module, folder: str | Path, *, other_base: bool = False) -> dict[str, Adapted]:
    """Put the saved adapter on `model`, bit for bit and in the dtype it was saved in. Returns adapted modules by site.

    other_base: take it onto other weights or another scheme; names and shapes must fit all the same.
    Raises QtuneError with everything that does not fit; then the model is as before.
    """
    refuse_adapted(model)
    fitted = fit_adapter(model, packed_layers(model), folder, other_base=other_base)
    install(model, fitted.sites, fitted.shared)
    if fitted.rows is not None:
        install_rows(model, fitted.rows)
    return adapted_sites(model)


@dataclass(frozen=True)
class Fitted:
    """A saved adapter on the layers of a model, whole, and in the model not yet. rows: of new tokens."""

    spec: AdapterSpec
    sites: dict[str, Adapted]
    shared: nn.Module | None
    rows: Built | None


def fit_adapter(
    model: nn.Module,
    layers: Mapping[str, QuantLinear],
    folder: str | Path,
    *,
    other_base: bool = False,
    digest: Digest | None = None,
) -> Fitted:
    """Read the adapter in `folder` for the packed layers of `model`, by name; the model stays as it is.

    digest: what knows those of layers already. Raises QtuneError with everything that does not fit.
    """
    info = read_adapter_json(folder)
    tensors = _read_tensors(Path(folder) / TENSORS, info)
    spec = AdapterSpec.from_dict(info["adapter"]).checked()
    bases, faults = _find_bases(layers, info["sites"], None if other_base else digest or _digest_of)
    sites, shared = build(bases, spec, any_scheme=other_base) if bases else ({}, None)
    tokens = [Token(token["text"], token["id"]) for token in info.get("tokens", ())]
    own = build_rows(model, tokens) if tokens else None
    for name, site in sites.items():
        site.adapter.resize(_sizes(site.adapter, tensors, name))
    expected = _state(sites, shared) | ({} if own is None else own.tensors())
    faults += _compare(expected, tensors, set(info["sites"]) - set(bases))
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:SHOWN])
        raise QtuneError("Q404", f"the adapter in {folder} does not fit this model:{listed}{more}")
    _fill(expected, tensors)
    for name, site in sites.items():
        site.start = Start(**info["sites"][name]["start"]) if "start" in info["sites"][name] else None
        site.adapter.prepare(site.base)
    return Fitted(spec, sites, shared, own)


def read_adapter_json(folder: str | Path) -> dict[str, Any]:
    """What `adapter.json` says: format, qtune, adapter, base, parameters, bytes, sha256, sites.

    Raises QtuneError where the file is absent, damaged or of another format.
    """
    path = Path(folder) / INFO
    try:
        info = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise QtuneError(
            "Q402",
            f"cannot read {path}: {error.strerror or error}; a folder with an adapter holds {INFO} and {TENSORS}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise QtuneError("Q402", f"{path} is no JSON text ({error}); is it cut off?") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise QtuneError("Q402", f"{path} has format {found!r}; this qtune reads format {FORMAT}")
    needed = {"adapter": dict, "base": dict, "bytes": int, "sha256": str, "sites": dict}
    wrong = [key for key, kind in needed.items() if not isinstance(info.get(key), kind)]
    if "sites" not in wrong and not all(map(_is_site, info["sites"].values())):
        wrong.append("sites")
    if "adapter" not in wrong and not _is_spec(info["adapter"]):
        wrong.append("adapter")
    if not isinstance(info.get("kept", 0), int):
        wrong.append("kept")
    if not _are_tokens(info.get("tokens", [])):
        wrong.append("tokens")
    if wrong:
        raise QtuneError("Q402", f"{path} lacks or garbles {', '.join(wrong)}")
    return info


def _is_site(site: Any) -> bool:
    """Is it what `describe_sites` says of one?"""
    if not isinstance(site, dict) or not isinstance(site.get("magnitude"), float):
        return False
    start = site.get("start", {"before": 0.0, "after": 0.0, "weighted": False})
    kinds: dict[str, Any] = {"before": (int, float), "after": (int, float), "weighted": bool}
    return isinstance(start, dict) and set(start) == set(kinds) and all(isinstance(start[k], kinds[k]) for k in kinds)


def _is_spec(value: Mapping[str, Any]) -> bool:
    """Is it what AdapterSpec.to_dict gives, as far as its kinds go?"""
    targets = value.get("targets", [])
    return (
        isinstance(value.get("method"), str) and isinstance(targets, list) and all(isinstance(t, str) for t in targets)
    )


def _are_tokens(given: Any) -> bool:
    fine = isinstance(given, list) and all(
        isinstance(token, dict) and isinstance(token.get("text"), str) and type(token.get("id")) is int
        for token in given
    )  # fmt: skip
    return fine and len({token["id"] for token in given if token["id"] >= 0}) == len(given)


def _read_tensors(path: Path, info: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QtuneError("Q403", f"cannot read {path}: {error.strerror or error}") from error
    if len(content) != info["bytes"]:
        raise QtuneError(
            "Q403", f"{path} has {len(content)} bytes, {INFO} says {info['bytes']}: cut off, or of another save"
        )
    if hashlib.sha256(content).hexdigest() != info["sha256"]:
        raise QtuneError(
            "Q403",
            f"{path} is not the file that {INFO} was written for: its sha256 differs (damaged, or of another save)",
        )
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise QtuneError("Q403", f"{path} is no safetensors file: {error}") from error


def _digest_of(base: QuantLinear, whole: bool) -> str:
    return base.digest(whole=whole)


def _find_bases(
    layers: Mapping[str, QuantLinear], sites: Mapping[str, Any], digest: Digest | None
) -> tuple[dict[str, QuantLinear], list[str]]:
    """The layers of these names, and a fault for each that is absent or, where there is a `digest`, packed
    otherwise."""
    bases = {name: layer for name, layer in layers.items() if name in sites}
    faults = [f"{name}: the model has no packed linear layer of this name" for name in sites if name not in bases]
    for name, base in bases.items() if digest else ():
        assert digest is not None
        there, here = sites[name], _identity(base, digest)
        if there.get("scheme") != here["scheme"]:
            faults.append(f"{name}: trained on {there.get('scheme')}, here the layer is {base.scheme}")
        elif not _same_codes(there, here, digest(base, True)):
            digests = f"digest {str(there.get('digest'))[:12]}, here {here['digest'][:12]}"
            faults.append(f"{name}: trained on other weights ({digests})")
    return bases, faults


def _same_codes(there: Mapping[str, Any], here: Mapping[str, Any], whole: str) -> bool:
    """Is `here` the layer that an adapter was trained on? Codes of the run's own are stored, so that every bit of them
    counts, be they here from the run or, by now, from a packed folder. whole: the digest of all bits."""
    if there.get("digest") not in (here["digest"], whole):
        return False
    return isclose(there["magnitude"], here["magnitude"], rel_tol=1e-4)


def _identity(base: QuantLinear, digest: Digest) -> dict[str, Any]:
    return {"scheme": str(base.scheme), "digest": digest(base, base.own), "magnitude": base.magnitude()}


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


def _sizes(adapter: Adapter, tensors: Mapping[str, Tensor], site: str) -> dict[str, int]:
    """The sizes of what grows in training, as the file has them."""
    found: dict[str, int] = {}
    for name, (dim, what) in adapter.grows.items():
        tensor = tensors.get(f"{site}.{name}")
        if tensor is not None and tensor.dim() > dim:
            found.setdefault(what, tensor.shape[dim])
    return found


def _compare(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], absent: set[str], file: str = TENSORS
) -> list[str]:
    """Faults between what an adapter needs and what its file holds; tensors of absent sites are not reported again."""
    faults = [f"{name}: missing from {file}" for name in expected if name not in tensors]
    for name, value in tensors.items():
        if name not in expected:
            if not any(name.startswith(f"{site}.") for site in absent):
                faults.append(f"{name}: in {file}, but the method has no such parameter")
        elif value.shape != expected[name].shape or not _fits(value, expected[name]):
            kind = "floating point" if expected[name].is_floating_point() else expected[name].dtype
            wanted = f"{tuple(expected[name].shape)} {kind}"
            faults.append(f"{name}: {tuple(value.shape)} {value.dtype} in {file}, the layer needs {wanted}")
    return faults


def _fits(value: Tensor, expected: Tensor) -> bool:
    """Floats come in the dtype that they were saved in; places of coefficients only in their own."""
    return value.is_floating_point() if expected.is_floating_point() else value.dtype == expected.dtype
