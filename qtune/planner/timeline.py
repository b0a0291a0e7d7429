"""Timeline: births and releases of a stage of the job, put together from pieces of traces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..memory.cuda import expandable
from .allocator import peak_allocated, replay
from .devices import Device, workspaces
from .runtime import process_bytes
from .trace import Trace


class Timeline:
    """Births and releases of a phase, put together from pieces of traces."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.buffers: dict[str, int] = {}

    def born(self, nbytes: int) -> int:
        """A block that stays until `gone`."""
        self.sizes.append(nbytes)
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def gone(self, blocks: Iterable[int]) -> None:
        """These are released."""
        self.events += [~block for block in blocks]

    def insert(self, trace: Trace, first: int = 0, there: Mapping[int, int] | None = None) -> dict[int, int]:
        """The events of a trace from number `first` on. A kept buffer is there once.

        there: blocks of the trace that the timeline has already. Returns the timeline's block of each block of the
        trace that is still alive.
        """
        moved = dict(there or {})
        for event in trace.events[first:]:
            block = event if event >= 0 else ~event
            if event >= 0:
                if trace.kinds[block] == "buffer":
                    self._buffer(trace.ops[block], trace.sizes[block])
                else:
                    moved[block] = self.born(trace.sizes[block])
            elif block in moved:
                self.gone([moved.pop(block)])
        return moved

    def _buffer(self, name: str, nbytes: int) -> None:
        """A kept buffer, which only grows."""
        old = self.buffers.get(name)
        if old is not None and self.sizes[old] >= nbytes:
            return
        if old is not None:
            self.gone([old])
        self.buffers[name] = self.born(nbytes)

    def peak(self, device: Device, threads: int = 0) -> int:
        """Bytes of the process at the peak. threads: that multiply, each with a workspace of cuBLAS."""
        if device.kind == "cuda":
            space = [workspaces(device, threads)] if threads else []
            sizes = [*self.sizes, *space]
            events = [*range(len(self.sizes), len(sizes)), *self.events]
            return replay(sizes, events, expandable=expandable()).reserved + process_bytes(device)
        return peak_allocated(self.sizes, self.events, 1)[0] + process_bytes(device)
