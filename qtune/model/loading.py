"""Load a causal language model with packed weights: skeleton on meta, then each tensor is read, packed and dropped.

Peak anonymous memory above the imports = packed model + about two of its largest tensors, at any model size. What is
not packed (norms, biases, by default the embeddings and the output head) is cast to `dtype` as it is read; nothing is
ever held in a higher precision.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import Piece, faults_error
from ..errors import QtuneError
from ..keys import shown
from ..quant import Dense, Mixed, QuantEmbedding, QuantLinear, Scheme, Storage
from ..screen import size
from . import names
from .layerwise import decoder_layers
from .skeleton import Origin, compute_buffers, dense_experts, dtypes_of, empty, linear_sizes, replace
from .source import Source, no_tokenizer, open_source, read_folder, reason_of

TRIM_BYTES = 64_000_000  # of checkpoint read between two calls of malloc_trim

Progress = Callable[[str, int, int], None]
Aside = Callable[[nn.Module], None]  # what becomes of a decoder layer when all of it is there


class Packing:
    """What becomes of each linear weight on its way in; this one packs it. What chooses codes from data or starts
    adapters while the checkpoint streams in is a subclass (`qtune.starting`)."""

    def begin(
        self, model: PreTrainedModel, pieces: list[Piece], ties: dict[str, str], device: torch.device
    ) -> list[Piece]:
        """Called before anything is read. Returns the pieces in the order in which they are wanted."""
        return pieces

    def weight(self, layer: QuantLinear, weight: Tensor) -> None:
        """Fill `layer` with weight [out, in], in the precision of the file; it must not be written to."""
        layer.set_weight(weight)
        layer.own = False

    def filled(self, piece: Piece) -> None:
        """Called when all tensors of a piece are in the model."""

    def notes(self) -> list[str]:
        """What the user must know of it, after the last piece."""
        return []


def load(
    model: str | Path | Source,
    scheme: Storage | None,
    *,
    embeddings: Scheme | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    packing: Packing | None = None,
    kept: Path | None = None,
    aside: Aside | None = None,
) -> PreTrainedModel:
    """A frozen transformers model in eval mode whose linear layers are QuantLinear; `model.qtune` is its Origin.

    model: folder with safetensors, hub id, .gguf file, or a packed folder (ours or bitsandbytes'), whose codes are
    kept as they are. scheme: how linear layers are packed; None takes what a packed folder holds. embeddings: a scheme
    for the input table and the output head, which otherwise stay in `dtype`. progress(name, done, total) counts pieces.
    packing: what becomes of each linear weight. kept: a run's folder, whose own codes (`base.safetensors`) take the
    place of what packing the model would give. aside: what becomes of each decoder layer once it is whole
    (`qtune.memory`). Raises QtuneError with all faults: missing, extra, mis-shaped or
    non-finite tensors, damaged files, unknown architectures, pickles.
    """
    source = model if isinstance(model, Source) else open_source(model)
    skeleton = empty(source.config, dtype)
    compute_buffers(skeleton)
    found = names.plan(source, skeleton)
    if scheme is not None:
        scheme = scheme.resolve(linear_sizes(skeleton))
        if kept is not None:
            names.put_kept(found, kept, skeleton, scheme)
    ties = ties_of(skeleton, found)
    faults = names.check(found, skeleton, ties) + _scheme_faults(found, scheme, embeddings)
    if faults:
        raise faults_error("Q305", f"cannot load {source.name}", faults)
    scheme = scheme or found.stored
    embeddings = embeddings or found.stored_embeddings
    assert scheme is not None
    packing = packing or Packing()
    fill = prepare(skeleton, found, scheme, embeddings, dtype, device, packing, aside)
    fill.all(packing.begin(skeleton, found.pieces, ties, fill.device), source.name, progress)
    finish(skeleton, ties, torch.device(device))
    origin = Origin(source.name, scheme, embeddings, dtype, source.kind, source.notes + found.notes + packing.notes())
    _warn_of_experts(skeleton, origin)
    skeleton.qtune = origin  # type: ignore[assignment]
    _generation(skeleton, source)
    return skeleton


def prepare(
    skeleton: PreTrainedModel,
    found: names.Pieces,
    scheme: Storage,
    embeddings: Scheme | None,
    dtype: torch.dtype,
    device: torch.device | str,
    packing: Packing | None = None,
    aside: Aside | None = None,
) -> Fill:
    """Replace the layers of an unpacked skeleton by packed ones, in place; returns what fills it, piece by piece."""
    plain = dtypes_of(skeleton, dtype)
    _swap(skeleton, found, scheme, embeddings, dtype)
    return Fill(skeleton, plain, torch.device(device), packing or Packing(), aside)


def _scheme_faults(found: names.Pieces, scheme: Storage | None, embeddings: Scheme | None) -> list[str]:
    faults = []
    if scheme is None and found.stored is None:
        faults.append("its weights are not packed, so a scheme must be given")
    if scheme is not None and found.stored not in (None, scheme):
        faults.append(
            f"its weights are packed as {found.stored} and cannot become {scheme}: "
            "ask for the scheme that it has, or take the original model"
        )
    asked = embeddings if scheme is not None or embeddings is not None else found.stored_embeddings
    if found.stored_embeddings not in (None, asked):
        faults.append(f"its embeddings are packed as {found.stored_embeddings}, {asked or 'dense ones'} were asked for")
    return faults


def ties_of(model: PreTrainedModel, found: names.Pieces) -> dict[str, str]:
    """Tied name -> the name it shares. Where the file holds both: equal ones stay tied, the second is not read; others
    are untied."""
    by_name = {name: piece for piece in found.pieces for name in piece.targets if len(piece.targets) == 1}
    ties = {}
    for name, owner in model.all_tied_weights_keys.items():
        mine, other = by_name.get(name), by_name.get(owner)
        if mine is not None and other is not None and not _same(mine, other):
            found.notes.append(
                f"{name} and {owner} differ in the file, so they are not tied although config.json says so"
            )
            model.config.tie_word_embeddings = False
            continue
        if mine is not None and other is not None:
            found.pieces.remove(mine)
        ties[name] = owner
    model.all_tied_weights_keys = dict(ties)
    return ties


def _same(a: Piece, b: Piece) -> bool:
    if a.scheme != b.scheme or list(a.targets.values()) != list(b.targets.values()):
        return False
    mine, other = list(a.read().values()), list(b.read().values())
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(mine, other, strict=True))


def _swap(
    model: PreTrainedModel, found: names.Pieces, scheme: Storage, embeddings: Scheme | None, dtype: torch.dtype
) -> None:
    """Replace the layers; in a packed checkpoint those that it holds unpacked become dense ones."""
    packed = {
        name.removesuffix(".weight"): piece.scheme for piece in found.pieces for name in piece.targets if piece.scheme
    }
    plain = found.stored if isinstance(found.stored, Dense | Mixed) else Dense(str(dtype).removeprefix("torch."))
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), "")
    wanted = scheme.resolve(linear_sizes(model))
    replace(
        model,
        lambda site: packed.get(site) or (plain if found.stored else wanted).of(site),
        embeddings,
        dtype,
        packed.get(head),
    )


class Fill:
    """Fills the tensors of a skeleton, one piece at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        dtypes: dict[str, torch.dtype],
        device: torch.device,
        packing: Packing,
        aside: Aside | None = None,
    ) -> None:
        self.model, self.dtypes, self.device, self.packing, self.aside = model, dtypes, device, packing, aside
        self.stack = None if aside is None else decoder_layers(model)
        self.left: dict[nn.Module, int] = {}  # pieces that each decoder layer waits for

    def all(self, pieces: list[Piece], name: str, progress: Progress | None) -> None:
        """Fill every piece; weights that cannot be packed are listed together at the end."""
        faults, read = [], 0
        for layer in map(self._layer, pieces):
            if layer is not None:
                self.left[layer] = self.left.get(layer, 0) + 1
        for done, piece in enumerate(pieces):
            if progress is not None:
                progress(next(iter(piece.targets)), done, len(pieces))
            try:
                self.piece(piece)
                self.filled(piece)
            except QtuneError as error:
                faults.append(str(error))
            read += sum(2 * prod(shape) for shape in piece.targets.values())
            if read >= TRIM_BYTES or done == len(pieces) - 1:
                give_back()
                read = 0
        if progress is not None:
            progress("", len(pieces), len(pieces))
        if faults:
            raise faults_error("Q305", f"cannot load {name}", faults)

    def filled(self, piece: Piece) -> None:
        """All tensors of a piece are there; a decoder layer that is whole may be put aside."""
        self.packing.filled(piece)
        layer = self._layer(piece)
        if layer is not None and self.aside is not None:
            self.left[layer] -= 1
            if not self.left[layer]:
                self.aside(layer)

    def _layer(self, piece: Piece) -> nn.Module | None:
        """The decoder layer that a piece belongs to."""
        if self.stack is None:
            return None
        name, layers = self.stack
        inside, _, rest = next(iter(piece.targets)).partition(name + ".")
        return layers[int(rest.partition(".")[0])] if not inside and rest else None

    def piece(self, piece: Piece) -> None:
        """Read one piece and put its tensors where they belong."""
        if piece.scheme is not None:
            (target,) = piece.targets
            parts = {part: tensor.to(self.device) for part, tensor in piece.read().items()}
            self.parts(target, parts, piece.own)
            return
        if piece.rows is not None and self.site(next(iter(piece.targets))) is None:
            (target,) = piece.targets
            self.plain(target, piece.targets[target], piece.rows())
            return
        for target, tensor in piece.read().items():
            layer = self.site(target)
            if layer is not None:
                self.weight(target, layer, tensor)
            else:
                self.plain(target, tuple(tensor.shape), iter([tensor]))

    def site(self, target: str) -> QuantLinear | QuantEmbedding | None:
        """The packed layer that `target` is the weight of, or None where it is an ordinary tensor."""
        path, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(path)
        return module if leaf == "weight" and isinstance(module, QuantLinear | QuantEmbedding) else None

    def parts(self, target: str, parts: dict[str, Tensor], own: bool) -> None:
        layer = self.site(target)
        assert layer is not None
        layer.set_parts(parts)
        layer.own = own

    def weight(self, target: str, layer: QuantLinear | QuantEmbedding, tensor: Tensor) -> None:
        tensor = tensor.to(self.device)
        if getattr(layer, "conv1d", False):
            tensor = tensor.T
        if isinstance(layer, QuantLinear):
            self.packing.weight(layer, tensor)
        else:
            layer.set_weight(tensor)
            layer.own = False

    def plain(self, target: str, shape: tuple[int, ...], blocks: Iterator[Tensor]) -> None:
        """Copy a tensor, given as blocks of rows, into a fresh one of the model's dtype."""
        path, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(path)
        old = getattr(module, leaf)
        if tuple(old.shape) != shape:
            raise QtuneError("Q305", f"{target} is {shape}, expected {tuple(old.shape)}")
        new = torch.empty(shape, dtype=self.dtypes[target], device=self.device)
        at = 0
        for block in blocks:
            part = new[at : at + len(block)] if block.shape != new.shape else new
            part.copy_(block)
            at += len(block) if block.dim() else 0
        if leaf in module._buffers:
            module._buffers[leaf] = new
        else:
            module._parameters[leaf] = nn.Parameter(new, requires_grad=False)


