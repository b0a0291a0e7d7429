"""What `qtune merge --keep` leaves of a fine-tuned model: by codes, and with a remainder beside the packed checkpoint.

    python benchmarks/keep.py [--steps N]        writes benchmarks/results/keep.jsonl and prints the table
SmolLM2-135M on an NF4 base learns the demo's task (LoRA of rank 16 on all linear layers). Its run is then merged into
NF4 and into int4 codes. share, KL: as the command tells them, KL of the trained model from the written one on prompts
of the held-out records. accuracy: of the written checkpoint, opened again, on held-out records; in the rows `trained`
and `base` of the run and of its base without the adapter.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

from results import FOLDER, write_rows
from tables import keep_table

RESULTS = FOLDER / "keep.jsonl"
HELD_OUT, RANK = 50, 16
WAYS = [
    ("nf4", "nearest", None), ("nf4", "nearest", RANK), ("nf4", "feedback", None), ("nf4", "gptq", None),
    ("int4", "nearest", None), ("int4", "nearest", RANK), ("int4", "feedback", None), ("int4", "feedback", RANK),
]  # fmt: skip


def main() -> None:
    from qtune.adapters.files import load_adapter
    from qtune.adapters.sites import enable_adapters
    from qtune.batches import Capacity
    from qtune.data import load_source
    from qtune.demo import RECIPE, fetch
    from qtune.evaluate import evaluate
    from qtune.model import load
    from qtune.packed_merge import merge_packed
    from qtune.recipe import Recipe
    from qtune.runs import open_run
    from qtune.screen import Screen
    from qtune.step import LanguageModel
    from qtune.trainer import train

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=32, help="of training, 8 records each")
    parser.add_argument("--folder", type=Path, help="where model and data lie or go")
    options = parser.parse_args()
    quiet, rows = Screen(quiet=True), []
    with tempfile.TemporaryDirectory() as fresh:
        folder, place = options.folder or Path(fresh), Path(fresh)
        fetch(folder, quiet)
        recipe = Recipe.load(RECIPE.format(folder=folder), {
            "train.steps": options.steps, "train.epochs": None, "output": str(place / "run"), "train.report": False,
            "data.eval": None, "train.samples": 0, "calibrate.samples": 4,
        })  # fmt: skip
        train(recipe, screen=quiet)
        run = open_run(place / "run", quiet)
        records, _ = load_source(str(folder / "eval.jsonl"), run.tokenizer, recipe.data, screen=quiet)

        def accuracy(model: Any) -> float | None:
            return evaluate(LanguageModel(model), records[:HELD_OUT], capacity=Capacity(8)).accuracy

        def row(way: str, **told: Any) -> None:
            rows.append({"way": way, "steps": options.steps, "records": HELD_OUT} | told)
            print(rows[-1], flush=True)

        row("trained", accuracy=accuracy(run.model))
        enable_adapters(run.model, False)
        base = accuracy(run.model)
        for keep, codes, rank in WAYS:
            run, before = open_run(place / "run", quiet), time.perf_counter()
            out = place / f"{keep}-{codes}-{rank}"
            report = merge_packed(run, out, keep, codes=codes, least=float("-inf"), remainder=rank, screen=quiet)
            seconds, kept = time.perf_counter() - before, report.kept
            assert kept is not None
            del run
            gc.collect()
            model, rest = load(out, None), kept["remainder"]
            if rest is not None:
                load_adapter(model, rest["folder"])
            if not any(one["way"] == "base" for one in rows):
                row("base", accuracy=base, kl=kept["kl_base"])
            told = rest or kept
            row(
                "merged", keep=keep, codes=codes, rank=rank, share=told["share"], kl=told["kl"],
                accuracy=accuracy(model), bytes=report.nbytes, rest_bytes=rest and rest["nbytes"], seconds=seconds,
            )  # fmt: skip
            del model
    print("\n".join(keep_table(rows)))
    write_rows(RESULTS, "python benchmarks/keep.py", rows)


if __name__ == "__main__":
    main()
