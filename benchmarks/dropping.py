"""What a training step takes where layers are left out of the backward, or keys and hidden values dropped by chance.

    python benchmarks/dropping.py [--rounds N]      writes benchmarks/results/dropping.jsonl and prints the table
SmolLM2-135M on an NF4 base, LoRA rank 16, 2 x 256 tokens of the demo's text, with and without checkpointing. All ways
take turns, step by step, in one process. A way that leaves layers out draws them anew for each step, so times are means
of all steps. The limit of such a way: what is left of a step whose backward goes by every layer (forward, head, update)
and, for each layer that stays on average, its part of the rest. The step that goes by every layer is not there, for one
always stays; that one is measured and its layer's part taken off.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measure import demo_on_nf4, percentiles, take_turns
from results import FOLDER, write_rows

RESULTS = FOLDER / "dropping.jsonl"
ROWS, LENGTH, RANK = 2, 256, 16
LEAST = {"drop_backward": 1 - 1e-9}  # one layer stays
HIDDEN_KEY = {"drop_keys": 0.1, "drop_hidden": 0.1}
WAYS: list[dict[str, float]] = [
    {}, *({"drop_backward": chance} for chance in (0.25, 0.5, 0.75)), LEAST, HIDDEN_KEY,
    HIDDEN_KEY | {"consistency": 1.0},
]  # fmt: skip


def name_of(way: dict[str, float]) -> str:
    """The keys of `train` that make it."""
    return (
        ", ".join(f"{key} {value:g}" for key, value in way.items()) if way != LEAST else "all layers but one left out"
    )


def limit(way: dict[str, float], least: float, layers: int) -> float | None:
    """The least time of a step that leaves layers out, by that of a whole one. least: of one in which one layer stays,
    likewise."""
    fixed = (least - 1 / layers) / (1 - 1 / layers)
    return fixed + (1 - way["drop_backward"]) * (1 - fixed) if "drop_backward" in way and way != LEAST else None


def main() -> None:
    import torch

    from qtune.adapters import AdapterSpec, adapt
    from qtune.loss import loss_options
    from qtune.memory.layers import layers_of
    from qtune.model.layerwise import decoder_layers
    from qtune.optim import Optimizer
    from qtune.sections import MemoryKeys, TrainKeys
    from qtune.step import LanguageModel, TrainStep

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="steps of each way that are counted")
    parser.add_argument("--folder", type=Path, help="where model and data lie or go")
    options = parser.parse_args()
    model, text = demo_on_nf4(options.folder)
    ids = torch.tensor(text[: ROWS * LENGTH]).view(ROWS, LENGTH)
    batch = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    adapt(model, AdapterSpec("lora", (), {"rank": RANK}))
    language, memory = LanguageModel(model), MemoryKeys()
    language.choose_attention(LENGTH, dropped=True)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    step = TrainStep(language, Optimizer(trained, lr=1e-4), clip=1.0)
    model.train()
    torch.manual_seed(0)

    def run(checkpointing: bool, way: dict[str, float]) -> None:
        keys: Any = TrainKeys(checkpointing=checkpointing, **way)
        language.loss = loss_options(keys, memory, "cpu")
        language.arrange(keys, memory, Path())
        step([batch], 1, 1, 1.0)
        language.restore()
        assert layers_of(model) is None

    layers, rows = len(decoder_layers(model)[1]), []
    for checkpointing in (True, False):
        providers = {name_of(way): lambda way=way, on=checkpointing: run(on, way) for way in WAYS}
        seconds = take_turns(providers, options.rounds, slow=math.inf)
        times = {name: statistics.mean(found) for name, found in seconds.items()}
        whole = times[name_of({})]
        for way in WAYS:
            name = name_of(way)
            row = {"checkpointing": checkpointing, "way": name or "as it comes", "mean_ms": 1e3 * times[name]}
            row |= {f"{key}_ms": value for key, value in percentiles([1e3 * s for s in seconds[name]]).items()}
            ratio, least = times[name] / whole, limit(way, times[name_of(LEAST)] / whole, layers)
            rows.append(row | {"ratio": ratio, "limit": least, "steps": options.rounds})
            told = "" if least is None else f"  limit {least:.2f}"
            print(f"{'checkpointing' if checkpointing else 'plain':14} {row['way']:50} {ratio:.2f}{told}", flush=True)
    write_rows(RESULTS, "python benchmarks/dropping.py", rows)


if __name__ == "__main__":
    main()
