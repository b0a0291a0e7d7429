"""One method on one scheme, in a process of its own: its options, plan and measured bytes, rate, runs, time beside
LoRA's. family.py runs it and says what is measured how.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any

from family import NEAR, PILOT, RANK, REFERENCE, ROWS, TURNS, Book, Cell, distance, nearest
from measure import take_turns
from quality import BATCH, LENGTH, WINDOW
from quality_cell import Bench, Start, perplexity, train, training

TARGETS = ("all-linear",)
THIRD = 3  # blocks whose layers' ranks are taken: every third
TINY = 1e-4  # of the largest singular value: what counts as none


# ---- options of the same number of trained values


class Counter:
    """Trained values of methods on a model, counted on meta."""

    def __init__(self, file: Path, scheme: Any) -> None:
        from qtune.adapters import find_sites
        from qtune.model.skeleton import build
        from qtune.model.source import open_source

        self.bases = find_sites(build(open_source(file).config, scheme), TARGETS)

    def __call__(self, method: str, options: dict[str, Any]) -> int | None:
        """None: these options are refused, for this model or at all."""
        from qtune.adapters import AdapterSpec
        from qtune.adapters.sites import build
        from qtune.errors import QtuneError

        try:
            sites, shared = build(self.bases, AdapterSpec(method, TARGETS, options).checked())
        except QtuneError:
            return None
        modules = [site.adapter for site in sites.values()] + ([] if shared is None else [shared])
        return sum({id(p): p.numel() for m in modules for p in m.parameters() if p.requires_grad}.values())


def matched(method: str, count: Counter) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options with about as many trained values as LoRA of rank 16, and what is said of them in the row."""
    from qtune.adapters import METHODS

    target, plain = count(REFERENCE, {"rank": RANK}), count(method, {})
    assert target
    legal = {name: p.default for name, p in METHODS[method].options().items() if type(p.default) is int}
    knobs = ["rank"] if "rank" in legal else [n for n, v in legal.items() if count(method, {n: 2 * v}) != plain]
    options: dict[str, Any] = {}
    if knobs:
        counts: dict[int, int | None] = {legal[knobs[0]]: plain}
        while more := nearest(legal[knobs[0]], counts, target):
            counts.update({value: count(method, {knobs[0]: value}) for value in more})
        best = min(counts, key=lambda value: (distance(counts[value] or 0, target), value))
        if distance(counts[best] or 0, target) <= math.log(NEAR):
            options = {knobs[0]: best}
    trained = count(method, options)
    said = {"options": options, "trained": trained, "of_lora": (trained or 0) / target, "matched": bool(options)}
    return options, said


# ---- what was learned


