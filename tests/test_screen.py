"""What is seen while a run goes: the figures of a step under its bar, lines where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qtune.screen import Screen

FIGURES = {"loss": "1.250", "lr": "9.09e-05", "grad norm": "8.56", "memory": "795.6 MiB, 674.3 MiB planned"}


def screen(width: int, *, terminal: bool) -> tuple[Screen, io.StringIO]:
    made, out = Screen(), io.StringIO()
    made.console = Console(file=out, force_terminal=terminal, width=width, color_system=None, highlight=False)
    return made, out


def last_frame(out: io.StringIO) -> str:
    """What stands on the terminal after the last line was erased."""
    return out.getvalue().rsplit("\x1b[2K", 1)[1].split("\x1b[?25h")[0]


@pytest.mark.parametrize("width", [30, 60, 120])
def test_the_last_frame_shows_every_figure_unbroken(width: int) -> None:
    made, out = screen(width, terminal=True)
    with made.steps("training", 4) as show:
        for _ in range(4):
            show(FIGURES)
    frame = last_frame(out)
    for name, value in FIGURES.items():
        assert f"{name} {value}" in frame or len(f"{name} {value}") > width
    assert max(map(len, frame.splitlines())) <= width
    assert "4/4" in frame


def test_without_a_terminal_a_tenth_of_the_steps_is_a_line_and_what_was_done_before_is_none() -> None:
    made, out = screen(200, terminal=False)
    with made.steps("training", 100, done=50) as show:
        for step in range(51, 101):
            show(FIGURES | {"loss": str(step)})
    lines = out.getvalue().splitlines()
    assert [line.split()[1].rstrip(",") for line in lines] == [f"{n}/100" for n in (60, 70, 80, 90, 100)]
    assert lines[0].endswith("loss 60, lr 9.09e-05, grad norm 8.56, memory 795.6 MiB, 674.3 MiB planned")
    assert " left" in lines[0] and " left" not in lines[-1]


def test_what_stands_beside_a_head_stays_there() -> None:
    lines = []
    for terminal in (True, False):
        made, out = screen(30, terminal=terminal)
        made.beside("✓ data    ", "some words that are long\nand a second line", "green")
        lines.append(out.getvalue().splitlines())
    assert [line.rstrip() for line in lines[0]] == [
        "✓ data      some words that", "            are long", "            and a second line",
    ]  # fmt: skip
    assert lines[1] == ["✓ data      some words that are long", "            and a second line"]


def test_a_passing_bar_leaves_nothing_and_a_bar_inside_of_another_does_not_end_it() -> None:
    made, out = screen(80, terminal=True)
    with made.steps("training", 2) as show:
        show(FIGURES)
        with made.bar("evaluating", 1, passing=True) as advance:
            advance(1)
        made.line("eval  step 1: fine")
        show(FIGURES)
    assert "evaluating" in out.getvalue() and "evaluating" not in last_frame(out)
    assert "2/2" in last_frame(out)
