"""`qtune merge --keep-scheme`: what was learned goes into the parts of the packed base, and a packed checkpoint of the
same size is written, which `load` reads without an adapter.

Only for methods whose change the parts can say (`merge_into`: QA-LoRA's zero points). Verified as a merge is: each
layer against the adapter's own forward, within what rounding W to bf16 would move it, and the written checkpoint, as
`load` reads it, against base + adapter in fp32 on real prompts.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path

import torch

from .adapters import METHODS, adapted_sites
from .adapters.sites import place
from .card import model_card
from .errors import QtuneError
from .export import MergeReport, check_merge, prompts_of, verified_as
from .memory.layers import device_of
from .model import load, save_quantized
from .quant import QuantLinear
from .recipe import Recipe
from .runs import Run, licences
from .safe_io import write_text
from .screen import Screen
from .verify import PROBES, Reference, Verification, compared, in_dtype, layer_error, logits_of

ROUNDED = torch.bfloat16  # the dtype whose rounding of W bounds what a layer's parts may be off


def check_packed(recipe: Recipe, out: Path, overwrite: bool) -> None:
    """Raises QtuneError for what is known to be wrong before anything is loaded."""
    able = [name for name, method in sorted(METHODS.items()) if method.has_own("merge_into")]
    if recipe.adapter.method not in able:
        raise QtuneError(
            "Q801",
            f"method {recipe.adapter.method} cannot merge into packed parts, packing its merged weights again would "
            f"lose most of what it learned; legal with --keep-scheme: {', '.join(able)}; others: merge without it",
        )
    if named := (*recipe.tokens.add, *recipe.tokens.train):
        raise QtuneError(
            "Q801",
            f"tokens with rows of their own ({', '.join(named[:3])}) are not packed; merge without --keep-scheme",
        )
    check_merge(recipe, out, "bfloat16", "trained", overwrite)


def merge_packed(run: Run, out: Path, *, screen: Screen | None = None, overwrite: bool = False) -> MergeReport:
    """Write the packed checkpoint of a run with what was learned in it, verify it, and only then give it the name
    `out`. The run's model is merged afterwards and has no adapter.

    Raises QtuneError as `merge` does, and where the run's method cannot merge into packed parts.
    """
    screen = screen or Screen(quiet=True)
    check_packed(run.recipe, out, overwrite)
    return verified_as(out, lambda partial: _write(run, out, partial, screen))


def _write(run: Run, out: Path, partial: Path, screen: Screen) -> MergeReport:
    reference = Reference.of(run.model, prompts_of(run), ROUNDED)
    layers = len(adapted_sites(run.model))
    error, worst = _merge_sites(run, screen)
    save_quantized(run.model, run.tokenizer, partial)
    for path in licences(run.recipe.model):
        shutil.copyfile(path, partial / path.name)
    verification = _verify(run, partial, reference, layers, error, worst)
    write_text(partial / "README.md", model_card(run, str(run.recipe.scheme), "packed", verification.lines()))
    nbytes = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    return MergeReport(out, str(run.recipe.scheme), "packed", nbytes, verification)


@torch.no_grad()
def _merge_sites(run: Run, screen: Screen) -> tuple[float, str]:
    """Put what each adapter learned into its base, which takes the adapter's place. Returns the largest error of a
    layer as a fraction of its bound, and which layer; NaN wins."""
    sites, generator = adapted_sites(run.model), torch.Generator().manual_seed(0)
    worst, where = 0.0, next(iter(sites), "")
    with screen.bar("merging", len(sites)) as advance:
        for name, site in sites.items():
            merged: QuantLinear = deepcopy(site.base)
            if not site.adapter.merge_into(merged):
                raise QtuneError("Q801", f"{name}: what was learned cannot be said by the parts of {merged.scheme}")
            x = torch.randn(PROBES, merged.in_features, generator=generator)
            bias = None if merged.bias is None else merged.bias.float().cpu()
            error = layer_error(site, merged.dequantize(torch.float32).cpu(), bias, x, ROUNDED)
            if not error <= worst:
                worst, where = error, name
            place(run.model, name, merged)  # type: ignore[arg-type]
            advance(1)
    return worst, where


def _verify(run: Run, folder: Path, reference: Reference, layers: int, error: float, worst: str) -> Verification:
    """The checkpoint as it is read, in fp32, against base + adapter."""
    written = load(folder, None, dtype=run.model.qtune.dtype, device=device_of(run.model))
    with in_dtype(written, torch.float32):
        return compared(reference, logits_of(written, reference.prompts), layers, error, worst)
