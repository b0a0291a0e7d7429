"""A tiny run for tests: a random Llama with a one-word tokenizer learns to answer by the first word of the prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny

from qtune.adapters import METHODS, AdapterSpec
from qtune.quant import SCHEMES
from qtune.recipe import Recipe


def other_scheme(method: str) -> dict[str, str]:
    """What a recipe must change where the method, with its defaults, refuses nf4."""
    refused = METHODS[method].refuses(SCHEMES["nf4"](), AdapterSpec(method).resolved())
    return {"scheme": "int3"} if refused else {}


def write_task(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """prompt/completion records of unequal length; the answer is w5 or w6 by the first word."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        first = draw.choice(("w1", "w2"))
        words = [first, *(f"w{draw.randint(10, 40)}" for _ in range(draw.randint(1, 9)))]
        rows.append({"prompt": " ".join(words) + " ", "completion": "w5" if first == "w1" else "w6"})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"task{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(folder: Path, family: str = "llama", **options: Any) -> Path:
    """The tiny model of `family` with its tokenizer and a licence."""
    tiny.saved(family, folder, **options)
    tiny.words(folder)
    (folder / "LICENSE").write_text("Licence of the base\n")
    return folder


def recipe(root: Path, family: str = "llama", **changes: Any) -> Recipe:
    """A recipe over a new tiny model and task under `root`; changes: overrides by dotted key, `__` for the dot."""
    model = root / "model"
    if not model.exists():
        write_model(model, family)
    overrides = {
        "model": str(model),
        "dtype": "float32",
        "data.train": str(write_task(root)),
        "data.eval": str(write_task(root, 12, seed=1)),
        "train.steps": 8,
        "train.samples": 0,  # a page and its samples take longer than the steps
        "train.report": False,
        "train.lr": 1e-2,
        "output": str(root / "run"),
    } | {key.replace("__", "."): value for key, value in changes.items()}
    tree = {"model": "x", "scheme": {"name": "nf4", "block": 32}, "adapter": {"method": "lora", "rank": 4}}
    return Recipe.load(tree, overrides)
