"""Where a layer's input waits between forward and backward: on the device, in host memory, or in a file.

Away from the device, tensors go out in order and come back in reverse. One may still be on its way out, and one is
fetched ahead, both on a copy stream on CUDA: two boundaries are on the device at a time, however many layers there are.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import Elsewhere
from .host import DISK, is_here


@dataclass(eq=False)
class Kept:
    """One layer's inputs, put aside; owned by the graph. away: where they lie, in `buffers`; back: those that were
    fetched; done: the copy's event."""

    away: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    back: list[Tensor] = field(default_factory=list)
    done: Any = None
    leaving: Sequence[Tensor] = ()


class Boundaries:
    """Keeps them on the device, with autograd's own care."""

    def put(self, ctx: Any, tensors: Sequence[Tensor]) -> Kept:
        """Called in the forward of a Function; returns what `take` wants to see."""
        ctx.save_for_backward(*tensors)
        return Kept()

    def take(self, ctx: Any, kept: Kept) -> Sequence[Tensor]:
        """The tensors again, in the backward of the same Function."""
        tensors: Sequence[Tensor] = ctx.saved_tensors
        return tensors

    def clear(self) -> None:
        """Forget all buffers."""


class Away(Boundaries):
    """In host memory (page-locked on CUDA), or with `folder` in a mapped file.

    A buffer is bytes, for whatever comes: one that is too small for what is largest so far goes when a larger one is
    taken, so that there are never more than one pass needs.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device, self.there = device, Elsewhere(device, folder, "the inputs of layers", "memory.boundaries")
        self._stack: list[weakref.ref[Kept]] = []
        self.free: list[Tensor] = []  # buffers, uint8
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, ctx: Any, tensors: Sequence[Tensor]) -> Kept:
        if self.stack:
            self._left(self.stack[-1])
        kept = Kept(buffers=[self._buffer(x.nbytes) for x in tensors], leaving=tensors)
        weakref.finalize(kept, self.free.extend, kept.buffers).atexit = False  # a forward pass without a backward
        kept.away = [b[: x.nbytes].view(x.dtype).view(x.shape) for b, x in zip(kept.buffers, tensors, strict=True)]
        self._copy(zip(kept.away, tensors, strict=True), kept)
        for buffer in kept.buffers:
            self.there.release(buffer)
        self._stack.append(weakref.ref(kept))
        return kept

    def take(self, ctx: Any, kept: Kept) -> Sequence[Tensor]:
        self._stack = [ref for ref in self._stack if ref() not in (kept, None)]
        self._left(kept)
        if not kept.back:
            self._fetch(kept)
        self._wait(kept)
        tensors, kept.back = kept.back, []
        self._drop(kept)
        if self.stack and not self.stack[-1].back:
            self._fetch(self.stack[-1])
        return tensors

    @property
    def stack(self) -> list[Kept]:
        """What is put aside and still wanted, in order: of a forward pass without a backward the graph is gone."""
        return [kept for ref in self._stack if (kept := ref()) is not None]

    def clear(self) -> None:
        self._stack.clear()
        self.free.clear()

    def _left(self, kept: Kept) -> None:
        """The device's copy may go: what is computed from here on waits until it has left."""
        if kept.leaving:
            self._wait(kept)
            kept.leaving = ()

    def _fetch(self, kept: Kept) -> None:
        with torch.no_grad():
            kept.back = [torch.empty(x.shape, dtype=x.dtype, device=self.device) for x in kept.away]
        self._copy(zip(kept.back, kept.away, strict=True), kept)

    def _copy(self, pairs: Any, kept: Kept) -> None:
        with torch.no_grad():
            if self.stream is None:
                for into, x in pairs:
                    into.copy_(x)
                return
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for into, x in pairs:
                    into.copy_(x, non_blocking=True)
                    (into if into.is_cuda else x).record_stream(self.stream)  # a pass that is given up frees it at once
            kept.done = self.stream.record_event()

    def _wait(self, kept: Kept) -> None:
        if kept.done is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.done)
            kept.done = None

    def _buffer(self, nbytes: int) -> Tensor:
        for place, buffer in enumerate(self.free):
            if buffer.numel() >= nbytes:
                return self.free.pop(place)
        if self.free:
            self.there.drop(self.free.pop())
        return self.there.empty([nbytes], torch.uint8)

    def _drop(self, kept: Kept) -> None:
        """Its buffers are free for others. The copy out of them is over before the next one into them: one stream."""
        for buffer in kept.buffers:
            self.there.release(buffer)
        self.free += kept.buffers
        kept.buffers.clear()  # the finalizer has this list, too
        kept.away = []


def boundaries_of(place: str, kind: str, device: torch.device, folder: Path) -> Boundaries:
    """What `memory.boundaries` asks for. kind: of the device that trains; device: where the tensors are (a plan's are
    on meta); folder: of the file."""
    if is_here(place, kind):
        return Boundaries()
    return Away(device, folder if place == DISK else None)
