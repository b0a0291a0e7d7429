"""The tables of README and docs/, made of the results files.

python benchmarks/tables.py            rewrites what stands between `<!-- NAME -->` and `<!-- end -->` in README.md
                                       and in docs/*.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from method_tables import (
    combine_memory_table,
    combine_table,
    dropping_table,
    family_table,
    forgetting_table,
    many_table,
    quality_cost_table,
    quality_papers_table,
    quality_starts_table,
    quality_table,
)
from results import FOLDER, latest, read_rows

README = Path(__file__).parent.parent / "README.md"


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


def serving_table(rows: list[dict[str, Any]]) -> list[str]:
    """Each way out: how many greedy texts are those of qtune, and how near to even the choices are that are others."""
    table = [
        "| adapter | written by | computed by | texts equal | tokens before they part | log-probabilities differ by | "
        "the other choice was less likely by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in latest(rows):
        given, apart = row["settings"], row["differences"]
        gaps = [one["gap"] for one in apart if one["gap"] is not None]
        written, by = (f"`{given['command']}`", given["where"]) if given["where"] else ("", "qtune without the adapter")
        gap = f"{min(gaps):.2g} to {max(gaps):.2g}" if gaps else ""
        cells = [given["run"], written, by, f"{row['equal']} of {given['prompts']}"]
        cells += [f"{row['same_tokens']} of {given['prompts'] * given['new']}", f"{row['moved']:.2g}", gap]
        table.append(f"| {' | '.join(cells)} |")
    return table


def keep_table(rows: list[dict[str, Any]]) -> list[str]:
    """What a merge into packed codes leaves, beside the run and its base."""
    lines = ["| written as | share left | KL from the trained model, nats | accuracy | size |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        if row["way"] != "merged":
            what = "base + adapter, as trained" if row["way"] == "trained" else "base alone"
            lines.append(f"| {what} | | {row.get('kl', 0.0):.2g} | {row['accuracy']:.1%} | |")
            continue
        beside = "" if row["rank"] is None else f" --remainder {row['rank']}"
        nbytes = f"{row['bytes'] / 1e6:.0f} MB" + (f" + {row['rest_bytes'] / 1e6:.0f} MB" if beside else "")
        way = f"`--keep {row['keep']} --codes {row['codes']}{beside}`"
        lines.append(f"| {way} | {row['share']:.1%} | {row['kl']:.2g} | {row['accuracy']:.1%} | {nbytes} |")
    return lines


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
    "serving": serving_table,
    "keep": keep_table,
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


def fill_all() -> None:
    """Write every table that has results, on every page that has a place for it."""
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
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    fill_all()
