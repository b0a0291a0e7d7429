"""Sources -> examples: tokenized, duplicates removed, cut, split into training and held-out data, drawn by weight.

The mask is kept by position and never found by token id, so `pad == eos` cannot hide an EOS. What is held out hangs on
the content of records and on a seed alone: not on their order, nor on the tokenizer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import QtuneError, one_of
from ..screen import Screen
from ..sections import TOO_LONG, DataKeys, Source, Sources, entries, named
from .divide import Part, both, drawn, split
from .encode import Encoder
from .formats import CONVERSATIONS, Reading
from .records import LEGAL, PLAIN, Record
from .report import DataReport, Example
from .sources import Origin, open_source
from .tokens import collect, tokens_of

SHOWN_LONG = 3  # examples that are too long, as an error names them


@dataclass(frozen=True)
class Sets:
    """What is learned from and what is evaluated on (empty where there is neither data.eval nor data.split)."""

    train: list[Example]
    held_out: list[Example]
    report: DataReport
    held_out_report: DataReport | None


def load_data(
    source: str | Path | Sources,
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: str = "answer",
    template: str | None = None,
    system: str | None = None,
    format: str | None = None,
    columns: dict[str, str] | None = None,
    too_long: str = "cut",
    dedupe: bool = False,
    seed: int = 0,
    screen: Screen | None = None,
) -> tuple[list[Example], DataReport]:
    """Read and tokenize a file, a folder, a dataset, or several of them; options are the keys of `data` in a recipe.

    Raises one QtuneError for all faults of a source, and where nothing is left to train.
    """
    keys = DataKeys(
        max_length=max_length, loss_on=loss_on, template=template, system=system, format=format, columns=columns,
        too_long=too_long, dedupe=dedupe,
    )  # fmt: skip
    return load_source(str(source) if isinstance(source, Path) else source, tokenizer, keys, seed=seed, screen=screen)


def load_source(
    source: Sources, tokenizer: Any, keys: DataKeys, *, seed: int = 0, screen: Screen | None = None
) -> tuple[list[Example], DataReport]:
    """As `load_data`, by the keys of a recipe; what they say of train, eval and split is not looked at."""
    parts, encoder, notes = _parts(source, tokenizer, keys, screen or Screen(quiet=True))
    examples = drawn(parts, seed)
    return examples, _report(named(source), parts, examples, encoder, keys, notes)


def load_held_out(
    keys: DataKeys, tokenizer: Any, *, seed: int, screen: Screen | None = None
) -> tuple[list[Example], DataReport | None]:
    """data.eval, or what data.split holds out of data.train; nothing where the keys have neither. seed: train.seed."""
    if keys.eval is not None:
        return load_source(keys.eval, tokenizer, keys, seed=seed, screen=screen)
    if keys.split is None or keys.train is None:
        return [], None
    sets = load_sets(keys, tokenizer, seed=seed, screen=screen)
    return sets.held_out, sets.held_out_report


def load_sets(keys: DataKeys, tokenizer: Any, *, seed: int, screen: Screen | None = None) -> Sets:
    """data.train, and beside it data.eval or what data.split holds out of it; seed: of the split, where the keys name
    none, and of what a weight draws. Raises QtuneError."""
    assert keys.train is not None, "the caller asks for data.train"
    screen = screen or Screen(quiet=True)
    parts, encoder, notes = _parts(keys.train, tokenizer, keys, screen)
    name, held = named(keys.train), list[Example]()
    report: DataReport | None = None
    if keys.eval is not None:
        others, _, more = _parts(keys.eval, tokenizer, keys, screen)
        held = drawn(others, seed)
        report = _report(named(keys.eval), others, held, encoder, keys, more)
        notes += both(parts, others)
    elif keys.split is not None:
        held = split(parts, keys.split, seed if keys.split_seed is None else keys.split_seed, name)
        report = _held_report(name, parts, held, keys)
    train = drawn(parts, seed)
    if not train:
        raise QtuneError(
            "Q215", f"{name}: no example is left to train on beside the {len(held)} that data.split holds out"
        )
    made = _report(name, parts, train, encoder, keys, notes)
    return Sets(train, held, made if keys.eval is not None else replace(made, held_out=len(held)), report)


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: str = "answer",
    template: str | None = None,
    path: str = "data",
) -> tuple[list[Example], DataReport]:
    """Examples of at most `max_length` tokens, cut on the right; those left without a trained token are dropped.

    Raises QtuneError when a record cannot be rendered, or when nothing is left to train.
    """
    keys = DataKeys(max_length=max_length, loss_on=loss_on, template=template)
    encoder = _encoder(tokenizer, keys)
    tokens = collect(((record, 0) for record in records), encoder, path, lambda n: None)
    tokens.places = [record.where for record in records]
    part = Part(path, 1.0, tokens)
    _cut(part, encoder, keys, set(), whole_place=True)
    _something_left(path, [part], keys)
    return drawn([part], 0), _report(path, [part], drawn([part], 0), encoder, keys, [])


def read_records(source: str | Path | Source, keys: DataKeys | None = None) -> list[Record]:
    """All records of one source, in order, read as the keys of a recipe say. QtuneError names lines, what was found,
    what is legal."""
    source = source if isinstance(source, Source) else Source(str(source))
    origin = open_source(source.file)
    records = [record for record, _ in reading_of(source, keys or DataKeys()).records(origin)]
    if not records:
        raise _no_records(origin)
    return records


# ---- sources


def _encoder(tokenizer: Any, keys: DataKeys) -> Encoder:
    if keys.max_length < 2:
        raise QtuneError("Q102", f"data.max_length is {keys.max_length}; legal: 2 or more")
    if keys.too_long not in TOO_LONG:
        raise one_of("data.too_long", keys.too_long, TOO_LONG)
    return Encoder(tokenizer, loss_on=keys.loss_on, template=keys.template)


def _parts(given: Sources, tokenizer: Any, keys: DataKeys, screen: Screen) -> tuple[list[Part], Encoder, list[str]]:
    """Every source as examples, and notes."""
    encoder, parts, notes, seen = _encoder(tokenizer, keys), list[Part](), list[str](), set[bytes]()
    for source in entries(given):
        origin = open_source(source.file)
        tokens, more = tokens_of(origin, reading_of(source, keys), encoder, screen)
        if not tokens.ids:
            raise _no_records(origin)
        part = Part(origin.name, source.weight, tokens)
        _cut(part, encoder, keys, seen)
        parts.append(part)
        notes += more
    formats = {part.tokens.format for part in parts}
    if keys.system is not None and not formats & {*CONVERSATIONS, "alpaca"}:
        raise QtuneError(
            "Q218",
            f"data.system is set, but {named(given)} holds {', '.join(sorted(formats))} records, which have no place "
            f"for it; legal: null, or records of {', '.join((*CONVERSATIONS, 'alpaca'))}",
        )
    _something_left(named(given), parts, keys)
    return parts, encoder, notes


def reading_of(source: Source, keys: DataKeys) -> Reading:
    """How the rows of a source become records: by its own keys, else by the recipe's."""
    columns = source.columns if source.columns is not None else keys.columns
    return Reading(source.format or keys.format, columns or {}, keys.system)


