"""`qtune merge --keep SCHEME`: what was learned goes into the codes of a packed checkpoint, as large as the packed
base, which `load` reads without an adapter.

Exact where the method can say its change by the parts of the base's own scheme (`merge_into`: QA-LoRA's zero points):
verified as a merge is, each layer within what rounding W to bf16 would move it. Else the merged weight is packed again
(qtune/repacking.py), and a change smaller than the steps between codes gets lost; told for each layer and all together,
with d what was learned, W the base and P packing and unpacking:

    share = <P(W + d) - W, d> / |d|^2          1: all of d is there, 0: nothing of it
What is left below a stated share is refused. With a remainder, what packing lost becomes the adapter of a run of its
own, whose base is the packed checkpoint that it lies in; then the share is that of the two together.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from math import floor, inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import METHODS, Adapted, AdapterSpec, adapted_sites
from .adapters.files import TENSORS, load_adapter, save_adapter
from .adapters.sites import enable_adapters, install, place
from .card import model_card
from .errors import QtuneError, one_of
from .export import REMAINDER, MergeReport, check_merge, prompts_of, verified_as
from .memory.layers import device_of
from .model import load, save_quantized
from .model.loading import packed_sites
from .quant import Dense, QuantLinear, Scheme, scheme_from
from .quant.calibrate import refuses
from .recipe import Recipe
from .repacking import MERGE_CODES, Repacked, Way, repack
from .runs import COMBINED, RECIPE, Run, anchored, calibration_text, licences
from .safe_io import write_json, write_text
from .screen import Screen, size
from .sections import CalibrateKeys, entries
from .verify import Reference, Verification, compared, in_dtype, layer_error, logits_of, worst_layer

ROUNDED = torch.bfloat16  # the dtype whose rounding of W bounds what a layer's exact parts may be off
LEAST = 0.5  # share of what was learned that packing must leave, unless told so


def rounded_down(share: float) -> str:
    """To three places, so that a share passes where this is the least that is taken."""
    return f"{floor(share * 1000) / 1000:g}"


@dataclass(frozen=True)
class Remainder:
    """What packing lost, as a run. layers, share, kl: as of Kept, of packed layers and remainder together."""

    folder: str
    rank: int
    nbytes: int
    share: float
    layers: dict[str, float]
    kl: float


@dataclass(frozen=True)
class Kept:
    """What packing left of what was learned. share: of all layers together; layers: of each. kl: KL(trained || packed)
    a position; kl_base: KL(trained || base without the adapter), what losing all of it would cost."""

    share: float
    layers: dict[str, float]
    kl: float
    kl_base: float
    remainder: Remainder | None = None

    def lines(self) -> list[str]:
        """For a person."""
        low = min(self.layers, key=lambda name: self.layers[name])
        lines = [
            f"kept     {self.share:.1%} of what was learned; least in {low}: {self.layers[low]:.1%}",
            f"         KL(trained || packed) {self.kl:.2e} nats, without the adapter {self.kl_base:.2e}",
        ]
        if (rest := self.remainder) is not None:
            where = f"a run of its own, {size(rest.nbytes)}: qtune chat {rest.folder}"
            lines.append(f"beside   the remainder of rank {rest.rank}, {where}")
            lines.append(f"         both together: {rest.share:.1%} of what was learned, KL {rest.kl:.2e} nats")
        return lines


def scheme_of(recipe: Recipe, keep: str) -> Scheme:
    """The scheme that --keep names: the recipe's own with its options, else one with its defaults."""
    own = recipe.scheme
    if isinstance(own, Scheme) and own.name == keep:
        return own
    return scheme_from(keep)


def is_exact(recipe: Recipe, scheme: Scheme) -> bool:
    """Can the method say its change by the parts of this scheme?"""
    return METHODS[recipe.adapter.method].has_own("merge_into") and recipe.scheme == scheme


