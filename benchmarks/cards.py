"""What fits where: the longest example that a card trains, by plan, with the weights on the card and streamed to it.

    python benchmarks/cards.py [--recipes]      writes benchmarks/results/cards.jsonl and the header of each recipe in
                                                configs/cards/ (--recipes: those headers alone)
NF4, LoRA of rank 16 on every linear layer, one example in a micro-batch. On the card: AdamW in 8 bits, embeddings in
nf4 with the table on the host, layers' inputs on the host, MLPs in tiles. Streamed: the packed weights wait on the host
as well. A row is found by the slope of two plans and then planned itself. Nothing here is measured on a card.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from results import FOLDER, machine

from qtune.errors import QtuneError
from qtune.planner.devices import find_device
from qtune.planner.phases import phases_of
from qtune.planner.plan import plan_recipe
from qtune.recipe import Recipe
from qtune.screen import size
from qtune.units import parse_size

RESULTS, RECIPES = FOLDER / "cards.jsonl", Path(__file__).parent.parent / "configs" / "cards"
# the card whose plan is taken, and the bytes that it has; cards of 4 and 6 GB are planned as slices of a larger one
CARDS = {
    "4 GB": ("rtx3060", "3.8GiB"), "6 GB": ("rtx3060", "5.7GiB"), "8 GB": ("rtx4060", None), "12 GB": ("rtx3060", None),
    "16 GB": ("rtx4060ti-16g", None), "24 GB": ("rtx4090", None),
}  # fmt: skip
MODELS = ("mistral-7b-v0.3", "llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.3-70b")
ON_CARD = {
    "train.micro_batch": 1, "train.optimizer": "adamw8", "scheme.embeddings": "nf4", "memory.embeddings": "host",
    "memory.boundaries": "host", "memory.mlp_tile": 2048,
}  # fmt: skip
SETTINGS = {"on the card": ON_CARD, "streamed": ON_CARD | {"memory.weights": "host"}}
STEP, SHORTEST = 256, 512  # tokens
MEASURED = re.compile(r"(?m)^# plan: .*\n(#   .*\n)*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--recipes", action="store_true", help="write configs/cards/ only, from the rows that are there"
    )
    if not parser.parse_args().recipes:
        rows = []
        for card in CARDS:
            for model in MODELS:
                for how, settings in SETTINGS.items():
                    rows.append({"card": card, "model": model, "how": how, **longest(card, model, settings)})
                    print(rows[-1], file=sys.stderr, flush=True)
        import json

        where = {"command": "python benchmarks/cards.py", "device": "plan", **machine()}
        RESULTS.write_text("".join(json.dumps(row | where) + "\n" for row in rows))
        print(f"wrote {RESULTS}; the README's table: python benchmarks/tables.py")
    for path in sorted(RECIPES.glob("*.yaml")):
        text = path.read_text()
        found = re.search(r"--device (\S+)(?: --budget (\S+))?", text)
        assert found, path
        path.write_text(MEASURED.sub(told(path, found[1], found[2]), text))
        print(f"wrote the header of {path}")


def longest(card: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The most tokens that fit, a multiple of STEP, and what they take; tokens 0: not even the shortest."""
    key, budget = CARDS[card]
    device = find_device(key)
    limit = parse_size(budget) if budget else device.memory

    def planned(tokens: int) -> Any:
        recipe = Recipe.load({"model": model}, settings | {"data.max_length": tokens}, training=False)
        return plan_recipe(recipe, device, budget=limit)

    few = planned(SHORTEST)
    if few.verdict != "fits":
        return {"tokens": 0, "peak": few.process, "verdict": few.verdict}
    positions = few.model.config.get_text_config().max_position_embeddings
    more = planned(min(positions, 8 * SHORTEST))
    slope = (more.process - few.process) / (more.shape.tokens - few.shape.tokens)
    room = few.left - few.doubt
    tokens = min(positions, int(SHORTEST + room / slope) // STEP * STEP)
    best = few
    while tokens > SHORTEST:
        best = planned(tokens)
        if best.verdict == "fits":
            break
        over = max(STEP, int((best.doubt - best.left) / slope))
        tokens, best = (tokens - over) // STEP * STEP, few
    speed = best.speed
    return {
        "tokens": best.shape.tokens, "peak": best.process, "verdict": best.verdict, "host": best.trace.waiting,
        "tokens_per_second": getattr(speed, "tokens_per_second", None), "positions": positions,
    }  # fmt: skip


def told(path: Path, key: str, budget: str | None) -> str:
    """The lines of a recipe's header."""
    recipe, device = Recipe.load(path, training=False), find_device(key)
    try:
        plan = plan_recipe(recipe, device, budget=parse_size(budget) if budget else None)
    except QtuneError as error:
        raise SystemExit(f"{path}: {error}") from error
    train = next(phase for phase in phases_of(plan) if phase.name == "train")
    speed = f"{plan.speed.tokens_per_second:,.0f} tokens/s estimated" if not isinstance(plan.speed, str) else plan.speed
    speed += f" of a whole {device.name}, of which this is a slice" if budget else ""
    return (
        f"# plan: {size(plan.process)} of {size(plan.budget)} at the peak ({size(plan.allocated)} allocated), "
        f"{train.host / 2**30:.1f} GiB of host memory;\n"  # the libraries' part is of the machine that plans
        f"#   {plan.shape.rows} x {plan.shape.length:,} tokens in a micro-batch, {speed}. Not measured on a card.\n"
    )


if __name__ == "__main__":
    main()
