"""GGUF files read tensor by tensor: the header (names, shapes, where each tensor lies) and dequantization in blocks of
rows, to fp32.

Format: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian. The numbers come from the package
`gguf`; its reader is not used, as it builds Python objects for every token of the vocabulary (seconds and 150 MB at 49k
tokens). Written through the package, one tensor in memory at a time. Left out: types of fewer than 8 bits for writing.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import QtuneError
from .safe_io import replacing

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, F32 = 8, 9, 0
CHUNK = 1 << 22  # elements dequantized at a time
COUNT_LIMIT = 1 << 20  # tensors or keys: beyond this the header is damaged
VOCABULARY = ("tokens", "scores", "token_type", "merges")  # per-token arrays under tokenizer.ggml


@dataclass(frozen=True)
class StoredGGUF:
    """A tensor of the file: shape in torch's order, ggml type, first byte and bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Field:
    """A value of the header and its type in the file; items: the type of an array's items."""

    value: Any
    kind: int
    items: int | None = None


@dataclass(frozen=True)
class Made:
    """A tensor to write: shape in torch's order, and its blocks along the first dimension, fp32, in order."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]


class _Cursor:
    """Reads forward through the header; leaving the file is a struct.error or a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def string(self) -> str:
        length = self.take("Q")
        self.skip(length)
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def skip(self, length: int) -> None:
        if length > len(self.data) - self.at:
            raise ValueError(f"a field of {length} bytes at byte {self.at} leaves the file")
        self.at += length

    def value(self) -> Any:
        """The next typed value; of an array only its length."""
        kind = self.take("I")
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.take(_scalar(kind))
        kind, count = self.take("I"), self.take("Q")
        if kind == STRING:
            for _ in range(count):
                self.skip(self.take("Q"))
        else:
            self.skip(count * struct.calcsize("<" + _scalar(kind)))
        return count

    def field(self) -> Field:
        """The next typed value, arrays with all their items."""
        kind = self.take("I")
        if kind != ARRAY:
            return Field(self.string() if kind == STRING else self.take(_scalar(kind)), kind)
        items, count = self.take("I"), self.take("Q")
        if items == STRING:
            return Field([self.string() for _ in range(count)], kind, items)
        start, form = self.at, f"<{count}{_scalar(items)}"
        self.skip(struct.calcsize(form))
        return Field(list(struct.unpack_from(form, self.data, start)), kind, items)


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of type {kind}")
    return SCALARS[kind]


