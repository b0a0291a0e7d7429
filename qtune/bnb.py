"""bitsandbytes' packed weights as transformers stores them, both ways, so that either side reads what the other wrote.

    4 bits   X.weight uint8 [ceil(n/2), 1] · .absmax · .quant_map fp32 [16] · .nested_absmax · .nested_quant_map fp32
             [256] · .quant_state.bitsandbytes__nf4 (or __fp4): JSON as bytes, with block sizes, shape, dtype and the
             nested offset, as bitsandbytes 0.50 `QuantState.as_dict(packed=True)` writes it
    8 bits   X.weight int8 [out, in] · X.SCB fp32 [out], the largest magnitude of each row · X.weight_format uint8 [],
             0: rows (as `Linear8bitLt` writes it; the other layouts are of versions before 0.38)
bitsandbytes itself is not needed. Left out: the outlier columns of LLM.int8, which are of inputs and in no file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import tables
from .checkpoint import Safetensors
from .errors import QtuneError
from .quant import Parts, Scheme
from .quant.blockwise4 import FP4, NF4, Blockwise4
from .quant.int8 import INT8

STATE = ".quant_state.bitsandbytes__"
SCALES = ".SCB"  # of 8 bits, beside `.weight`
FORMAT = ".weight_format"
SCHEMES: dict[str, type[Blockwise4]] = {"nf4": NF4, "fp4": FP4}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Packed:
    """A packed weight of a checkpoint. names: its tensors in the file; shape [out, in]; read: its parts, bit for
    bit."""

    names: list[str]
    scheme: Scheme
    shape: tuple[int, ...]
    read: Callable[[], Parts]


def readable(config: Mapping[str, Any]) -> bool:
    """Is this `quantization_config` of config.json one that is read here?"""
    return config.get("quant_method") == "bitsandbytes" and bool(
        config.get("load_in_4bit") or config.get("load_in_8bit")
    )


def says(scheme: Any) -> bool:
    """Can bitsandbytes' files hold layers of this scheme?"""
    return isinstance(scheme, Blockwise4 | INT8)


def weights(names: Mapping[str, Any]) -> Iterator[str]:
    """The weights `X.weight` of which `names` holds a packed form."""
    for name in names:
        weight, found, kind = name.partition(STATE)
        if found and kind in SCHEMES:
            yield weight
        elif name.endswith(SCALES):
            yield name.removesuffix(SCALES) + ".weight"


def packed(files: Safetensors, weight: str) -> Packed:
    """The packed `weight` of a checkpoint, nothing of it read but its quant_state. Raises QtuneError where a tensor is
    missing or of another size, and for what bitsandbytes may write and is not read here."""
    if weight.removesuffix(".weight") + SCALES in files.entries:
        return _eight(files, weight)
    names = _suffixes(files.entries, weight)
    state = next(suffix for suffix in names if suffix.startswith(STATE))
    scheme, shape, offset = from_state(weight, files.read(weight + state))
    sizes = {"codes": "", "absmax": ".absmax"} | ({"nested_absmax": ".nested_absmax"} if scheme.double else {})
    for part, suffix in sizes.items():
        dtype, size = scheme.layout(shape)[part]
        stored = files.entries.get(weight + suffix)
        if stored is None:
            raise QtuneError("Q306", f"{weight}{suffix} is missing")
        other = bool(suffix) and stored.dtype != dtype  # codes may be stored as any dtype
        if other or prod(stored.shape) * stored.dtype.itemsize != prod(size) * dtype.itemsize:
            given = f"{weight}{suffix} is {stored.dtype} {tuple(stored.shape)}"
            raise QtuneError("Q306", f"{given}, a weight of {shape} packed as {scheme} has {dtype} {size}")
    named = [weight + suffix for suffix in names]
    return Packed(
        named, scheme, shape, lambda: to_parts(weight, {s: files.read(weight + s) for s in names}, scheme, offset)
    )


def _eight(files: Safetensors, weight: str) -> Packed:
    path = weight.removesuffix(".weight")
    names = {part: name for part in (".weight", SCALES, FORMAT) if (name := path + part) in files.entries}
    if ".weight" not in names:
        raise QtuneError("Q306", f"{weight} is missing, {path + SCALES} is there")
    codes, scales = files.entries[weight], files.entries[names[SCALES]]
    if codes.dtype != torch.int8 or len(codes.shape) != 2:
        raise QtuneError("Q306", f"{weight} is {codes.dtype} {codes.shape}; 8-bit codes are torch.int8 [out, in]")
    if scales.dtype != torch.float32 or prod(scales.shape) != codes.shape[0]:
        raise QtuneError(
            "Q306", f"{path + SCALES} is {scales.dtype} {scales.shape}; {weight} has torch.float32 {codes.shape[:1]}"
        )
    if FORMAT in names and files.entries[names[FORMAT]].shape == () and int(files.read(names[FORMAT])) != 0:
        raise QtuneError(
            "Q306",
            f"{path + FORMAT} is {int(files.read(names[FORMAT]))}, an order of codes that bitsandbytes wrote before "
            "0.38; readable: 0 (rows). Load and save it again with transformers",
        )

    def read() -> Parts:
        return {"codes": files.read(weight), "absmax": files.read(names[SCALES]).view(-1)}

    return Packed(list(names.values()), INT8(), codes.shape, read)


