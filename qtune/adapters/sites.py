"""Adapters in a model: which layers they go to, how they start there, and how they are put in.

A start that is no identity is measured: it may not be farther from the weight before packing than its method's `bound`
times the base alone, after the factors have their final dtype.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import QtuneError
from ..quant import Dense, QuantLinear, matches
from ..quant.scheme import DTYPES
from .base import ALL_LINEAR, METHODS, PROBE_ROWS, Adapted, AdapterSpec, Source, Start
from .starts import check_gram

MANY = "qtune_adapters"  # the model's attribute that holds its adapters where many are loaded (many.py)
SHARED = "adapter_shared"  # the model's child that holds what a method's sites share
SLACK = 1e-5  # of a distance: sums in fp32


def find_sites(model: nn.Module, targets: Iterable[str]) -> dict[str, QuantLinear]:
    """Sites by name: QuantLinears whose full name or its end matches a target; `all-linear` is every one but the head
    and a mixture's experts, which `*.experts.*` takes.

    Raises QtuneError naming each target that matches nothing, with the names that exist.
    """
    bases = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    left = {name for name, m in bases.items() if m.routed or name.rsplit(".", 1)[-1] in ("lm_head", "embed_out")}
    sites: dict[str, QuantLinear] = {}
    missing = []
    for target in targets:
        found = (
            [n for n in bases if n not in left] if target == ALL_LINEAR else [n for n in bases if matches(n, target)]
        )
        if not found:
            missing.append(target)
        sites.update({name: bases[name] for name in found})
    if missing:
        ends = sorted({name.rsplit(".", 1)[-1] for name in bases})
        raise QtuneError(
            "Q109",
            f"adapter.targets {', '.join(map(repr, missing))} match no packed linear layer; "
            f"legal: {ALL_LINEAR}, {', '.join(ends)}, or a pattern",
        )
    return {name: bases[name] for name in bases if name in sites}


def adapt(
    model: nn.Module,
    spec: AdapterSpec,
    sources: Mapping[str, Source] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Adapted]:
    """Put an adapter on each site of `model`, in place; everything else is frozen. Returns the adapted modules by site.

    sources: what is known of layers before packing, by site. seed: first values depend on it and on the site's name,
    not on the order. On meta there are no values.
    """
    spec.checked()
    method = METHODS[spec.method]
    refuse_adapted(model)
    sites, shared = build(find_sites(model, spec.targets or method.targets), spec)
    for name, site in sites.items():
        if not site.base.packed.is_meta:
            site.start = begin(name, site, spec, (sources or {}).get(name), seed)
    return install(model, sites, shared)


def begin(name: str, site: Adapted, spec: AdapterSpec, source: Source | None, seed: int) -> Start | None:
    """Give the adapter at site `name` its first values. Returns how far from the weight it starts, where it is not the
    identity.

    Raises QtuneError where the source lacks what the method needs, and where the start is farther from the weight than
    the method's `bound` allows.
    """
    if missing := [what for what in sorted(spec.needs()) if getattr(source, what, None) is None]:
        raise QtuneError(
            "Q704",
            f"{name}: method {spec.method} starts from the {' and the '.join(missing)} of a layer before it is packed; "
            "load the model and start the adapter together with qtune.start",
        )
    bound, base = type(site.adapter).bound, site.base
    if source is not None and source.gram is not None:
        check_gram(source.gram, base, name)
    before = None if bound is None or source is None else distance(source, base.dequantize())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # only the CPU's generator: torch.manual_seed would leave those of all accelerators reseeded
        torch.default_generator.manual_seed(zlib.crc32(f"{seed}.{name}".encode()))
        site.adapter.reset(base, source)
    if before is None or bound is None or source is None:
        return None
    start = Start(before, distance(source, site.merged()[0]), source.gram is not None)
    rounding = torch.finfo(DTYPES[base.scheme.dtype] if isinstance(base.scheme, Dense) else torch.float32).eps
    if bound > 1:  # other codes err by another draw: what that scatters, and small layers scatter by more than 1 %
        bound += 3 / (base.in_features * base.out_features) ** 0.5
    if not start.after <= start.before * bound * (1 + SLACK) + rounding:
        raise QtuneError(
            "Q705",
            f"{name}: {spec.method} starts at a distance of {start.after:.4g} from the original weight, "
            f"{base.scheme} alone is at {start.before:.4g}: the start made it worse. Leave the layer out of "
            "adapter.targets, or take another method",
        )
    return start


@torch.no_grad()
def distance(source: Source, weight: Tensor) -> float:
    """||W - weight|| / ||W||, weighted by the gram where there is one; NaN where that has no value. weight [out, in]
    fp32 is overwritten."""
    size = error = 0.0
    gram = None if source.gram is None else source.gram.to(weight)
    unit = _unit(source.weight)
    buffers = weight.new_empty(2, min(PROBE_ROWS, len(weight)), weight.shape[1])  # fresh pages cost more than sums
    for rows, part in zip(source.weight.split(PROBE_ROWS), weight.split(PROBE_ROWS), strict=True):
        own, product = buffers[:, : len(rows)]
        own.copy_(rows).div_(unit)
        size += _square(own, gram, product)
        error += _square(part.div_(unit).sub_(own), gram, product)
    return 0.0 if size <= 0 else (max(error, 0.0) / size) ** 0.5


def _unit(weight: Tensor) -> float:
    """max |W|, in which squares are taken: those of 1e20 and 1e-23 are no fp32 numbers."""
    return max(abs(float(end)) for end in torch.aminmax(weight)) or 1.0


def _square(rows: Tensor, gram: Tensor | None, product: Tensor) -> float:
    """tr(E E^T) or tr(E G E^T) of rows E [n, in]. product: room for E G."""
    other = rows if gram is None else torch.mm(rows, gram, out=product)
    return float(torch.dot(rows.reshape(-1), other.reshape(-1)))


def build(
    bases: Mapping[str, QuantLinear],
    spec: AdapterSpec,
    *,
    any_scheme: bool = False,
    among: Iterable[str] | None = None,
) -> tuple[dict[str, Adapted], nn.Module | None]:
    """Adapters for `bases` by site, and what they share; no values yet, and the model that the bases are in is
    untouched.

    any_scheme: also where the method makes no sense to start on the scheme. among: the names of all sites, where
    `bases` are not all. Raises QtuneError with what does not fit.
    """
    method = METHODS[spec.method]
    varied = method.varied(list(bases if among is None else among), spec.resolved())
    shared = method.shared(list(bases.values()), **spec.options)
    extra = {} if shared is None else {"shared": shared}
    sites, faults = {}, {}
    for name, base in bases.items():
        if not any_scheme and (why := method.refuses(base.scheme, spec.resolved())):
            faults[name] = why
            continue
        try:
            sites[name] = Adapted(base, method(base, **{**spec.options, **varied.get(name, {})}, **extra))
        except QtuneError as error:
            faults[name] = str(error)
    if faults:
        raise QtuneError("Q107", _by_reason(faults))
    return sites, shared


def _by_reason(faults: Mapping[str, str]) -> str:
    """Each reason once, with the sites that it holds for."""
    names: dict[str, list[str]] = {}
    for name, why in faults.items():
        names.setdefault(why, []).append(name)
    return "; ".join(
        f"{why} ({', '.join(n[:3])}{f' and {len(n) - 3} more' * (len(n) > 3)})" for why, n in names.items()
    )


def install(model: nn.Module, sites: Mapping[str, Adapted], shared: nn.Module | None) -> dict[str, Adapted]:
    """Put built adapters into `model`, in place; everything else is frozen."""
    model.requires_grad_(False)
    for name, site in sites.items():
        place(model, name, site)
    if shared is not None:
        model.add_module(SHARED, shared)
    return adapted_sites(model)


def refuse_adapted(model: nn.Module) -> None:
    """Raises QtuneError where the model carries an adapter, or has many loaded."""
    if adapted_sites(model) or hasattr(model, MANY):
        raise QtuneError("Q405", "this model already carries an adapter; load the base again to put another one on it")


def place(model: nn.Module, name: str, site: nn.Module) -> None:
    """Put one site into `model`, where its base stands."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, site)


def adapted_sites(model: nn.Module) -> dict[str, Adapted]:
    """Site name -> Adapted, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off: off, the model is its base."""
    for site in adapted_sites(model).values():
        site.enabled = enabled
