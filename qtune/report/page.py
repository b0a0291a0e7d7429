"""The page of a run: one HTML file that needs nothing else, without a script. `page(read_run(folder))` is its text.

Every text of the user (samples, recipe, command) goes through the template's escaping. What can be long is cut: the
page stays under LIMIT bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..safe_io import write_text
from ..screen import size
from ..version import version
from . import curves, facts
from .advice import advise
from .curves import SMALL, TALL, WIDE, Line, draw, smooth
from .read import Reading

PAGE = "report.html"
FOLDER = Path(__file__).parent  # of the templates
LIMIT = 1_500_000  # bytes
TEXT = 1200  # characters of a prompt or an answer
SITES = 300  # layers in the list of start errors, those of the least gain


def write_page(run: Reading, path: Path) -> None:
    """Draw the run and write its page; a file at `path` is replaced once it is whole."""
    curves.need_matplotlib()
    write_text(path, page(run))


def page(run: Reading) -> str:
    """The HTML of a run."""
    rows, total = facts.trained(run)
    return render(
        "page.html", title=f"{run.model} on {run.data}", run=run, status=facts.status(run),
        numbers=facts.numbers(run), advice=advise(run.rows), figures=figures(run), options=facts.options(run),
        trained=rows, trained_total=total, start=start_errors(run), samples=samples(run), data=data(run),
        sessions=run.record.get("sessions", []), plan=run.record.get("plan", {}), groups=groups(run),
    )  # fmt: skip


def render(template: str, **values: Any) -> str:
    """A template of this folder with these values."""
    style = Markup((FOLDER / "style.css").read_text("utf-8"))
    return _templates().get_template(template).render(style=style, version=version(), **values)


@cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(size=size, date=facts.date)
    return made


def svg(text: str) -> Markup:
    """A picture as the template takes it: our own, in which nothing of the user stands."""
    return Markup(text)


# ---- pictures


def figures(run: Reading) -> dict[str, Markup]:
    """Name -> picture, of what the metrics hold."""
    found: dict[str, Markup] = {}
    lines = _losses(run)
    if lines:
        log = curves.wide_range([y for line in lines for y in line.ys])
        found["loss"] = svg(draw("loss", lines, size=WIDE, log=log))
        found["loss_narrow"] = svg(draw("loss-narrow", lines, size=TALL, log=log))
    for name, form in (("lr", curves.short), ("grad_norm", curves.short), ("tokens_per_s", "{:,.0f}".format)):
        steps, values = run.series(name)
        if len(values) > 1:
            raw = [] if name == "lr" else [Line(steps, values, faint=True)]
            log = name == "grad_norm" and curves.wide_range(values)
            drawn = values if name == "lr" else _smooth(values, log)
            found[name] = svg(
                draw(name.replace("_", "-"), [*raw, Line(steps, drawn)], log=log, zero=not log, form=form)
            )
    if picture := _memory(run):
        found["memory"] = svg(picture)
    return found


def _losses(run: Reading) -> list[Line]:
    steps, losses = run.series("loss")
    lines = []
    if losses:
        log = curves.wide_range(losses)
        lines = [Line(steps, losses, faint=True), Line(steps, _smooth(losses, log))]
    evaluated, values = run.series("eval_loss")
    return lines + ([Line(evaluated, values, role="c1", dots=True)] if values else [])


def _smooth(values: list[float], log: bool) -> list[float]:
    """Smoothed as it is drawn: on a logarithmic axis the geometric mean."""
    if not log:
        return smooth(values)
    import numpy as np

    return [float(y) for y in np.exp(smooth([float(y) for y in np.log(values)]))]


def _memory(run: Reading) -> str | None:
    """Memory held over the steps, and the plan as a dashed line; in GiB or MiB."""
    steps, held = run.series("memory")
    if len(held) < 2 or not max(held):
        return None
    unit, factor = ("GiB", 2**30) if max(held) >= 2**30 else ("MiB", 2**20)
    lines = [Line(steps, [y / factor for y in held], area=True)]
    planned = run.record.get("plan", {}).get("reserved" if facts.on_cuda(run) else "process")
    if planned:
        lines.append(Line([steps[0], steps[-1]], [planned / factor] * 2, role="planned", dashed=True))
    return draw("memory", lines, zero=True, form=lambda y: f"{y:.3g} {unit}" if y else "0")


# ---- tables


def start_errors(run: Reading) -> dict[str, Any] | None:
    """How far layers were from their weights before and after the start: by kind, the picture, the list. None where
    the method starts as the identity."""
    sites = {name: site["start"] for name, site in run.adapter.get("sites", {}).items() if "start" in site}
    if not sites:
        return None
    kinds: dict[str, list[dict[str, float]]] = {}
    layers: dict[int, list[dict[str, float]]] = {}
    for name, start in sites.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(start)
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers:
            layers.setdefault(numbers[0], []).append(start)
    rows = [{"kind": kind, "layers": len(found), **_means(found)} for kind, found in kinds.items()]
    picture = None
    if len(layers) > 1:
        several = [layers.get(i, []) for i in range(max(layers) + 1)]
        before, after = ([[s[key] for s in one] for one in several] for key in ("before", "after"))
        picture = svg(curves.band("start", before, after, size=SMALL))
    worst = sorted(sites.items(), key=lambda pair: -_ratio(pair[1]))
    listed = [{"kind": name, **start, "ratio": _ratio(start)} for name, start in worst[:SITES]]
    return {
        "rows": [*rows, {"kind": "all", "layers": len(sites), **_means(list(sites.values()))}], "picture": picture,
        "sites": listed, "more": len(sites) - len(listed), "weighted": next(iter(sites.values())).get("weighted"),
    }  # fmt: skip


def _means(starts: list[dict[str, float]]) -> dict[str, float]:
    before, after = (sum(s[key] for s in starts) / len(starts) for key in ("before", "after"))
    return {"before": before, "after": after, "ratio": after / before if before else 1.0}


def _ratio(start: Mapping[str, float]) -> float:
    return start["after"] / start["before"] if start["before"] else 1.0


def samples(run: Reading) -> list[dict[str, str]]:
    """Samples with long texts cut in their middle."""
    return [{key: _cut(str(text).strip()) for key, text in one.items()} for one in run.record.get("samples", [])]


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[: TEXT // 2]} … {text[-TEXT // 2 :]}"


def data(run: Reading) -> list[dict[str, Any]]:
    """Rows of the training and the held-out data, each with its histogram."""
    return [
        row | {
            "name": {"train": "Training", "eval": "Held out"}.get(name, name),
            "picture": svg(curves.histogram(f"lengths-{name}", row["bins"], row["width"], x_label="tokens")),
        }
        for name, row in run.record.get("data", {}).items()
    ]  # fmt: skip


def groups(run: Reading) -> list[dict[str, Any]]:
    """The plan's groups, the largest first, with their share of the largest."""
    found = {name: nbytes for name, nbytes in run.record.get("plan", {}).get("groups", {}).items() if nbytes}
    most = max(found.values(), default=1)
    ordered = sorted(found.items(), key=lambda pair: -pair[1])
    return [{"name": name, "nbytes": nbytes, "share": nbytes / most} for name, nbytes in ordered]
