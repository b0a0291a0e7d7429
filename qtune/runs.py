"""A run folder and what is built from a recipe: base model, tokenizer, adapter.

A run holds recipe.yaml, adapter.safetensors, adapter.json, metrics.jsonl, and merged/ once merged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapters.files import load_adapter
from .errors import QtuneError
from .model import load, load_tokenizer, save_quantized
from .quant import QuantEmbedding, QuantLinear
from .quant.scheme import DTYPES
from .recipe import Recipe
from .screen import Screen, size

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
    return (folder / RECIPE).is_file() and (folder / "adapter.json").is_file()


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run. Raises QtuneError where the folder is no run."""
    if not is_run(folder):
        missing = [name for name in (RECIPE, "adapter.json") if not (folder / name).is_file()]
        raise QtuneError(
            f"{folder} is not a run: it lacks {' and '.join(missing)}; give the `output` folder of a `qtune train`"
        )
    return Recipe.load(folder / RECIPE, training=False)


def open_run(folder: Path, screen: Screen, *, device: str | None = None) -> Run:
    """Load base, tokenizer and adapter of a run."""
    recipe = read_recipe(folder)
    model, tokenizer = load_base(recipe, screen, device=device)
    load_adapter(model, folder)
    return Run(folder, recipe, model, tokenizer)


def load_base(recipe: Recipe, screen: Screen, *, device: str | None = None) -> tuple[Any, Any]:
    """Base and tokenizer of a recipe, quantized while loading, with a bar."""
    target = pick_device(device or recipe.device)
    tokenizer = load_tokenizer(recipe.model)
    model = load_with_bar(
        recipe.model,
        screen,
        scheme=recipe.scheme,
        embeddings=recipe.embeddings,
        dtype=DTYPES[recipe.dtype],
        device=target,
    )
    packed = sum(p.packed.numel() for p in model.modules() if isinstance(p, (QuantLinear, QuantEmbedding)))
    other = sum(p.numel() * p.element_size() for p in model.parameters()) - packed
    screen.line(
        f"base  {recipe.model} on {target}: {recipe.scheme}, {size(packed)} packed + {size(other)} in {recipe.dtype}"
    )
    return model, tokenizer


def load_with_bar(source: str, screen: Screen, **options: Any) -> Any:
    """`model.load` with a progress bar that appears with the first tensor."""
    bar, advance = None, None

    def progress(name: str, done: int, total: int) -> None:
        nonlocal bar, advance
        if advance is None:
            bar = screen.bar("loading", total)
            advance = bar.__enter__()
        advance(1)

    try:
        return load(source, progress=progress, **options)
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)


def quantize(recipe: Recipe, out: Path, *, screen: Screen | None = None) -> int:
    """Write the packed checkpoint of a recipe's model, which `load` reads without the original. Returns its bytes."""
    if (out / "config.json").exists():
        raise QtuneError(f"{out} already holds a checkpoint; choose another --out")
    options = {"scheme": recipe.scheme, "embeddings": recipe.embeddings, "dtype": DTYPES[recipe.dtype]}
    model = load_with_bar(recipe.model, screen or Screen(quiet=True), **options)
    save_quantized(model, load_tokenizer(recipe.model), out)
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def pick_device(name: str) -> torch.device:
    """A recipe's device; auto is the best that there is. Raises QtuneError for one that this machine lacks."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    count = torch.cuda.device_count()
    index = int(name.partition(":")[2] or 0)
    if (name.startswith("cuda") and index >= count) or (name == "mps" and not mps):
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
