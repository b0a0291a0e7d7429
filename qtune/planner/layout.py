"""The parts that a plan is shown by: the bar to scale, the tables.

Colours are those of Okabe and Ito, which the colour-blind tell apart; where there are none (a pipe, NO_COLOR) each
group of the bar has a sign of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ..screen import size
from .breakdown import GROUPS
from .plan import Plan

COLOURS = dict(zip(GROUPS, ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999"), strict=True))
SIGNS = dict(zip(GROUPS, "█▚▞▓▒░╳", strict=True))
ASCII_SIGNS = dict(zip(GROUPS, "#AGOaTr", strict=True))
WIDEST = 96  # columns


# ---- the bar


def bar(plan: Plan, console: Console) -> list[Text]:
    """The groups against the limit, to scale, and a line that names the limit."""
    signs = signs_of(console)
    width = min(console.width, WIDEST) - 2
    scale = max(plan.process, plan.budget)
    ends = _cells(list(plan.groups.values()), scale, width)
    line = Text("")
    for group, cells in zip(GROUPS, ends, strict=True):
        line.append(signs[group] * cells, COLOURS[group])
    limit = min(width, round(plan.budget / scale * width))
    free, edge = ("·", "│") if not console.options.ascii_only else (".", "|")
    used = len(line)
    if used < limit:
        line.append(free * (limit - used), "dim")
        line.append(edge, "bold")
    else:  # the limit stands inside of what is needed
        line = line[:limit] + Text(edge, "bold red") + line[limit:]
    return [line, Text(size(plan.budget).rjust(limit + 1), "dim")]  # the limit is named below its edge


def _cells(values: Sequence[int], scale: int, width: int) -> list[int]:
    """Whole cells for each value; the ends are rounded, so that errors do not add up."""
    cells, before, total = [], 0, 0
    for value in values:
        total += value
        end = round(total / scale * width)
        cells.append(end - before)
        before = end
    return cells


def signs_of(console: Console) -> dict[str, str]:
    """What stands for each group: one block where colours tell them apart (rich knows NO_COLOR apart from those)."""
    if console.options.ascii_only:
        return ASCII_SIGNS
    coloured = console.color_system is not None and not console.no_color
    return dict.fromkeys(GROUPS, "█") if coloured else SIGNS


# ---- the tables


def grid(titles: Mapping[str, JustifyMethod], wrapped: Sequence[str] = ()) -> Table:
    """A table without lines, under bold titles; a column's cells break only if it is one of `wrapped`."""
    made = Table.grid(padding=(0, 2))
    for title, justify in titles.items():
        made.add_column(justify=justify, no_wrap=title not in wrapped)
    made.add_row(*(Text(title, "bold") for title in titles))
    return made


def table(plan: Plan, console: Console) -> Table:
    """Groups with their items; the last row is the sum of all items: the peak of the process in a training step."""
    made = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right"):
        made.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
    signs = signs_of(console)
    for group, total in plan.groups.items():
        items = [item for item in plan.items if item.group == group]
        if not items:
            continue
        name = Text.assemble((f"{signs[group]} ", COLOURS[group]), (group, "bold"))
        if len(items) == 1 and items[0].name != group:  # one row says it all
            name.append(f"  {items[0].name.removeprefix(f'{group} ')}")
        made.add_row(name, Text(size(total), "bold"), Text(f"{total / plan.process:.1%}", "bold"))
        for item in items if len(items) > 1 else ():
            made.add_row(f"    {item.name}", size(item.nbytes), Text(f"{item.nbytes / plan.process:.1%}", "dim"))
    total = sum(item.nbytes for item in plan.items)
    made.add_row(Text("= peak of a training step", "bold"), Text(size(total), "bold"), Text("100%", "bold"))
    return made


def changes(amount: str, words: str) -> Table:
    """The columns of a search: a change, its peak, whether that fits, an amount of bytes, time a token, and words."""
    titles: dict[str, JustifyMethod] = {"change": "left", "peak": "right", "fits": "left"}
    return grid({**titles, amount: "right", "time": "right", words: "left"}, wrapped=("change", "fits", words))


def tiers(plan: Plan) -> Text:
    """Allocated, reserved, process: what the tools of torch and the driver would show."""
    text = Text("In a training step: ")
    for name, nbytes, end in (
        ("allocated", plan.allocated, ", "), ("reserved", plan.reserved, ", "), ("process", plan.process, ".")
    ):  # fmt: skip
        text.append(f"{name} ").append(size(nbytes), "bold").append(end)
    return text


def phases(plan: Plan) -> Table:
    """The stages of the job beside the training step; a dash where nothing is taken."""
    made = grid({"phase": "left", "device": "right", "host": "right", "disk": "right", "": "left"}, wrapped=("",))
    for phase in plan.phases:
        amounts = (size(n) if n else "-" for n in (phase.device, phase.host, phase.disk))
        made.add_row(phase.name, *amounts, Text(phase.note, "dim"))
    return made
