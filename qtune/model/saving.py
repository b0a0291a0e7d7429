"""Write a packed model as a checkpoint that loads without the original.

NF4, FP4 and INT8 linear layers: under transformers' bitsandbytes names in `model.safetensors`, so that
`AutoModelForCausalLM.from_pretrained` loads it. Dense ones: an ordinary checkpoint. Other schemes, any with packed
embeddings, and packed experts, which that loader does not know: parts named `X.weight.<part>` in `qtune.safetensors`,
which transformers does not find and so cannot misread; config.json then says in its entry `qtune` what they are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)

from .. import bnb
from ..checkpoint import SHARD_BYTES, Entry, write
from ..errors import QtuneError
from ..quant import Dense, QuantEmbedding, QuantLinear, Scheme
from ..safe_io import write_json, write_text
from .experts import Experts, experts_of
from .skeleton import Origin
from .source import FORMAT


def save_quantized(model: PreTrainedModel, tokenizer: Any, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write model (as `load` returned it) and tokenizer (or None) into the folder `out`; one tensor is copied at a
    time.

    Raises QtuneError where `out` holds a checkpoint already, or adapters are attached.
    """
    origin = getattr(model, "qtune", None)
    if not isinstance(origin, Origin):
        raise QtuneError("Q802", "only a model that qtune.model.load returned can be saved packed")
    folder = Path(out)
    if present := sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".gguf")):
        raise QtuneError(
            "Q801", f"{folder} already holds a checkpoint ({', '.join(present[:5])}); give another folder or remove it"
        )
    plain, packed = _sites(model)
    routed = any(isinstance(m, QuantLinear) and m.routed for m in model.modules())
    foreign = isinstance(origin.scheme, Dense) or (bnb.says(origin.scheme) and not routed)
    standard = origin.embeddings is None and foreign
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, _entries(model, standard), "model" if standard else "qtune", shard_bytes)
    write_json(folder / "config.json", _config(model, origin, standard, plain, packed))
    if model.can_generate():
        # not save_pretrained: it refuses values that many published models hold (a temperature without sampling)
        write_text(folder / "generation_config.json", model.generation_config.to_json_string())
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def _sites(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linear layers that are stored plain, and of those that are packed."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | QuantLinear)}
    if moved := [n for n, m in layers.items() if isinstance(m, QuantLinear) and m.name != n]:
        raise QtuneError(
            "Q405",
            f"adapters are attached ({', '.join(moved[:3])} ...): merge or remove them before saving the packed model",
        )
    plain = [n for n, m in layers.items() if not isinstance(m, QuantLinear) or isinstance(m.scheme, Dense)]
    return plain, [n for n in layers if n not in plain]


def _config(
    model: PreTrainedModel, origin: Origin, standard: bool, plain: list[str], packed: list[str]
) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(origin.dtype).removeprefix("torch.")
    config.pop("_name_or_path", None)
    if not standard:
        sites = dict(model.named_modules())
        config["qtune"] = {
            "format": FORMAT,
            "scheme": origin.scheme.to_dict(),
            "embeddings": None if origin.embeddings is None else origin.embeddings.to_dict(),
            "conv1d": [name for name in packed if getattr(sites[name], "conv1d", False)],
        }
    elif packed:
        assert isinstance(origin.scheme, Scheme)
        config["quantization_config"] = bnb.quantization_config(origin.scheme, origin.dtype, plain)
    return config


def _entries(model: nn.Module, standard: bool) -> Iterator[Entry]:
    """Every tensor of the model once, under the name that it has in the file."""
    seen: set[int] = set()
    names, inside = PublishedNames(model), "\n"  # no name begins so
    for path, module in model.named_modules():
        if standard and isinstance(module, Experts):
            inside, part = path + ".", partial(_dense_part, module)
            yield from names.experts(path, module, part, part(0, module.first).dtype)
        if path.startswith(inside):
            continue
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or leaf in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = f"{path}.{leaf}" if path else leaf
            if leaf == "packed" and isinstance(module, QuantLinear | QuantEmbedding):
                weight = f"{path}.weight"
                yield from _packed(names.of(weight) if standard else weight, module, standard)
            else:
                yield Entry(names.of(name) if standard else name, tensor.dtype, tuple(tensor.shape), tensor.detach)


def _packed(weight: str, layer: QuantLinear | QuantEmbedding, standard: bool) -> Iterator[Entry]:
    parts = layer.parts
    if isinstance(layer.scheme, Dense):
        dense = parts["weight"].T if getattr(layer, "conv1d", False) else parts["weight"]
        yield Entry(weight, dense.dtype, tuple(dense.shape), dense.detach)
        return
    if standard:
        named = bnb.to_bnb(weight, parts, layer.scheme, layer.shape, layer.dtype)
    else:
        named = {f"{weight}.{part}": tensor for part, tensor in parts.items()}
    for name, tensor in named.items():
        yield Entry(name, tensor.dtype, tuple(tensor.shape), tensor.detach)


def _dense_part(experts: Experts, number: int, leaf: str) -> Tensor:
    layer: Any = experts.get_submodule(f"{number}.{leaf}")
    return layer.parts["weight"]  # type: ignore[no-any-return]


# ---- experts as they are published


class PublishedNames:
    """The names and shapes under which transformers itself would write a model with experts: its conversions reversed,
    for one expert's matrix at a time."""

    def __init__(self, model: Any) -> None:
        self.model, self.any = model, bool(experts_of(model))
        known = get_model_conversion_mapping(model, add_legacy=False) if self.any else []
        reverse = [t.reverse_transform() for t in reversed(known) if not isinstance(t, PrefixChange)]
        self.renamings = [t for t in reverse if isinstance(t, WeightRenaming)]
        self.converters = [t for t in reverse if isinstance(t, WeightConverter)]
        self.last: tuple[Any, dict[str, Tensor]] = None, {}  # what one matrix was made into, for all its names

    def of(self, name: str) -> str:
        """The published name of a tensor that is in the file as it is in the model."""
        taken = apply_converters(name, self.converters)[1] is not None
        return name if taken else apply_renamings(name, self.renamings)

    def experts(
        self, path: str, experts: Experts, part: Callable[[int, str], Tensor], dtype: torch.dtype
    ) -> Iterator[Entry]:
        """The entries of the experts at `path`. part(number, leaf) -> the matrix [out, in] of one expert."""
        for leaf, shape in experts.shapes.items():
            name = f"{path}.{leaf}"
            whole = self._made(name, torch.empty(experts.count, *shape, dtype=dtype, device="meta"))
            alone = self._made(name, torch.empty(1, *shape, dtype=dtype, device="meta"))
            each = len(whole) // experts.count
            if all(like.dim() == 3 for like in alone.values()):  # published fused, too: each expert lies at its place
                for key, like in whole.items():
                    stack = partial(self._stack, name, key, experts.count, part)
                    yield Entry(key, dtype, tuple(like.shape), stack, f"{path}.0.{leaf}")
                continue
            assert len(alone) == each, name
            own = sorted(alone, key=dot_natural_key)
            for place, key in enumerate(sorted(whole, key=dot_natural_key)):
                number, kind = divmod(place, each)
                read = partial(self._one, name, own[kind], number, part)
                yield Entry(key, dtype, tuple(whole[key].shape), read, f"{path}.{number}.{leaf}")

    def _one(self, name: str, key: str, number: int, part: Callable[[int, str], Tensor]) -> Tensor:
        """What the file holds under `key` for expert `number`."""
        if self.last[0] != (name, number):
            self.last = None, {}
            self.last = (name, number), self._made(name, part(number, name.rpartition(".")[2]).unsqueeze(0))
        return self.last[1][key]

    def _stack(self, name: str, key: str, count: int, part: Callable[[int, str], Tensor]) -> Tensor:
        first = self._one(name, key, 0, part)
        stack = first.new_empty(count, *first.shape[1:])
        for number in range(count):
            stack[number] = self._one(name, key, number, part)[0]
        return stack

    def _made(self, name: str, stack: Tensor) -> dict[str, Tensor]:
        """Published name -> tensor, of a fused weight [E, out, in]."""
        renamed, pattern = apply_converters(name, self.converters)
        if pattern is None:
            return {apply_renamings(name, self.renamings): stack}
        converter = copy.deepcopy(next(c for c in self.converters if pattern in c.source_patterns))
        converter.add_tensor(renamed, name, pattern, stack)  # type: ignore[arg-type]  # as in transformers' own saving
        made = converter.convert(renamed, model=self.model, config=self.model.config)
        values = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        return {apply_renamings(key, self.renamings): value for key, value in values.items()}
