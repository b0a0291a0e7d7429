"""What the benchmarks share: the peak of a process's own memory, percentiles, turns between providers, a real model."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


def status(field: str) -> int:
    """A field of this process's status, in bytes (Linux)."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field + ":")).split()[1]) * 1024


class PeakMemory:
    """Peak anonymous memory of this process while the block runs, looked at every 2 ms: pages of mapped files, which
    the system may drop, do not count."""

    def __init__(self) -> None:
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        self.peak, self._done = status("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, status("RssAnon"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, status("RssAnon"))


def percentiles(values: list[float]) -> dict[str, float]:
    """p20, p50, p80 of at least two values."""
    found = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": found[1], "p50": found[4], "p80": found[7]}


def take_turns(
    providers: Mapping[str, Callable[[], object]], rounds: int, slow: float = 0.1, few: int = 5
) -> dict[str, list[float]]:
    """Seconds of each call. The providers take turns, so that a slow moment of the machine hits all of them; one that
    takes longer than `slow` gets `few` rounds only. The first call of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(rounds + 1):
        for name, run in providers.items():
            if round_ > few and statistics.median(times[name]) > slow:
                continue
            start = time.perf_counter()
            run()
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def demo_on_nf4(folder: Path | None) -> tuple[Any, list[int]]:
    """SmolLM2-135M on NF4 in bf16 on the CPU, and the token ids of the demo's text. folder: where both lie or go; None:
    one that goes again."""
    import torch

    from qtune.demo import MODEL_FILE, fetch
    from qtune.model import load, load_tokenizer
    from qtune.quant import NF4
    from qtune.runs import pick_device
    from qtune.screen import Screen

    with tempfile.TemporaryDirectory() as fresh:
        folder = folder or Path(fresh)
        fetch(folder, Screen(quiet=True))
        pick_device("cpu")
        model = load(folder / "model" / MODEL_FILE, NF4(), dtype=torch.bfloat16)
        tokenizer = load_tokenizer(folder / "model" / MODEL_FILE)
        records = (folder / "train.jsonl").read_text("utf-8").splitlines()
    texts = (message["content"] for record in records for message in json.loads(record)["messages"])
    return model, tokenizer("\n".join(texts))["input_ids"]
