"""Tasks of EleutherAI's lm-eval harness, through its model interface: by name, or from a YAML file of one's own.

Our model is handed to lm-eval's own `HFLM`, so that requests, padding, few-shot prompts and metrics are its own, and so
are its numbers. Needs the extra `eval`; a task by name is fetched by lm-eval where it is not on this machine.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QtuneError

YAML = (".yaml", ".yml")
NONE = "none"  # the filter of a metric that has none


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval has built, with their data."""

    manager: Any
    items: list[Any]


def load_tasks(names: Sequence[str]) -> Tasks:
    """Tasks, groups and tags by name, YAML files by path. Raises QtuneError for what is not there or does not load."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise QtuneError(
            "Q904", f"--tasks needs EleutherAI's lm-eval harness ({error}): pip install 'qtune[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [name for name in names if Path(name).suffix.lower() in YAML]
    faults = [f"there is no task file {name}" for name in files if not Path(name).expanduser().is_file()]
    with redirect_stdout(sys.stderr):
        manager = TaskManager(include_defaults=len(files) < len(names))  # an index of thousands of files
        known = list(manager.task_index)
        for name in names:
            if name not in files and name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                faults.append(f"lm-eval knows no task {name!r}{hint}; legal: a name of `lm_eval ls tasks`, a YAML file")
        if faults:
            raise QtuneError("Q811", "\n".join(faults))
        paths = [str(Path(name).expanduser()) if name in files else name for name in names]
        try:
            loaded = manager.load(paths)
        except Exception as error:  # lm-eval and datasets raise anything for a task file
            reason = " ".join(str(error).split())[:400]
            raise QtuneError(
                "Q811",
                f"lm-eval cannot load {', '.join(names)}: {type(error).__name__}: {reason}. (Paths of data files in "
                "a task are relative to the current folder)",
            ) from error
    return Tasks(manager, paths if loaded["groups"] else list(loaded["tasks"].values()))


def run_tasks(
    model: Any, tokenizer: Any, tasks: Tasks, *, batch: int, limit: int | None, num_fewshot: int | None
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Task -> metric -> value as lm-eval reports it, with `n-shot`; and a row for each of its samples."""
    from lm_eval.evaluator import simple_evaluate

    mode = model.training
    try:
        with redirect_stdout(sys.stderr):
            found = simple_evaluate(
                model=_lm(model, tokenizer, batch), tasks=tasks.items, task_manager=tasks.manager, limit=limit,
                num_fewshot=num_fewshot, log_samples=True,
            )  # fmt: skip
    finally:
        model.train(mode)
    results = {
        task: {key: value for key, value in row.items() if key != "alias"} | {"n-shot": found["n-shot"].get(task)}
        for task, row in found["results"].items()
    }
    rows = [_row(task, sample) for task, samples in found["samples"].items() for sample in samples]
    return results, rows


def _lm(model: Any, tokenizer: Any, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """lm-eval's HFLM over a model that is loaded and on its device."""

        def get_model_info(self) -> dict[str, Any]:
            return {}  # HFLM would ask the hub for the revision of a name

    return Harness(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _row(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample as `--out` writes it: the score is the first metric's."""
    arguments = sample["arguments"]
    first = next(iter(arguments.values() if isinstance(arguments, dict) else arguments), "")
    prompt = first.get("arg_0", "") if isinstance(first, dict) else first[0] if first else ""
    answer, metric = sample["filtered_resps"], next(iter(sample.get("metrics", [])), None)
    return {
        "metric": metric, "where": f"{task}, document {sample['doc_id']}", "prompt": prompt,
        "answer": answer[0] if len(answer) == 1 else answer, "expected": sample["target"],
        "score": sample.get(metric) if metric else None,
    }  # fmt: skip


def shown(results: dict[str, dict[str, Any]]) -> list[str]:
    """The results in lines: task, metric, value ± standard error."""
    lines = []
    for task, row in results.items():
        for key, value in row.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = row.get(f"{metric}_stderr,{how}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            filtered = "" if how == NONE else f" ({how})"
            number = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"{task}  {metric}{filtered} {number}{spread}, {row['n-shot']}-shot")
    return lines