def to_bnb(weight: str, parts: Parts, scheme: Scheme, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parts of `weight` [out, in] -> name in the file -> tensor. dtype: what bitsandbytes dequantizes to."""
    if isinstance(scheme, INT8):
        path = weight.removesuffix(".weight")
        rows = torch.zeros((), dtype=torch.uint8)
        return {weight: parts["codes"], path + SCALES: parts["absmax"], path + FORMAT: rows}
    assert isinstance(scheme, Blockwise4)
    state: dict[str, Any] = {
        "quant_type": scheme.name,
        "blocksize": scheme.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    named = {"": parts["codes"].view(-1, 1), ".absmax": parts["absmax"], ".quant_map": tables.table(scheme.name, CPU)}
    if scheme.double:
        state |= {
            "nested_blocksize": tables.NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": parts["nested_offset"].item(),
        }
        named |= {".nested_absmax": parts["nested_absmax"], ".nested_quant_map": tables.dynamic8(CPU)}
    named[f"{STATE}{scheme.name}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {weight + suffix: tensor for suffix, tensor in named.items()}


def _suffixes(names: Mapping[str, Any], weight: str) -> list[str]:
    """The suffixes under which a weight packed in 4 bits is stored."""
    known = ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *(STATE + kind for kind in SCHEMES)]
    return [suffix for suffix in known if weight + suffix in names]


def from_state(weight: str, tensor: Tensor) -> tuple[Blockwise4, tuple[int, ...], float]:
    """The JSON of a quant_state -> scheme, shape [out, in], nested offset (0 without double quantization)."""
    try:
        state = json.loads(bytes(tensor.tolist()))
        double = "nested_offset" in state
        if double and state["nested_blocksize"] != tables.NESTED_BLOCK:
            raise QtuneError(
                "Q306", f"{weight}: nested blocks of {state['nested_blocksize']}; readable: {tables.NESTED_BLOCK}"
            )
        scheme = SCHEMES[state["quant_type"]](block=state["blocksize"], double=double)
        shape = tuple(int(n) for n in state["shape"])
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"a shape of {shape}")
        return scheme, shape, float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise QtuneError("Q306", f"{weight}: its quant_state is damaged ({error!r})") from error


def to_parts(weight: str, named: Mapping[str, Tensor], scheme: Blockwise4, offset: float) -> Parts:
    """Suffix -> tensor of one weight packed in 4 bits, as in the file -> our parts, bit for bit. Raises QtuneError for
    another code table."""
    _same_map(weight, named, ".quant_map", tables.table(scheme.name, CPU))
    codes = named[""].contiguous().view(torch.uint8).view(-1)  # bnb_4bit_quant_storage may be any dtype
    parts = {"codes": codes, "absmax": named[".absmax"].view(-1)}
    if scheme.double:
        _same_map(weight, named, ".nested_quant_map", tables.dynamic8(CPU))
        parts |= {
            "nested_absmax": named[".nested_absmax"].view(-1),
            "nested_offset": torch.tensor([offset], dtype=torch.float32),
        }
    return parts


def _same_map(weight: str, named: Mapping[str, Tensor], suffix: str, expected: Tensor) -> None:
    if suffix not in named:
        raise QtuneError("Q306", f"{weight}{suffix} is missing")
    if not torch.equal(named[suffix].float().view(-1), expected):
        raise QtuneError("Q306", f"{weight}{suffix} is not bitsandbytes' standard table")


def quantization_config(scheme: Scheme, dtype: torch.dtype, skip: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json by which transformers reads the packed weights. skip: the linear layers
    that are not packed."""
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": isinstance(scheme, Blockwise4),
        "load_in_8bit": isinstance(scheme, INT8),
        "llm_int8_skip_modules": list(skip),
    }
    if isinstance(scheme, INT8):
        return config | {"llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}
    assert isinstance(scheme, Blockwise4)
    return config | {
        "bnb_4bit_quant_type": scheme.name,
        "bnb_4bit_use_double_quant": scheme.double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
