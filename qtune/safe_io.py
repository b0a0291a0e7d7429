"""Files and folders that are whole or absent: written beside their final name, flushed to disk, then renamed to it.

What a killed process leaves is named `.NAME.PID.partial`, so that `remove_partials` knows it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import QtuneError

PARTIAL = ".partial"


def expanded(name: str | Path) -> Path:
    """A path that a person typed, `~` replaced. Raises QtuneError for the home of a user that is not there."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise QtuneError("Q102", f"{name}: no user of this name has a home here; legal: a path") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path`: on success it takes that name, on any error it goes and `path` is as before."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_folder(path.parent)
    except OSError as error:
        raise QtuneError(
            "Q901", f"cannot write {path}: {error.strerror or error}; the previous file, if any, is untouched"
        ) from error
    finally:
        with suppress(OSError):  # it was renamed, or never made
            partial.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which must not exist: on success it takes that name, on any error it goes.

    One rename makes it whole. Whoever fills it flushes the files, as `replacing` does. Raises OSError.
    """
    partial = _partial(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        flush_folder(partial)
        os.rename(partial, path)
        flush_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it was renamed, or never made


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")


def remove_partials(folder: Path) -> list[str]:
    """Remove what was half written to `folder` when its process was killed. Returns the names."""
    found = sorted(folder.glob(f".*{PARTIAL}"))
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in found]


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on disk, so that a rename outlives a power cut; Windows has no way to ask for it, nor
    have some network file systems."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)


def copy_file(source: Path, path: Path) -> None:
    """Have a copy of the file `source` at `path`, whole or as before. (No second name of the same bytes: who writes to
    one of them later would change both.)"""
    with open(source, "rb") as read, replacing(path) as file:
        shutil.copyfileobj(read, file, 1 << 22)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the existing `folder` against other processes that ask for the same; the system lets go when this process
    ends, however it does. Nobody is held off on Windows, nor where a network's file system has no such locks."""
    if os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QtuneError(
                "Q415", f"{folder} is being written to by another run of qtune: wait for its end, stop it, or choose "
                "another folder with output=..."
            ) from error  # fmt: skip
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make `folder` and prove that it can be written to, before hours of work go into what it shall hold. On an error
    inside of the block the folders that this made go again, where they are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".{os.getpid()}.writable"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise QtuneError("Q901", f"cannot write to the folder {folder}: {error.strerror or error}") from error
        yield
    except BaseException:
        with suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()
        raise
