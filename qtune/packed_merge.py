"""`qtune merge --keep SCHEME`: what was learned goes into the codes of a packed checkpoint, as large as the packed
base, which `load` reads without an adapter.

Exact where the method can say its change by the parts of the base's own scheme (`merge_into`: QA-LoRA's zero points):
verified as a merge is, each layer within what rounding W to bf16 would move it. Else the merged weight is packed again,
and a change smaller than the steps between codes gets lost; told for each layer and all together, with d what was
learned, W the base and P packing and unpacking:

    share = <P(W + d) - W, d> / |d|^2          1: all of d is there, 0: nothing of it
Codes are the nearest ones, or GPTQ's on the merged weight by text (`quant/calibrate.py`), whose inputs come through the
layers that are packed already. What is left below a stated share is refused. Left out: error feedback without data.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import METHODS, Adapted, adapted_sites
from .adapters.sites import enable_adapters, place
from .card import model_card
from .errors import QtuneError, one_of
from .export import MergeReport, check_merge, prompts_of, verified_as
from .memory.layers import device_of
from .model import load, save_quantized
from .model.layerwise import decoder_layers
from .model.loading import packed_sites
from .quant import Dense, Parts, QuantLinear, Scheme, scheme_from
from .quant.calibrate import CODES, choose, refuses, too_little
from .recipe import Recipe
from .runs import Run, calibration_text, licences
from .safe_io import write_text
from .screen import Screen
from .sections import entries
from .verify import Reference, Verification, compared, in_dtype, layer_error, logits_of, worst_layer

ROUNDED = torch.bfloat16  # the dtype whose rounding of W bounds what a layer's exact parts may be off
LEAST = 0.5  # share of what was learned that packing must leave, unless told so


@dataclass(frozen=True)
class Kept:
    """What packing left of what was learned. share: of all layers together; layers: of each. kl: KL(trained || packed)
    a position; kl_base: KL(trained || base without the adapter), what losing all of it would cost."""

    share: float
    layers: dict[str, float]
    kl: float
    kl_base: float

    def lines(self) -> list[str]:
        """For a person."""
        low = min(self.layers, key=lambda name: self.layers[name])
        return [
            f"kept     {self.share:.1%} of what was learned; least in {low}: {self.layers[low]:.1%}",
            f"         KL(trained || packed) {self.kl:.2e} nats, without the adapter {self.kl_base:.2e}",
        ]


def scheme_of(recipe: Recipe, keep: str) -> Scheme:
    """The scheme that --keep names: the recipe's own with its options, else one with its defaults."""
    own = recipe.scheme
    if isinstance(own, Scheme) and own.name == keep:
        return own
    return scheme_from(keep)


def is_exact(recipe: Recipe, scheme: Scheme) -> bool:
    """Can the method say its change by the parts of this scheme?"""
    return METHODS[recipe.adapter.method].has_own("merge_into") and recipe.scheme == scheme


def check_packed(recipe: Recipe, keep: str, out: Path, overwrite: bool, codes: str = "nearest") -> Scheme:
    """The scheme to pack in. Raises QtuneError for what is known to be wrong before anything is loaded."""
    scheme = scheme_of(recipe, keep)
    if isinstance(scheme, Dense):
        raise QtuneError("Q801", "--keep dense keeps nothing packed; merge without --keep, with --dtype")
    if codes not in CODES:
        raise one_of("--codes", codes, CODES)
    if why := refuses(scheme, codes):
        raise QtuneError("Q702", why)
    if not isinstance(recipe.scheme, Scheme):
        raise QtuneError(
            "Q801", f"the base is packed as {recipe.scheme}, which --keep has no name for; merge without it"
        )
    if named := (*recipe.tokens.add, *recipe.tokens.train):
        raise QtuneError(
            "Q801", f"tokens with rows of their own ({', '.join(named[:3])}) are not packed; merge without --keep"
        )
    check_merge(recipe, out, "bfloat16", "trained", overwrite)
    return scheme


