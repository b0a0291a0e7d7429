"""Checkpoints of a run: `RUN/checkpoints/step-N/` holds all that the steps after N depend on. Nothing of it is pickle.

    adapter.safetensors, adapter.json   the adapter, as in the run's own folder
    state.safetensors                   the optimizer's masters and states, random states, the losses so far
    state.json                          the rest, the recipe, size and sha256 of the other files

A checkpoint is filled under another name, flushed to disk and renamed, so that it is whole or absent; removing begins
with state.json, without which a folder is no checkpoint. The adapter files of the run are copies of the newest
checkpoint's (at the end, with train.keep_best, of the best's): where a process is killed between the two, the pair is
taken from there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters.files import INFO, TENSORS, is_whole_pair, read_adapter_json
from .checkpoint import Entry, Safetensors, write
from .errors import QtuneError
from .safe_io import copy_file, new_folder, remove_partials, write_json, write_text
from .screen import size

FORMAT = 1
FOLDER, STEM, STATE = "checkpoints", "state", "state.json"
FILES = (TENSORS, INFO, f"{STEM}.safetensors")  # besides STATE, which knows their digests


# ---- where they lie


def folder_of(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / FOLDER / f"step-{step}"


def run_of(folder: Path) -> Path:
    """The run that a folder is, or that a checkpoint's folder belongs to."""
    return folder.parent.parent if folder.parent.name == FOLDER and (folder / STATE).is_file() else folder


def steps_in(run: Path) -> list[int]:
    """The steps that a run has checkpoints of, rising; whether they are damaged is not looked at."""
    found = (re.fullmatch(r"step-(\d+)", path.parent.name) for path in (run / FOLDER).glob(f"*/{STATE}"))
    return sorted(int(match[1]) for match in found if match)


def adapter_in(folder: Path) -> tuple[Path, str]:
    """The folder that a run's (or a checkpoint's) whole pair of adapter files lies in, and a note where that is not
    `folder` itself: a process was killed while it replaced them."""
    if is_whole_pair(folder) or not steps_in(folder):
        return folder, ""
    whole = [path for step in reversed(steps_in(folder)) if is_whole_pair(path := folder_of(folder, step))]
    tensors = _digest(folder / TENSORS) if (folder / TENSORS).is_file() else None
    whole.sort(key=lambda path: read_adapter_json(path)["sha256"] != tensors)  # that of the file which is new already
    if not whole:
        return folder, ""
    what = f"{TENSORS} and {INFO} in {folder} are not of one save (was a process killed while it wrote them?)"
    return whole[0], f"{what}; the adapter is taken from {whole[0]}"


# ---- reading


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint. info: what state.json says."""

    folder: Path
    info: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.info["step"])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state, as views of the mapped file that must not be written to."""
        file = Safetensors(self.folder, STEM)
        return {name: file.read(name) for name in file.entries}


