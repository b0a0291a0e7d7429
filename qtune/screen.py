"""What a person sees: rich bars on a terminal, plain lines elsewhere. With `json` everything of it goes to stderr,
stdout stays for the program. And what a person presses: Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[..., None]  # advance(n=1, note="")
PLAIN_LINES = 10  # lines that a bar prints where there is no terminal


class Screen:
    """Console and bars. `quiet` shows nothing at all (tests, library use)."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.console = Console(stderr=json, quiet=quiet, highlight=False)

    def line(self, text: str | Text = "", style: str | None = None) -> None:
        """One line of text; markup in a str is not interpreted."""
        # whole lines where a program or a log reads them; on a terminal wrapped between words
        wrapped = self.console.is_terminal
        self.console.print(Text(text, style=style or "") if isinstance(text, str) else text, soft_wrap=not wrapped)

    def title(self, text: str) -> None:
        """A heading between the stages of a command."""
        self.line()
        self.line(text, "bold cyan")

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """A progress bar of `total` units; yields advance(n, note)."""
        if self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task(label, total=total, note="")
                yield lambda n=1, note="": progress.update(task, advance=n, **({"note": note} if note else {}))
        else:
            yield self._plain(label, total)

    def _plain(self, label: str, total: int) -> Advance:
        state = {"done": 0, "shown": 0}
        start = time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            state["done"] += n
            tenth = state["done"] * PLAIN_LINES // max(1, total)
            if tenth > state["shown"]:
                state["shown"] = tenth
                left = (time.monotonic() - start) / state["done"] * (total - state["done"])
                self.line(
                    f"{label} {state['done']}/{total}"
                    + (f", {left:.0f} s left" if state["done"] < total else "")
                    + (f"  {note}" if note else "")
                )

        return advance


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
    """Ctrl-C and SIGTERM set a flag that the loop reads between steps, so that no step is left half done. A second
    Ctrl-C stops at once; a second SIGTERM does not, as some schedulers send several."""
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
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, handler)
    except ValueError:  # not in the main thread: the program that runs us handles its own signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
