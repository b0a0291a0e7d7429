"""What a run records beside its weights and metrics, in run.json: versions, hardware and command of each session, what
is trained, the data, the planned peak, samples before and after. Each write is atomic.

Every part is for the page (`qtune report`) and costs little: what cannot be known is left out with a note.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import adapted_sites
from ..data import Example
from ..errors import QtuneError
from ..evaluate import generate
from ..headroom import over_budget, peak_memory
from ..recipe import Recipe
from ..resume import data_digest
from ..runs import pick_device
from ..safe_io import write_json
from ..screen import Screen, size
from ..version import version, version_of
from .advice import Watch
from .page import PAGE, write_page
from .read import FORMAT, RUN, read_record, read_run
from .trackers import Trackers

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "accelerate", "bitsandbytes", "triton")
BINS = 40  # of the histogram of lengths
NEW_TOKENS, PROMPT_TOKENS = 32, 48  # of a sample: continued by; where all is trained, continued from so many
SECONDS = 20.0  # that all samples may take, once before and once after training


class Recorder:
    """Writes run.json, completes each row of metrics, tells advice once, and feeds the trackers."""

    def __init__(self, recipe: Recipe, folder: Path, screen: Screen) -> None:
        self.recipe, self.folder, self.screen = recipe, folder, screen
        self.device = pick_device(recipe.device)
        self.watch = Watch()
        self.told: list[str] = []  # what was said of the training data, and of the held-out
        self.content: dict[str, Any] = {}
        self.probe: list[nn.Parameter] = []
        self.before: list[torch.Tensor] = []
        self.held = 0  # bytes, by the last row
        self.over = False  # the budget, as was told
        self.trackers: Trackers | None = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        """Trackers end with the run, however it ends."""
        if self.trackers is not None:
            self.trackers.close()

    def begin(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        steps: int,
        rows: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        """Write run.json as far as it is known before the first step, and start the trackers.

        rows: of metrics, of a run that goes on: it keeps what its first session wrote, and what its rows showed is not
        told again. None: a new run.
        """
        self.content = (self._kept() if rows is not None else {}) or {"format": FORMAT, "sessions": []}
        self.content["sessions"].append(session(self.device))
        data = {"train": examples} | ({"eval": held_out} if held_out else {})
        told = dict(zip(data, self.told, strict=False))
        self.content |= {
            "steps": steps,
            "model": about(model),
            "trained": by_kind(model),
            "data": {
                name: lengths(some) | {"told": told.get(name, ""), "digest": data_digest(some)}
                for name, some in data.items()
            },
        }
        self.content.pop("ended", None)
        if self.recipe.train.report:
            self.content["plan"] = planned_peak(self.recipe, [*examples, *held_out], self.screen)
        self._write()
        self.probe = _probe(model)
        self.before = [parameter.detach().clone() for parameter in self.probe]
        for row in rows or ():
            self.watch.see(row)
        self.trackers = Trackers(self.recipe, self.folder, self.screen, fresh=rows is None)

    def _kept(self) -> dict[str, Any]:
        """What the sessions before wrote; training goes on without it where it is damaged."""
        try:
            return read_record(self.folder)
        except QtuneError as error:
            self.screen.line(f"note: it is written anew: {error}", "yellow")
            return {}

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of metrics with what is known beside the step; told to the trackers, and advice to the user."""
        row = row | ({"memory": memory_now(self.device), "memory_peak": peak_memory(self.device)})
        self.held = row["memory"]
        if "loss" in row:
            row["moved"] = self._moved()
        for advice in self.watch.see(row):
            self.screen.line(f"note: {advice}", "yellow")
        if not self.over and (over := over_budget(self.recipe, self.device)):
            self.over = True
            self.screen.line(f"note: {over}", "yellow")
        if self.trackers is not None:
            self.trackers.log(row)
        return row

    def sample(self, when: str, model: Any, tokenizer: Any, held_out: Sequence[Example]) -> None:
        """Continue a few held-out prompts, greedily. when: "before" or "after" training; a run that goes on keeps what
        it had before. Ctrl-C after training leaves them out, for all else is done."""
        chosen = spread(held_out, self.recipe.train.samples)
        kept = self.content.get("samples", [])
        if not chosen or (when == "before" and len(self.content["sessions"]) > 1):
            return
        rows = kept if len(kept) == len(chosen) else [{} for _ in chosen]
        try:
            for row, example in zip(rows, chosen, strict=True):
                row |= _sample(model, tokenizer, example, when, SECONDS / len(chosen))
        except KeyboardInterrupt:
            if when == "before":
                raise
            return
        self.content["samples"] = rows
        self._write()

    def end(self, steps: int, interrupted: bool, best: int | None, early: bool) -> None:
        """The training is over, with everything saved: write how it ended, and the page. best: the step whose adapter
        is the run's, where it is not the last. early: train.patience ended it."""
        self.content["ended"] = {
            "at": _now(), "steps": steps, "interrupted": interrupted, "best": best, "early": early,
        }  # fmt: skip
        self._write()
        if self.recipe.train.report:
            try:
                write_page(read_run(self.folder), self.folder / PAGE)
            except QtuneError as error:  # the run itself is done
                self.screen.line(f"note: no {PAGE}: {error}", "yellow")
            else:
                self.screen.line(f"report  {self.folder / PAGE}")

    def memory(self) -> str:
        """What is held by now against what is planned, in words; empty before the first row, and where unknown."""
        plan = self.content.get("plan", {})
        planned = plan.get("reserved" if self.device.type == "cuda" else "process")
        if not self.held:
            return ""
        return f"{size(self.held)}, {size(planned)} planned" if planned else size(self.held)

    def _moved(self) -> float:
        """The largest change of a weight of the probed layer since the row before. A tensor that a method resized is
        a new one: all of it counts."""
        most = 0.0
        for index, parameter in enumerate(self.probe):
            now, before = parameter.detach(), self.before[index]
            change = now - before if now.shape == before.shape else now
            most = max(most, float(change.abs().max()) if change.numel() else 0.0)
            self.before[index] = now.clone()
        return most

    def _write(self) -> None:
        write_json(self.folder / RUN, self.content)


