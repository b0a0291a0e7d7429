"""Which tensors of a checkpoint fill which tensors of the model: transformers' own renamings and conversions, applied
piece by piece.

safetensors: `conversion_mapping` (renamings; converters that merge or split tensors). GGUF: transformers' name map and
its tensor processors. Fused experts: a piece an expert, which the same conversions make of that expert's tensors alone.
Packed checkpoints: the parts of one weight form one piece. Shapes are known before anything is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from .. import bnb
from ..checkpoint import Piece, Pieces, Safetensors
from ..errors import QtuneError
from ..quant import Average, Dense, Mixed, Parts, Scheme
from .experts import fused_shapes, library_state, part_of
from .gguf_names import gguf_pieces
from .skeleton import linear_sites
from .source import Source, stored_scheme

Member = tuple[str, str | None]  # a name in the file, and the pattern of a converter that takes it
Convert = Callable[[Callable[[str], Tensor]], dict[str, Tensor]]  # how to read a name -> tensors of the model
KEPT = "base"  # stem of the files in which a run keeps codes of its own


class _Shapes:
    """Stands for the model where transformers' conversions ask it for the shape of a parameter."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self._state = model.config, library_state(model)

    def get_parameter(self, name: str) -> Tensor:
        return self._state[name]

    get_parameter_or_buffer = get_parameter


def plan(source: Source, model: PreTrainedModel) -> Pieces:
    """The pieces of `source` for the unpacked skeleton `model` (on meta)."""
    if source.gguf is not None:
        return gguf_pieces(source.gguf, model)
    files = Safetensors(source.path, source.stem)
    rename = _Names(model, own=bool(source.packed))
    found = _packed_pieces(files, model, source, rename)
    used = {name for piece in found.pieces for name in piece.source.split(" + ")}
    rest = [name for name in files.entries if name not in used]
    _plain_pieces(files, rest, rename, _Shapes(model), found)
    if source.kind == "qtune" and found.stored is None:
        found.faults.append(
            "config.json says that it is packed, but no packed weight was found in it; where its weights are plain "
            "(llm_int8_has_fp16_weight), take quantization_config out of config.json"
        )
    found.pieces.sort(key=lambda piece: dot_natural_key(next(iter(piece.targets), "")))
    return found


# ---- safetensors ----


class _Names:
    """A checkpoint's name -> transformers' name in the model, and the pattern of the converter that must run on it, if
    any. own: the checkpoint is one of ours, which has a name for each expert's part of a fused weight."""

    def __init__(self, model: PreTrainedModel, own: bool = False) -> None:
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.by_pattern = {pattern: t for t in self.converters for pattern in t.source_patterns}
        self.prefix, self.state, self.fused = model.base_model_prefix, library_state(model), fused_shapes(model)
        state = model.state_dict() if own else {}
        self.parts = {n: t for n, t in state.items() if n not in self.state}
        self.state |= self.parts

    def __call__(self, name: str) -> tuple[str, str | None]:
        if name in self.parts:
            return name, None
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        if renamed not in self.state and name in self.state:  # written under the model's own names
            renamed, pattern = rename_source_key(name, [], [], self.prefix, self.state)
        return renamed, pattern