def ranks(sites: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    """Of what the adapters learned: a layer's merged weight less that of its start (`first`), which for most methods is
    the dequantized base. Means over the layers of every third block.

    effective: exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007). stable: the sum
    of their squares by the largest square. numerical: those above 1e-4 of the largest. size: norm, by the weight's.
    Nothing where no weight does what the method does, or nothing was learned.
    """
    import torch

    found = []
    sites = {name: site for name, site in sites.items() if site.adapter.mergeable}
    for name, site in sites.items():
        block = re.search(r"\.(\d+)\.", name)
        if block and int(block[1]) % THIRD == 0:
            then = first[name].merged(site.base)[0]
            change = site.merged()[0] - then
            wide = (change if change.shape[0] < change.shape[1] else change.T).double()
            values = torch.linalg.eigvalsh(wide @ wide.T).clamp_(min=0).sqrt().flip(0)  # exact to 1e-8 of the largest
            if float(values[0]) > 0:
                part = values / values.sum()
                entropy = -float(torch.special.xlogy(part, part).sum())
                stable = float((values / values[0]).square().sum())
                size = float(change.norm() / then.norm())
                found.append((math.exp(entropy), stable, float((values > TINY * values[0]).sum()), size))
    names = ("effective", "stable", "numerical", "size")
    return dict(zip(names, map(statistics.mean, zip(*found, strict=True)), strict=True)) if found else {}


# ---- rows


class Work:
    """A process's model and text."""

    def __init__(self, cell: Cell, folder: Path, book: Book) -> None:
        from qtune.adapters import AdapterSpec
        from qtune.quant.scheme import scheme_from

        self.cell, self.book, self.bench = cell, book, Bench(folder)
        if book.smoke:
            self.bench.held_out = self.bench.held_out[:2]
        self.scheme = scheme_from(cell.scheme)
        options, self.said = matched(cell.method, Counter(self.bench.file, self.scheme))
        self.spec = AdapterSpec(cell.method, TARGETS, options)
        self.language: Any = None

    def start(self) -> dict[str, Any]:
        """Load and start; what is refused is said."""
        from qtune.adapters import adapted_sites
        from qtune.errors import QtuneError
        from qtune.model.loading import give_back

        begun = time.perf_counter()
        try:
            self.language = self.loaded(self.spec)
        except QtuneError as error:
            return {"refused": str(error)}
        seconds = time.perf_counter() - begun
        self.sites, self.first = adapted_sites(self.language.model), Start(self.language.model)
        give_back()
        row = {**self.said, "start_seconds": seconds}
        if self.cell.method == REFERENCE:  # which starts as the packed model is
            row["perplexity"] = perplexity(self.language, self.bench)
        return row

    def loaded(self, spec: Any) -> Any:
        """A language model with adapters, ready to train."""
        import torch

        from qtune.starting import start
        from qtune.step import LanguageModel

        made = start(self.bench.file, self.scheme, spec, windows=self.bench.calibration, dtype=torch.bfloat16)
        language = LanguageModel(made)
        language.choose_attention(WINDOW)
        return language

    def plan(self) -> dict[str, Any]:
        """Bytes of a step, planned and measured, in a process of its own."""
        from qtune.planner.devices import find_device
        from qtune.planner.measure import measure
        from qtune.recipe import Recipe
        from qtune.screen import Screen

        shape = {"train.micro_batch": BATCH, "data.max_length": LENGTH, "train.checkpointing": False}
        text = {"samples": 8, "length": LENGTH}  # enough for every start; no step is another after more
        tree = {"model": str(self.bench.file), "scheme": self.cell.scheme, "adapter": self.spec.to_dict()}
        tree |= {"calibrate": text}
        found = measure(Recipe.load(tree, shape, training=False), find_device("cpu"), None, Screen(quiet=True))
        row = next(row for row in found.rows() if row["tier"] == "allocated" and "tracer" not in row["how"])
        return {"planned": row["planned"], "measured": row["measured"], "planned_process": found.plan.process}

    def run(self, kind: str, rate: float, seed: int) -> dict[str, Any]:
        """Train from the start; after the first run also what was learned."""
        self.first.again(self.spec, seed)
        self.bench.rows, begun = ROWS, dict[str, Any]()
        looked_at = kind == "run" and seed == self.book.seeds[0]
        if looked_at:
            begun = copy.deepcopy({name: site.adapter for name, site in self.sites.items()})  # what they share once
        steps = PILOT if kind == "rate" else self.book.steps
        found = train(self.language, self.bench, kind, rate, seed, steps)
        found.pop("peak_bytes", None)  # of a process that has other work behind it
        if looked_at and "diverged" not in found:
            self.language.model.eval()
            found["ranks"] = ranks(self.sites, begun)
        return found

    def cost(self, rate: float) -> dict[str, Any]:
        """Seconds of a step beside LoRA's, in turns on the same batches."""
        from qtune.adapters import AdapterSpec

        self.bench.rows, turns = BATCH, 1 if self.book.smoke else TURNS
        self.first.again(self.spec, 0)
        both = {"own": self.language, "lora": self.loaded(AdapterSpec(REFERENCE, TARGETS, {"rank": RANK}))}

        def stepper(language: Any) -> Any:
            language.model.train()
            step, batches = training(language, rate), self.bench.batches("run", 0)
            numbers = iter(range(1, turns + 2))
            return lambda: step([next(batches)], next(numbers), turns + 1, 0.1)

        found = take_turns({name: stepper(one) for name, one in both.items()}, turns, slow=math.inf)
        own, lora = (statistics.median(found[name]) for name in ("own", "lora"))
        return {"step_seconds": own, "lora_seconds": lora, "times_lora": own / lora}


def run_cell(cell: Cell, folder: Path, book: Book) -> None:
    """All rows of a cell that are not there yet."""
    if (todo := book.next(cell)) is None:
        return
    work = Work(cell, folder, book)
    started: dict[str, Any] | None = None
    while todo is not None:
        kind, rate, seed = todo
        if kind == "plan":
            row = work.plan()
        else:
            started = work.start() if started is None else started
            if kind == "start" or "refused" in started:
                row = started
            elif kind == "cost":
                row = work.cost(rate or 0.0)
            else:
                row = work.run(kind, rate or 0.0, seed or 0)
        book.add(book.key(cell, *todo), row)
        todo = book.next(cell)
