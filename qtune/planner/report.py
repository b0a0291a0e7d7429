"""A plan as a person reads it: what fits, the bar, the table that adds up, the moment, the phases, the time.

Colours are those of Okabe and Ito, which the colour-blind tell apart; where there are none (a pipe, NO_COLOR) each
group of the bar has a sign of its own. Numbers are bytes as GiB or MiB of 2^30 and 2^20.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.text import Text

from ..screen import Screen, count, duration, size
from .fit import Fit, Row, Rung, peak, shown, tokens_per_second
from .layout import bar, changes, grid, phases, table, tiers
from .plan import CLOSE, HEAP, Plan, Shape, stored_as
from .request import Request
from .roofline import Speed

if TYPE_CHECKING:
    from .measure import Measured
    from .sweep import Sweep

WORDS = {"fits": "yes", "barely": "barely", "no": "no"}
STACKS = tuple(f"by transformers (as {of}), PEFT and bitsandbytes" for of in ("released up to 5.8", "installed"))
VERDICTS = {"fits": "bold green", "barely": "bold yellow", "no": "bold red"}
MORE = {  # why a plan that fits may not
    "cuda": f"Less than {CLOSE:.0%} is left: whatever else uses the device may be too much.",
    "cpu": f"The C library's heap keeps gaps: processes were measured to take up to {HEAP:.0%} more than planned.",
}


# ---- one plan


def show_plan(plan: Plan, request: Request, screen: Screen, instead: Plan | None = None) -> None:
    """The whole answer. instead: the same recipe on qtune's own stack, beside another stack's plan."""
    for line in head(plan):
        screen.line(line)
    screen.line()
    screen.line(verdict(plan))
    screen.line()
    for line in bar(plan, screen.console):
        screen.line(line)
    screen.line()
    screen.console.print(table(plan, screen.console))
    screen.line()
    screen.line(tiers(plan))
    screen.line(f"Its peak comes in: {plan.moment}.")
    if instead is not None:
        screen.line(beside(plan, instead))
    if plan.phases:
        screen.line()
        screen.console.print(phases(plan))
    screen.line()
    first, assumed = speed_lines(plan.speed, request, own=plan.stack == "qtune")
    screen.line(first)
    for assumption in assumed:
        aside(assumption, screen)
    for note in (*request.late_notes, *plan.notes, *unknown_room(plan)):
        aside(f"note: {note}", screen)


def unknown_room(plan: Plan) -> list[str]:
    """What is needed beside the device and cannot be compared with anything."""
    notes = []
    if plan.waiting and plan.room.host is None:
        notes.append(f"{size(plan.host)} of host memory are needed; --host 32GB, say, compares that with what there is")
    if plan.files and plan.room.disk is None:
        notes.append(f"files of {size(plan.files)} lie in memory.folder; --disk 20GB, say, compares that with its room")
    return notes


def aside(text: str, screen: Screen) -> None:
    """A line of less weight, indented also where a terminal wraps it."""
    if screen.console.is_terminal:
        screen.console.print(Padding(Text(text, "dim"), (0, 0, 0, 2)))
    else:
        screen.line(f"  {text}")


def head(plan: Plan) -> list[Text]:
    """What is planned: the model, how it is held and trained, the micro-batch, the device."""
    recipe, shape = plan.recipe, plan.shape
    stored = stored_as(recipe) + (f", embeddings in {recipe.embeddings.name}" if recipe.embeddings else "")
    rank = f", rank {recipe.adapter.options['rank']}" if "rank" in recipe.adapter.options else ""
    share = f"{plan.trained / plan.parameters:.2%}" if plan.parameters else "?"
    keys = recipe.train
    return [
        Text.assemble((plan.model.name, "bold cyan"), f"  {count(plan.parameters)} parameters in {stored}"),
        *([] if plan.stack == "qtune" else [Text(STACKS[plan.stack.endswith(":installed")])]),
        Text(
            f"{recipe.adapter.method}{rank}: {count(plan.trained)} trained ({share}), "
            f"by {keys.optimizer}{' with checkpointing' if keys.checkpointing else ', no checkpointing'}"
            f"{', a step in which drop_backward leaves out no layer' if keys.drop_backward else ''}"
        ),
        Text(
            f"{_micro_batch(shape)} in a micro-batch"
            f"{f', {keys.accumulate:,} micro-batches a step' if keys.accumulate > 1 else ''}"
        ),
        Text(f"  {shape.source}", "dim"),
        Text(f"{plan.device.name}, {size(plan.device.memory)}" + _limit(plan)),
    ]


def _micro_batch(shape: Shape) -> str:
    if shape.lengths:
        return f"{shape.length:,} tokens of examples of up to {shape.longest:,}, packed in one row,"
    return f"{shape.rows:,} example{'s' * (shape.rows != 1)} of {shape.length:,} tokens"


def limit(request: Request) -> str:
    """The bytes that may be used, beside what the user wrote."""
    typed = request.typed.get("budget")
    return f"{typed} = {size(request.budget)}" if typed else size(request.budget)


def _limit(plan: Plan) -> str:
    return "" if plan.budget == plan.device.memory else f", of which {size(plan.budget)} may be used"


def verdict(plan: Plan) -> Text:
    """Fits, fits barely or does not fit, and by how much."""
    most, limit = size(peak(plan)), size(plan.budget)
    if plan.left < 0:
        words, rest = "Does not fit", f": {most} at the peak, {size(-plan.left)} more than {limit}."
    elif plan.short:
        words, rest = "Does not fit", f": {' and '.join(map(str, plan.short))}."
    else:
        words = "Fits" if plan.verdict == "fits" else "Fits barely"
        rest = f": {most} at the peak, {size(plan.left)} of {limit} stay free ({plan.left / plan.budget:.0%})."
    if plan.verdict == "barely":
        rest += f" {MORE[plan.device.kind]}"
    by = next((phase for phase in plan.phases if phase.device == peak(plan) > plan.process), None)
    if by is not None:
        rest += f" What takes most is not the training step, it is: {by.name}."
    if plan.left < 0 and plan.short:
        rest += f" It also takes {' and '.join(map(str, plan.short))}."
    merge = next((phase for phase in plan.phases if phase.name == "merge" and phase.device > plan.budget), None)
    if merge is not None and plan.verdict != "no":
        rest += f" Merging afterwards, a command of its own that is not counted here, takes {size(merge.device)}"
        rest += "; run `qtune merge` with --device cpu." if plan.device.kind == "cuda" else "."
    return Text.assemble((words, VERDICTS[plan.verdict]), rest)


def show_way_out(found: Fit, request: Request, screen: Screen) -> None:
    """The smallest change that makes it fit, or that there is none."""
    screen.line()
    if found.plan.verdict == "no":
        screen.line(nothing_fits(found))
        return
    screen.line(Text.assemble("The smallest change that ", ("fits", VERDICTS[found.plan.verdict]), ":"))
    screen.line(f"  {paste(found, request)}", "bold")
    screen.line(f"  {size(peak(found.plan))} at the peak, {size(found.plan.left)} stay free")


def nothing_fits(found: Fit) -> Text:
    """What is missing even with every knob at its smallest."""
    least = f"with every knob at its smallest it takes {size(peak(found.plan))}, {size(-found.plan.left)} too much"
    if found.plan.left >= 0:
        least = f"with the changes that help it takes {' and '.join(map(str, found.plan.short))}"
    return Text.assemble(("No change of the recipe makes it fit", VERDICTS["no"]), f": {least}.")


def beside(plan: Plan, own: Plan) -> Text:
    """What qtune needs for the same recipe."""
    less = peak(plan) - peak(own)
    words = f"{size(abs(less))} {'less' if less >= 0 else 'more'}"
    return Text.assemble("The same recipe in qtune: ", (f"{size(peak(own))} at the peak", "bold"), f", {words}.")


# ---- time


def speed_lines(speed: Speed | str, request: Request, own: bool = True) -> tuple[Text, list[str]]:
    """The estimate in a line, then what it assumes. own: of qtune's own stack; published runs of another are slower."""
    if isinstance(speed, str) or speed.seconds is None:
        return Text(f"Time: {speed if isinstance(speed, str) else speed.reason}."), []
    text = Text.assemble(
        "Time, an estimate: ", "" if own else "at most ", (f"{speed.tokens_per_second:,.0f} tokens/s", "bold")
    )
    text.append(f", {'' if own else 'at least '}{duration(speed.seconds)} a step")
    if steps := request.steps():
        text.append(f"; {steps:,} step{'s' * (steps != 1)} in {duration(steps * speed.seconds)}")
        text.append(" if every micro-batch is as large")
    text.append(f" (bound by {speed.bound}).")
    return text, speed.assumptions