# ---- where it runs


def session(device: torch.device) -> dict[str, Any]:
    """One start of the program: when, the command and its folder, versions, hardware."""
    return {
        "started": _now(), "command": command(sys.argv), "folder": str(Path.cwd()), "versions": versions(),
        "hardware": hardware(device),
    }  # fmt: skip


def command(argv: Sequence[str]) -> str:
    """The command line of this process as a shell takes it; `python -m qtune` is `qtune`."""
    first = Path(argv[0])
    ours = first.stem == "qtune" or (first.name == "__main__.py" and first.parent.name == "qtune")
    return shlex.join(["qtune" if ours else argv[0], *argv[1:]])


def versions() -> dict[str, str]:
    """Name -> version of what computes; packages that are not installed are left out."""
    found = {"qtune": version(), "python": platform.python_version()}
    found |= {name: there for name in PACKAGES if (there := version_of(name))}
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Words for the device that trains, the CPU, the machine's memory in bytes, the system."""
    from ..planner.devices import find_device

    cpu = find_device("cpu")
    card = find_device(str(device)) if device.type == "cuda" else None
    return {
        "device": str(device),
        **({"card": card.name, "card_memory": card.memory} if card else {}),
        "cpu": cpu.name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "memory": cpu.memory,
        "system": platform.platform(),
    }  # fmt: skip


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def memory_now(device: torch.device) -> int:
    """Bytes that the process holds of its device: reserved by torch on CUDA, resident elsewhere; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    from ..planner.runtime import resident

    now = resident()
    return now.own + now.files if now else 0


def planned_peak(recipe: Recipe, examples: Sequence[Example], screen: Screen) -> dict[str, Any]:
    """Bytes of the plan's three tiers and of its groups, on the device that trains; {"why": ...} where it cannot be
    planned, with a note. It takes about as long as `qtune plan`."""
    from ..planner.devices import find_device
    from ..planner.request import lengths_of, request_of

    try:
        device = find_device(str(pick_device(recipe.device)))
        plan = request_of(recipe, device, device.memory, lengths_of(examples)).plan()
    except (QtuneError, MemoryError, RuntimeError) as error:
        screen.line(f"note: the memory of this run is not planned: {error}", "yellow")
        return {"why": str(error)}
    if recipe.budget is None:  # else it was told beside it
        screen.line(f"plan  {size(plan.process)} at the peak of a training step")
    return {
        "device": device.name, "allocated": plan.allocated, "reserved": plan.reserved, "process": plan.process,
        "groups": dict(plan.groups),
    }  # fmt: skip


# ---- what is trained, on what


def about(model: nn.Module) -> dict[str, Any]:
    """The model's class and its decoder layers."""
    config: Any = getattr(model, "config", None)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    return {"class": type(model).__name__, "layers": layers}


