"""Tensors in a file without a name: mapped into memory, written by the system when it likes, gone with the process.

Pages of a mapping that were released cost no memory of the process; what was written to them stays in the file (or in
the system's cache of it), and touching them brings them back.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import QtuneError
from ..screen import size
from .host import DISK, HOST, host_empty, mark

PAGE = mmap.ALLOCATIONGRANULARITY
RELEASE = getattr(mmap, "MADV_DONTNEED", None)
FETCH = getattr(mmap, "MADV_WILLNEED", None)
REMOVE = getattr(mmap, "MADV_REMOVE", None)


class Elsewhere:
    """Tensors that wait for `device` in host memory, or with `folder` in a mapped file; on meta, where a plan runs, in
    neither, but marked. what: the words for errors; key: of the recipe, that asks for it."""

    def __init__(self, device: torch.device, folder: Path | None, what: str, key: str) -> None:
        self.device, self.place, self.key = device, HOST if folder is None else DISK, key
        self.file = None if folder is None or device.type == "meta" else MappedFile(folder, what)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A fresh tensor there."""
        if self.file is None:
            return host_empty(shape, dtype, self.device, f"set {self.key} to disk or device", self.place)
        return self.file.empty(prod(shape) * dtype.itemsize).view(dtype).view(*shape)

    def drop(self, tensor: Tensor) -> None:
        """It is not wanted any more: its place in the file is free."""
        if self.file is not None:
            self.file.drop(tensor)

    def release(self, tensor: Tensor) -> None:
        """Its pages are not needed for now."""
        if self.file is not None:
            self.file.release(tensor)

    def fetch(self, tensor: Tensor) -> None:
        """They soon will be."""
        if self.file is not None:
            self.file.fetch(tensor)


class MappedFile:
    """A growing file in `folder`, which no other process can change: it has no name (on Windows: a name until it is
    closed). what: the words for errors."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what, self.nbytes = folder, what, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed with the object)
        except OSError as error:
            raise QtuneError(
                f"cannot write {what} to {folder}: {error.strerror or error}; set memory.folder to a writable folder"
            ) from error
        self._maps: dict[int, mmap.mmap] = {}  # address of a tensor -> its mapping

    def empty(self, nbytes: int) -> Tensor:
        """A fresh uint8 tensor [nbytes], zero, that begins at a page."""
        length = max(1, -(nbytes // -PAGE)) * PAGE
        try:
            if hasattr(os, "posix_fallocate"):  # a hole in a full disk would kill the process when it is written to
                os.posix_fallocate(self.file.fileno(), self.nbytes, length)
            else:
                os.truncate(self.file.fileno(), self.nbytes + length)
            mapped = mmap.mmap(self.file.fileno(), length, offset=self.nbytes)
        except OSError as error:
            raise self._refused(nbytes, error) from error
        tensor = mark(torch.frombuffer(mapped, dtype=torch.uint8), DISK)[:nbytes]
        self._maps[tensor.data_ptr()] = mapped
        self.nbytes += length
        return tensor

    def drop(self, tensor: Tensor) -> None:
        """The caller lets go of a tensor that `empty` gave: its blocks go back to the disk where the system can punch
        holes, its mapping goes with it."""
        mapped = self._maps.pop(tensor.data_ptr())
        if REMOVE is not None:
            with suppress(OSError):  # a file system that cannot: the blocks stay until the file is closed
                mapped.madvise(REMOVE)

    def release(self, tensor: Tensor) -> None:
        """Give the pages of a tensor back to the system; its values stay."""
        self._advise(tensor, RELEASE)

    def fetch(self, tensor: Tensor) -> None:
        """Ask the system to read the pages of a tensor ahead."""
        self._advise(tensor, FETCH)

    def _advise(self, tensor: Tensor, advice: Any) -> None:
        if advice is not None:
            self._maps[tensor.data_ptr()].madvise(advice)

    def _refused(self, nbytes: int, error: OSError) -> QtuneError:
        if error.errno == errno.ENOMEM:
            return QtuneError(
                f"the system maps no more of {self.what} ({error.strerror}): it allows a process too few mappings "
                f"(vm.max_map_count; {len(self._maps):,} are in use here) or too little address space"
            )
        free = shutil.disk_usage(self.folder).free
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return QtuneError(f"cannot write {self.what} to {self.folder}: {error.strerror or error}")
        return QtuneError(
            f"no room for {self.what} in {self.folder}: {size(nbytes)} more are needed, {size(free)} are free; set "
            "memory.folder to a folder on a larger disk"
        )