class GGUF:
    """The header of a GGUF file and its tensors. Raises QtuneError where the file is cut off, damaged, or of a type
    nobody can read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise QtuneError("Q309", f"cannot read {path}: {error}") from error
        self.fields: dict[str, Any] = {}  # key -> value; of an array its length
        self._spans: dict[str, tuple[int, int]] = {}  # key -> bytes of the whole entry
        try:
            self.tensors = self._parse(_Cursor(self._data))
        except (struct.error, ValueError, IndexError, ArithmeticError) as error:  # the last: an alignment of 0
            raise QtuneError("Q309", f"{path} is truncated or damaged: {error}") from error

    def _parse(self, cursor: _Cursor) -> dict[str, StoredGGUF]:
        if self._data[:4] != b"GGUF":
            raise QtuneError("Q309", f"{self.path} is no GGUF file: it does not start with GGUF")
        cursor.skip(4)
        version, tensors, keys = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
        if version not in (2, 3):
            raise QtuneError("Q309", f"{self.path} is GGUF version {version}; readable: 2 and 3, little-endian")
        if tensors > COUNT_LIMIT or keys > COUNT_LIMIT:
            raise ValueError(f"it claims {tensors} tensors and {keys} keys")
        for _ in range(keys):
            start = cursor.at
            key = cursor.string()
            self.fields[key] = cursor.value()
            self._spans[key] = (start, cursor.at)
        found = {}
        for _ in range(tensors):
            name = cursor.string()
            dims = [cursor.take("Q") for _ in range(cursor.take("I"))]
            found[name] = (tuple(reversed(dims)), cursor.take("I"), cursor.take("Q"))
        align = int(self.fields.get("general.alignment", 32))
        data = -(-cursor.at // align) * align
        return {name: self._located(name, shape, kind, data + offset) for name, (shape, kind, offset) in found.items()}

    def _located(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> StoredGGUF:
        sizes = {int(t): size for t, size in _package().GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise QtuneError(
                "Q310", f"{self.path}: {name} has ggml type {kind}, which the installed package gguf does not know"
            )
        block, width = sizes[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} {shape} is not made of blocks of {block}")
        nbytes = prod(shape) // block * width
        if start + nbytes > len(self._data):
            raise ValueError(f"{name} ends at byte {start + nbytes}, the file has {len(self._data)}")
        return StoredGGUF(shape, kind, start, nbytes)

    @property
    def architecture(self) -> str:
        """`general.architecture`, or "" where the file names none."""
        return str(self.fields.get("general.architecture", ""))

    def header(self) -> dict[str, Field]:
        """All keys with their values and types; the vocabulary takes some tens of MB."""
        found = {}
        for key, (start, _) in self._spans.items():
            cursor = _Cursor(self._data)
            cursor.at = start
            cursor.string()
            found[key] = cursor.field()
        return found

    def rows(self, name: str, at: int | None = None) -> Iterator[Tensor]:
        """The tensor as fp32 blocks of rows [r, last dimension], in order; at: only this place of its first
        dimension."""
        entry = self.tensors[name]
        count = prod(entry.shape[:-1])
        width = entry.nbytes // max(count, 1)
        start = entry.start
        if at is not None:
            count //= entry.shape[0]
            start += at * count * width
        step = max(1, CHUNK // entry.shape[-1])
        kind = _package().GGMLQuantizationType(entry.kind)
        for first in range(0, count, step):
            n = min(step, count - first)
            raw = np.frombuffer(self._data, np.uint8, n * width, start + first * width).reshape(n, width)
            try:
                block = _package().dequantize(raw, kind)
            except NotImplementedError as error:
                raise QtuneError(
                    "Q310", f"{self.path}: {name} is {kind.name}, which the package gguf cannot dequantize"
                ) from error
            yield torch.from_numpy(np.require(block, np.float32, "W"))

    def read(self, name: str, at: int | None = None) -> Tensor:
        """The whole tensor in fp32, or [1, ...] what lies at one place of its first dimension; at most one block of
        rows is held twice."""
        shape = self.tensors[name].shape if at is None else (1, *self.tensors[name].shape[1:])
        out = torch.empty(prod(shape[:-1]), shape[-1])
        done = 0
        for block in self.rows(name, at):
            out[done : done + len(block)] = block
            done += len(block)
        return out.view(shape)

    def write_header(self, path: Path) -> None:
        """Write a small GGUF with the same keys and tensor names, but without the vocabulary and the weights: enough to
        read the config."""
        kept = {k: span for k, span in self._spans.items() if k not in {f"tokenizer.ggml.{x}" for x in VOCABULARY}}
        keys = [self._data[start:end] for start, end in kept.values()]
        size = f"{self.architecture}.vocab_size"
        if size not in self.fields and "tokenizer.ggml.tokens" in self.fields:
            keys.append(_string(size) + struct.pack("<II", 4, self.fields["tokenizer.ggml.tokens"]))
        infos = [_string(name) + struct.pack("<IQIQ", 1, 1, F32, 0) for name in self.tensors]
        head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
        path.write_bytes(head + bytes(4096 + 64))  # room for the one value that all tensors share, at any alignment


def write_adapter(path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    """Write a LoRA for llama.cpp atomically, in fp32: NAME.lora_a [r, in] and NAME.lora_b [out, r]; it adds
    alpha / r B A x (llama.cpp, src/llama-adapter.cpp)."""
    package = _package()
    with replacing(path) as file:
        writer = package.GGUFWriter(file.name, architecture)
        writer.add_type(package.GGUFType.ADAPTER)
        writer.add_string(package.Keys.Adapter.TYPE, "lora")
        writer.add_float32(package.Keys.Adapter.LORA_ALPHA, alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.detach().cpu().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def names_of(architecture: str, layers: int) -> Callable[[str], str | None]:
    """Name of a tensor in a checkpoint -> its name in a GGUF file of `architecture`, None where it has none."""
    number = next(k for k, v in _package().MODEL_ARCH_NAMES.items() if v == architecture)
    names = _package().get_tensor_name_map(number, layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))  # type: ignore[no-any-return]


def write(path: Path, fields: Mapping[str, Field], tensors: Iterable[Made], kind: str) -> int:
    """Write a GGUF file: matrices as `kind` (f32, f16, bf16, q8_0), vectors as F32, as llama.cpp's converter does; rows
    that are no whole blocks of q8_0 as F16. Returns the bytes of the tensors."""
    package, types, made = _package(), {}, list(tensors)
    asked = package.GGMLQuantizationType[kind.upper()]
    block = package.GGML_QUANT_SIZES[asked][0]
    writer = package.GGUFWriter(path, str(fields["general.architecture"].value))
    for key, field in fields.items():
        if key != "general.architecture":  # the writer's own
            items = None if field.items is None else package.GGUFValueType(field.items)
            writer.add_key_value(key, field.value, package.GGUFValueType(field.kind), items)
    total = 0
    for tensor in made:
        types[tensor.name] = package.GGMLQuantizationType.F32
        if len(tensor.shape) > 1:
            types[tensor.name] = asked if tensor.shape[-1] % block == 0 else package.GGMLQuantizationType.F16
        size, width = package.GGML_QUANT_SIZES[types[tensor.name]]
        nbytes = prod(tensor.shape) // size * width
        total += nbytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, types[tensor.name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in made:
            blocks = (package.quantize(np.ascontiguousarray(b.numpy()), types[tensor.name]) for b in tensor.blocks())
            writer.write_tensor_data(np.concatenate([np.atleast_1d(b) for b in blocks]))
    finally:
        writer.close()
    return total


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise QtuneError("Q904", "reading a GGUF file needs the package gguf: pip install 'qtune[gguf]'") from error
    return gguf
