"""What a person sees: rich bars on a terminal, plain lines elsewhere. With `json` everything of it goes to stderr,
stdout stays for the program. And what a person presses: Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Advance = Callable[..., None]  # advance(n=1, note="")
Figures = Mapping[str, str]  # name -> value, in the order in which they are shown
PLAIN_LINES = 10  # lines that a bar prints where there is no terminal
STEADY = 1800.0  # seconds whose steps tell the time left: a step on a CPU may take a minute


class Screen:
    """Console and bars. `quiet` shows nothing at all (tests, library use)."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.console = Console(stderr=json, quiet=quiet, highlight=False)

    def line(self, text: str | Text = "", style: str | None = None) -> None:
        """One line of text; markup in a str is not interpreted."""
        # whole lines where a program or a log reads them; on a terminal wrapped between words
        wrapped = self.console.is_terminal
        shown = Text(printable(text), style=style or "") if isinstance(text, str) else text
        self.console.print(shown, soft_wrap=not wrapped)

    def beside(self, head: str, text: str, style: str) -> None:
        """A head, and a text of one or more lines beside it. On a terminal what is wrapped stays beside the head."""
        if self.console.is_terminal:
            row = Table.grid(padding=(0, 2, 0, 0))
            row.add_row(Text(head, style), Text(printable(text), style))
            self.console.print(row)
            return
        first, *rest = text.splitlines() or [""]
        self.line(f"{head}  {first}", style)
        for line in rest:
            self.line(f"{' ' * len(head)}  {line}", style)

    def title(self, text: str) -> None:
        """A heading between the stages of a command."""
        self.line()
        self.line(text, "bold cyan")

    @contextmanager
    def bar(self, label: str, total: int, *, passing: bool = False) -> Iterator[Advance]:
        """A progress bar of `total` units; yields advance(n, note). passing: it goes when it is done."""
        if self.console.is_terminal and not self.console.quiet:
            note = TextColumn("{task.fields[note]}")
            with Progress(*_columns(), note, console=self.console, transient=passing) as progress:
                task = progress.add_task(label, total=total, note="")
                yield lambda n=1, note="": progress.update(task, advance=n, **({"note": note} if note else {}))
        else:
            yield self._plain(label, total)

    @contextmanager
    def steps(self, label: str, total: int, done: int = 0) -> Iterator[Callable[[Figures], None]]:
        """A bar of `total` steps, `done` of them before now, over the figures of the last one; yields a function that
        takes a step's figures. Without a terminal a tenth of all steps is a line."""
        if self.console.is_terminal and not self.console.quiet:
            progress = Progress(*_columns(), console=self.console, speed_estimate_period=STEADY)
            task = progress.add_task(label, total=total, completed=done)
            with Live(progress, console=self.console, refresh_per_second=4) as live:

                def show(figures: Figures) -> None:
                    progress.advance(task)
                    live.update(Group(progress, *_lines(figures, self.console.width)))

                yield show
        else:
            advance = self._plain(label, total, done)
            yield lambda figures: advance(1, ", ".join(f"{name} {value}" for name, value in figures.items()))

    def _plain(self, label: str, total: int, before: int = 0) -> Advance:
        state = {"done": before, "shown": before * PLAIN_LINES // max(1, total)}
        start = time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            state["done"] += n
            tenth = state["done"] * PLAIN_LINES // max(1, total)
            if tenth > state["shown"]:
                state["shown"] = tenth
                left = (time.monotonic() - start) / (state["done"] - before) * (total - state["done"])
                self.line(
                    f"{label} {state['done']}/{total}"
                    + (f", {duration(left)} left" if state["done"] < total else "")
                    + (f"  {note}" if note else "")
                )

        return advance


def _lines(figures: Figures, width: int) -> list[Text]:
    """Names and values beside each other, in as many lines of `width` as they take; none is broken."""
    lines: list[Text] = []
    for name, value in figures.items():
        told = Text.assemble((f"{name} ", "dim"), value)
        if lines and lines[-1].cell_len + 3 + told.cell_len <= width:
            lines[-1].append("   ").append_text(told)
        else:
            lines.append(told)
    return lines


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def printable(text: str) -> str:
    """The text as it can be printed: file names that are no UTF-8 hold halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def size(n: float) -> str:
    """Bytes in words: 87.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds in words: 380 ms, 1.7 s, 115 s, 14 min, 3 h 20 min, 4.2 days."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 180:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{hours} h {rest} min" if hours < 48 else f"{seconds / 86400:.1f} days"


def count(n: int) -> str:
    """A number of parameters in three digits: 6.74 B, 40.0 M."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= factor:
            return f"{n / factor:#.3g} {unit}" if n < 99.95 * factor else f"{n / factor:,.0f} {unit}"
    return str(n)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and SIGHUP (a closed terminal, unless `nohup` has it ignored) set a flag that the loop reads
    between steps, so that no step is left half done. A second Ctrl-C stops at once; a second SIGTERM does not, as some
    schedulers send several."""
    asked = False

    def handler(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        with suppress(OSError, RuntimeError):  # the terminal is gone, or another line is being printed
            print("\nstopping after this step and saving; Ctrl-C stops at once, without this step", file=sys.stderr)

    before: dict[int, Any] = {}
    try:
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # which Windows has not
        for signum in {signal.SIGINT, signal.SIGTERM, hangup}:
            if signum == hangup and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            before[signum] = signal.signal(signum, handler)
    except ValueError:  # not in the main thread: the program that runs us handles its own signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
