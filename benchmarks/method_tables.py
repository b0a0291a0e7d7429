"""Tables of what adapter methods and starts are worth, and of several adapters, made of rows of results files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from results import FOLDER, latest

PICTURE = FOLDER.parent.parent / "docs" / "methods.svg"  # what family.py draws
# Layer error after the start by the plain base's, 4-bit LLaMA-3.2-3B: QWHA (arXiv 2509.17428), tables 2 and 7
QWHA_PAPER = {
    "qwha, no exchange, no refinement": 7.06 / 7.21,
    "qwha, no exchange, uniform, random": 5.96 / 7.21,
    "qwha, no exchange, uniform": 3.82 / 7.21,
    "qwha, no exchange (the paper's)": 3.86 / 7.21,
}
# What papers find after fine-tuning, best first; LoftQ and QLoRA are not in QWHA's tables, PiSSA is in neither
ORDERS = {
    "int2-g64": "qwha > cloq (QWHA, table 3); loftq > lora, which does not converge (LoftQ, table 5)",
    "int3-g64": "qwha > cloq (QWHA, table 3); loftq > lora (LoftQ, table 5)",
    "nf4": "pissa > loftq > lora (PiSSA, section 5); int4: qwha > cloq (QWHA, table 3)",
}


def quality_table(rows: list[dict[str, Any]]) -> list[str]:
    """Every start on every scheme: layer error, perplexity before and after, accuracy."""
    table = [
        "| scheme | start | layer error: calibration, held out | perplexity before | after (least to most) "
        "| learning rate | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (scheme, name), start, runs, tasks, edge in _quality(rows):
        error = start.get("layer_error")
        cells = [scheme, name, f"{error['calibration']:.3f}, {error['held_out']:.3f}" if error else ""]
        cells += [_perplexity(start["perplexity"]), _spread([run["perplexity"] for run in runs])]
        cells += [f"{runs[0]['lr']:g}{' (end of the range)' if edge else ''}" if runs else ""]
        cells += [f"{sum(task['accuracy'] for task in tasks) / len(tasks):.1%}" if tasks else ""]
        table.append(f"| {' | '.join(cells)} |")
    return table


def quality_cost_table(rows: list[dict[str, Any]]) -> list[str]:
    """What a start and a step cost, one process at a time."""
    cost = [row for row in latest(rows) if row["settings"]["group"] == "cost"]
    started = {row["settings"]["name"]: row for row in cost if row["settings"]["kind"] == "start"}
    steps = {row["settings"]["name"]: row for row in cost if row["settings"]["kind"] == "cost"}
    table = ["| start | seconds to start | s a step | of lora's | peak memory of steps | of lora's |"]
    table += ["| --- | --- | --- | --- | --- | --- |"]
    for name, row in steps.items():
        seconds, peak = row["step_seconds"], row["peak_bytes"]
        times, more = seconds / steps["lora"]["step_seconds"], peak / steps["lora"]["peak_bytes"]
        cells = [name, f"{started[name]['start_seconds']:.0f}", f"{seconds:.2f}", f"{times:.2f}"]
        table.append(f"| {' | '.join(cells)} | {peak / 2**20:,.0f} MiB | {more:.2f} |")
    return table


def quality_starts_table(rows: list[dict[str, Any]]) -> list[str]:
    """The ablations: what stands after a start, before any training."""
    table = [
        "| scheme | codes | start | rank | layer error: calibration, held out | off the nuclear norm "
        "| perplexity before |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in latest(rows):
        given, error = row["settings"], row.get("layer_error")
        if given["kind"] == "start" and given["group"] not in ("main", "cost") and error:
            share = f"{row['nuclear']:.1%}" if "nuclear" in row else ""
            cells = [given["scheme"], given["codes"], given["name"], str(given["rank"])]
            cells += [f"{error['calibration']:.3f}, {error['held_out']:.3f}", share, _perplexity(row["perplexity"])]
            table.append(f"| {' | '.join(cells)} |")
    return table


def quality_papers_table(rows: list[dict[str, Any]]) -> list[str]:
    """Orderings and ratios beside the papers'."""
    table = ["| after fine-tuning (~: within the spread of seeds) | papers | here |", "| --- | --- | --- |"]
    for scheme, theirs in ORDERS.items():
        runs = {name: found for (at, name), _, found, _, _ in _quality(rows) if at == scheme and found}
        table.append(f"| {scheme} | {theirs} | {_ordered(runs)} |")
    schemes = ("int4-g64", "int3-g64")
    heads = " | ".join(f"here, {scheme}" for scheme in schemes)
    table += ["", f"| layer error by the plain base's | paper, 4 bits, 3B | {heads} |", "| --- | --- | --- | --- |"]
    found = {
        (row["settings"]["name"], row["settings"]["scheme"]): f"{row['layer_error']['calibration']:.2f}"
        for row in latest(rows)
        if row["settings"]["group"] == "ablation" and row["settings"]["codes"] == "nearest" and "layer_error" in row
    }
    for name in (*QWHA_PAPER, "qwha"):
        theirs = f"{QWHA_PAPER[name]:.2f}" if name in QWHA_PAPER else ""
        table.append(f"| {name} | {theirs} | {' | '.join(found.get((name, at), '') for at in schemes)} |")
    return table