# ---- searches


def show_fit(found: Fit, request: Request, screen: Screen) -> None:
    """The ladder and what to paste."""
    for line in head(found.start):
        screen.line(line)
    screen.line()
    screen.line(f"Limit {limit(request)}. Each row keeps the changes above it:")
    screen.line()
    made = changes("saved", "the price")
    made.add_row("the recipe as it is", *_peak(found.start), "", seconds(found.start), "")
    for rung in found.rungs:
        made.add_row(*_rung(rung, found.start))
    screen.console.print(made)
    back = [rung.level.words for rung in found.rungs if not rung.kept]
    screen.line()
    if back:
        screen.line(f"Taken back, for it fits without: {', '.join(back)}.")
    step = replace(found.plan, phases=())  # of a phase that takes more, the verdict tells
    fits = step.verdict != "no"
    screen.line(verdict(found.plan) if fits else nothing_fits(found))
    if found.plan.verdict != "no" and found.change:
        screen.line()
        screen.line(paste(found, request), "bold")
    elif found.plan.verdict != "no":
        screen.line("Nothing has to be changed.")
    for note in (*request.late_notes, *found.plan.notes, *unknown_room(found.plan)):
        aside(f"note: {note}", screen)


def _peak(plan: Plan) -> tuple[Text, Text]:
    style = VERDICTS[plan.verdict]
    return Text(size(peak(plan)), style), Text(WORDS[plan.verdict], style)