def check_packed(
    recipe: Recipe, keep: str, out: Path, overwrite: bool, codes: str = "nearest", remainder: int | None = None
) -> Way:
    """How to pack. Raises QtuneError for what is known to be wrong before anything is loaded."""
    scheme = scheme_of(recipe, keep)
    if isinstance(scheme, Dense):
        raise QtuneError("Q801", "--keep dense keeps nothing packed; merge without --keep, with --dtype")
    if codes not in MERGE_CODES:
        raise one_of("--codes", codes, MERGE_CODES)
    way = Way(scheme, codes, remainder)
    if why := refuses(scheme, way.choice):
        raise QtuneError("Q702", why)
    if remainder is not None and remainder < 1:
        raise QtuneError("Q102", f"--remainder must be at least 1, not {remainder}")
    if remainder is not None and is_exact(recipe, scheme):
        raise QtuneError(
            "Q103", f"--remainder: {recipe.adapter.method} goes into {scheme} exactly, so that nothing remains; leave "
            "it out"
        )  # fmt: skip
    if not isinstance(recipe.scheme, Scheme):
        raise QtuneError(
            "Q801", f"the base is packed as {recipe.scheme}, which --keep has no name for; merge without it"
        )
    if named := (*recipe.tokens.add, *recipe.tokens.train):
        raise QtuneError(
            "Q801", f"tokens with rows of their own ({', '.join(named[:3])}) are not packed; merge without --keep"
        )
    check_merge(recipe, out, "bfloat16", "trained", overwrite)
    return way


