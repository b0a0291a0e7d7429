"""What each method and each scheme takes, by plan, and what each knob saves: tables of docs/choosing-a-method.md,
choosing-a-scheme.md and memory.md.

    python benchmarks/choices.py        writes benchmarks/results/choices.jsonl and plan-explain.json (some minutes; no
                                        weights, no GPU)
Llama 3.1 8B, one example of 2,048 tokens, an RTX 4090, everything else at its default; methods on nf4, schemes under
LoRA; a method that refuses nf4 is on int4. Sizes follow from tensors that are counted; seconds are estimates of the
planner. Nothing is measured on a card.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from family import scheme_for
from plan import COMMAND
from results import FOLDER, machine, write

from qtune.adapters import METHODS
from qtune.planner.devices import find_device
from qtune.planner.plan import plan_recipe
from qtune.quant import SCHEMES
from qtune.recipe import Recipe

RESULTS, EXPLAINED = FOLDER / "choices.jsonl", FOLDER / "plan-explain.json"
MODEL, CARD = "llama-3.1-8b", "rtx4090"
SHAPE = {"train.micro_batch": 1, "data.max_length": 2048}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    where = {"command": "python benchmarks/choices.py", "device": "plan", **machine()}
    cases = [("method", name, {"adapter": name, "scheme": scheme_for(name)}) for name in sorted(METHODS)]
    cases += [("scheme", name, {"scheme": name}) for name in sorted(SCHEMES)]
    rows = []
    for kind, name, change in cases:
        rows.append({"kind": kind, "name": name, **planned(change), **where})
        print(rows[-1]["kind"], name, rows[-1]["process"], file=sys.stderr, flush=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {RESULTS}; the tables: python benchmarks/tables.py")
    explain()


def planned(change: dict[str, Any]) -> dict[str, Any]:
    """Bytes by group, the peak, and the estimate of a step's time."""
    plan = plan_recipe(Recipe.load({"model": MODEL}, SHAPE | change, training=False), find_device(CARD))
    groups: dict[str, int] = {}
    for item in plan.items:
        groups[item.group] = groups.get(item.group, 0) + item.nbytes
    return {
        "settings": {"model": MODEL, "card": CARD, "tokens": plan.shape.tokens},
        "parameters": plan.parameters,
        "trained": plan.trained,
        "process": plan.process,
        "groups": groups,
        "tokens_per_second": getattr(plan.speed, "tokens_per_second", None),
    }


def explain() -> None:
    """What the knobs of the README's example save, as the command prints it on a terminal of 100 columns."""
    words = [sys.executable, "-m", "qtune", *COMMAND.split()[1:], "--explain"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "COLUMNS": "100"})
    text = [line.rstrip() for line in done.stdout.splitlines()]
    write(EXPLAINED, {"command": f"{COMMAND} --explain", **machine(), "text": [f"$ {COMMAND} --explain", *text]})


if __name__ == "__main__":
    main()
