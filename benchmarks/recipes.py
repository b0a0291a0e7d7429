"""One short run of each recipe in configs/methods/, on the demo's model and task: what the headers of the recipes say.

    python benchmarks/recipes.py [NAME ...]     runs the recipes that have no row yet (named ones: anew); writes
                                                results/recipes.jsonl and the line `# measured:` of each recipe
Each run is a process of its own. The task is the demo's: is a headline satire or news? 60 steps of 8 headlines.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import machine, read_rows

from qtune.adapters.files import read_adapter_json
from qtune.demo import fetch
from qtune.recipe import Recipe
from qtune.runs import METRICS
from qtune.screen import Screen, size
from qtune.trainer import train

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "methods"
MEASURED = re.compile(r"(?m)^# measured: .*(\n#   loss .*)?$")
RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"


def main() -> None:
    names = sys.argv[1:]
    if names[:1] == ["--one"]:
        print(json.dumps(one(Path(names[1]), names[2])))
        return
    fetch(ROOT / "demo", Screen())
    done = {row["recipe"]: row for row in (read_rows(RESULTS) if RESULTS.is_file() else [])}
    for path in sorted(FOLDER.glob("*.yaml")):
        if path.stem in names or not (names or path.stem in done):
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, __file__, "--one", str(path), out]
                text = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
            done[path.stem] = {**json.loads(text.splitlines()[-1]), "command": f"python {sys.argv[0]}", **machine()}
            RESULTS.write_text("".join(json.dumps(done[name]) + "\n" for name in sorted(done)))
        if path.stem in done:
            path.write_text(MEASURED.sub("# measured: " + told(done[path.stem]), path.read_text()))


def one(path: Path, out: str) -> dict[str, object]:
    """Run a recipe here; what came out."""
    recipe = Recipe.load(path, {"output": out, "train.report": False, "train.samples": 0})
    result = train(recipe, overwrite=True)
    sites = read_adapter_json(Path(out))["sites"].values()
    starts = [site["start"]["after"] / site["start"]["before"] for site in sites if "start" in site]
    metrics = [json.loads(line) for line in (Path(out) / METRICS).read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "lr" in row]
    assert result.after is not None
    return {
        "recipe": path.stem,
        "method": recipe.adapter.method,
        "scheme": str(recipe.scheme),
        "steps": result.steps,
        "trained": read_adapter_json(Path(out))["parameters"],
        "accuracy": result.after.accuracy,
        "chance": result.after.chance,
        "examples": result.after.examples,
        "first_loss": losses[0],
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "start": sum(starts) / len(starts) if starts else None,
        "seconds": result.seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def told(row: dict[str, object]) -> str:
    """The line of a header."""
    hardware: Any = row["hardware"]
    values = {**row, "peak": size(int(str(row["peak_bytes"]))), "cores": hardware["cores"]}
    return (
        "{steps} steps in {seconds:.0f} s on {cores} CPU cores, peak {peak}, {trained:,} trained;\n"
        "#   loss {first_loss:.2f} -> {last_loss:.2f}; {accuracy:.1%} of {examples} held-out headlines right, "
        "{chance:.1%} by always giving one answer"
    ).format(**values)


if __name__ == "__main__":
    main()
