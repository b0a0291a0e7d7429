"""Layer streaming: the frozen packed weights of the decoder layers wait in host memory or in a mapped file.

On a CPU the mapped file is the stream: products read its pages where they lie, the next layer is asked for ahead, and
the pages of a layer that is done are given back. On any other device there are two slots, each as large as the largest
layer: while one layer computes, the next one is copied into the other slot, in forward and in backward order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layerwise import decoder_layers
from ..model.loading import packed_sites
from ..quant import QuantLinear
from .files import Elsewhere
from .host import DISK, is_here, return_freed_memory
from .layers import run_layers


class Store(Elsewhere):
    """Where packed weights wait: host memory, or with `folder` a mapped file. device: where they are computed on; kind:
    what it is, or on meta what it stands for."""

    def __init__(self, device: torch.device, kind: str, folder: Path | None = None) -> None:
        super().__init__(device, folder, "the streamed weights", "memory.weights")
        self.kind = kind
        if self.file is not None and kind == "cpu":  # before loading, which would leave a heap full of holes
            return_freed_memory()

    def put(self, layer: nn.Module) -> None:
        """Put the packed weights of a decoder layer aside."""
        for linear in linears(layer):
            linear.home = linear.packed.device
            linear.packed = nn.Parameter(self.keep(linear.packed.data), requires_grad=False)
            linear.release = self.release

    def run(self, model: nn.Module) -> None:
        """Stream the layers of a model, all of which were put here, from now on."""
        layers = decoder_layers(model)[1]
        run_layers(model, Mapped(layers, self) if self.kind == "cpu" else Slots(layers, self.device))

    def keep(self, flat: Tensor) -> Tensor:
        """A packed weight, uint8 [bytes], where it waits."""
        waiting = self.empty(flat.shape, flat.dtype)
        waiting.copy_(flat)
        self.release(waiting)
        return waiting


class Mapped:
    """The stream on a CPU: the weights are used where they lie."""

    def __init__(self, layers: nn.ModuleList, store: Store) -> None:
        self.packed = [[m.packed for m in linears(layer)] for layer in layers]
        self.store = store

    def enter(self, index: int, *, backward: bool) -> None:
        following = index + (-1 if backward else 1)
        if 0 <= following < len(self.packed):
            for packed in self.packed[following]:
                self.store.fetch(packed)

    def leave(self, index: int) -> None:
        for packed in self.packed[index]:
            self.store.release(packed)


class Slots:
    """The stream on a device of its own memory: two slots, and copies ahead of use (on CUDA on a copy stream)."""

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.linears = [linears(layer) for layer in layers]
        self.waiting = [[m.packed.data for m in layer] for layer in self.linears]
        largest = max(sum(_aligned(t) for t in layer) for layer in self.waiting)
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.held: list[int | None] = [None, None]  # the layer in each slot
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:  # what loading still computes may be in the memory that the slots got
            self.stream.wait_stream(torch.cuda.current_stream(device))
            for slot in self.slots:  # and a pass that is given up frees them at once
                slot.record_stream(self.stream)
        self.ready: list[Any] = [None, None]  # the copy into a slot is over
        self.free: list[Any] = [None, None]  # what was computed from a slot is over
        self.backward, self.inside = False, -1
        for index, layer in enumerate(self.linears):
            for linear in layer:  # who reads the waiting bytes may have written them
                linear.release = partial(self._forget, index)

    def _forget(self, index: int, packed: Tensor) -> None:
        if self.inside == index:  # read by the layer itself, in its slot
            return
        self.held = [None if layer == index else layer for layer in self.held]

    def enter(self, index: int, *, backward: bool) -> None:
        slot = self._bring(index, beside=None)
        if self.ready[slot] is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready[slot])
        for linear, part in zip(self.linears[index], self._parts(index, slot), strict=True):
            linear.packed.data = part
        self.backward, self.inside = backward, index

    def leave(self, index: int) -> None:
        slot, self.inside = self.held.index(index), -1
        for linear, host in zip(self.linears[index], self.waiting[index], strict=True):
            linear.packed.data = host
        if self.stream is not None:
            self.free[slot] = torch.cuda.current_stream(self.device).record_event()
        following = index + (-1 if self.backward else 1)
        if 0 <= following < len(self.linears):  # now, as a copy from a file holds the caller up until it is made
            self._bring(following, beside=slot)

    def _bring(self, index: int, beside: int | None) -> int:
        """The slot of a layer, copied there if it is not: into the slot that is not `beside`."""
        if index in self.held:
            return self.held.index(index)
        slot = 0 if beside is None else 1 - beside
        with torch.no_grad():
            if self.stream is None:
                self._copy(index, slot)
            else:
                if self.free[slot] is not None:
                    self.stream.wait_event(self.free[slot])
                with torch.cuda.stream(self.stream):
                    self._copy(index, slot)
                self.ready[slot] = self.stream.record_event()
        self.held[slot] = index
        return slot

    def _copy(self, index: int, slot: int) -> None:
        for part, host in zip(self._parts(index, slot), self.waiting[index], strict=True):
            part.copy_(host, non_blocking=True)

    def _parts(self, index: int, slot: int) -> list[Tensor]:
        parts, at = [], 0
        for host in self.waiting[index]:
            parts.append(self.slots[slot][at : at + host.numel()])
            at += _aligned(host)
        return parts


def linears(layer: nn.Module) -> list[QuantLinear]:
    """The packed layers inside of a decoder layer."""
    return list(packed_sites(layer).values())


def _aligned(tensor: Tensor) -> int:
    return -(tensor.numel() // -256) * 256


def store_of(place: str, kind: str, device: torch.device, folder: Path) -> Store | None:
    """What `memory.weights` asks for; None: the weights stay on the device. kind, device, folder: as of
    `boundaries_of`."""
    if is_here(place, kind):
        return None
    return Store(device, kind, folder if place == DISK else None)
