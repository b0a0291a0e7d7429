"""A source as token ids, uncut: tokenized, or taken from the cache of what was tokenized before.

Large sources are kept in the user's cache (beside the compiled kernels) under a hash of the files' content, tokenizer,
template and of every key that what is kept hangs on; max_length is none of them. A damaged file is made anew, with a
note. What was used longest ago goes when all of it takes more than LIMIT.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import QtuneError
from ..screen import Screen
from ..version import version_of
from .encode import Coded, Encoder
from .formats import Reading
from .records import PLAIN, SHOWN_FAULTS, Record
from .sources import Origin

KEPT_BYTES = 1_000_000  # smaller sources are tokenized in no time, and neither kept nor shown in a bar
LIMIT = 4_000_000_000  # bytes of the cache
FORM = 2  # of what is kept: raise it when the same records get other tokens, or the file another layout
DIGEST = 16  # bytes
SHOWN_BYTES = 100_000  # between two moves of the bar


@dataclass
class Tokens:
    """A source's records as ids and masks, uncut; of plain text the mask is left out, for all of it is learned."""

    format: str = ""
    ids: list[array[int]] = field(default_factory=list)
    trained: list[bytes] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    shortened: int = 0  # answers of which the chat template shows a part only
    unled: int = 0  # conversations whose system prompt it does not show

    def add(self, record: Record, place: str, coded: Coded) -> None:
        self.format = record.format
        self.ids.append(coded[0])
        self.trained.append(coded[1])
        self.places.append(place)
        self.digests.append(record.digest())


def tokens_of(
    origin: Origin, reading: Reading, encoder: Encoder, screen: Screen, *, keep: bool = True
) -> tuple[Tokens, tuple[str, ...]]:
    """The source as tokens, and notes. Raises QtuneError with every fault of its records.

    keep: look into the cache, and keep what is tokenized.
    """
    notes: list[str] = []
    path = _place(origin, reading, encoder) if keep and origin.files and origin.size >= KEPT_BYTES else None
    if path is not None and path.is_file():
        try:
            return _read(path), (f"tokens of {origin.name} taken from the cache",)
        except QtuneError as error:
            notes.append(f"what the cache held of {origin.name} is damaged ({error}); tokenized anew")
    made = _tokenized(origin, reading, encoder, screen)
    if path is not None:
        try:
            _write(path, made)
            _trim(path)
        except (QtuneError, OSError) as error:
            notes.append(f"the tokens of {origin.name} are not kept for the next time: {error}")
    return made, tuple(notes)


