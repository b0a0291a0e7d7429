"""Files that are whole or absent: written beside their final name, flushed to disk, then renamed over it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import QtuneError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path`: on success it takes that name, on any error it goes and `path` is as before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise QtuneError(
            f"cannot write {path}: {error.strerror or error}; the previous file, if any, is untouched"
        ) from error
    finally:
        with suppress(OSError):  # it was renamed, or never made
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def claim_folder(folder: Path) -> None:
    """Make `folder` and prove that it can be written to, before hours of work go into what it shall hold."""
    probe = folder / f".{os.getpid()}.writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise QtuneError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
