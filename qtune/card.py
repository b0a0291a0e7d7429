"""README.md of a merged checkpoint: what it is made of, and what its verification found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .runs import Run, combined_from, licences
from .sections import entries
from .version import version

RECORD = "run.json"  # which training writes (report/record.py)


def fingerprint(folder: Path) -> str:
    """sha256 of all tokens that a run trained on and of which of them were learned; "" where none was recorded."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder / RECORD).read_text())["data"]["train"]["digest"])
    return ""


def model_card(run: Run, dtype: str, keep_base: str, verified: Sequence[str]) -> str:
    """dtype, keep_base: of the merge; verified: what was found, by lines."""
    recipe = run.recipe
    names = ", ".join(path.name for path in licences(recipe.model)) or "none was found beside it: see its own page"
    bases = {
        "trained": "the base as it was trained on (dequantized)",
        "original": "the original weights before quantization",
        "packed": "the packed base, whose scheme it keeps",
    }
    given = [recipe.model, *(source.file for source in entries(recipe.data.train or "unknown"))]
    model, *data = [Path(name).name if Path(name).is_absolute() else name for name in given]
    named = [*recipe.tokens.add, *recipe.tokens.train]
    lines = (
        f"# {run.folder.resolve().name}",
        "",
        f"- base model: {model}",
        f"- licence of the base: {names}",
        *_made(run, ", ".join(data)),
        *([f"- tokens with rows of their own: {', '.join(named)}"] if named else []),
        *([f"- training data, sha256 of its tokens: {digest}"] if (digest := fingerprint(run.folder)) else []),
        f"- merged onto {bases[keep_base]}, in {dtype}",
        "- verification against base + adapter:",
        "",
        *(f"      {line}" for line in verified),
        "",
    )
    return "\n".join(lines)


def _made(run: Run, data: str) -> list[str]:
    """How the adapter came to be."""
    what = f"{run.recipe.adapter.method} on {run.recipe.scheme}"
    if parts := combined_from(run.folder):
        return [f"- combined with qtune {version()} into one {what}:", *(f"    - {part}" for part in parts)]
    return [f"- trained with qtune {version()}: {what}, data {data}"]
