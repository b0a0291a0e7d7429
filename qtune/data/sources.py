"""Sources of rows: .jsonl, .json, .csv, .tsv and .txt files (also as .gz), .parquet files, folders of text files, and
datasets of Hugging Face's library, saved in a folder or named as hf:owner/name, hf:owner/name:split,
hf:owner/name:config:split.

Files are read as a stream, but for .json and .txt. Parquet and datasets ask for the extra `data`.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import QtuneError, one_of
from ..keys import HUB
from ..safe_io import expanded
from .records import LEGAL, Fault, found, parsed

ZIPPED = ".gz"
TEXTS = (".txt", ".md")  # what is read in a folder
BATCH = 1000  # rows of a table that are in memory at a time
_SPACE = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """A row as it was found, or the Fault of it; place: "line 3"; size: bytes read since the row before."""

    place: str
    value: Any
    size: int


@dataclass(frozen=True)
class Origin:
    """An opened source. files: all that its rows hang on (none where that is not known: such a source is not cached).
    size: bytes of it, for the bar. plain: each row is a text."""

    name: str
    files: tuple[Path, ...]
    size: int
    plain: bool
    rows: Callable[[], Iterator[Row]]


def open_source(name: str) -> Origin:
    """The source of that name. Raises QtuneError where there is none, or it is of no known kind."""
    if name.startswith(HUB):
        return _dataset(name, _from_hub(name))
    path = expanded(name)
    if path.is_dir() and path.suffix.lower() not in READERS:
        if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return _dataset(name, _from_disk(path))
        return _folder(path)
    kind = _kind(path)
    if kind not in READERS:
        legal = [*READERS, *(k + ZIPPED for k in READERS if k != PARQUET)]
        raise one_of(f"kind of data file: {path} ends in", kind, legal, "Q202")
    with _told(path):
        size = path.stat().st_size
        path.open("rb").close()
    return Origin(str(path), (path,), size, kind == ".txt", partial(READERS[kind], path))


def is_there(name: str) -> bool:
    """Is it a file or folder of this machine, or named as a dataset of the hub?"""
    return name.startswith(HUB) or Path(name).expanduser().exists()


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [ZIPPED]
    kind = suffixes[-2] if zipped and len(suffixes) > 1 else path.suffix.lower()
    return kind + ZIPPED if zipped and (kind not in READERS or kind == PARQUET) else kind


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Faults of reading as QtuneError."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise QtuneError(
            "Q204", f"{path} is no whole gzip file ({error}); pack it anew, or give the file unpacked"
        ) from error
    except OSError as error:
        raise QtuneError("Q201", f"cannot read the data file {path}: {error.strerror or error}") from error


# ---- lines and texts


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(number, line with its end, bytes of the file read since the last). A byte-order mark is dropped."""
    with _told(path), open(path, "rb") as raw:
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ZIPPED else raw
        done = 0
        for number, line in enumerate(stream, 1):
            if number == 1:
                _not_utf16(path, line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            at = raw.tell()
            yield number, line, at - done
            done = at


def _not_utf16(path: Path, data: bytes) -> None:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise QtuneError("Q203", f"{path} is UTF-16 text (it begins with that byte-order mark); save it as UTF-8")


def _decoded(data: bytes) -> str | Fault:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return Fault(f"byte 0x{data[error.start]:02x} is not UTF-8 text; save the file as UTF-8")


def _text(path: Path) -> str:
    """The whole text; a byte-order mark is dropped and CRLF becomes LF."""
    with _told(path):
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix.lower() == ZIPPED else data
    _not_utf16(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise QtuneError(
            "Q203", f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8"
        ) from error
    return text.replace("\r\n", "\n") if "\r\n" in text else text


def _plain_rows(path: Path) -> Iterator[Row]:
    text = _text(path)
    if text.strip():
        yield Row("", text, path.stat().st_size)


def _json_lines(path: Path) -> Iterator[Row]:
    begun, waiting = False, 0
    for number, data, size in _lines(path):
        line = _decoded(data)
        waiting += size
        if isinstance(line, str):
            line = line.strip()
            if not line:
                continue
            if not begun and line[0] == "[":
                raise QtuneError(
                    "Q205",
                    f"{path} begins with '[', as a JSON list does, but .jsonl holds one object a line; rename it to "
                    ".json",
                )
        begun = True
        yield Row(f"line {number}", parsed(line) if isinstance(line, str) else line, waiting)
        waiting = 0


def _json_list(path: Path) -> Iterator[Row]:
    """The items of a JSON list, one in memory at a time beside the text."""
    text = _text(path)
    at = _space(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        raise _no_list(path, text)
    decoder, number, share = json.JSONDecoder(), 0, path.stat().st_size / len(text)
    at = _space(text, at + 1)
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise _no_list(path, text) from None
        after = _space(text, end)
        if text[after : after + 1] == ",":
            after = _space(text, after + 1)
            if text[after : after + 1] == "]":
                raise _no_list(path, text)
        elif text[after : after + 1] != "]":
            raise _no_list(path, text)
        number += 1
        yield Row(f"record {number}", value, int(share * after) - int(share * at))
        at = after
    if _space(text, at + 1) != len(text):
        raise _no_list(path, text)


def _space(text: str, at: int) -> int:
    found_here = _SPACE.match(text, at)
    return found_here.end() if found_here else at


def _no_list(path: Path, text: str) -> QtuneError:
    """Why the text is no JSON list."""
    value = parsed(text)
    if not isinstance(value, Fault):
        return QtuneError(
            "Q205", f"{path} holds {found(value)}, but a .json file must hold a list of records; legal are {LEGAL}"
        )
    lines = [line for line in text.split("\n", 3) if line.strip()][:2]
    by_line = len(lines) > 1 and all(isinstance(parsed(line), dict) for line in lines)
    return QtuneError(
        "Q205", f"{path} is no JSON list: {value}{'; each line is JSON by itself: rename it to .jsonl' * by_line}"
    )


# ---- tables


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a .csv or .tsv file, cells as text."""
    sizes: list[int] = []
    wrong: list[str] = []

    def lines() -> Iterator[str]:
        for _, data, size in _lines(path):
            line = _decoded(data)
            sizes.append(size)
            wrong.extend([str(line)] if isinstance(line, Fault) else [])
            yield data.decode("utf-8", "replace") if isinstance(line, Fault) else line

    limit = csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # a text may be longer than 128 KiB
    try:
        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            start = reader.line_num + 1
            place = f"line {start}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(place, Fault(f"not readable as {path.suffix} ({error})"), 0)
                return  # what comes after it cannot be told from it
            if not cells:
                continue
            size, fault = sum(sizes), wrong[0] if wrong else ""
            sizes.clear()
            wrong.clear()
            if fault:
                yield Row(place, Fault(fault), size)
                names = names or cells
            elif names is None:
                names = _header(path, cells)
            elif len(cells) != len(names):
                told = f"has {len(cells)} cells, but the header names {len(names)} columns: {', '.join(names)}"
                yield Row(place, Fault(told), size)
            else:
                yield Row(place, dict(zip(names, cells, strict=True)), size)
    finally:
        csv.field_size_limit(limit)


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise QtuneError("Q208", f"{path}, line 1: the column {twice[0]!r} stands twice; legal: once")
    return names


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _needs("pyarrow", f"{path} is a Parquet file") from error
    try:
        with _told(path):
            file = parquet.ParquetFile(path)
            each = path.stat().st_size / max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", pruned(value), int(number * each) - int((number - 1) * each))
    except pyarrow.ArrowException as error:
        raise QtuneError("Q204", f"{path} is no readable Parquet file: {' '.join(str(error).split())[:200]}") from error


def pruned(value: Any) -> Any:
    """Without the nulls that a table puts where an object of a list has no such key."""
    if isinstance(value, dict):
        return {key: pruned(item) for key, item in value.items() if item is not None}
    return [pruned(item) for item in value] if isinstance(value, list) else value


def _needs(package: str, why: str) -> QtuneError:
    return QtuneError(
        "Q904", f"{why}, and {package} is not installed; pip install 'qtune[data]', or pip install {package}"
    )


# ---- folders and datasets


def _folder(path: Path) -> Origin:
    """Every text file of a folder and of those in it."""
    files = sorted(f for f in path.rglob("*") if f.is_file() and _kind(f) in TEXTS and not _hidden(f, path))
    if not files:
        others = sorted({file.suffix or file.name for file in path.rglob("*") if file.is_file()})
        raise QtuneError(
            "Q209",
            f"the folder {path} holds no text files; found {', '.join(others[:8]) or 'nothing'}; legal: a folder of "
            f"{', '.join(TEXTS)} files, a dataset saved by `datasets`, or a list of files in data.train",
        )

    def rows() -> Iterator[Row]:
        for file in files:
            text = _text(file)
            if text.strip():
                yield Row(str(file.relative_to(path)), text, file.stat().st_size)

    return Origin(str(path), tuple(files), sum(file.stat().st_size for file in files), True, rows)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _datasets(why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _needs("datasets", why) from error
    return datasets


def _from_disk(path: Path) -> Any:
    library = _datasets(f"{path} is a saved dataset")
    try:
        return library.load_from_disk(str(path))
    except Exception as error:  # whatever that library raises for a damaged folder
        raise QtuneError("Q210", f"cannot read the saved dataset {path}: {_line(error)}") from error


def _from_hub(name: str) -> Any:
    owner, *parts = name[len(HUB) :].split(":")
    if not owner or len(parts) > 2 or not all(parts):
        raise QtuneError(
            "Q210",
            f"{name!r} is no dataset's name; legal: hf:owner/name, hf:owner/name:split, hf:owner/name:config:split",
        )
    library = _datasets(f"{name} is a dataset of the hub")
    config, split = (parts[0] if len(parts) == 2 else None), (parts[-1] if parts else None)
    try:
        return library.load_dataset(owner, config, split=split)
    except Exception as error:  # no network, no such dataset, a damaged file: that library's own errors
        raise QtuneError("Q210", f"cannot load the dataset {name}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _dataset(name: str, loaded: Any) -> Origin:
    """A dataset; of several splits the one called train."""
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            several = f"{name} has the splits {', '.join(loaded)}"
            raise QtuneError("Q210", f"{several}; name one: hf:owner/name:split, or its folder")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    files = tuple(Path(entry["filename"]) for entry in loaded.cache_files)
    size = sum(file.stat().st_size for file in files)

    def rows() -> Iterator[Row]:
        count = len(loaded)
        for start in range(0, count, BATCH):
            columns = loaded[start : start + BATCH]
            names = list(columns)
            for offset, cells in enumerate(zip(*columns.values(), strict=True)):
                number = start + offset + 1
                value = pruned(dict(zip(names, cells, strict=True)))
                yield Row(f"row {number}", value, size * number // count - size * (number - 1) // count)

    return Origin(name, files, size, False, rows)


PARQUET = ".parquet"
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    PARQUET: _parquet,
    ".txt": _plain_rows,
}
