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
import weakref
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
STRETCH = 1 << 30  # bytes that a file grows by at most, beyond what is asked for
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


def existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(path))


def _remove(folder: Path, there: Path) -> None:
    """Remove a folder and those above it, up to the one that was there, as far as they are empty."""
    with suppress(OSError):
        for path in (folder.absolute(), *folder.absolute().parents):
            if path == there:
                return
            path.rmdir()


class MappedFile:
    """A growing file in `folder`, which no other process can change: it has no name (on Windows: a name until it is
    closed). what: the words for errors."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what, self.nbytes = folder, what, 0
        there = existing(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed with the object)
        except OSError as error:
            _remove(folder, there)
            no_folder = isinstance(error, FileExistsError | NotADirectoryError)
            why = "it is no folder" if no_folder else f"no file can be made there ({error.strerror or error})"
            raise QtuneError(
                "Q901", f"cannot write {what} to {folder}: {why}; set memory.folder to a writable folder"
            ) from error
        weakref.finalize(self, _remove, folder, there)  # the file has no name: what is made for it stays empty
        self._maps: dict[int, tuple[mmap.mmap, int, int]] = {}  # address of a tensor -> mapping, place and bytes there
        self._mapped: mmap.mmap | None = None  # the newest mapping, of which `_used` bytes are taken
        self._used = 0

    def empty(self, nbytes: int) -> Tensor:
        """A fresh uint8 tensor [nbytes], zero, that begins at a page."""
        length = max(1, -(nbytes // -PAGE)) * PAGE
        if self._mapped is None or self._used + length > len(self._mapped):
            self._grow(nbytes, length)
        assert self._mapped is not None
        at, self._used = self._used, self._used + length
        tensor = mark(torch.frombuffer(self._mapped, dtype=torch.uint8, count=max(1, nbytes), offset=at), DISK)[:nbytes]
        self._maps[tensor.data_ptr()] = self._mapped, at, length
        return tensor

    def _grow(self, nbytes: int, length: int) -> None:
        """Another stretch of the file, mapped: with room for more, as each mapping takes a file descriptor. It is as
        large as the file is by then, within STRETCH, so that little is taken that is not used."""
        stretch = max(length, min(STRETCH, -(self.nbytes // -PAGE) * PAGE))
        try:
            if hasattr(os, "posix_fallocate"):  # a hole in a full disk would kill the process when it is written to
                try:
                    os.posix_fallocate(self.file.fileno(), self.nbytes, stretch)
                except OSError:
                    stretch = length  # what is asked for may fit yet
                    os.posix_fallocate(self.file.fileno(), self.nbytes, stretch)
            else:
                os.truncate(self.file.fileno(), self.nbytes + stretch)
            self._mapped, self._used = mmap.mmap(self.file.fileno(), stretch, offset=self.nbytes), 0
        except OSError as error:
            raise self._refused(nbytes, error) from error
        self.nbytes += stretch

    def drop(self, tensor: Tensor) -> None:
        """The caller lets go of a tensor that `empty` gave: its blocks go back to the disk where the system can punch
        holes."""
        mapped, at, length = self._maps.pop(tensor.data_ptr())
        if REMOVE is not None:
            with suppress(OSError):  # a file system that cannot: the blocks stay until the file is closed
                mapped.madvise(REMOVE, at, length)

    def release(self, tensor: Tensor) -> None:
        """Give the pages of a tensor back to the system; its values stay."""
        self._advise(tensor, RELEASE)

    def fetch(self, tensor: Tensor) -> None:
        """Ask the system to read the pages of a tensor ahead."""
        self._advise(tensor, FETCH)

    def _advise(self, tensor: Tensor, advice: Any) -> None:
        if advice is not None:
            mapped, at, length = self._maps[tensor.data_ptr()]
            mapped.madvise(advice, at, length)

    def _refused(self, nbytes: int, error: OSError) -> QtuneError:
        if error.errno == errno.EMFILE:
            return QtuneError(
                "Q504",
                f"no file descriptor is left for {self.what} in {self.folder}: this process has as many files open as "
                "it may (ulimit -n); allow it more",
            )
        if error.errno == errno.ENOMEM:
            return QtuneError(
                "Q504",
                f"the system maps no more of {self.what} ({error.strerror}): it allows a process too few mappings "
                f"(vm.max_map_count; {len(self._maps):,} are in use here) or too little address space",
            )
        free = shutil.disk_usage(existing(self.folder)).free
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return QtuneError("Q901", f"cannot write {self.what} to {self.folder}: {error.strerror or error}")
        return QtuneError(
            "Q903",
            f"no room for {self.what} in {self.folder}: {size(nbytes)} more are needed, {size(free)} are free; set "
            "memory.folder to a folder on a larger disk",
        )
