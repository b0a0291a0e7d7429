"""Pictures as SVG that takes its colours from the page: light or dark, without a script.

matplotlib draws with one stand-in colour for each role; in the SVG they become CSS variables, and texts take the
page's font. Figures are drawn at the size in CSS pixels that they are shown at, so that letters are legible.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QtuneError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROLES = ("ink", "muted", "line", "card", "planned", *(f"c{i}" for i in range(8)))  # CSS variables of style.css
STAND_IN = {role: f"#0a{i:02x}f{i:x}" for i, role in enumerate(ROLES)}
POINTS = 600  # of a line; more are thinned to the extremes of equal pieces
SMALL, WIDE, TALL = (420, 205), (940, 330), (420, 300)  # CSS pixels
FONT = 13
Form = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """xs, ys: points. role: its colour. faint: the raw values behind a smoothed line. dots: points, not joined.
    dashed: what is planned. area: filled down to the axis."""

    xs: Sequence[float]
    ys: Sequence[float]
    role: str = "c0"
    faint: bool = False
    dots: bool = False
    dashed: bool = False
    area: bool = False


def need_matplotlib() -> None:
    """Raises QtuneError, naming the pip command, where the drawing library is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise QtuneError(
            "Q904", "the page is drawn with matplotlib, which is not installed: pip install 'qtune[report]'"
        ) from error


def draw(
    name: str,
    lines: Sequence[Line],
    *,
    size: tuple[int, int] = SMALL,
    log: bool = False,
    zero: bool = False,
    form: Form = "{:.4g}".format,
    x_label: str = "step",
) -> str:
    """An SVG of lines over steps. name: tells it from the page's other pictures. log: a logarithmic y axis, of values
    above 0. zero: the y axis begins there. form: the words of a tick of y."""
    with _figure(name, size) as (axes, done):
        if log:
            axes.set_yscale("log")
        for line in lines:
            _line(axes, line, log)
        xs = [x for line in lines if len(line.xs) for x in (line.xs[0], line.xs[-1])]
        if xs and min(xs) < max(xs):
            axes.set_xlim(min(xs), max(xs))
        if zero:
            axes.set_ylim(
                bottom=0, top=1.12 * max((max(line.ys) for line in lines if len(line.ys)), default=1.0) or 1.0
            )
        _ticks(axes, size, log, form)
        axes.set_xlabel(x_label, loc="right", color=STAND_IN["muted"], fontsize=FONT)
        return done()


def histogram(name: str, bins: Sequence[int], width: int, *, size: tuple[int, int] = SMALL, x_label: str) -> str:
    """An SVG of counts in bins of `width` that begin at 0."""
    with _figure(name, size) as (axes, done):
        axes.bar(
            [(i + 0.5) * width for i in range(len(bins))], bins, width=0.86 * width, color=STAND_IN["c0"], linewidth=0
        )
        axes.set_xlim(0, len(bins) * width)
        _ticks(axes, size, False, "{:,.0f}".format)
        axes.set_xlabel(x_label, loc="right", color=STAND_IN["muted"], fontsize=FONT)
        return done()


def band(
    name: str, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], *, size: tuple[int, int]
) -> str:
    """An SVG of the mean and the range of values a layer, before and after. One inner sequence a layer."""
    with _figure(name, size) as (axes, done):
        for role, groups in (("muted", before), ("c0", after)):
            xs = [i for i, values in enumerate(groups) if values]
            kept = [groups[i] for i in xs]
            axes.fill_between(
                xs, [min(v) for v in kept], [max(v) for v in kept], color=STAND_IN[role], alpha=0.16, linewidth=0
            )
            mean = [sum(v) / len(v) for v in kept]
            axes.plot(xs, mean, color=STAND_IN[role], linewidth=1.8, marker="o", markersize=3)
        axes.set_ylim(bottom=0)
        _ticks(axes, size, False, "{:.3g}".format)
        axes.set_xlabel("layer", loc="right", color=STAND_IN["muted"], fontsize=FONT)
        return done()


def smooth(ys: Sequence[float]) -> list[float]:
    """A Gaussian mean around each point, over a tenth of the values; few values stay as they are."""
    if len(ys) < 8:
        return list(ys)
    sigma = max(1.0, len(ys) / 60)
    radius = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    near = np.convolve(np.asarray(ys, float), kernel, "same") / np.convolve(np.ones(len(ys)), kernel, "same")
    return [float(y) for y in near]


def thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most POINTS of the points: first, last, and the lowest and the highest of equal pieces, in their order."""
    if len(xs) <= POINTS:
        return list(xs), list(ys)
    pieces = np.array_split(np.arange(len(xs)), POINTS // 2 - 1)
    values = np.asarray(ys, float)
    kept = {0, len(xs) - 1}
    for piece in pieces:
        kept |= {int(piece[values[piece].argmin()]), int(piece[values[piece].argmax()])}
    order = sorted(kept)
    return [xs[i] for i in order], [ys[i] for i in order]


def short(value: float) -> str:
    """A small number as 2.4e-4, others as they are."""
    if not 0 < abs(value) < 0.01:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def wide_range(ys: Sequence[float]) -> bool:
    """Do values above 0 spread so far that a linear axis would flatten most of them?"""
    return bool(ys) and min(ys) > 0 and max(ys) > 15 * min(ys)


# ---- how it looks


class _figure:
    """Axes of a new figure and a function that gives its SVG; matplotlib's settings are as before afterwards."""

    def __init__(self, name: str, size: tuple[int, int]) -> None:
        self.name, self.size = name, size

    def __enter__(self) -> tuple[Axes, Callable[[], str]]:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.settings: Any = matplotlib.rc_context({
            "svg.fonttype": "none", "svg.hashsalt": self.name, "font.size": FONT, "font.family": "DejaVu Sans",
            "axes.unicode_minus": False, "path.simplify": True,
        })  # fmt: skip
        self.settings.__enter__()
        width, height = self.size
        self.figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(self.figure)
        axes = self.figure.add_axes((50 / width, 40 / height, 1 - 64 / width, 1 - 54 / height))
        axes.set_facecolor("none")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(STAND_IN["line"])
        axes.grid(axis="y", color=STAND_IN["line"], linewidth=1)
        axes.set_axisbelow(True)
        return axes, self._svg

    def __exit__(self, *error: object) -> None:
        self.settings.__exit__(*error)

    def _svg(self) -> str:
        out = io.StringIO()
        self.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return clean(out.getvalue(), self.name)


def _line(axes: Any, line: Line, log: bool) -> None:
    pairs = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if not log or y > 0]
    xs, ys = thin([x for x, _ in pairs], [y for _, y in pairs])
    colour = STAND_IN[line.role]
    if line.dots:
        axes.plot(
            xs, ys, color=colour, linewidth=1.2, marker="o", markersize=7, markeredgecolor=STAND_IN["card"],
            markeredgewidth=1.5, zorder=5, clip_on=False,
        )  # fmt: skip
        return
    style: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.35} if line.faint else {"linewidth": 1.9}
    if line.dashed:
        style |= {"linestyle": (0, (5, 3)), "linewidth": 1.5}
    if line.area:
        axes.fill_between(xs, ys, color=colour, alpha=0.13, linewidth=0)
    axes.plot(xs, ys, color=colour, solid_joinstyle="round", zorder=3 if line.faint else 4, **style)


def _ticks(axes: Any, size: tuple[int, int], log: bool, form: Form) -> None:
    from matplotlib import ticker

    few = size[0] < 700
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5 if few else 9, integer=True))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if log:
        low, high = axes.get_ylim()
        subs = (1.0, 2.0, 5.0) if high < 2000 * low else (1.0,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4 if size[1] < 300 else 5))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: form(y)))
    axes.tick_params(length=0, pad=7, labelsize=FONT, labelcolor=STAND_IN["muted"])


def clean(svg: str, name: str) -> str:
    """The <svg> element alone: it scales with the page, its colours are the page's, and no id is another's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"(<svg[^>]*?)\s+width=\"[^\"]*\"", r"\1", svg, count=1)
    svg = re.sub(r"(<svg[^>]*?)\s+height=\"[^\"]*\"", r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    for role, colour in STAND_IN.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    links = re.compile(r'(url\(#|href="#)([\w.-]+)')
    used = {found[1] for found in links.findall(svg)}
    svg = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = links.sub(rf"\g<1>{name}-\g<2>", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    return re.sub(r"\n\s*", "\n", svg).strip()
