"""Eight LoRA adapters of rank 16 in one batch: forward passes of each way to use them, time, FLOP and peak memory.

    python benchmarks/many.py [--rounds N]          writes benchmarks/results/many.jsonl
SmolLM2-135M (fetched as the demo does) on an NF4 base in bf16, adapters on every linear layer of the decoder, random
values. A batch has one sample for each adapter, of 256 tokens or of one, as when texts are generated; the pass ends
before the head, which is the same for all. The ways take turns in one process. "apart" gives each sample a pass of its
own. "selected" keeps, of the parts of all eight, as many as one adapter has for each token. FLOP are of the products
with weights and factors. Memory: peak anonymous memory of a process that loads all, chooses and runs one pass, above
what it held when all was loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import PeakMemory, percentiles, status
from results import FOLDER, write_rows

RESULTS = FOLDER / "many.jsonl"
COUNT, RANK = 8, 16
NAMES = [f"adapter{number}" for number in range(COUNT)]
ALL = dict.fromkeys(NAMES, 1.0 / COUNT)
LENGTHS = (256, 1)
WAYS = ("base", "one", "mixed", "apart", "sum", "selected")


def make_adapters(folder: Path, model: Path) -> None:
    """Saved adapters of other values, each in a folder of its name."""
    import torch

    from qtune.adapters import AdapterSpec, adapt, adapted_sites
    from qtune.adapters.files import describe_sites, save_adapter
    from qtune.model import load
    from qtune.quant import NF4

    packed, spec = load(model, NF4(), dtype=torch.bfloat16), AdapterSpec("lora", (), {"rank": RANK})
    adapt(packed, spec)
    sites = describe_sites(packed)
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        for site in adapted_sites(packed).values():
            site.adapter.B.data.copy_(torch.randn(site.adapter.B.shape, generator=generator) * 1e-2)
            site.adapter.A.data.copy_(torch.randn(site.adapter.A.shape, generator=generator) * 1e-2)
        save_adapter(packed, spec, folder / name, {"model": model.name}, sites=sites)


def opened(folder: Path, model: Path) -> tuple[Any, Any]:
    """The base, and its adapters."""
    import torch

    import qtune
    from qtune.quant import NF4
    from qtune.runs import pick_device
    from qtune.step import LanguageModel

    pick_device("cpu")
    packed = qtune.load(model, NF4(), dtype=torch.bfloat16).eval()
    adapters = qtune.load_adapters(packed, {name: folder / name for name in NAMES})
    LanguageModel(packed).choose_attention(max(LENGTHS))
    return packed, adapters


def run_of(way: str, model: Any, adapters: Any, ids: Any) -> Callable[[], Any]:
    """One pass of the batch, with the adapters that it needs chosen outside of it."""
    import torch

    def chosen() -> Any:
        if way == "selected":
            return adapters.select(ALL)
        return adapters.use({"base": None, "one": NAMES[0], "mixed": NAMES, "sum": ALL}[way])

    @torch.no_grad()
    def apart() -> None:
        for row, name in zip(ids.split(1), NAMES, strict=True):
            adapters.use(name)
            model.base_model(input_ids=row, use_cache=False)

    @torch.no_grad()
    def together() -> None:
        model.base_model(input_ids=ids, use_cache=False)

    if way == "apart":
        return apart
    chosen()
    return together


def flops(way: str, adapters: Any, tokens: int) -> int:
    """Of the products with weights and factors in one pass."""
    ranks = {"base": 0, "one": RANK, "mixed": RANK, "apart": RANK, "sum": COUNT * RANK, "selected": COUNT * RANK}[way]
    shapes = [site.base.shape for site in adapters.sites.values()]
    return 2 * tokens * sum(out * width + ranks * (out + width) for out, width in shapes)


def same(model: Any, adapters: Any, ids: Any) -> float:
    """The largest difference of a mixed batch from its samples apart, by the largest value: of the numbers timed."""
    import torch

    with torch.no_grad():
        adapters.use(NAMES)
        mixed = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        alone = []
        for row, name in zip(ids.split(1), NAMES, strict=True):
            adapters.use(name)
            alone.append(model.base_model(input_ids=row, use_cache=False).last_hidden_state.float())
    return float((mixed - torch.cat(alone)).abs().max() / torch.cat(alone).abs().max())


def batch_of(length: int) -> Any:
    """Token ids [samples, length]."""
    import torch

    return torch.randint(10, 40_000, (COUNT, length), generator=torch.Generator().manual_seed(length))


def peak(folder: Path, model: Path, way: str, length: int) -> None:
    """In a process of its own: prints the bytes."""
    packed, adapters = opened(folder, model)
    held = status("RssAnon")
    with PeakMemory() as memory:
        run_of(way, packed, adapters, batch_of(length))()
    print(json.dumps(memory.peak - held))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="passes of each way that are counted")
    parser.add_argument("--length", type=int, nargs="*", default=LENGTHS, help="tokens of a sample")
    parser.add_argument("--folder", type=Path, help="where the demo's model lies or goes")
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "LENGTH"), help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    from qtune.demo import MODEL_FILE, fetch
    from qtune.screen import Screen

    with tempfile.TemporaryDirectory() as fresh:
        folder = options.folder or Path(fresh)
        fetch(folder, Screen(quiet=True))
        model = folder / "model" / MODEL_FILE
        if options.peak:
            peak(options.adapters, model, options.peak[0], int(options.peak[1]))
            return
        saved = Path(fresh) / "adapters"
        make_adapters(saved, model)
        rows = [row for length in options.length for row in measured(folder, saved, model, length, options.rounds)]
    write_rows(RESULTS, "python benchmarks/many.py", rows)


def measured(folder: Path, saved: Path, model: Path, length: int, rounds: int) -> list[dict[str, Any]]:
    """A row of each way."""
    packed, adapters = opened(saved, model)
    ids = batch_of(length)
    error = same(packed, adapters, ids)
    assert error < 0.05, f"a mixed batch is not its samples apart: {error}"
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            run = run_of(way, packed, adapters, ids)
            for _ in range(1 + (way != "apart")):  # what a choice makes once (stacks, groups) is no part of a pass
                run()
            before = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - before)
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, "--folder", str(folder), "--adapters", str(saved)]
        found = subprocess.run([*command, "--peak", way, str(length)], capture_output=True, text=True, check=True)
        ms = {f"{key}_ms": value * 1e3 for key, value in percentiles(times[way]).items()}
        row = {"way": way, "batch": COUNT, "length": length, "rank": RANK, **ms}
        row |= {"flop": flops(way, adapters, COUNT * length), "peak_bytes": json.loads(found.stdout.splitlines()[-1])}
        rows.append(row | {"error": error})
        print(f"{COUNT} x {length:4} {way:9} {row['p50_ms']:9.1f} ms  {row['flop'] / 1e9:8.1f} GFLOP  "
              f"{row['peak_bytes'] / 2**20:7.0f} MiB")  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
