"""Host memory: what the C library's allocator is told, and tensors that wait in the host's memory for another device.

A step takes the same blocks again and again. By default glibc gives large ones back to the system at once, and every
page of them costs a fault when it is next written: a step of SmolLM2-135M on 2 x 512 tokens took 120,000 faults, 0.3 s
of CPU time. A page of 2 MiB costs one fault in place of 512. And libraries remember the code that they made for each
shape of a product, without end.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import torch
from torch import Tensor

from ..errors import QtuneError
from ..screen import size
from ..sections import PLACES

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # the numbers of M_TRIM_THRESHOLD ... in glibc's malloc.h
MAPPINGS = 65536  # glibc's own limit of them
OWN_PAGES = 1 << 20  # bytes of a block that is a mapping of its own
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's: blocks of 2 MiB and more ask for huge pages, on Linux
# How many products torch keeps ready on a CPU, each of them bytes: in its own cache, and in oneDNN's below it, which
# holds what a step of one length takes. Both are 1,024 by default.
CACHES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}

DEVICE, HOST, DISK = PLACES
_making: ContextVar[str] = ContextVar("making", default=DEVICE)


def large_pages() -> None:
    """Let torch ask for huge pages for its large blocks, unless the user has said it; before its first tensor on the
    CPU, or without effect. It aligns them to pages then, too, which leaves smaller gaps in glibc's heap: one step of a
    7B, 1 x 512 tokens, took 5.03 GiB in place of 5.45 with resident weights, and 26 s in place of 38 with streamed
    ones, which are given back after each layer."""
    os.environ.setdefault(LARGE_PAGES, "1")


def small_caches() -> None:
    """Let torch's libraries keep few products of matrices ready, unless the user has said it; before the first one, or
    without effect. A new shape (another length, a rank that has moved) costs half a MiB there until another takes its
    place: 12 steps of AdaLoRA on SmolLM2-135M ended at 630 MiB in place of 1,460, of LoRA at 660 in place of 710, in
    the same time."""
    for name, value in CACHES.items():
        os.environ.setdefault(name, value)


def keep_freed_memory() -> bool:
    """Never give freed memory back, from now on, and take no block straight from the system. Returns whether the C
    library could be told: only glibc knows these two."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(TRIM_THRESHOLD, -1)) and bool(mallopt(MMAP_MAX, 0))


def return_freed_memory() -> bool:
    """Take every block of at least OWN_PAGES straight from the system and give it back when it is freed, from now on:
    the opposite of `keep_freed_memory`. For runs whose memory must be small: glibc's heap fits aligned blocks badly
    (12 layers of a 7B, streamed: a peak of 1,450 MiB in place of 1,800, planned 1,270, for a tenth more CPU time)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(MMAP_MAX, MAPPINGS) and mallopt(TRIM_THRESHOLD, OWN_PAGES)  # what the other one has set
    return bool(kept) and bool(mallopt(MMAP_THRESHOLD, OWN_PAGES))


def host_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def host_empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, instead: str, place: str = HOST
) -> Tensor:
    """A tensor in host memory, to wait in for `device`: page-locked for CUDA, which then copies beside the computation.

    On meta, where a plan runs, it is on meta too, and marked; `place` may then be DISK. Raises QtuneError where the
    system has no such memory. instead: what the user can do then.
    """
    with on_host(place):
        if device.type == "meta":
            return mark(torch.empty(*shape, dtype=dtype, device=device), place)
        try:
            return mark(torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=device.type == "cuda"), HOST)
        except RuntimeError as error:
            kind = "page-locked host memory" if device.type == "cuda" else "host memory"
            raise QtuneError(
                "Q503",
                f"the system gave no {size(prod(shape) * dtype.itemsize)} of {kind} ({str(error).splitlines()[0]}); "
                f"{instead}",
            ) from error


def is_here(place: str, kind: str) -> bool:
    """Is what a key of `memory` says the device's own memory? A CPU's is the host's. kind: of the device."""
    return place == DEVICE or (place == HOST and kind == "cpu")


def mark(tensor: Tensor, place: str) -> Tensor:
    """Say where the memory of a tensor is; whatever is over the same memory is there as well."""
    tensor.untyped_storage().qtune_place = place  # type: ignore[attr-defined]
    return tensor


def place_of(tensor: Tensor) -> str:
    """DEVICE, HOST (of the machine, for another device) or DISK (pages of a file)."""
    return getattr(tensor.untyped_storage(), "qtune_place", DEVICE)


@contextmanager
def on_host(place: str = HOST) -> Iterator[None]:
    """What a plan sees being made in here stands for host memory: a plan of another device does not count it. place:
    DISK for what lies in a file, which no plan counts."""
    token = _making.set(place)
    try:
        yield
    finally:
        _making.reset(token)


def making() -> str:
    """The place of what is made now: HOST, say, inside of `on_host`."""
    return _making.get()