def _quality(rows: list[dict[str, Any]]) -> Iterator[tuple[Any, dict[str, Any], list[Any], list[Any], bool]]:
    """(scheme, start), its start's row, its runs and tasks at the rate chosen on seed 0, and whether that is the least
    or the largest tried. Of several numbers of steps the one most run counts."""
    main = [row | row["settings"] for row in latest(rows) if row["settings"]["group"] == "main"]
    counted = [row["steps"] for row in main if row["kind"] == "run"]
    steps = max(counted, key=counted.count, default=0)
    for start in main:
        if start["kind"] == "start":
            at = start["scheme"], start["name"]
            mine = [row for row in main if (row["scheme"], row["name"]) == at and row.get("steps") == steps]
            tried = {row["lr"]: row["perplexity"] for row in mine if row["kind"] == "run" and row["seed"] == 0}
            rate = min(tried, key=lambda lr: tried[lr] or math.inf, default=0.0)
            runs = [row for row in mine if row["kind"] == "run" and row["lr"] == rate]
            tasks = [row for row in mine if row["kind"] == "task" and row["lr"] == rate and "accuracy" in row]
            yield at, start, runs, tasks, bool(tried) and rate in (min(tried), max(tried))


def _perplexity(value: float | None) -> str:
    return (
        "diverged"
        if value is None
        else f"{value:.2f}"
        if value < 1e3
        else f"{value:,.0f}"
        if value < 1e6
        else f"{value:.0e}"
    )


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "diverged" if values else ""
    mean = _perplexity(sum(known) / len(known))
    return f"{mean} ({_perplexity(min(known))} to {_perplexity(max(known))})" if len(known) > 1 else mean


def _ordered(runs: dict[str, list[Any]]) -> str:
    """Best first; `~` between two whose seeds overlap."""
    values = {name: [run["perplexity"] or math.inf for run in found] for name, found in runs.items()}
    names = sorted(values, key=lambda name: sum(values[name]) / len(values[name]))
    text = names[0] if names else ""
    for better, worse in pairwise(names):
        text += (" > " if max(values[better]) < min(values[worse]) else " ~ ") + worse
    return text


def family_points(rows: list[dict[str, Any]], scheme: str) -> list[dict[str, Any]]:
    """What was measured of each method on a scheme, a value a method. drawn: has it what a picture needs?"""
    by: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in latest(rows):
        given = row["settings"]
        if given["scheme"] == scheme:
            by.setdefault(given["method"], {}).setdefault(given["kind"], []).append(row)
    points = []
    for method, found in by.items():
        start, plan, cost = ((found.get(kind) or [{}])[-1] for kind in ("start", "plan", "cost"))
        point: dict[str, Any] = {"method": method, **start, **plan, "times": cost.get("times_lora")}
        point |= {"rate": None, "runs": [], "ranks": []}
        if runs := found.get("run"):
            point["rate"] = rate = runs[-1]["settings"]["lr"]
            runs = [run for run in runs if run["settings"]["lr"] == rate]
            point["runs"] = [run["perplexity"] for run in runs]
            point["ranks"] = [run["ranks"] for run in runs if run.get("ranks")]
        whole = [value for value in point["runs"] if value is not None]
        point["perplexity"] = sum(whole) / len(whole) if whole and len(whole) == len(point["runs"]) else None
        tasks = [row["accuracy"] for row in found.get("task", ()) if "accuracy" in row]
        point["accuracy"] = sum(tasks) / len(tasks) if tasks else None
        point["drawn"] = point["perplexity"] is not None and "measured" in point
        points.append(point)
    return points


