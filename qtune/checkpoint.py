"""Files of tensors: safetensors folders read tensor by tensor through the memory map, and written shard by shard
without a second copy.

A Piece is what a loader fills at once: the model's names it gives, and how to read them. Reading costs no anonymous
memory until a piece is read. Left out: pickle files (`.bin`, `.pt`), which can run code and are refused by the caller.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import QtuneError
from .quant import Scheme, Storage
from .safe_io import replacing, write_json

SHARD_BYTES = 5_000_000_000
MAPPED_BYTES = 256_000_000  # read through one mapping of a file
HEADER_LIMIT = 100_000_000  # the format's own limit
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a file describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class Piece:
    """Tensors of the model that are filled together.

    targets: name in the model -> shape in the file. read: those names -> tensors, or with `scheme` the parts of the one
    packed target. rows: the same single target as blocks of rows, for a table that is too large to hold in fp32.
    source: the names in the file. own: the packed target is a run's own, not what packing the checkpoint would give.
    """

    source: str
    targets: dict[str, tuple[int, ...]]
    read: Callable[[], Mapping[str, Tensor]]
    rows: Callable[[], Iterator[Tensor]] | None = None
    scheme: Scheme | None = None
    own: bool = False


@dataclass
class Pieces:
    """What a checkpoint gives to a model, before anything is read."""

    pieces: list[Piece] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stored: Storage | None = None  # how the linear layers are packed in the file
    stored_embeddings: Scheme | None = None


def faults_error(code: str, what: str, faults: Sequence[str]) -> QtuneError:
    """All faults of one thing in one error."""
    return QtuneError(
        code, f"{what}: {faults[0]}" if len(faults) == 1 else f"{what}, {len(faults)} faults: " + "; ".join(faults)
    )


# ---- reading ----


def read_header(path: Path) -> dict[str, Stored]:
    """Names, dtypes and shapes of a safetensors file. Raises QtuneError where the header is insane or the file is cut
    off."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or length > size - 8:
                raise QtuneError(
                    "Q304",
                    f"{path.name} is truncated or no safetensors file: {size} bytes, its header says {length} + 8",
                )
            if length > HEADER_LIMIT:
                raise QtuneError("Q304", f"{path.name}: a header of {length} bytes; the format allows {HEADER_LIMIT}")
            header = json.loads(file.read(length))
        entries = {
            name: _stored(path, name, info, size - 8 - length)
            for name, info in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise QtuneError("Q304", f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, AttributeError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise QtuneError("Q304", f"{path.name}: its safetensors header is damaged ({error})") from error
    return entries


def _stored(path: Path, name: str, info: Mapping[str, Any], room: int) -> Stored:
    begin, end = info["data_offsets"]
    if info["dtype"] not in DTYPES:
        raise QtuneError("Q304", f"{path.name}: {name} is {info['dtype']}; readable: {', '.join(DTYPES)}")
    dtype, shape = DTYPES[info["dtype"]], tuple(int(n) for n in info["shape"])
    if not 0 <= begin <= end or end - begin != prod(shape) * dtype.itemsize:
        raise QtuneError("Q304", f"{path.name}: {name} {shape} {info['dtype']} cannot lie at bytes {begin} to {end}")
    if end > room:
        raise QtuneError(
            "Q304", f"{path.name} is truncated: {name} ends at byte {end} of the data, the file holds {room}"
        )
    return Stored(dtype, shape)


def shard_files(folder: Path, stem: str) -> tuple[dict[str, set[str]], list[str]]:
    """File name -> tensors that the index expects in it (empty without an index), and the faults of the index."""
    if (folder / f"{stem}.safetensors").is_file():
        return {f"{stem}.safetensors": set()}, []
    index = folder / f"{stem}.safetensors.index.json"
    try:
        weights = json.loads(index.read_text())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weights.items()]
    except OSError as error:
        return {}, [f"{index.name} cannot be read: {error.strerror or error}"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, [f"{index.name} cannot be read: it must be JSON with a mapping under weight_map"]
    files: dict[str, set[str]] = {}
    for name, file in pairs:
        files.setdefault(file, set()).add(name)
    faults = [f"{index.name} points to {file!r}, outside of the folder" for file in sorted(files) if _leaves(file)]
    faults += [f"{file} is missing" for file in sorted(files) if not _leaves(file) and not (folder / file).is_file()]
    return files, faults


def _leaves(name: str) -> bool:
    # lexical: the hub's cache keeps its files as links to a folder of blobs
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return posix.is_absolute() or bool(windows.drive or windows.root) or ".." in posix.parts + windows.parts or not name


class Safetensors:
    """The tensors of a folder, `<stem>.safetensors` or shards with an index. Nothing is read before `read`; all faults
    in one error."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        files, faults = shard_files(folder, stem)
        self.entries: dict[str, Stored] = {}
        self._file: dict[str, _Mapped] = {}
        for file, expected in sorted(files.items()) if not faults else ():
            try:
                found = read_header(folder / file)
                handle = _Mapped(folder / file)
            except QtuneError as error:
                faults.append(str(error))
                continue
            except (SafetensorError, OSError) as error:
                faults.append(f"{file}: {error}")
                continue
            faults += [f"{name} is in {file} and in another file" for name in found if name in self.entries]
            faults += [f"the index expects {name} in {file}, which lacks it" for name in sorted(expected - set(found))]
            self.entries |= found
            self._file |= dict.fromkeys(found, handle)
        if faults:
            raise faults_error("Q304", f"cannot read the checkpoint {folder}", faults)

    def read(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file: it costs no anonymous memory and must not be written to."""
        return self._file[name].read(name)


class _Mapped:
    """A safetensors file, mapped anew after every MAPPED_BYTES that were read: pages that were touched count as the
    process's memory for as long as their mapping lives, which is until the last tensor of it is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = self._look()
        self.handle = self._open()
        self.left = MAPPED_BYTES

    def read(self, name: str) -> Tensor:
        if self.left <= 0:
            if self._look() != self.seen:
                raise QtuneError(
                    "Q307", f"{self.path} was changed while it was read; start again when nothing writes to it"
                )
            self.handle, self.left = self._open(), MAPPED_BYTES
        tensor: Tensor = self.handle.get_tensor(name)
        self.left -= tensor.numel() * tensor.element_size()
        return tensor

    def _open(self) -> Any:
        return safe_open(str(self.path), framework="pt", device="cpu")

    def _look(self) -> tuple[int, int, int]:
        try:
            found = self.path.stat()
        except OSError as error:
            raise QtuneError("Q307", f"{self.path} is gone while it was read: {error.strerror or error}") from error
        return found.st_ino, found.st_size, found.st_mtime_ns


# ---- writing ----


@dataclass(frozen=True)
class Entry:
    """A tensor to write: what the header must know, and how to get it when its turn comes. site: the module that it is
    made of, where that matters."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: Callable[[], Tensor]
    site: str = ""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write(folder: Path, entries: Iterable[Entry], stem: str = "model", limit: int = SHARD_BYTES) -> list[Path]:
    """Write `<stem>.safetensors`, or shards of at most `limit` bytes with an index; one tensor in memory at a time.

    Each file is whole or absent. Raises QtuneError where the disk refuses.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > limit:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        return [_write_file(folder / f"{stem}.safetensors", shards[0])]
    paths = [folder / f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        _write_file(path, shard)
    weight_map = {entry.name: path.name for path, shard in zip(paths, shards, strict=True) for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return paths


def _write_file(path: Path, entries: list[Entry]) -> Path:
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # so that every tensor is aligned to its items
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the data starts on a cache line
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = entry.tensor().detach()
            assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry.name
            file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return path
