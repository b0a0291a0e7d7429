"""Which tensors of a GGUF file fill which tensors of the model, by transformers' own name map and tensor processors,
one piece at a time.

Processors undo what llama.cpp does to the weights: permuted q and k rows, norms stored as w + 1, transposed or fused
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from ..checkpoint import Piece, Pieces
from ..errors import QtuneError, listed
from ..gguf import GGUF
from .experts import fused_shapes, library_state, part_of

UNREAD_GGUF = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
TABLES_GGUF = ("token_embd.weight", "output.weight")


class _TwoLevels:
    """A model as transformers' name map asks for it, without the children below its base model: the map is built anew
    for each of them."""

    def __init__(self, model: nn.Module, config: Any, child: str = "") -> None:
        self.model, self.config, self.child = model, config, child

    def state_dict(self) -> dict[str, Tensor]:
        return library_state(self.model)

    def named_children(self) -> list[tuple[str, Any]]:
        inner = getattr(self.model, self.child, None) if self.child else None
        return [] if inner is None else [(self.child, _TwoLevels(inner, self.config))]


def _gguf_names(file: GGUF, model: PreTrainedModel, processor: Any) -> dict[str, str]:
    """GGUF name -> the model's name, from transformers' map."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    try:
        names = get_gguf_hf_weights_map(_TwoLevels(model, model.config, model.base_model_prefix), processor)
        if any(_gguf_target(name, names) is None and name not in UNREAD_GGUF for name in file.tensors):
            names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise QtuneError(
            "Q303",
            f"cannot load {file.path}: transformers has no tensor names for GGUF architecture {file.architecture!r}",
        ) from error
    return names


def _gguf_target(name: str, names: Mapping[str, str]) -> str | None:
    return names.get(name, names.get(name.removesuffix(".weight")))


def gguf_pieces(file: GGUF, model: PreTrainedModel) -> Pieces:
    """The pieces of a GGUF file for the unpacked skeleton `model` (on meta)."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
    names = _gguf_names(file, model, processor)
    found, state, fused = Pieces(), library_state(model), fused_shapes(model)
    groups: dict[str, list[str]] = {}
    for name in file.tensors:
        target = _gguf_target(name, names)
        if target is not None and target in state:
            groups.setdefault(target, []).append(name)
        elif name in UNREAD_GGUF:
            found.notes.append(
                f"{name} is not read (nor by transformers): positions beyond the original context length will be wrong"
            )
        else:
            found.extra.append(name)
    for target, members in groups.items():
        if target in fused and all(file.tensors[name].shape[0] == fused[target][0] for name in members):
            for number in range(fused[target][0]):
                part = part_of(target, number)
                one = _expert_reader(_gguf_reader(file, members, target, processor, names, number), target, part)
                found.pieces.append(Piece(" + ".join(members), {part: fused[target][1:]}, one))
            continue
        shape = _gguf_shape(file, members, tuple(state[target].shape))
        table = members[0] in TABLES_GGUF and shape == file.tensors[members[0]].shape
        rows = _bind_rows(file, members[0]) if table else None
        read = _gguf_reader(file, members, target, processor, names)
        found.pieces.append(Piece(" + ".join(members), {target: shape}, read, rows))
    found.pieces.sort(key=lambda piece: dot_natural_key(next(iter(piece.targets))))
    return found


def _gguf_shape(file: GGUF, members: list[str], expected: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a target will have, as far as it can be known before a processor has run (it may transpose or add
    a dimension)."""
    shape = file.tensors[members[0]].shape
    same = sorted(n for n in shape if n > 1) == sorted(n for n in expected if n > 1)
    return expected if same or len(members) > 1 else shape


def _bind_rows(file: GGUF, name: str) -> Callable[[], Any]:
    return lambda: file.rows(name)


def _expert_reader(
    read: Callable[[], Mapping[str, Tensor]], target: str, part: str
) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: {part: read()[target][0]}


def _gguf_reader(
    file: GGUF, members: list[str], target: str, processor: Any, names: dict[str, str], at: int | None = None
) -> Callable[[], Mapping[str, Tensor]]:
    def read() -> Mapping[str, Tensor]:
        made: dict[str, Tensor] = {}  # what processors of fused experts fill themselves
        for name in members:
            given = file.read(name, at).numpy()
            result = processor.process(
                weights=given, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": made}
            )
            if result.name is not None:
                made[target] = torch.from_numpy(result.weights)
        return made

    return read


# ---- the way out, for adapters

# model_type -> the architecture that llama.cpp's convert_hf_to_gguf.py gives it, as far as that leaves linear layers as
# they are or transformers' processors undo what it does to them
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip


def gguf_architecture(config: Any) -> str:
    """What llama.cpp calls a model of this configuration. Raises QtuneError where we do not know."""
    if config.model_type not in ARCHITECTURES:
        raise QtuneError(
            "Q812",
            f"how llama.cpp lays out a model of type {config.model_type!r} is not known here; known: "
            f"{', '.join(ARCHITECTURES)}. Export with --as lora, and use llama.cpp's own convert_lora_to_gguf.py",
        )
    return ARCHITECTURES[config.model_type]


@dataclass(frozen=True)
class Place:
    """Where a linear layer lies in a GGUF file. order: row i of the layer is row order[i] of the file."""

    name: str
    order: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """values [out, n] of the layer, in the order of the file."""
        return torch.empty_like(values).index_copy_(0, self.order.to(values.device), values)


def gguf_places(model: PreTrainedModel, layers: Sequence[str]) -> dict[str, Place]:
    """Layer -> its place in a GGUF file of the model, by what transformers undoes where it reads one: the processor is
    asked what becomes of rows that are numbered. Raises QtuneError for layers that have no place of their own."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = gguf_architecture(model.config)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    asked = SimpleNamespace(
        config=model.config, state_dict=lambda: {f"{name}.weight": None for name in layers}, named_children=list
    )
    names = get_gguf_hf_weights_map(asked, processor, architecture, model.config.num_hidden_layers)
    found = {}
    for theirs, ours in names.items():
        layer = ours.removesuffix(".weight")
        if layer not in layers:  # experts, whose names lose their numbers here
            continue
        site: Any = model.get_submodule(layer)
        count = site.base.out_features
        numbered = np.tile(np.arange(count, dtype=np.float32)[:, None], 2)
        result = processor.process(weights=numbered, name=theirs, tensor_key_mapping=names, parsed_parameters={})
        rows = result.weights if result.weights.shape == numbered.shape else result.weights.T
        order = torch.from_numpy(np.ascontiguousarray(rows[:, 0])).long()
        if (rows != rows[:, :1]).any() or not torch.equal(order.sort().values, torch.arange(count)):
            raise QtuneError("Q812", f"{layer}: its rows lie in the file of {architecture} in no order of their own")
        found[layer] = Place(theirs, order)
    tied = {"lm_head"} if model.config.tie_word_embeddings else set()
    if missing := [name for name in layers if name not in found or name in tied]:
        raise QtuneError(
            "Q812", f"llama.cpp has no adapter for {listed(missing)}: merge, or train without them in adapter.targets"
        )
    return found
