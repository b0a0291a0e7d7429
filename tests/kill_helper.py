"""Train a recipe in children that are killed with SIGKILL: `python kill_helper.py RECIPE MOMENT ...`

A MOMENT is `rename:N`, before the N-th call of os.rename (or of another of CALLS, or with `any:N` of all of them);
`replace@FILE:N`, before the N-th one to a file of that name; or `time:S`, S seconds after the child began.
Behind the last one a child goes on undisturbed. Prints a JSON list with what was left by each child, and the losses of
the last one. One process imports torch, which the children are forked from.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qtune.recipe import Recipe
from qtune.state import adapter_in, newest, steps_in
from qtune.trainer import train

CALLS = ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir")


def die_before(names: tuple[str, ...], file: str, number: int) -> None:
    """Let the process be killed before its `number`-th call of these functions of os, whose last argument is called
    `file`, if that is given."""
    left = [number]

    def counted(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= not file or Path(args[-1]).name == file
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in names:
        setattr(os, name, counted(getattr(os, name)))


def child(recipe: Recipe, moment: str) -> int:
    """Fork one that trains; 0 there never returns. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    kind, _, value = moment.partition(":")
    name, _, file = kind.partition("@")
    if name in (*CALLS, "any"):
        die_before(CALLS if name == "any" else (name,), file, int(value))
    result = train(recipe, resume=True)
    Path(recipe.output, "losses.json").write_text(json.dumps(result.losses))
    os._exit(0)


def left(run: Path) -> dict[str, Any]:
    """What lies in the run's folder after a child is gone, read as the next start will."""
    damaged: list[str] = []
    saved = newest(run, damaged.append)
    pair, note = adapter_in(run)
    return {
        "steps": steps_in(run), "newest": saved and saved.step, "damaged": damaged, "note": note,
        "pair": (pair / "adapter.json").is_file(),
    }  # fmt: skip


def main() -> None:
    recipe = Recipe.load(Path(sys.argv[1]))
    found = []
    for moment in (*sys.argv[2:], "undisturbed"):
        pid = child(recipe, moment)
        if moment.startswith("time:"):
            time.sleep(float(moment.partition(":")[2]))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        found.append({"moment": moment, "killed": os.WIFSIGNALED(status), **left(Path(recipe.output))})
    print(json.dumps([*found, json.loads(Path(recipe.output, "losses.json").read_text())]))


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads of the parent would be missing in its children
    main()