def _no_records(origin: Origin) -> QtuneError:
    return QtuneError(
        "Q207", f"{origin.name} holds no records; legal are {LEGAL}, one object a line in .jsonl or in a list in .json"
    )


# ---- cutting


def _cut(part: Part, encoder: Encoder, keys: DataKeys, seen: set[bytes], *, whole_place: bool = False) -> None:
    """Fill the part's examples. seen: the digests of the records before, to which its own are added."""
    tokens, limit = part.tokens, keys.max_length
    for ids, trained, place, digest in zip(tokens.ids, tokens.trained, tokens.places, tokens.digests, strict=True):
        if digest in seen:
            part.duplicates += 1
            if keys.dedupe:
                continue
        seen.add(digest)
        where = place if whole_place else f"{part.name}, {place}" if place else part.name
        if tokens.format == PLAIN:
            windows = list(encoder.windows(ids, limit))
            part.longest = max(part.longest, *(len(window) for window, _ in windows))
            part.examples += [(Example(window, mask, where), digest) for window, mask in windows]
        else:
            _cut_one(part, ids, trained, where, digest, keys)
    if part.long:
        count, longest = part.truncated, part.longest
        raise QtuneError(
            "Q216",
            f"{part.name}: {count:,} example{'s' * (count != 1)} longer than data.max_length = {limit:,}, and "
            f"data.too_long is refuse: {', '.join(part.long)}{', ...' * (count > SHOWN_LONG)}; legal: a "
            f"data.max_length of {longest:,} or more, or data.too_long cut or drop",
        )
    tokens.ids, tokens.trained = [], []  # the examples have them