def family_table(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each scheme, best perplexity first; the picture, if it was drawn."""
    lines: list[str] = []
    for scheme in dict.fromkeys(row["settings"]["scheme"] for row in rows):
        points = [point for point in family_points(rows, scheme) if point["runs"]]
        task = any(point["accuracy"] is not None for point in points)
        heads = ["method", "options", "trained", "of LoRA's", "rank: effective, stable, numerical"]
        heads += ["MiB planned, measured", "step, times LoRA's", "perplexity (least to most)", "learning rate"]
        heads += ["accuracy"] * task
        lines += [f"On `{scheme}`:", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"] if points else []
        entries = [(point["perplexity"] or math.inf, _family_cells(point, task)) for point in points]
        if before := [row["perplexity"] for row in latest(rows) if _of_the_base(row, scheme)]:
            blank = [""] * (len(heads) - 3 - task)
            entries.append((before[0], ["none, the packed model", *blank, _perplexity(before[0]), *[""] * (1 + task)]))
        lines += [f"| {' | '.join(cells)} |" for _, cells in sorted(entries, key=lambda entry: entry[0])]
        lines += [""] if points else []
    if PICTURE.exists():
        lines.append("![Perplexity against bytes](methods.svg)")
    return lines[: -1 if lines and not lines[-1] else None]


def _of_the_base(row: dict[str, Any], scheme: str) -> bool:
    """Has a row the perplexity of LoRA's start, which is the packed model as it is?"""
    given = row["settings"]
    return "perplexity" in row and (given["kind"], given["scheme"], given["method"]) == ("start", scheme, "lora")


def _family_cells(point: dict[str, Any], task: bool) -> list[str]:
    options = ", ".join(f"{name} {value}" for name, value in point.get("options", {}).items()) or "as it comes"
    names = ("effective", "stable", "numerical")
    means = [sum(one[name] for one in point["ranks"]) / len(point["ranks"]) for name in names if point["ranks"]]
    bytes_ = [f"{point[key] / 2**20:,.1f}" for key in ("planned", "measured") if key in point]
    cells = [f"`{point['method']}`", options, f"{point.get('trained', 0):,}", f"{point.get('of_lora', 0):.2f}"]
    cells += [", ".join(f"{mean:.1f}" for mean in means), ", ".join(bytes_)]
    cells += [f"{point['times']:.2f}" if point["times"] else "", _spread(point["runs"]), f"{point['rate']:g}"]
    return cells + [f"{point['accuracy']:.1%}" if point["accuracy"] is not None else ""] * task


def dropping_table(rows: list[dict[str, Any]]) -> list[str]:
    """Steps that leave layers out of the backward, or drop keys and hidden values."""
    table = [
        "| step | checkpointing | ms, mean (steps: p20 to p80) | times the whole step | at least |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        least = "" if row["limit"] is None else f"{row['limit']:.2f}"
        table.append(
            f"| {row['way']} | {'yes' if row['checkpointing'] else 'no'} "
            f"| {row['mean_ms']:,.0f} ({row['p20_ms']:,.0f} to {row['p80_ms']:,.0f}) | {row['ratio']:.2f} | {least} |"
        )
    return table


def many_table(rows: list[dict[str, Any]]) -> list[str]:
    """Ways to use eight adapters, as multiples of the pass with one."""
    table = [
        "| batch | adapters | ms (p20 to p80) | times one adapter | GFLOP | peak memory above the loaded model |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    said = {
        "base": "none", "one": "one, for all samples", "mixed": "8, of each sample its own",
        "apart": "8, a pass for each sample", "sum": "the sum of 8, for all samples",
        "selected": "8, the strongest parts for each token",
    }  # fmt: skip
    one = {row["length"]: row["p50_ms"] for row in rows if row["way"] == "one"}
    for row in rows:
        low, middle, high = (row[f"p{n}_ms"] for n in (20, 50, 80))
        table.append(
            f"| {row['batch']} x {row['length']} | {said[row['way']]} | {middle:,.0f} ({low:,.0f} to {high:,.0f}) "
            f"| {middle / one[row['length']]:.2f} | {row['flop'] / 1e9:,.1f} | {row['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    return table


def combine_table(rows: list[dict[str, Any]]) -> list[str]:
    """Loss and accuracy on two tasks of adapters that were trained apart, by the way that made them one."""
    found = [row for row in latest(rows) if row["settings"]["kind"] == "loss"]
    tasks = list(found[0]["tasks"]) if found else []
    heads = [f"{task}: {what}" for task in tasks for what in ("loss", "accuracy")]
    lines = [f"| adapter | rank | lost by the cut | {' | '.join(heads)} |", "| --- " * (3 + len(heads)) + "|"]
    for row in found:
        rank = row.get("made_rank", "" if row["settings"]["way"] == "base" else row["settings"]["rank"])
        lost = f"{row['lost']:.1%}" if row.get("lost") else ""
        seen = [row["tasks"][task] for task in tasks]
        cells = [text for one in seen for text in (f"{one['eval_loss']:.3f}", _share(one.get("accuracy")))]
        lines.append(f"| {row['settings']['way']} | {rank} | {lost} | {' | '.join(cells)} |")
    return lines


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def combine_memory_table(rows: list[dict[str, Any]]) -> list[str]:
    """Peak memory of making one adapter of two on a 1B-shaped model, in MiB."""
    lines = ["| step | peak anonymous memory | bound of loading | seconds |", "| --- | --- | --- | --- |"]
    for row in latest(rows):
        if row["settings"]["kind"] == "memory":
            peak, bound = (f"{row[key] / 2**20:,.0f} MiB" for key in ("peak", "bound"))
            lines.append(f"| {row['settings']['step']} | {peak} | {bound} | {row['seconds']:.1f} |")
    return lines


def forgetting_table(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy and loss on tasks learned one after another, by the way: after the last of them, and what was
    forgotten."""
    # way -> seed -> tasks learned -> (accuracy, loss) on each task
    by: dict[str, dict[int, dict[int, list[tuple[float, float]]]]] = {}
    for row in latest(rows):
        given = row["settings"]
        seen = [(row["tasks"][task]["accuracy"], row["tasks"][task]["eval_loss"]) for task in given["tasks"]]
        by.setdefault(given["way"], {}).setdefault(given["seed"], {})[given["after"]] = seen
    tasks = rows[0]["settings"]["tasks"] if rows else []
    heads = ["learned as", *(f"{task}: right (loss)" for task in tasks), "mean", "forgotten", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for way, seeds in by.items():
        whole = [after for after in seeds.values() if len(tasks) in after or 0 in after]  # no seed still under way
        if whole:
            last = [after[max(after)] for after in whole]
            means = [
                tuple(sum(one) / len(whole) for one in zip(*seen, strict=True)) for seen in zip(*last, strict=True)
            ]
            means.append(tuple(sum(one) / len(tasks) for one in zip(*means, strict=True)))
            lost = [_forgotten(after) for after in whole if len(after) == len(tasks)]
            cells = [way, *(f"{right:.1%} ({loss:.2f})" for right, loss in means)]
            cells += [f"{sum(lost) / len(lost):.1%}" if lost else "", str(len(whole))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _forgotten(after: dict[int, list[tuple[float, float]]]) -> float:
    """Mean over the tasks before the last of the best accuracy, before the last task was learned, less the last one
    (Chaudhry et al. 2018, arXiv 1801.10112). A task counts from when it was learned."""
    count = max(after)
    best = [max(after[k][task][0] for k in range(task + 1, count)) for task in range(count - 1)]
    lost = [before - now for before, (now, _) in zip(best, after[count], strict=False)]
    return sum(lost) / len(lost)
