"""One short run of each recipe in configs/methods/, on the demo's model and task: what the headers of the recipes say.

    python benchmarks/recipes.py [--jobs N] [NAME ...]  runs the recipes that have no row yet (named ones: anew); writes
                                                        results/recipes.jsonl and `# measured:` of each recipe
Each run is a process of its own, N at a time, which share the cores; its time is that of the CPU, all threads together.
The task is the demo's: is a headline satire or news? 60 steps of 8 headlines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
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
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(Path(sys.argv[2]), sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description="One short run of each recipe in configs/methods/.")
    paths = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes to run, also where they have a row")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time, which share the cores")
    options = parser.parse_args()
    if unknown := sorted({*options.names} - {*paths}):
        parser.error(f"{FOLDER} has no {', '.join(unknown)}; it has {', '.join(paths)}")
    fetch(ROOT / "demo", Screen())
    done = {row["recipe"]: row for row in (read_rows(RESULTS) if RESULTS.is_file() else [])}
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
    writing = Lock()

    def run(name: str) -> None:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, __file__, "--one", str(paths[name]), out]
            env = os.environ | {"OMP_NUM_THREADS": threads}
            text = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
        with writing:
            done[name] = {**json.loads(text.splitlines()[-1]), "command": "python benchmarks/recipes.py", **machine()}
            RESULTS.write_text("".join(json.dumps(done[key]) + "\n" for key in sorted(done)))

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, options.names or [name for name in paths if name not in done]))
    write_headers(done)


def write_headers(rows: dict[str, dict[str, Any]]) -> None:
    """`# measured:` of each recipe that has a row."""
    for name, row in rows.items():
        path = FOLDER / f"{name}.yaml"
        path.write_text(MEASURED.sub("# measured: " + told(row), path.read_text()))


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
        "cpu_seconds": time.process_time(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def told(row: dict[str, Any]) -> str:
    """The line of a header."""
    values = {**row, "peak": size(row["peak_bytes"])}
    return (
        "{steps} steps, {cpu_seconds:.0f} s of a CPU core with loading and start, peak {peak}, {trained:,} trained;\n"
        "#   loss {first_loss:.2f} -> {last_loss:.2f}; {accuracy:.1%} of {examples} held-out headlines right, "
        "{chance:.1%} by always giving one answer"
    ).format(**values)


if __name__ == "__main__":
    main()