def by_kind(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters by kind of layer (the last part of its name), in the order of the model. What sites share is
    counted once, as a kind of its own."""
    sites = adapted_sites(model)
    rows: dict[str, dict[str, Any]] = {}
    within: Counter[int] = Counter(id(p) for site in sites.values() for p in site.adapter.parameters())
    counted = 0
    for name, site in sites.items():
        row = rows.setdefault(name.rpartition(".")[2], {"layers": 0, "parameters": 0})
        own = sum(p.numel() for p in site.adapter.parameters() if p.requires_grad and within[id(p)] == 1)
        row["layers"] += 1
        row["parameters"] += own
        counted += own
    rest = sum(p.numel() for p in model.parameters() if p.requires_grad) - counted
    shared = [{"kind": "shared by all", "layers": len(sites), "parameters": rest}] if rest else []
    return [{"kind": kind, **row} for kind, row in rows.items()] + shared


def _probe(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of the last adapted layer: if these stand still, so does the rest."""
    last = list(adapted_sites(model).values())[-1]
    return [parameter for parameter in last.adapter.parameters() if parameter.requires_grad]


def lengths(examples: Sequence[Example]) -> dict[str, Any]:
    """Counts of examples and tokens, and how long they are: a histogram over equal bins from 1 to the longest."""
    tokens = [len(example.input_ids) for example in examples]
    longest = max(tokens)
    width = max(1, -(-longest // BINS))
    bins = [0] * -(-longest // width)
    for n in tokens:
        bins[(n - 1) // width] += 1
    ordered = sorted(tokens)
    return {
        "examples": len(tokens), "tokens": sum(tokens), "trained": sum(sum(example.trained) for example in examples),
        "median": ordered[len(ordered) // 2], "longest": longest, "width": width, "bins": bins,
    }  # fmt: skip


# ---- samples


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the examples, evenly from the first to the last."""
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def _sample(model: Any, tokenizer: Any, example: Example, when: str, seconds: float) -> dict[str, str]:
    prompt, answer = halves(example)
    return {
        "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
        "expected": tokenizer.decode(answer, skip_special_tokens=True),
        when: generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS, max_seconds=seconds),
    }


def halves(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before the first trained one, and those trained behind them; where all are trained, the first half of
    the example (at most PROMPT_TOKENS) is the prompt."""
    ids, start = list(example.input_ids), example.trained.find(1)
    if start > 0:
        end = example.trained.find(0, start)
        return ids[:start], ids[start : end if end > 0 else None]
    start = max(1, min(PROMPT_TOKENS, len(ids) // 2))
    return ids[:start], ids[start : start + NEW_TOKENS]