def give_back() -> None:
    """Hand freed memory to the system: glibc keeps temporaries below 32 MB that lie between packed weights (measured:
    int8 of 1.2 B parameters held 2.9 GB instead of 1.5). Nothing to do with other C libraries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def finish(model: PreTrainedModel, ties: dict[str, str], device: torch.device) -> None:
    """Share tied tensors, move computed buffers, and make sure that nothing was forgotten."""
    tie(model, ties, device)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise QtuneError("Q305", f"nothing filled {', '.join(left)}")
    model.requires_grad_(False).eval()


def tie(model: PreTrainedModel, ties: dict[str, str], device: torch.device) -> None:
    """Share tied tensors and move computed buffers; a second time changes nothing."""
    packed = {name: owner for name, owner in ties.items() if isinstance(_module(model, owner), QuantEmbedding)}
    for name, owner in ties.items():
        leaf = "packed" if name in packed else name.rpartition(".")[2]
        mine, other = _module(model, name), _module(model, owner)
        source_leaf = "packed" if name in packed else owner.rpartition(".")[2]
        value = getattr(other, source_leaf)
        if value.is_meta:
            setattr(other, source_leaf, getattr(mine, leaf))
        else:
            setattr(mine, leaf, value)
    if packed:  # later calls of tie_weights must find the packed tensors
        model._tied_weights_keys = {
            n.removesuffix("weight") + "packed": o.removesuffix("weight") + "packed" for n, o in packed.items()
        }
        model.all_tied_weights_keys = dict(model._tied_weights_keys)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _warn_of_experts(model: PreTrainedModel, origin: Origin) -> None:
    for kind, (count, nbytes) in {} if isinstance(origin.scheme, Dense) else dense_experts(model).items():
        note = (
            f"{count} fused expert weights of {kind}, {size(nbytes)}, stay dense in {origin.dtype}: "
            f"the class computes more than the products and the gate that {origin.scheme} can be put under"
        )
        origin.notes.append(note)
        warnings.warn(note, stacklevel=3)


def _generation(model: PreTrainedModel, source: Source) -> None:
    model.config._name_or_path = source.name
    if source.kind != "gguf" and (source.path / "generation_config.json").is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(source.path)
        except Exception as error:  # values of other types raise what they raise
            what = f"cannot read {source.path / 'generation_config.json'}"
            raise QtuneError("Q302", f"{what}: {reason_of(error)}") from error
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(model.generation_config, name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(one, int) and abs(one) < 2**31 for one in ids):
                path = source.path / "generation_config.json"
                raise QtuneError("Q302", f"{path}: {name} is {shown(value)}; legal: a token's id, or a list of them")


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder, a hub id or a .gguf file. Raises QtuneError where there is none."""
    path = Path(model).expanduser()
    is_gguf = path.is_file() and path.suffix.lower() == ".gguf"
    folder = path.parent if is_gguf else path if path.is_dir() else open_source(model).path
    try:
        if is_gguf:  # AutoTokenizer would parse the whole vocabulary twice more, for a config that it does not need
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), gguf_file=path.name)
        found = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the package tokenizers raises plain ones
        if not is_gguf:
            read_folder(folder, str(model), weights=False)  # a fault of config.json is told as such
        told = "" if is_gguf else no_tokenizer(folder)
        raise QtuneError("Q308", f"cannot read a tokenizer from {model}: {told or reason_of(error)}") from error
    if not isinstance(found.model_max_length, (int, float)):
        wrong = f"model_max_length in tokenizer_config.json is {shown(found.model_max_length)}; legal: a number"
        raise QtuneError("Q308", f"cannot read a tokenizer from {model}: {wrong}")
    return found


def packed_sites(model: nn.Module) -> dict[str, QuantLinear]:
    """Name -> packed linear layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that is not packed (tied ones once)."""
    packed = {id(m.packed) for m in model.modules() if isinstance(m, QuantLinear | QuantEmbedding)}
    return {name: p for name, p in model.named_parameters() if id(p) not in packed}
