"""A run folder and what is built from a recipe: base model, tokenizer, adapter.

A run holds recipe.yaml, adapter.safetensors, adapter.json, metrics.jsonl, and merged/ once merged.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .adapters.files import INFO, load_adapter
from .errors import QtuneError
from .model import load, load_tokenizer, save_quantized
from .model.source import open_source
from .quant import QuantEmbedding, QuantLinear
from .quant.scheme import DTYPES
from .recipe import Recipe
from .safe_io import claim_folder
from .screen import Advance, Screen, size

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"


@dataclass
class Run:
    """A finished or interrupted run, loaded: `model` is a transformers model that carries the adapter."""

    folder: Path
    recipe: Recipe
    model: Any
    tokenizer: Any


def is_run(path: str | Path) -> bool:
    """Does this folder hold a recipe and an adapter?"""
    folder = Path(path)
    return (folder / RECIPE).is_file() and (folder / INFO).is_file()


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run. Raises QtuneError where the folder is no run."""
    if not is_run(folder):
        missing = [name for name in (RECIPE, INFO) if not (folder / name).is_file()]
        raise QtuneError(
            f"{folder} is not a run: it lacks {' and '.join(missing)}; give the `output` folder of a `qtune train`"
        )
    return Recipe.load(folder / RECIPE, training=False)


def open_run(folder: Path, screen: Screen, *, device: str | None = None) -> Run:
    """Load base, tokenizer and adapter of a run."""
    recipe = read_recipe(folder)
    if Path(recipe.model).is_absolute() and not Path(recipe.model).exists():
        raise QtuneError(
            f"the base of {folder} is gone: there is no {recipe.model}; "
            f"put it back, or set `model` in {folder / RECIPE} to where it lies now"
        )
    model, tokenizer = load_base(recipe, screen, device=device)
    load_adapter(model, folder)
    return Run(folder, recipe, model, tokenizer)


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with its files and folders as absolute paths, so that its run can be read from any folder."""

    def absolute(value: str | None) -> str | None:
        path = Path(value or "").expanduser()
        return str(path.absolute()) if value and "{" not in value and path.exists() else value

    data, output = recipe.data, recipe.output and str(Path(recipe.output).expanduser().absolute())
    data = replace(data, train=absolute(data.train), eval=absolute(data.eval), template=absolute(data.template))
    return replace(recipe, model=absolute(recipe.model) or recipe.model, data=data, output=output)


def load_base(
    recipe: Recipe, screen: Screen, *, device: str | None = None, stored: bool = False, tokenizer: Any = None
) -> tuple[Any, Any]:
    """Base and tokenizer of a recipe, quantized while loading, with a bar. stored: a packed model, kept as it is
    packed, whatever the recipe says. tokenizer: the base's, where it is loaded already."""
    target = pick_device(device or recipe.device)
    tokenizer = tokenizer or load_tokenizer(recipe.model)
    model = load_with_bar(
        recipe.model,
        screen,
        scheme=None if stored else recipe.scheme,
        embeddings=None if stored else recipe.embeddings,
        dtype=DTYPES[recipe.dtype],
        device=target,
    )
    packed = sum(p.packed.numel() for p in model.modules() if isinstance(p, (QuantLinear, QuantEmbedding)))
    other = sum(p.numel() * p.element_size() for p in model.parameters()) - packed
    sizes = f"{size(packed)} packed + {size(other)} in {recipe.dtype}"
    screen.line(f"base  {recipe.model} on {target}: {model.qtune.scheme}, {sizes}")
    for note in model.qtune.notes:
        screen.line(f"note: {note}", "yellow")
    return model, tokenizer


def load_with_bar(source: str, screen: Screen, **options: Any) -> Any:
    """`model.load` with a progress bar that appears with the first tensor."""
    with ExitStack() as stack:
        advance: Advance | None = None
        shown = 0

        def progress(name: str, done: int, total: int) -> None:
            nonlocal advance, shown
            if advance is None:
                advance = stack.enter_context(screen.bar("loading", total))
            if done > shown:
                advance(done - shown)
                shown = done

        return load(source, progress=progress, **options)


def quantize(recipe: Recipe, out: Path, *, screen: Screen | None = None) -> int:
    """Write the packed checkpoint of a recipe's model, which `load` reads without the original, with the licence.
    Returns its bytes."""
    if (out / "config.json").exists():
        raise QtuneError(f"{out} already holds a checkpoint; choose another --out")
    claim_folder(out)
    options = {"scheme": recipe.scheme, "embeddings": recipe.embeddings, "dtype": DTYPES[recipe.dtype]}
    model = load_with_bar(recipe.model, screen or Screen(quiet=True), **options)
    save_quantized(model, load_tokenizer(recipe.model), out)
    for path in licences(recipe.model):
        shutil.copyfile(path, out / path.name)
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def licences(source: str) -> list[Path]:
    """LICENSE and NOTICE files that lie with a base model (in its folder, beside its .gguf, or in the hub's cache)."""
    path = Path(source).expanduser()
    if not path.exists():
        path = open_source(source).path
    folder = path.parent if path.is_file() else path
    starts = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    return sorted(p for p in folder.glob("*") if p.is_file() and p.name.upper().startswith(starts))


def pick_device(name: str) -> torch.device:
    """A recipe's device; auto is the best that there is. Raises QtuneError for one that this machine lacks."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    count = torch.cuda.device_count()
    legal = re.fullmatch(r"cpu|mps|cuda(:\d+)?", name)
    index = int(name.partition(":")[2] or 0) if legal else 0
    if not legal or (name.startswith("cuda") and index >= count) or (name == "mps" and not mps):
        have = [f"cuda:{i}" for i in range(count)] + ["mps"] * mps + ["cpu"]
        raise QtuneError(
            f"device {name!r} is not there (torch {torch.__version__}); this machine has {', '.join(have)}"
        )
    return torch.device(name)


def refuse_ranks() -> None:
    """Several processes would each train a model of their own, silently apart."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise QtuneError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: qtune trains on one device; "
            "start it without torchrun or accelerate launch"
        )