def seconds(plan: Plan) -> str:
    """Of a step, by the time model."""
    return "unknown" if isinstance(plan.speed, str) or plan.speed.seconds is None else f"{duration(plan.speed.seconds)}"


def slower(plan: Plan, than: Plan) -> str:
    """How much more time a token takes, by the time model: +12%."""
    now, before = tokens_per_second(plan), tokens_per_second(than)
    if not (now and before):
        return "unknown"
    more = before / now - 1
    return "same" if abs(more) < 0.005 else f"{more:+.0%}"


def _rung(rung: Rung, start: Plan) -> Iterable[Text]:
    style = "" if rung.kept else "dim"
    words = rung.level.words + ("" if rung.kept else " (taken back)")
    saved = Text(size(rung.saved), style)
    return Text(words, style), *_peak(rung.plan), saved, Text(slower(rung.plan, start)), Text(rung.level.cost, "dim")


def paste(found: Fit, request: Request) -> str:
    """The command that trains the recipe that fits; of a mere model, which has no data yet, the one that plans it."""
    given = [text for text in request.changes if text.partition("=")[0] not in found.change]
    words = ["train", str(request.source)]
    if request.source is None:
        words = ["plan", "--model", request.recipe.model, "--device", request.device.key]
        if request.budget != request.device.memory:
            words += ["--budget", request.typed.get("budget", f"{request.budget}B")]
        beside = [name for name in ("host", "disk") if name in request.typed]
        words += [word for name in beside for word in (f"--{name}", request.typed[name])]
    return " ".join(shlex.quote(word) for word in ("qtune", *words, *given, *shown(found.change)))


def show_explained(start: Plan, rows: Sequence[Row], request: Request, screen: Screen) -> None:
    """One row a knob, the largest saving first."""
    for line in head(start):
        screen.line(line)
    screen.line()
    screen.line(f"Limit {limit(request)}. One change at a time, from the recipe as it is; time is for a token:")
    screen.line()
    made = changes("difference", "")
    shown_start = False
    for row in rows:
        if not shown_start and (row.difference > 0 or row.plan is None):
            made.add_row(Text("the recipe as it is", "bold"), *_peak(start), "", seconds(start), "a step")
            shown_start = True
        if row.plan is None:
            made.add_row(Text(row.words, "dim"), "-", "", "", "", Text(row.cost, "dim"))
        else:
            much = difference(row.difference), slower(row.plan, start)
            made.add_row(row.words, *_peak(row.plan), *much, Text(_paid(row, start), "dim"))
    if not shown_start:
        made.add_row(Text("the recipe as it is", "bold"), *_peak(start), "", seconds(start), "a step")
    screen.console.print(made)
    if not tokens_per_second(start):
        aside(speed_lines(start.speed, request)[0].plain, screen)
    for note in request.late_notes:
        aside(f"note: {note}", screen)


def _paid(row: Row, start: Plan) -> str:
    """What a change costs in words, and what it takes more of beside the device."""
    assert row.plan is not None
    more = ("host", row.plan.waiting - start.waiting), ("disk", row.plan.files - start.files)
    return ", ".join([row.cost, *(f"{difference(nbytes)} {where}" for where, nbytes in more if nbytes)])


def difference(nbytes: int) -> str:
    """Bytes with their sign."""
    return "none" if nbytes == 0 else f"{'-' if nbytes < 0 else '+'}{size(abs(nbytes))}"


# ---- the picture, and what was measured


def show_sweep(made: Sweep, path: Path, replaced: bool, screen: Screen) -> None:
    """Where the picture is, and for each micro-batch the longest length that fits."""
    screen.line(f"Of the lengths planned, these fit in {size(made.request.budget)}:")
    for rows, points in made.lines.items():
        fitting = [(length, most) for length, most in points if most <= made.request.budget]
        words = "nothing planned fits" if not fitting else f"up to {fitting[-1][0]:,} tokens, {size(fitting[-1][1])}"
        screen.line(f"micro-batch {rows:>2}: {words}")
    screen.line(f"{'replaced' if replaced else 'wrote'} {path}")


def show_measured(found: Measured, request: Request, screen: Screen) -> None:
    """Planned beside measured, one row a tier."""
    for line in head(found.plan):
        screen.line(line)
    screen.line()
    made = grid({"tier": "left", "planned": "right", "measured": "right", "error": "right", "measured by": "left"})
    for row in found.rows():
        planned, measured = size(row["planned"]), size(row["measured"])
        made.add_row(row["tier"], planned, measured, f"{row['error']:+.1%}", Text(row["how"], "dim"))
    screen.console.print(made)
    screen.line()
    aside(f"weights: {found.weights}", screen)
    for note in (*request.late_notes, *found.notes):
        aside(f"note: {note}", screen)