def merge_packed(
    run: Run,
    out: Path,
    keep: str,
    *,
    codes: str = "nearest",
    least: float = LEAST,
    remainder: int | None = None,
    screen: Screen | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write the packed checkpoint of a run with what was learned in it, verify it, and only then give it the name
    `out`. keep: name of a scheme; codes: one of MERGE_CODES; least: share of what was learned that must be left;
    remainder: rank of the adapter that holds what packing lost, a run in the folder `remainder` of `out`. The run's
    model is merged afterwards and has no adapter but that.

    Raises QtuneError as `merge` does, and where packing leaves less.
    """
    screen = screen or Screen(quiet=True)
    way = check_packed(run.recipe, keep, out, overwrite, codes, remainder)
    if is_exact(run.recipe, way.scheme):
        return verified_as(out, lambda folder: _write_exact(run, out, folder, screen))
    return verified_as(out, lambda folder: _write_again(run, out, folder, way, least, screen))


# ---- by the method's own parts


def _write_exact(run: Run, out: Path, folder: Path, screen: Screen) -> MergeReport:
    reference = Reference.of(run.model, prompts_of(run), ROUNDED)
    layers = len(adapted_sites(run.model))
    error, worst = _merge_sites(run, screen)
    _save(run, folder)
    logits = _logits(_read(run, folder), reference.prompts)
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


def _write_again(run: Run, out: Path, folder: Path, way: Way, least: float, screen: Screen) -> MergeReport:
    model, prompts = run.model, prompts_of(run)
    windows = _text(run, way.codes, screen) if way.by_text else None
    trained = Reference.of(model, prompts, ROUNDED)
    enable_adapters(model, False)
    kl_base = float(trained.kl(_logits(model, prompts)).mean())
    enable_adapters(model, True)
    made = repack(model, way, windows, screen)
    _refuse_little(way, made, least)
    model.qtune = replace(model.qtune, scheme=way.scheme)
    for name, site in made.beside.items():
        place(model, name, site.base)
    reference = Reference.of(model, prompts, ROUNDED)  # of the packed model: did its file become what is in memory?
    _save(run, folder)
    written, shares = _read(run, folder), made.packed
    layers = _by_codes(model, written)
    verification = replace(compared(reference, _logits(written, prompts), *layers), by_codes=True)
    kept = Kept(shares.all, shares.layers, float(trained.kl(reference.logits).mean()), kl_base)
    if way.rank is not None and verification.passed:
        _save_remainder(run, made, way.rank, out, folder / REMAINDER)
        reference = Reference.of(model, prompts, ROUNDED)
        load_adapter(written, folder / REMAINDER)
        verification = replace(compared(reference, _logits(written, prompts), *layers), by_codes=True)
        nbytes, kl = (folder / REMAINDER / TENSORS).stat().st_size, float(trained.kl(reference.logits).mean())
        rest = Remainder(str(out / REMAINDER), way.rank, nbytes, made.both.all, made.both.layers, kl)
        kept = replace(kept, remainder=rest)
    for line in kept.lines():
        screen.line(line)
    return replace(_report(run, out, folder, verification, kept.lines()), kept=asdict(kept))


def _by_codes(packed: Any, written: Any) -> tuple[int, float, str]:
    """Are all packed layers of two models the same bits? Their number, 0 or infinity, and a layer that is another."""
    own, theirs = packed_sites(packed), packed_sites(written)
    others = [name for name in own if own[name].digest(whole=True) != theirs[name].digest(whole=True)]
    return len(own), inf if others else 0.0, others[0] if others else ""


def _refuse_little(way: Way, made: Repacked, least: float) -> None:
    """Raises QtuneError where what was packed, with the remainder if there is one, leaves a smaller share, or goes as
    far beyond all of it: rounding errors that happen to lie along a small change."""
    shares = made.packed if way.rank is None else made.both
    if (good := 1 - abs(1 - shares.all)) >= least:
        return
    told = f"{shares.all:.1%} of what was learned is left, less than {least:.0%}"
    if shares.all > 1:
        told = f"rounding makes {shares.all:.1%} of what was learned out of it, more than {2 - least:.0%}"
    far = sorted(shares.layers, key=lambda name: -abs(1 - shares.layers[name]))[:3]
    raise QtuneError(
        "Q814",
        f"packed as {way}, {told} (farthest: {', '.join(f'{name} {shares.layers[name]:.1%}' for name in far)}). Merge "
        f"without --keep, choose a finer scheme, other --codes ({', '.join(MERGE_CODES)}) or a larger --remainder, or "
        f"give --least-kept {rounded_down(good)}",
    )


def _save_remainder(run: Run, made: Repacked, rank: int, out: Path, folder: Path) -> None:
    """Put the remainder back into the packed model, and write it as a run whose base is the checkpoint in `out`."""
    for layer in packed_sites(run.model).values():
        layer.own = False  # the codes are the checkpoint's
    install(run.model, made.beside, None)
    kinds = tuple(dict.fromkeys(name.rpartition(".")[2] for name in made.beside))
    spec = AdapterSpec("lora", kinds, {"rank": rank, "alpha": float(rank)})
    recipe = replace(
        run.recipe, model=str(out.absolute()), scheme=run.model.qtune.scheme, embeddings=run.model.qtune.embeddings,
        adapter=spec, calibrate=CalibrateKeys(), budget=None, output=str(out.absolute() / REMAINDER),
    )  # fmt: skip
    folder.mkdir()
    base = {"model": recipe.model, "scheme": recipe.scheme.to_dict(), "dtype": recipe.dtype}
    save_adapter(run.model, spec, folder, base)
    data = ", ".join(Path(source.file).name for source in entries(run.recipe.data.train or "")) or "unknown"
    origin = {"folder": str(run.folder.absolute()), "method": run.recipe.adapter.method, "data": data}
    write_json(folder / COMBINED, {"format": 1, "way": REMAINDER, "weights": [1.0], "runs": [origin]})
    write_text(folder / RECIPE, anchored(recipe).to_yaml())


def _text(run: Run, codes: str, screen: Screen) -> Tensor:
    """Calibration windows [samples, length]: of calibrate.data, or of the training data."""
    keys = run.recipe
    data = keys.calibrate.data or next((source.file for source in entries(keys.data.train or "")), None)
    recipe = replace(keys, calibrate=replace(keys.calibrate, codes=codes, data=data))
    windows = calibration_text(recipe, run.tokenizer, screen)
    assert windows is not None
    return windows


# ---- the folder


def _save(run: Run, folder: Path) -> None:
    save_quantized(run.model, run.tokenizer, folder)
    for path in licences(run.recipe.model):
        shutil.copyfile(path, folder / path.name)


def _read(run: Run, folder: Path) -> Any:
    """The checkpoint as a user will load it."""
    return load(folder, None, dtype=run.model.qtune.dtype, device=device_of(run.model))


def _logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """In fp32."""
    with in_dtype(model, torch.float32):
        return logits_of(model, prompts)


def _report(run: Run, out: Path, folder: Path, verification: Verification, more: list[str]) -> MergeReport:
    scheme = str(run.model.qtune.scheme)
    write_text(folder / "README.md", model_card(run, scheme, "packed", [*verification.lines(), *more]))
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return MergeReport(out, scheme, "packed", nbytes, verification)
