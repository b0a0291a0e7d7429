"""Tokens a second of packed rows against padded micro-batches of 8 in the order of the data, at equal loss.

    python benchmarks/packing.py [--steps N]        writes benchmarks/results/packing.jsonl and prints the table
SmolLM2-135M on an NF4 base, LoRA rank 16, checkpointing. 400 examples of the demo's text, of lengths drawn as those of
Alpaca's data are spread (log-normal, median 100, at most 512 tokens); the second half of each is trained, as an answer
is. A packed row has as many positions as a padded micro-batch on average, and so takes its memory. The two take turns,
step by step, in one process; tokens are counted without padding, and those of all steps divided by the time of all.
Then both evaluate all examples with the same weights: the losses must agree.
"""

from __future__ import annotations

import argparse
import random
import time
from array import array
from pathlib import Path
from typing import Any

from measure import demo_on_nf4, percentiles
from results import FOLDER, write_rows

RESULTS = FOLDER / "packing.jsonl"
COUNT, ROWS, MEDIAN, SPREAD, LONGEST = 400, 8, 100, 0.65, 512


def examples(ids: list[int]) -> list[Any]:
    """Stretches of a text, the second half of each trained."""
    from qtune.data import Example

    draw, at, found = random.Random(0), 0, []
    for number in range(COUNT):
        length = min(LONGEST, max(16, round(MEDIAN * draw.lognormvariate(0, SPREAD))))
        if at + length > len(ids):
            at = 0
        mask = bytes(length // 2) + b"\x01" * (length - length // 2)
        found.append(Example(array("i", ids[at : at + length]), mask, f"stretch {number}"))
        at += length
    return found


def main() -> None:

    from qtune.adapters import AdapterSpec, adapt
    from qtune.batches import Capacity, padding, stream
    from qtune.evaluate import evaluate
    from qtune.memory.boundaries import Boundaries
    from qtune.optim import Optimizer
    from qtune.step import LanguageModel, TrainStep

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of each that are counted")
    parser.add_argument("--folder", type=Path, help="where model and data lie or go")
    options = parser.parse_args()
    model, text = demo_on_nf4(options.folder)
    some = examples(text)
    adapt(model, AdapterSpec("lora", (), {"rank": 16}))
    language = LanguageModel(model)
    language.choose_attention(LONGEST, packed=True)
    language.check_apart()
    language.checkpointing(Boundaries())
    lengths = [len(one.input_ids) for one in some]
    padded = Capacity(ROWS)
    positions = ROWS * sum(lengths) / COUNT / (1 - padding(lengths, padded, 0))
    ways = {"padded": padded, "packed": Capacity(max(LONGEST, round(positions)), by_tokens=True, packed=True)}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    step = TrainStep(language, Optimizer(trained, lr=1e-4), clip=1.0)
    model.train()
    data = {name: stream(some, capacity, 0) for name, capacity in ways.items()}
    taken: dict[str, list[tuple[int, float]]] = {name: [] for name in ways}
    for number in range(options.steps + 2):
        for name in ways:
            batch, before = next(data[name]), time.perf_counter()
            done = step([batch], number + 1, options.steps + 2, 1.0)
            taken[name].append((done.tokens, time.perf_counter() - before))
    rows = []
    for name, capacity in ways.items():
        row = {"way": name, "capacity": str(capacity), "empty": padding(lengths, capacity, 0)}
        counted = taken[name][2:]  # the first ones warm up
        speed = {"tokens_per_s": sum(tokens for tokens, _ in counted) / sum(seconds for _, seconds in counted)}
        spread = percentiles([tokens / seconds for tokens, seconds in counted])
        speed |= {f"{key}_tokens_per_s": value for key, value in spread.items()}
        rows.append(row | speed | {"loss": evaluate(language, some, capacity=capacity).loss})
    first = rows[0]["tokens_per_s"]
    for row in rows:
        print(
            f"{row['way']:7} {row['capacity']:13} {row['empty']:5.1%} empty  {row['tokens_per_s']:6,.0f} tokens/s "
            f"({row['tokens_per_s'] / first:.2f}x)  loss {row['loss']:.5f}"
        )
    write_rows(RESULTS, "python benchmarks/packing.py", rows)


if __name__ == "__main__":
    main()