def _tokenized(origin: Origin, reading: Reading, encoder: Encoder, screen: Screen) -> Tokens:
    if origin.size < KEPT_BYTES:
        return collect(reading.records(origin), encoder, origin.name, lambda n: None)
    with screen.bar(f"tokenizing {origin.name}, kB", origin.size // 1000) as advance:
        return collect(reading.records(origin), encoder, origin.name, _in_steps(advance))


def _in_steps(advance: Callable[..., None]) -> Callable[[int], None]:
    """Bytes, passed on as kB and not too often."""
    waiting = 0

    def moved(size: int) -> None:
        nonlocal waiting
        waiting += size
        if waiting >= SHOWN_BYTES:
            advance(waiting // 1000)
            waiting %= 1000

    return moved


def collect(records: Iterable[tuple[Record, int]], encoder: Encoder, name: str, moved: Callable[[int], None]) -> Tokens:
    """Records as tokens. Raises one QtuneError for all that cannot be encoded."""
    made, ignored, faults, count = Tokens(), set[str](), list[QtuneError](), 0
    before = encoder.chat.shortened, encoder.chat.unled
    first, rest = _looked_at(records)
    if first is None:
        return made
    encoder.check(first)
    if first.format == PLAIN:
        for record, size in rest:
            made.add(record, _place_of(record, name), (encoder.text(record.answer), b""))
            moved(size)
        return made
    for record, coded, size in encoder.stream(rest):
        moved(size)
        ignored.update(record.ignored)
        if isinstance(coded, QtuneError):
            count += 1
            faults += [coded] if count <= SHOWN_FAULTS else []
        elif not count:
            made.add(record, _place_of(record, name), coded)
    if count:
        more = f"\n  ... and {count - SHOWN_FAULTS} more" if count > SHOWN_FAULTS else ""
        listed = "\n  ".join(map(str, faults))
        raise QtuneError(
            faults[0].code, listed if count == 1 else f"{name}: {count} records cannot be used:\n  {listed}{more}"
        )
    made.ignored = tuple(sorted(ignored))
    made.shortened, made.unled = encoder.chat.shortened - before[0], encoder.chat.unled - before[1]
    return made


def _looked_at(records: Iterable[tuple[Record, int]]) -> tuple[Record | None, Iterator[tuple[Record, int]]]:
    """The first record, and all of them."""
    rest = iter(records)
    first = next(rest, None)

    def all_of_them() -> Iterator[tuple[Record, int]]:
        if first is not None:
            yield first
        yield from rest

    return (first[0] if first else None), all_of_them()


def _place_of(record: Record, name: str) -> str:
    return record.where[len(name) + 2 :] if record.where.startswith(f"{name}, ") else ""


# ---- the cache


def cache_folder() -> Path:
    """Where tokens are kept."""
    folder: Path = import_module("qtune.kernels.cpu.build").cache_folder()
    return folder / "tokens"


def _place(origin: Origin, reading: Reading, encoder: Encoder) -> Path | None:
    """The file in the cache; None for a tokenizer that cannot be told from another one."""
    tokenizer = encoder.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        return None
    has_dates = "strftime_now" in str(encoder.chat.template or tokenizer.chat_template)
    what: dict[str, Any] = {
        "form": FORM,
        "files": [_hash(path) for path in origin.files],
        "kind": [path.name for path in origin.files] if origin.plain else origin.files[0].suffixes[-2:],
        "reading": [reading.format, dict(reading.columns), reading.system],
        "loss_on": encoder.loss_on,
        "template": encoder.chat.template or tokenizer.chat_template,
        "day": datetime.date.today().isoformat() if has_dates else None,
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.special_tokens_map],
        "versions": [version_of("transformers"), version_of("tokenizers")],
    }
    text = json.dumps(what, sort_keys=True, default=str)
    return cache_folder() / f"{hashlib.blake2b(text.encode(), digest_size=DIGEST).hexdigest()}.safetensors"


def _hash(path: Path) -> str:
    found = hashlib.blake2b()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise QtuneError("Q201", f"cannot read the data file {path}: {error.strerror or error}") from error
    return found.hexdigest()


def _write(path: Path, made: Tokens) -> None:
    """One tensor in memory at a time: ids int32 [tokens], trained bits, lengths int64 [records], places and digests as
    bytes, and what they are with a checksum."""
    import numpy as np
    import torch

    from ..checkpoint import Entry, write

    def entry(name: str, kind: torch.dtype, count: int, data: Callable[[], Any]) -> Entry:
        return Entry(name, kind, (count,), lambda: torch.from_numpy(data()))

    def ids() -> Any:
        return np.frombuffer(bytearray().join(made.ids), dtype=np.int32)

    def bits() -> Any:
        return np.packbits(np.frombuffer(bytearray().join(made.trained), dtype=np.uint8))

    def as_bytes(data: bytes) -> Any:
        return np.frombuffer(bytearray(data), dtype=np.uint8)

    lengths = array("q", map(len, made.ids))
    places, digests = "\n".join(made.places).encode(), b"".join(made.digests)
    tokens = sum(lengths)
    masked = sum(map(len, made.trained))
    total = hashlib.blake2b()
    blocks: list[Any] = [*made.ids, *made.trained, lengths, places, digests]
    for block in blocks:
        total.update(block)
    told = {"ignored": made.ignored, "shortened": made.shortened, "unled": made.unled}
    info = {"format": made.format, "masked": masked} | told
    text = json.dumps(info | {"checksum": total.hexdigest()}).encode()
    entries = [
        entry("ids", torch.int32, tokens, ids),
        entry("lengths", torch.int64, len(lengths), lambda: np.frombuffer(lengths, dtype=np.int64).copy()),
        entry("trained", torch.uint8, -(-masked // 8), bits),
        entry("places", torch.uint8, len(places), lambda: as_bytes(places)),
        entry("digests", torch.uint8, len(digests), lambda: as_bytes(digests)),
        entry("info", torch.uint8, len(text), lambda: as_bytes(text)),
    ]
    write(path.parent, entries, stem=path.stem)


def _read(path: Path) -> Tokens:
    """What `_write` wrote. Raises QtuneError for anything else."""
    import numpy as np

    from ..checkpoint import Safetensors

    file = Safetensors(path.parent, path.stem)
    try:
        info = json.loads(file.read("info").numpy().tobytes())
        ids, lengths = file.read("ids").numpy(), file.read("lengths").numpy()
        bits = np.unpackbits(file.read("trained").numpy(), count=info["masked"]).tobytes()
        places, digests = file.read("places").numpy().tobytes(), file.read("digests").numpy().tobytes()
        total = hashlib.blake2b()
        for block in (ids.data, bits, lengths.data, places, digests):
            total.update(block)
        if total.hexdigest() != info["checksum"]:
            raise QtuneError("Q220", "its checksum is another one")
        made = Tokens(info["format"], ignored=tuple(info["ignored"]))
        made.shortened, made.unled = int(info["shortened"]), int(info["unled"])
        made.places = places.decode().split("\n")
        at = 0
        for number, length in enumerate(lengths.tolist()):
            some: array[int] = array("i")
            some.frombytes(ids[at : at + length].tobytes())
            made.ids.append(some)
            made.trained.append(bits[at : at + length])  # empty for plain text, which has no mask
            made.digests.append(digests[number * DIGEST : (number + 1) * DIGEST])
            at += length
    except (KeyError, ValueError, TypeError) as error:
        raise QtuneError("Q220", f"{path.name} is not what was kept: {error!r}") from error
    with suppress(OSError):
        os.utime(path)
    return made


def _trim(kept: Path) -> None:
    """Remove what was used longest ago, but for what was just kept."""
    files = sorted(kept.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in files)
    for file in files:
        if total > LIMIT and file != kept:
            total -= file.stat().st_size
            file.unlink(missing_ok=True)