def merge_packed(
    run: Run,
    out: Path,
    keep: str,
    *,
    codes: str = "nearest",
    least: float = LEAST,
    screen: Screen | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write the packed checkpoint of a run with what was learned in it, verify it, and only then give it the name
    `out`. keep: name of a scheme; codes: one of CODES; least: share of what was learned that must be left. The run's
    model is merged afterwards and has no adapter.

    Raises QtuneError as `merge` does, and where packing leaves less.
    """
    screen = screen or Screen(quiet=True)
    scheme = check_packed(run.recipe, keep, out, overwrite, codes)
    if is_exact(run.recipe, scheme):
        return verified_as(out, lambda folder: _write_exact(run, out, folder, screen))
    return verified_as(out, lambda folder: _write_again(run, out, folder, scheme, codes, least, screen))


# ---- by the method's own parts


def _write_exact(run: Run, out: Path, folder: Path, screen: Screen) -> MergeReport:
    reference = Reference.of(run.model, prompts_of(run), ROUNDED)
    layers = len(adapted_sites(run.model))
    error, worst = _merge_sites(run, screen)
    _save(run, folder)
    logits = _logits(run, folder, reference.prompts)
    return _report(run, out, folder, compared(reference, logits, layers, error, worst), [])


def _merge_sites(run: Run, screen: Screen) -> tuple[float, str]:
    """Put what each adapter learned into its base, which takes the adapter's place. Returns the largest error of a
    layer as a fraction of its bound, and which layer; NaN wins."""
    sites = adapted_sites(run.model)
    with screen.bar("merging", len(sites)) as advance:

        def merge_one(name: str, site: Adapted, x: Tensor) -> float:
            merged: QuantLinear = deepcopy(site.base)
            if not site.adapter.merge_into(merged):
                raise QtuneError("Q801", f"{name}: what was learned cannot be said by the parts of {merged.scheme}")
            bias = None if merged.bias is None else merged.bias.float().cpu()
            error = layer_error(site, merged.dequantize(torch.float32).cpu(), bias, x, ROUNDED)
            place(run.model, name, merged)  # type: ignore[arg-type]
            advance(1)
            return error

        return worst_layer(sites, merge_one)


# ---- packed again


def _write_again(
    run: Run, out: Path, folder: Path, scheme: Scheme, codes: str, least: float, screen: Screen
) -> MergeReport:
    model, prompts = run.model, prompts_of(run)
    windows = None if codes == "nearest" else _text(run, codes, screen)
    trained = Reference.of(model, prompts, ROUNDED)
    enable_adapters(model, False)
    with in_dtype(model, torch.float32):
        kl_base = float(trained.kl(logits_of(model, prompts)).mean())
    enable_adapters(model, True)
    shares, share = _pack_sites(run, scheme, codes, windows, screen)
    if not share >= least:
        low = sorted(shares, key=lambda name: shares[name])[:3]
        raise QtuneError(
            "Q814",
            f"packed as {scheme} ({codes}), {share:.1%} of what was learned is left, less than {least:.0%} "
            f"(least in {', '.join(f'{name}: {shares[name]:.1%}' for name in low)}). Merge without --keep, choose a "
            f"finer scheme or other --codes ({', '.join(CODES)}), or give --least-kept {max(share, 0.0):.2g}",
        )
    model.qtune = replace(model.qtune, scheme=scheme)
    reference = Reference.of(model, prompts, ROUNDED)  # of the packed model: did its file become what is in memory?
    _save(run, folder)
    verification = compared(reference, _logits(run, folder, prompts), len(shares), 0.0, next(iter(shares)))
    kept = Kept(share, shares, float(trained.kl(reference.logits).mean()), kl_base)
    for line in kept.lines():
        screen.line(line)
    return replace(_report(run, out, folder, verification, kept.lines()), kept=asdict(kept))


def _text(run: Run, codes: str, screen: Screen) -> Tensor:
    """Calibration windows [samples, length]: of calibrate.data, or of the training data."""
    keys = run.recipe
    data = keys.calibrate.data or next((source.file for source in entries(keys.data.train or "")), None)
    recipe = replace(keys, calibrate=replace(keys.calibrate, codes=codes, data=data))
    windows = calibration_text(recipe, run.tokenizer, screen)
    assert windows is not None
    return windows


@torch.no_grad()
def _pack_sites(
    run: Run, scheme: Scheme, codes: str, windows: Tensor | None, screen: Screen
) -> tuple[dict[str, float], float]:
    """Put packed layers in the place of all adapters, and of what is packed in another scheme. Returns the share of
    each adapted layer, and of all together."""
    model: Any = run.model
    shares, along, whole = {}, 0.0, 0.0
    packed = {name: layer for name, layer in packed_sites(model).items() if not isinstance(layer.scheme, Dense)}
    sites, head = adapted_sites(model), model.get_output_embeddings()
    fixed = {name for name, module in model.named_modules() if module is head}  # packed as embeddings are, or dense
    bases = {f"{name}.base" for name in sites}
    others = {name: layer for name, layer in packed.items() if name not in bases | fixed and layer.scheme != scheme}
    groups = _groups(model, [*sites, *others]) if windows is not None else [[*sites, *others]]
    with screen.bar("packing", len(sites) + len(others)) as advance:
        for names in groups:
            grams = {} if windows is None else _grams(model, names, windows, screen)
            for name in names:
                site = sites.get(name)
                base = others[name] if site is None else site.base
                before = base.dequantize(torch.float32)
                after, bias = (before, base.bias) if site is None else site.merged()
                kind = base.scheme if name in fixed or isinstance(base.scheme, Dense) else scheme
                how = codes if name in grams and kind is scheme else "nearest"
                made = _packed_layer(base, name, kind, after, bias, partial(choose, gram=grams.get(name), how=how))
                place(model, name, made)  # type: ignore[arg-type]
                if site is not None:
                    change = after - before
                    kept = float(((made.dequantize(torch.float32) - before) * change).sum())
                    size = float(change.square().sum())
                    shares[name] = kept / size if size else 1.0
                    along, whole = along + kept, whole + size
                advance(1)
    return shares, along / whole if whole else 1.0


def _packed_layer(
    base: QuantLinear, name: str, scheme: Scheme, weight: Tensor, bias: Tensor | None, pack: Callable[..., Parts]
) -> QuantLinear:
    """A layer as `base` is, of `weight` in `scheme`."""
    if bias is not None and base.bias is None:
        raise QtuneError("Q805", f"{name}: the adapter adds a bias, which a checkpoint of this model cannot hold")
    made = QuantLinear(
        base.in_features, base.out_features, scheme, bias=base.bias is not None, dtype=base.dtype,
        device=base.device, name=name, conv1d=base.conv1d,
    )  # fmt: skip
    made.routed = base.routed
    made.set_parts(pack(scheme, weight, name=name))
    if made.bias is not None and bias is not None:
        made.bias.data.copy_(bias)
    return made


def _groups(model: Any, names: list[str]) -> list[list[str]]:
    """The sites of each decoder layer, in the order in which text meets them; those outside of the layers last."""
    stack, layers = decoder_layers(model)
    groups: dict[int, list[str]] = {}
    for name in names:
        inside = name.startswith(stack + ".")
        groups.setdefault(int(name[len(stack) + 1 :].partition(".")[0]) if inside else len(layers), []).append(name)
    return [groups[number] for number in sorted(groups)]


def _grams(model: Any, names: list[str], windows: Tensor, screen: Screen) -> dict[str, Tensor]:
    """Second moments [in, in], fp32, of the inputs of each layer over the text. An expert that too little text reaches
    has none, which is told: its codes are the nearest. Raises QtuneError for any other layer of which that is true."""
    grams: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def see(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        grams[name] = rows.T @ rows if name not in grams else grams[name].addmm_(rows.T, rows)
        counts[name] += len(rows)

    with _watched(model, names, see):
        for window in windows:
            model(input_ids=window[None].to(device_of(model)), use_cache=False)
    few = {}
    for name in names:
        layer = model.get_submodule(name)
        base = layer if isinstance(layer, QuantLinear) else layer.base
        if why := too_little(counts[name], base.in_features):
            if not base.routed:
                raise QtuneError("Q706", f"{name}: {why}")
            few[name] = counts[name]
    if few:
        screen.line(f"note: too little text reaches {', '.join(few)}: the nearest codes are taken", "yellow")
    return {name: gram.div_(counts[name]) for name, gram in grams.items() if name not in few}


@contextmanager
def _watched(model: nn.Module, names: list[str], see: Any) -> Iterator[None]:
    """While it lasts, see(name, input) is called for each input of the named layers."""
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- the folder


def _save(run: Run, folder: Path) -> None:
    save_quantized(run.model, run.tokenizer, folder)
    for path in licences(run.recipe.model):
        shutil.copyfile(path, folder / path.name)


def _logits(run: Run, folder: Path, prompts: list[list[int]]) -> list[Tensor]:
    """Of the checkpoint as it is read, in fp32."""
    written = load(folder, None, dtype=run.model.qtune.dtype, device=device_of(run.model))
    with in_dtype(written, torch.float32):
        return logits_of(written, prompts)


def _report(run: Run, out: Path, folder: Path, verification: Verification, more: list[str]) -> MergeReport:
    scheme = str(run.model.qtune.scheme)
    write_text(folder / "README.md", model_card(run, scheme, "packed", [*verification.lines(), *more]))
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return MergeReport(out, scheme, "packed", nbytes, verification)