def _plain_pieces(files: Safetensors, names: Iterable[str], rename: _Names, shapes: _Shapes, found: Pieces) -> None:
    merged: dict[str, list[Member]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename(name)
        if target not in rename.state:
            found.extra.append(name)
        elif pattern is None and target not in rename.fused:
            found.pieces.append(Piece(name, {target: files.entries[name].shape}, _reader(files, name, target)))
        else:
            merged.setdefault(target, []).append((name, pattern))
    for target, members in merged.items():
        template = None if members[0][1] is None else rename.by_pattern[members[0][1]]
        make = partial(_converter, template, target, shapes)
        try:
            if target in rename.fused and _expert_pieces(files, target, members, make, rename.fused[target], found):
                continue
            meta = make(members)(partial(_like, files, None))
        except Exception as error:  # noqa: BLE001  an operation of transformers met shapes or counts that it does not expect
            found.faults.append(f"{target} cannot be made of {', '.join(name for name, _ in members)}: {error}")
            continue
        targets = {name: tuple(tensor.shape) for name, tensor in meta.items()}
        read = _bind(make(members), files.read)
        if target in rename.fused:
            shape = targets.pop(target)
            targets |= {part_of(target, number): shape[1:] for number in range(shape[0])}
            read = _apart(read, target)
        found.pieces.append(Piece(" + ".join(name for name, _ in members), targets, read))


def _expert_pieces(
    files: Safetensors,
    target: str,
    members: list[Member],
    make: Callable[[list[Member]], Convert],
    shape: tuple[int, int, int],
    found: Pieces,
) -> bool:
    """Add a piece for each expert of the fused weight `target` [E, out, in], where the conversion of one expert's
    tensors alone, or of their slices, gives its matrix. Returns whether it does."""
    sizes = {name: files.entries[name].shape for name, _ in members}
    sliced = all(len(size) == 3 and size[0] == shape[0] for size in sizes.values())
    groups: dict[int, list[Member]] = dict.fromkeys(range(shape[0]), members) if sliced else {}
    for name, pattern in () if sliced else members:
        numbers = re.findall(r"\.(\d+)\.", name)
        if len(sizes[name]) != 2 or not numbers:
            return False
        groups.setdefault(int(numbers[-1]), []).append((name, pattern))
    made: dict[Any, tuple[int, ...]] = {}  # what goes in -> the shape of what comes out
    pieces = []
    for number, mine in groups.items():
        kind = tuple((pattern, sizes[name], files.entries[name].dtype) for name, pattern in mine)
        at, names, part = number if sliced else None, [name for name, _ in mine], part_of(target, number)
        if number >= shape[0]:
            found.extra += names
            continue
        if kind not in made:
            try:
                made[kind] = tuple(make(mine)(partial(_like, files, at))[target].shape)
            except Exception as error:  # noqa: BLE001  as above
                found.faults.append(f"{part} cannot be made of {', '.join(names)}: {error}")
                made[kind] = ()
        if made[kind] and (len(made[kind]) != 3 or made[kind][0] != 1):
            return False
        if made[kind]:
            read = _apart(_bind(make(mine), partial(_slice, files, at)), target, number)
            pieces.append(Piece(" + ".join(names), {part: made[kind][1:]}, read))
    found.pieces += pieces
    return True


def _slice(files: Safetensors, at: int | None, name: str) -> Tensor:
    """A tensor of the files, or what lies at one place of its first dimension."""
    return files.read(name) if at is None else files.read(name)[at : at + 1]


def _like(files: Safetensors, at: int | None, name: str) -> Tensor:
    """The same on meta: nothing is read."""
    shape = files.entries[name].shape
    return torch.empty(shape if at is None else (1, *shape[1:]), dtype=files.entries[name].dtype, device="meta")


def _apart(read: Callable[[], dict[str, Tensor]], target: str, first: int = 0) -> Callable[[], dict[str, Tensor]]:
    """Expert by expert: a fused weight that begins at expert `first`."""

    def parts() -> dict[str, Tensor]:
        made = read()
        stack = made.pop(target)
        return made | {part_of(target, first + i): tensor for i, tensor in enumerate(stack)}

    return parts


def _reader(files: Safetensors, name: str, target: str) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: {target: files.read(name)}


def _bind(convert: Convert, read: Callable[[str], Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: convert(read)


def _converter(template: WeightConverter | None, target: str, shapes: _Shapes, members: list[Member]) -> Convert:
    """A function (how to read a name) -> {target: tensor}, which runs transformers' conversion of these members.
    Without a template there is one member, which is the target as it is."""

    def convert(read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if template is None:
            return {target: read(members[0][0])}
        converter = copy.deepcopy(template)
        for name, pattern in members:
            converter.add_tensor(target, name, pattern, partial(read, name))  # type: ignore[arg-type]  # as transformers itself reads lazily
        made = converter.convert(target, model=shapes, config=shapes.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    return convert


# ---- packed safetensors ----


def _packed_pieces(files: Safetensors, model: PreTrainedModel, source: Source, rename: _Names) -> Pieces:
    found = Pieces()
    if source.kind != "qtune":
        return found
    ends = {module: f"{name}.weight" for name, module in model.named_modules()}
    table, head = (ends.get(module, "") for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    schemes: dict[Scheme, str] = {}
    for weight in list(bnb.weights(files.entries)):
        try:
            kept = bnb.packed(files, weight)
        except QtuneError as error:
            found.faults.append(str(error))
            continue
        scheme = kept.scheme
        target = _add_packed(found, rename, weight, kept.names, kept.shape, kept.read, scheme)
        if target == table:
            found.faults.append(
                f"{weight} is an embedding packed by bitsandbytes, which transformers does not read either"
            )
        schemes.setdefault(scheme, weight)
    if len(schemes) > 1:
        found.faults.append(
            "it mixes schemes: " + ", ".join(f"{scheme} ({weight})" for scheme, weight in schemes.items())
        )
    found.stored = next(iter(schemes), None)
    if source.packed:
        _own_pieces(files, rename, source, {table, head}, found)
    return found


def _add_packed(
    found: Pieces,
    rename: _Names,
    weight: str,
    names: list[str],
    shape: tuple[int, ...],
    read: Callable[[], Parts],
    scheme: Scheme,
) -> str:
    target, pattern = rename(weight)
    if pattern is not None or target not in rename.state:
        found.extra += names
    else:
        found.pieces.append(Piece(" + ".join(names), {target: shape}, read, scheme=scheme))
    return target


def _own_pieces(files: Safetensors, rename: _Names, source: Source, tables: set[str], found: Pieces) -> None:
    scheme, embeddings = stored_scheme(source.packed, "scheme"), stored_scheme(source.packed, "embeddings")
    assert embeddings is None or isinstance(embeddings, Scheme)
    assert not isinstance(scheme, Average), "a packed folder says which layer has which scheme"
    found.stored, found.stored_embeddings = scheme, embeddings
    for weight, parts in _part_groups(files).items():
        kind = embeddings if weight in tables else None if scheme is None else scheme.of(weight.removesuffix(".weight"))
        state = rename.state.get(weight)
        if kind is None or isinstance(kind, Dense) or state is None or set(kind.layout((64, 64))) != parts:
            continue  # not a packed weight of ours: it will be named as extra
        shape = _packed_shape(weight, tuple(state.shape), source.packed)
        found.faults += _part_faults(files, weight, shape, kind)
        _add_packed(
            found,
            rename,
            weight,
            [f"{weight}.{part}" for part in sorted(parts)],
            shape,
            _own_reader(files, weight, parts),
            kind,
        )


def _part_groups(files: Safetensors) -> dict[str, set[str]]:
    """`X.weight` -> the parts `X.weight.<part>` that the files hold of it."""
    groups: dict[str, set[str]] = {}
    for name in files.entries:
        weight, _, part = name.rpartition(".")
        if weight.endswith(".weight") and weight not in files.entries:
            groups.setdefault(weight, set()).add(part)
    return groups


def _part_faults(files: Safetensors, weight: str, shape: tuple[int, ...], scheme: Scheme) -> list[str]:
    """What of a packed weight [out, in] is not as its scheme lays it out."""
    faults = []
    for part, (dtype, size) in scheme.layout(shape).items():
        stored = files.entries.get(f"{weight}.{part}")
        if stored is None:
            faults.append(f"{weight}.{part} is missing")
        elif (stored.dtype, stored.shape) != (dtype, tuple(size)):
            faults.append(
                f"{weight}.{part} is {stored.dtype} {stored.shape}, "
                f"a weight of {shape} packed as {scheme} has {dtype} {tuple(size)}"
            )
    return faults


def put_kept(found: Pieces, folder: Path, model: PreTrainedModel, scheme: Scheme | Mixed) -> None:
    """Let the codes that a run keeps take the place of the pieces that would pack the same weights."""
    files, sites, kept = Safetensors(folder, KEPT), linear_sites(model), dict[str, Piece]()
    for weight, parts in _part_groups(files).items():
        site = weight.removesuffix(".weight")
        if site not in sites:
            found.faults.append(f"{folder / KEPT}.safetensors holds {weight}, which this model does not have")
            continue
        plain = tuple(model.get_submodule(site).weight.shape)  # type: ignore[union-attr,arg-type]
        shape = plain[::-1] if isinstance(sites[site], Conv1D) else plain
        if faults := _part_faults(files, weight, shape, scheme.of(site)):
            found.faults += faults
            continue
        read = _own_reader(files, weight, parts)
        kept[weight] = Piece(weight, {weight: shape}, read, scheme=scheme.of(site), own=True)
    found.pieces = [piece for piece in found.pieces if not kept.keys() & piece.targets.keys()] + list(kept.values())


def _own_reader(files: Safetensors, weight: str, parts: set[str]) -> Callable[[], Parts]:
    return lambda: {part: files.read(f"{weight}.{part}") for part in parts}


def _packed_shape(weight: str, shape: tuple[int, ...], packed: Mapping[str, Any]) -> tuple[int, ...]:
    """[out, in] of a packed weight: Conv1D keeps the transpose in plain checkpoints, never in packed ones."""
    return tuple(reversed(shape)) if weight.removesuffix(".weight") in packed.get("conv1d", ()) else shape


# ---- faults ----


def check(found: Pieces, model: PreTrainedModel, ties: Mapping[str, str]) -> list[str]:
    """Faults of the pieces against the skeleton: missing, extra and mis-shaped tensors. ties: tied name -> the name it
    shares."""
    state = model.state_dict()
    given = {name for piece in found.pieces for name in piece.targets}
    groups: dict[str, set[str]] = {}
    for name, owner in ties.items():
        groups.setdefault(owner, {owner}).add(name)
    tied = {name for group in groups.values() if group & given for name in group}
    missing = sorted(set(state) - given - tied, key=dot_natural_key)
    faults = list(found.faults)
    if missing := [name for name in missing if not _matches(model._keys_to_ignore_on_load_missing, name)]:
        faults.append(f"{len(missing)} missing tensors: {', '.join(missing)}")
    if extra := [name for name in found.extra if not _ignored(model, name)]:
        faults.append(f"{len(extra)} extra tensors: {', '.join(extra)}")
    shapes = [
        f"{name} is {shape}, expected {expected}"
        for piece in found.pieces
        for name, shape in piece.targets.items()
        if name in state and (expected := _expected(model, name, state, piece)) != tuple(shape)
    ]
    return faults + ([f"{len(shapes)} mis-shaped tensors: {'; '.join(shapes)}"] if shapes else [])


def _expected(model: nn.Module, name: str, state: Mapping[str, Tensor], piece: Piece) -> tuple[int, ...]:
    shape = tuple(state[name].shape)
    packed_conv1d = piece.scheme is not None and isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
    return tuple(reversed(shape)) if packed_conv1d else shape


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _ignored(model: PreTrainedModel, name: str) -> bool:
    """Leftovers that transformers ignores, too: buffers that old versions stored."""
    buffers = {buffer.rpartition(".")[2] for buffer, _ in model.named_buffers()}
    old = [
        p
        for p, key in ((r"rotary_emb\.inv_freq$", "inv_freq"), (r"(^|\.)position_ids$", "position_ids"))
        if key in buffers
    ]
    return _matches(model._keys_to_ignore_on_load_unexpected, name) or _matches(old, name)