def _cut_one(part: Part, ids: array[int], trained: bytes, where: str, digest: bytes, keys: DataKeys) -> None:
    limit, length = keys.max_length, len(ids)
    part.longest = max(part.longest, length)
    kept = trained[:limit]
    if length > limit:
        part.truncated += 1
        if keys.too_long == "refuse":
            part.long += [f"{where} ({length:,})"] if len(part.long) < SHOWN_LONG else []
            return
        if keys.too_long == "drop":
            part.left_out += 1
            return
    if b"\1" not in kept:
        part.dropped += 1
        part.needed += [trained.index(1) + 1] if b"\1" in trained else []
        return
    lost = trained[limit:]
    part.cut_answers += lost.count(b"\0\1") + lost.startswith(b"\1")  # runs of trained tokens beyond the limit
    part.examples.append((Example(ids if length <= limit else ids[:limit], kept, where), digest))


def _something_left(name: str, parts: Sequence[Part], keys: DataKeys) -> None:
    if any(part.examples for part in parts):
        return
    dropped, left_out = sum(part.dropped for part in parts), sum(part.left_out for part in parts)
    needed = [length for part in parts for length in part.needed]
    if left_out and not dropped:
        longest = max(part.longest for part in parts)
        raise QtuneError(
            "Q216",
            f"{name}: all {left_out} records are longer than data.max_length = {keys.max_length}, and data.too_long is "
            f"drop; the longest has {longest:,} tokens",
        )
    if not dropped:
        raise QtuneError("Q207", f"{name}: no records to train on")
    fix = f"the shortest prompt needs at least {min(needed)}" if needed else "no record has a token to learn"
    raise QtuneError(
        "Q216",
        f"{name}: all {dropped} records lost every trained token when cut at data.max_length = {keys.max_length}; "
        f"{fix}",
    )


# ---- reports


def _report(
    name: str, parts: Sequence[Part], examples: Sequence[Example], encoder: Encoder, keys: DataKeys, notes: list[str]
) -> DataReport:
    ignored = sorted({key for part in parts for key in part.tokens.ignored})
    told = [f"keys that are not used: {', '.join(ignored)}"] if ignored else []
    chats = any(part.tokens.format in CONVERSATIONS for part in parts)
    if chats and keys.loss_on != "all" and not encoder.chat.turn_end.strip():
        told.append("the chat template ends an answer with no token of its own, so the model may not learn to stop")
    if unled := sum(part.tokens.unled for part in parts):
        told.append(f"the chat template does not show the system prompt of {unled:,} conversation{'s' * (unled != 1)}")
    if shortened := sum(part.tokens.shortened for part in parts):
        told.append(
            f"the chat template leaves out parts of {shortened:,} answer{'s' * (shortened != 1)} (thoughts before "
            "</think>, most likely), and what it leaves out is not learned"
        )
    duplicates = sum(part.duplicates for part in parts)
    if duplicates and not keys.dedupe:
        told.append(f"{duplicates:,} of the records are equal to an earlier one; data.dedupe: true leaves them out")
    sources = []
    for part in parts if len(parts) > 1 else ():
        count = len(part.examples)
        drawn = f", drawn {part.weight:g} times an epoch" if part.weight != 1 else ""
        sources.append(
            f"{part.name}: {len(part.tokens.places):,} records ({part.tokens.format}), {count:,} examples{drawn}"
        )
    return DataReport(
        path=name,
        format=", ".join(dict.fromkeys(part.tokens.format for part in parts)),
        records=sum(len(part.tokens.places) for part in parts),
        examples=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        trained=sum(example.trained.count(1) for example in examples),
        truncated=sum(part.truncated for part in parts),
        dropped=sum(part.dropped for part in parts),
        longest=max(part.longest for part in parts),
        max_length=keys.max_length,
        loss_on=keys.loss_on,
        notes=(*told, *notes),
        duplicates=duplicates,
        deduped=keys.dedupe,
        cut_answers=sum(part.cut_answers for part in parts),
        left_out=sum(part.left_out for part in parts),
        sources=tuple(sources),
    )


def _held_report(name: str, parts: Sequence[Part], held: Sequence[Example], keys: DataKeys) -> DataReport:
    lengths = [len(example.input_ids) for example in held]
    return DataReport(
        path=f"{name} (held out)",
        format=", ".join(dict.fromkeys(part.tokens.format for part in parts)),
        records=len({example.where for example in held}),
        examples=len(held),
        tokens=sum(lengths),
        trained=sum(example.trained.count(1) for example in held),
        truncated=0,
        dropped=0,
        longest=max(lengths),
        max_length=keys.max_length,
        loss_on=keys.loss_on,
    )
