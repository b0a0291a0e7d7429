"""What every results file says of the machine, and how the tables of README and docs/ are filled from these files.

python benchmarks/results.py           rewrites what stands between `<!-- NAME -->` and `<!-- end -->` in README.md
                                       and in docs/*.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "safetensors")


def machine() -> dict[str, Any]:
    """Date, hardware and versions, for a results file."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def write(path: Path, value: dict[str, Any]) -> None:
    """A results file, indented."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
    print(f"wrote {path}")


def write_rows(path: Path, command: str, rows: list[dict[str, Any]], device: str = "cpu") -> None:
    """A results file of one JSON row a line, each with date, hardware and versions; rows of other devices stay."""
    where = {"command": command, "device": device, **machine()}
    kept = [row for row in read_rows(path) if row["device"] != device] if path.exists() else []
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *(row | where for row in rows)]))
    print(f"wrote {path}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each settings, in the order of the first."""
    return list({json.dumps(row["settings"]): row for row in rows}.values())


def _cpu() -> str:
    try:
        return next(line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _source(file: str, rows: Sequence[dict[str, Any]]) -> str:
    """Every machine and every version that rows are of, and the day of the last one."""
    machines = [f"{row['hardware']['cpu']}, {row['hardware']['cores']} cores" for row in rows]
    packages = [f"torch {row['versions']['torch']}, transformers {row['versions']['transformers']}" for row in rows]
    where, what = ("; ".join(dict.fromkeys(names)) for names in (machines, packages))
    return f"({where}; {what}; {max(row['date'][:10] for row in rows)}; `benchmarks/results/{file}`)"


def load_table(value: dict[str, Any]) -> list[str]:
    """Peak memory of loading a 1B-shaped checkpoint, in MiB."""
    names = {"transformers": "transformers + bitsandbytes nf4 double"}
    rows = [
        "| loader | tensors of the model | peak anonymous memory | bound: tensors + two largest | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in value["rows"]:
        held, peak, bound = (f"{row[key] / 2**20:,.0f} MiB" for key in ("held", "peak", "bound"))
        rows.append(f"| {names.get(row['loader'], row['loader'])} | {held} | {peak} | {bound} | {row['seconds']:.1f} |")
    return rows


def demo_table(value: dict[str, Any]) -> list[str]:
    """The demo's outcome in one row."""
    before, after = value["before"], value["after"]
    return [
        "| accuracy before | after | always the more frequent answer | training | whole demo | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {before['accuracy']:.1%} | {after['accuracy']:.1%} | {after['chance']:.1%} | {value['seconds']:.0f} s "
        f"| {value['total_seconds']:.0f} s | {value['peak_bytes'] / 2**30:.2f} GiB |",
    ]


def kernels_table(rows: list[dict[str, Any]]) -> list[str]:
    """One row an op: qtune's median, its share of the limit, and how many times as long others take."""
    table = [
        "| op | size | qtune, ms | of the limit | torch reference | others |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for op, shape in dict.fromkeys((row["op"], row["shape"]) for row in rows):
        by = {row["provider"]: row for row in rows if (row["op"], row["shape"]) == (op, shape)}
        own = by.pop("qtune")
        if own.get("wrong"):
            table.append(f"| `{op}` | {own['shape']} | wrong result, not timed | | | |")
            continue
        del by["limit"]
        ratios = {name: row["p50_ms"] / own["p50_ms"] for name, row in by.items()}
        times = {name: f"{ratio:.{0 if ratio >= 10 else 1}f} x" for name, ratio in ratios.items()}
        reference = times.pop("reference", "")
        others = ", ".join(f"{name} {ratio}" for name, ratio in times.items())
        table.append(
            f"| `{op}` | {own['shape']} | {own['p50_ms']:.2f} | {own['of_limit']:.0%} | {reference} | {others} |"
        )
    return table


def step_table(rows: list[dict[str, Any]]) -> list[str]:
    """Median time and peak memory of a step, and both as multiples of qtune's in the same run."""
    table = [
        "| step | stack | ms (p20 to p80) | times qtune's | peak memory | times qtune's | loss after the last step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    own = {row["recipe"]: row for row in rows if row["provider"] == "qtune"}
    for row in rows:
        base = own[row["recipe"]]
        table.append(
            f"| {row['recipe']} | {row['provider']} | {row['p50_ms']:,.0f} ({row['p20_ms']:,.0f} to "
            f"{row['p80_ms']:,.0f}) | {row['p50_ms'] / base['p50_ms']:.2f} | {row['peak_bytes'] / 2**20:,.0f} MiB "
            f"| {row['peak_bytes'] / base['peak_bytes']:.2f} | {row['losses'][-1]:.4f} |"
        )
    return table


def merge_table(value: dict[str, Any]) -> list[str]:
    """What each way of merging leaves of a change, by the change's size."""
    shares = list(dict.fromkeys(row["share"] for row in value["rows"]))
    heads = [f"change of {share:.1%} of W" for share in shares]
    rows = [f"| merged by | {' | '.join(heads)} |", "| --- |" + " --- |" * len(shares)]
    for way in dict.fromkeys(row["way"] for row in value["rows"]):
        cells = [f"{r['survives']:.1%} survives, error {r['error']:.2g}" for r in value["rows"] if r["way"] == way]
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return rows


def published_table(rows: list[dict[str, Any]]) -> list[str]:
    """Errors of the plan of the stock stack against other people's measurements, one row a source and tier."""
    table = ["| measured by | what | runs | mean error | worst |", "| --- | --- | --- | --- | --- |"]
    peaks = [row for row in rows if row["moment"] == "peak"]
    others = [row for row in rows if row["moment"] != "peak"]
    groups = [
        (source, what, [abs(row[key]) for row in some if _origin(row) == source and key in row])
        for source in dict.fromkeys(map(_origin, rows))
        for what, key, some in (
            ("allocated at the peak", "error", peaks), ("allocated after a pass", "error", others),
            ("reserved at the peak", "reserved_error", rows), ("process at the peak", "process_error", rows),
        )
    ]  # fmt: skip
    for source, what, errors in groups:
        if errors:
            mean = sum(errors) / len(errors)
            table.append(f"| {source} | {what} | {len(errors)} | {mean:.2%} | {max(errors):.2%} |")
    return table


def _origin(row: dict[str, Any]) -> str:
    """The project that a published row comes from."""
    return str(row["source"].partition(",")[0])


def plan_table(rows: list[dict[str, Any]]) -> list[str]:
    """Planned and measured memory of real steps on this machine, MiB."""
    table = [
        "| model | micro-batch | recipe | planned | allocator's own events | process planned | measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        inner, outer = row["allocated"], row["process"]
        cells = [f"{row[key]}" for key in ("model", "tokens", "recipe")]
        for tier in (inner, outer):
            cells += [f"{tier['planned'] / 2**20:,.1f}", f"{tier['measured'] / 2**20:,.1f} ({tier['error']:+.2%})"]
        table.append(f"| {' | '.join(cells)} |")
    return table


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
        for point in sorted(points, key=lambda p: p["perplexity"] or math.inf):
            lines.append(f"| {' | '.join(_family_cells(point, task))} |")
        lines += [""] if points else []
    if (README.parent / "docs" / "methods.svg").exists():
        lines.append("![Perplexity against bytes](methods.svg)")
    return lines[: -1 if lines and not lines[-1] else None]


def _family_cells(point: dict[str, Any], task: bool) -> list[str]:
    options = ", ".join(f"{name} {value}" for name, value in point.get("options", {}).items()) or "as it comes"
    names = ("effective", "stable", "numerical")
    means = [sum(one[name] for one in point["ranks"]) / len(point["ranks"]) for name in names if point["ranks"]]
    bytes_ = [f"{point[key] / 2**20:,.1f}" for key in ("planned", "measured") if key in point]
    cells = [f"`{point['method']}`", options, f"{point.get('trained', 0):,}", f"{point.get('of_lora', 0):.2f}"]
    cells += [", ".join(f"{mean:.1f}" for mean in means), ", ".join(bytes_)]
    cells += [f"{point['times']:.2f}" if point["times"] else "", _spread(point["runs"]), f"{point['rate']:g}"]
    return cells + [f"{point['accuracy']:.1%}" if point["accuracy"] is not None else ""] * task


def seven_b_table(rows: list[dict[str, Any]]) -> list[str]:
    """One step of a 7B: memory planned and measured, time beside the products' limit."""
    table = [
        "| 7B shape, 1 x 512 tokens | planned | measured | s a step | of the limit | loading |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        planned = f"{row['planned'] / 2**30:.2f} GiB" if row["planned"] else ""
        ratio = f"{row['step_seconds'] / row['limit_seconds']:.2f} x {row['limit_seconds']:.0f} s"
        cells = [row["mode"], planned, f"{row['peak'] / 2**30:.2f} GiB", f"{row['step_seconds']:.0f}", ratio]
        cells.append(f"{row['load_seconds']:.0f} s, {row['load_peak'] / 2**30:.2f} GiB")
        table.append(f"| {' | '.join(cells)} |")
    return table


def cards_table(rows: list[dict[str, Any]]) -> list[str]:
    """The longest example that each card trains: with the weights on it / streamed to it."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["card"], row["model"], row["how"]): row["tokens"] for row in rows}
    table = [f"| card | {' | '.join(models)} |", f"| --- |{' --- |' * len(models)}"]
    for card in dict.fromkeys(row["card"] for row in rows):
        both = [[found[card, model, how] for how in ("on the card", "streamed")] for model in models]
        cells = [" / ".join(f"{tokens:,}" if tokens else "-" for tokens in pair) for pair in both]
        table.append(f"| {card} | {' | '.join(cells)} |")
    return table


def choices_methods_table(rows: list[dict[str, Any]]) -> list[str]:
    """What each method trains and takes, by plan; what changes with the method is the last column."""
    table = [
        "| method | trained values | of the model | peak | adapter, gradients, optimizer | tokens/s, estimated |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row["kind"] == "method":
            own = sum(row["groups"].get(group, 0) for group in ("adapters", "gradients", "optimizer"))
            cells = [f"`{row['name']}`", f"{row['trained']:,}", f"{row['trained'] / row['parameters']:.3%}"]
            cells += [f"{row['process'] / 2**30:.2f} GiB", f"{own / 2**20:,.0f} MiB", _rate(row)]
            table.append(f"| {' | '.join(cells)} |")
    return table


def choices_schemes_table(rows: list[dict[str, Any]]) -> list[str]:
    """What the weights of a model take in each scheme, and the peak of training on them, by plan."""
    found = sorted((row for row in rows if row["kind"] == "scheme"), key=lambda row: row["groups"]["weights"])
    table = ["| scheme | weights | peak | tokens/s, estimated |", "| --- | --- | --- | --- |"]
    for row in found:
        weights, peak = (f"{nbytes / 2**30:.2f} GiB" for nbytes in (row["groups"]["weights"], row["process"]))
        table.append(f"| `{row['name']}` | {weights} | {peak} | {_rate(row)} |")
    return table


def _rate(row: dict[str, Any]) -> str:
    rate = row["tokens_per_second"]
    return f"{rate:,.0f}" if rate else ""


SAME_FILE = {
    "choices-methods": "choices",
    "choices-schemes": "choices",
    "combine-memory": "combine",
    "quality-cost": "quality",
    "quality-starts": "quality",
    "quality-papers": "quality",
}  # tables of another's results


def packing_table(rows: list[dict[str, Any]]) -> list[str]:
    """Padded micro-batches and packed rows."""
    table = [
        "| micro-batch | padding | tokens/s (steps: p20 to p80) | times padded | loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, speed, high = (row[f"{part}tokens_per_s"] for part in ("p20_", "", "p80_"))
        times = speed / rows[0]["tokens_per_s"]
        table.append(
            f"| {row['way']}, {row['capacity']} | {row['empty']:.1%} | {speed:,.0f} ({low:,.0f} to {high:,.0f}) "
            f"| {times:.2f} | {row['loss']:.5f} |"
        )
    return table


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
    """Accuracy on tasks learned one after another, by the way: after the last of them, and what was forgotten."""
    by: dict[str, dict[int, dict[int, list[float]]]] = {}  # way -> seed -> tasks learned -> accuracy on each task
    for row in latest(rows):
        given = row["settings"]
        seen = [row["tasks"][task]["accuracy"] for task in given["tasks"]]
        by.setdefault(given["way"], {}).setdefault(given["seed"], {})[given["after"]] = seen
    tasks = rows[0]["settings"]["tasks"] if rows else []
    lines = [f"| learned as | {' | '.join(tasks)} | mean | forgotten | seeds |", "| --- " * (4 + len(tasks)) + "|"]
    for way, seeds in by.items():
        whole = [
            after for after in seeds.values() if len(tasks) in after or 0 in after
        ]  # a seed still under way is not
        if whole:
            last = [after[max(after)] for after in whole]
            means = [sum(values) / len(whole) for values in zip(*last, strict=True)]
            lost = [_forgotten(after) for after in whole if len(after) == len(tasks)]
            cells = [way, *(f"{mean:.1%}" for mean in (*means, sum(means) / len(means)))]
            cells += [f"{sum(lost) / len(lost):.1%}" if lost else "", str(len(whole))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _forgotten(after: dict[int, list[float]]) -> float:
    """Mean over the tasks before the last of the best accuracy, before the last task was learned, less the last one
    (Chaudhry et al. 2018, arXiv 1801.10112). A task counts from when it was learned."""
    count = max(after)
    lost = [max(after[k][task] for k in range(task + 1, count)) - after[count][task] for task in range(count - 1)]
    return sum(lost) / len(lost)


TABLES: dict[str, Callable[[Any], list[str]]] = {
    "many": many_table,
    "merge": merge_table,
    "load": load_table,
    "demo": demo_table,
    "step": step_table,
    "kernels": kernels_table,
    "plan": plan_table,
    "published": published_table,
    "seven_b": seven_b_table,
    "cards": cards_table,
    "choices-methods": choices_methods_table,
    "choices-schemes": choices_schemes_table,
    "packing": packing_table,
    "dropping": dropping_table,
    "family": family_table,
    "forgetting": forgetting_table,
    "combine": combine_table,
    "combine-memory": combine_memory_table,
    "quality": quality_table,
    "quality-cost": quality_cost_table,
    "quality-starts": quality_starts_table,
    "quality-papers": quality_papers_table,
    "plan-example": lambda value: ["```", *value["text"], "```"],
    "plan-explain": lambda value: ["```", *value["text"], "```"],
}


def read(name: str) -> tuple[Any, str, Sequence[dict[str, Any]]]:
    """What the table of this name is made of, the file's name, and what says where it was measured."""
    path = FOLDER / f"{SAME_FILE.get(name, name)}.jsonl"
    if path.exists():
        rows = [row for row in read_rows(path) if row["device"] in ("cpu", "meta", "plan")]
        return rows, path.name, rows
    path = path.with_suffix(".json")
    value = json.loads(path.read_text("utf-8"))
    return value, path.name, [value]


def pages() -> list[Path]:
    """Where tables stand."""
    return [README, *sorted((README.parent / "docs").glob("*.md"))]


def filled(text: str, name: str) -> str:
    """A page with its table of this name, if it has one, written anew."""
    value, file, where = read(name)
    body = "\n".join((f"<!-- {name} -->", *TABLES[name](value), "", _source(file, where), "<!-- end -->"))
    places = re.findall(rf"<!-- {name} -->.*?<!-- end -->", text, flags=re.DOTALL)
    assert len(places) <= 1, f"a page has {len(places)} places for {name}"
    return text.replace(places[0], body) if places else text


def has_results(name: str) -> bool:
    """Is there a results file with rows for the table of this name?"""
    if not any((FOLDER / f"{SAME_FILE.get(name, name)}{end}").exists() for end in (".jsonl", ".json")):
        return False
    return len(TABLES[name](read(name)[0])) > 2  # a head, and the line below it


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    texts = {page: page.read_text("utf-8") for page in pages()}
    for name in TABLES:
        if not has_results(name):
            print(f"{name}: no results yet")
            continue
        assert any(f"<!-- {name} -->" in text for text in texts.values()), f"no page has a place for {name}"
        texts = {page: filled(text, name) for page, text in texts.items()}
    for page, text in texts.items():
        page.write_text(text, "utf-8")
    print(f"wrote the tables of {README.name} and docs/")


if __name__ == "__main__":
    main()
