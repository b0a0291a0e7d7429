"""bitsandbytes' 4-bit weights as transformers stores them, both ways, so that either side reads what the other wrote.

    X.weight uint8 [ceil(n/2), 1] · .absmax · .quant_map fp32 [16] · .nested_absmax · .nested_quant_map fp32 [256]
    .quant_state.bitsandbytes__nf4 (or __fp4): JSON as bytes, with block sizes, shape, dtype and the nested offset
As bitsandbytes 0.50 `QuantState.as_dict(packed=True)` writes it. bitsandbytes itself is not needed. Left out: 8-bit
checkpoints (`SCB`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import tables
from .errors import QtuneError
from .quant import Parts, Scheme
from .quant.blockwise4 import FP4, NF4, Blockwise4

STATE = ".quant_state.bitsandbytes__"
SCHEMES: dict[str, type[Blockwise4]] = {"nf4": NF4, "fp4": FP4}
CPU = torch.device("cpu")


def to_bnb(parts: Parts, scheme: Blockwise4, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parts of a weight [out, in] -> suffix of `X.weight` -> tensor, "" for the codes. dtype: what bitsandbytes
    dequantizes to."""
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
    return named


def weights(names: Mapping[str, Any]) -> Iterator[str]:
    """The weights `X.weight` of which `names` holds a packed 4-bit form."""
    for name in names:
        weight, found, kind = name.partition(STATE)
        if found and kind in SCHEMES:
            yield weight


def suffixes(names: Mapping[str, Any], weight: str) -> list[str]:
    """The suffixes under which a packed `weight` is stored."""
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
        return scheme, tuple(state["shape"]), float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise QtuneError("Q306", f"{weight}: its quant_state is damaged ({error!r})") from error


def to_parts(weight: str, named: Mapping[str, Tensor], scheme: Blockwise4, offset: float) -> Parts:
    """Suffix -> tensor of one packed weight, as in the file -> our parts, bit for bit. Raises QtuneError for another
    code table."""
    _same_map(weight, named, ".quant_map", tables.table(scheme.name, CPU))
    codes = named[""].contiguous().view(torch.uint8).view(-1)  # bnb_4bit_quant_storage may be any dtype
    parts = {"codes": codes, "absmax": named[".absmax"]}
    if scheme.double:
        _same_map(weight, named, ".nested_quant_map", tables.dynamic8(CPU))
        parts |= {
            "nested_absmax": named[".nested_absmax"],
            "nested_offset": torch.tensor([offset], dtype=torch.float32),
        }
    return parts


def _same_map(weight: str, named: Mapping[str, Tensor], suffix: str, expected: Tensor) -> None:
    if suffix not in named:
        raise QtuneError("Q306", f"{weight}{suffix} is missing")
    if not torch.equal(named[suffix].float(), expected):
        raise QtuneError("Q306", f"{weight}{suffix} is not bitsandbytes' standard table")


def quantization_config(scheme: Scheme, dtype: torch.dtype, skip: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json by which transformers reads the packed weights. skip: the linear layers
    that are not packed."""
    assert isinstance(scheme, Blockwise4)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": scheme.name,
        "bnb_4bit_use_double_quant": scheme.double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(skip),
    }