def read(folder: Path) -> Saved:
    """The checkpoint in a folder, every byte of it checked. Raises QtuneError that says what is damaged."""
    try:
        info = json.loads((folder / STATE).read_text("utf-8"))
    except OSError as error:
        raise QtuneError("Q408", f"cannot read {folder / STATE}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise QtuneError("Q408", f"{folder / STATE} is no JSON text ({error})") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise QtuneError("Q408", f"{folder / STATE} has format {found!r}; this qtune reads format {FORMAT}")
    needed = {"step": int, "steps": int, "recipe": dict, "data": dict, "base": str, "versions": dict, "files": dict,
              "skipped": int, "in_row": int, "tokens": int, "seconds": float, "numbers": dict}  # fmt: skip
    wrong = [key for key, kind in needed.items() if not isinstance(info.get(key), kind)]
    if wrong:
        raise QtuneError("Q408", f"{folder / STATE} lacks or garbles {', '.join(wrong)}")
    if info.get("sha256") != _own_digest(info):
        raise QtuneError("Q408", f"{folder / STATE} was changed since it was written: its sha256 is not the one in it")
    faults = [fault for name in FILES if (fault := _fault(folder / name, info["files"].get(name)))]
    if faults:
        raise QtuneError("Q408", f"the checkpoint {folder} is damaged: {'; '.join(faults)}")
    return Saved(folder, info)


def _fault(path: Path, there: Any) -> str:
    if not isinstance(there, dict):
        return f"{STATE} does not know {path.name}"
    try:
        nbytes = path.stat().st_size
        if nbytes != there.get("bytes"):
            return f"{path.name} has {nbytes} bytes, {STATE} says {there.get('bytes')}"
        return "" if _digest(path) == there.get("sha256") else f"the sha256 of {path.name} is not that in {STATE}"
    except OSError as error:
        return f"{path.name}: {error.strerror or error}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _own_digest(info: Mapping[str, Any]) -> str:
    """sha256 of what state.json says besides it."""
    rest = {key: value for key, value in info.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def newest(run: Path, tell: Callable[[str], None]) -> Saved | None:
    """The newest whole checkpoint of a run; None where it has none. `tell` gets a line for each damaged one that is
    passed over. Raises QtuneError where all are damaged."""
    faults: list[str] = []
    for step in reversed(steps_in(run)):
        try:
            saved = read(folder_of(run, step))
            if saved.step != step:
                raise QtuneError("Q408", f"{saved.folder} is the checkpoint of step {saved.step}, by another name")
        except QtuneError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            tell(f"{fault}; the checkpoint of step {step} is whole, and is taken in its place")
        return saved
    if faults:
        raise QtuneError("Q408", f"{run} holds no checkpoint that is whole: {'; '.join(faults)}")
    return None


def read_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl up to `step`, the file cut back to them: what was measured after a checkpoint will be
    measured again. Lines that a killed process cut off go as well."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise QtuneError("Q411", f"cannot read {path}: {error.strerror or error}") from error
    kept = [(row, line) for row, line in rows_of(text) if row["step"] <= step]
    whole = "".join(f"{line}\n" for _, line in kept)
    if whole != text:
        write_text(path, whole)
    return [row for row, _ in kept]


def rows_of(text: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of metrics.jsonl, each with its line; what a killed process has half written is left out."""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row, line


# ---- tidying


def tidy(run: Path) -> None:
    """Remove what was half written or half removed when a process was killed."""
    remove_partials(run)
    remove_partials(run / FOLDER)
    for path in (run / FOLDER).glob("step-*"):
        if re.fullmatch(r"step-\d+", path.name) and not (path / STATE).is_file():
            _remove(path)


def set_aside(run: Path, after: int) -> None:
    """Checkpoints of later steps, which are damaged, get names that are no checkpoint's: their steps come again."""
    for step in steps_in(run):
        if step > after:
            path = folder_of(run, step)
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def clear(run: Path) -> None:
    """Remove all checkpoints of a run."""
    for step in steps_in(run):
        _remove(folder_of(run, step))
    tidy(run)
    with suppress(OSError):  # there is none, or it holds what is not ours
        (run / FOLDER).rmdir()


def _remove(folder: Path) -> None:
    for name in (STATE, *FILES):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds what is not ours
        remove_partials(folder)
        folder.rmdir()


# ---- writing


@dataclass(frozen=True)
class Checkpoints:
    """Writes the checkpoints of a run. adapter(folder, step): writes the pair of adapter files. about: what must be the
    same when the run goes on (recipe, data, base, versions). keep: the newest so many stay."""

    run: Path
    adapter: Callable[[Path, int], None]
    about: Mapping[str, Any]
    keep: int

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], best: int | None) -> None:
        """Write the checkpoint of a step, make its adapter the run's, and remove those that are too many. best: the
        step whose checkpoint stays in any case.

        Raises QtuneError where the disk refuses; then there is no new checkpoint, and all others are as they were.
        """
        path = folder_of(self.run, step)
        entries = [
            Entry(name, tensor.dtype, tuple(tensor.shape), tensor.detach) for name, tensor in sorted(tensors.items())
        ]
        try:
            with new_folder(path) as folder:
                self.adapter(folder, step)
                write(folder, entries, STEM, limit=max(1, sum(entry.nbytes for entry in entries)))
                files = {n: {"bytes": (folder / n).stat().st_size, "sha256": _digest(folder / n)} for n in FILES}
                info = {"format": FORMAT, "step": step, **self.about, **values, "files": files}
                write_json(folder / STATE, info | {"sha256": _own_digest(json.loads(json.dumps(info)))})
        except (OSError, QtuneError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            reason = getattr(cause, "strerror", None) or cause
            raise QtuneError(
                "Q901", f"cannot write the checkpoint of step {step} to {path.parent}: {reason}"
            ) from error
        self.publish(step)
        there = steps_in(self.run)
        for old in there[: -self.keep]:
            if old != best:
                with suppress(OSError):  # a folder too many stops no run
                    _remove(folder_of(self.run, old))

    def publish(self, step: int) -> None:
        """Make the adapter of a checkpoint the run's. Killed in between, `adapter_in` finds the pair."""
        for name in (TENSORS, INFO):
            copy_file(folder_of(self.run, step) / name, self.run / name)

    def check_room(self, adapter: int, state: int, saves: int, keep_best: bool) -> tuple[int, int]:
        """Bytes that are needed, and that are there. adapter, state: bytes of a checkpoint; saves: how many are written
        from now on. What is new is whole before what is old goes. Raises QtuneError where the disk has no room."""
        count = min(self.keep + 1, saves) + keep_best
        there = sum(path.stat().st_size for path in (self.run / FOLDER).glob("step-*/*") if path.is_file())
        needed, free = count * (adapter + state) + 2 * adapter, shutil.disk_usage(self.run).free
        if needed > free + there:
            raise QtuneError(
                "Q903",
                f"{self.run} has room for {size(free + there)}, and this run takes {size(needed)}: {count} checkpoints "
                f"at a time of {size(adapter + state)} each, and the adapter twice. Lower train.keep (is {self.keep}), "
                "make room, or take an output on another disk",
            )
        return needed, free + there
