"""Where the peak goes: each block that is alive then belongs to one row, and the rows add up to the process.

What a block is follows from what it was made as (a parameter, a gradient, an optimizer's state, a buffer) or else from
when it was made and when it goes: made in a layer's forward and gone in its backward, it was kept for it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..quant import QuantLinear
from ..vocabulary import bare
from .devices import Device
from .trace import BACKWARD, BEFORE, FORWARD, LOSS, SLOTS, UPDATE, Trace

GROUPS = ("weights", "adapters", "gradients", "optimizer", "activations", "transient", "runtime")
GRANULE = 512  # bytes: what CUDA's caching allocator rounds a block up to (kMinBlockSize)
TABLES = ("absmax", "code", "outer", "outer_code", "offset", "SCB")
Row = tuple[str, str]  # group, name


def rounded(nbytes: int, device: Device) -> int:
    """What an allocation takes of the device's allocator."""
    return -(nbytes // -GRANULE) * GRANULE if device.kind == "cuda" else nbytes


def rows_of(trace: Trace, model: Any, event: int, checkpointing: bool) -> Counter[Row]:
    """Bytes by (group, name) of what is alive after an event. model: whose parameters the trace names."""
    released = {~e: trace.segments[at].part for e, at in zip(trace.events, trace.at, strict=True) if e < 0}
    weights = _weights(model)
    rows: Counter[Row] = Counter()
    for block in trace.alive(event):
        name, size = trace.names.get(block, ""), trace.sizes[block]
        if trace.kinds[block] == "weights" and name in weights:
            for row, nbytes in weights[name].items():
                rows["weights", row] += nbytes
            continue
        rows[_row(trace, block, released.get(block, ""), checkpointing)] += size
    return rows


def _row(trace: Trace, block: int, released: str, checkpointing: bool) -> Row:
    kind, segment, op = trace.kinds[block], trace.segments[trace.born[block]], trace.ops[block]
    known: dict[str, Row] = {
        "weights": ("weights", _plain(trace.names.get(block, ""))),
        "adapters": ("adapters", "adapters"),
        "gradients": ("gradients", "gradients of the adapters"),
        "batch": ("activations", "batch"),
        "buffer": ("transient", "dequantized weight" if op.startswith("arena") else "kernels' buffers"),
        "scratch": ("transient", "kernels' scratch"),
        "workspace": ("runtime", "cuBLAS workspaces"),
    }
    name = trace.names.get(block, "")
    if kind == "adapters" and name.endswith(".rows") and ".adapter." not in name:
        return "adapters", "rows of tokens"
    if kind in known:
        return known[kind]
    if segment.part == UPDATE or (segment.part == BEFORE and segment.micro < 0):
        return ("transient", "optimizer temporaries") if released else ("optimizer", "states and master weights")
    if segment.part == FORWARD:
        if released in (BACKWARD, UPDATE) or not released:
            return "activations", "checkpoint boundaries" if checkpointing else "kept for the backward"
        return "activations", "one layer's forward"
    if segment.part == BACKWARD:
        return "activations", "one layer's recompute and gradients" if checkpointing else "one layer's gradients"
    return "activations", "loss and logits" if segment.part == LOSS else "embeddings, masks, positions"


def _plain(name: str) -> str:
    """The row of what is no parameter: bitsandbytes keeps its scales as buffers."""
    if name == SLOTS:
        return SLOTS
    return "scales and tables" if name.rpartition(".")[2] in TABLES else "buffers and other"


def _weights(model: Any) -> dict[str, dict[str, int]]:
    """Parameter -> its bytes by row: codes, scales, embeddings, head, norms and biases."""
    head, table = bare(model.get_output_embeddings()), bare(model.get_input_embeddings())
    found: dict[str, dict[str, int]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            nbytes = parameter.numel() * parameter.element_size()
            name = f"{path}.{leaf}" if path else leaf
            if module is table or module is head or getattr(module, "name", None) == getattr(head, "name", ""):
                found[name] = {"embeddings" if module is table else "head": nbytes}
            elif isinstance(module, QuantLinear) and leaf == "packed":
                parts = {k: v.numel() * v.element_size() for k, v in module.parts.items()}
                main = max(parts, key=lambda part: parts[part])
                label = "dense layers" if module.scheme.name == "dense" else f"{module.scheme.name} codes"
                found[name] = {label: parts[main], "scales and alignment": nbytes - parts[main]}
            elif isinstance(getattr(module, "shape", None), tuple) and leaf == "weight":  # another stack's packed layer
                found[name] = {"packed codes": nbytes}
            else:
                found[name] = {"linear layers" if parameter.dim() > 1 else "norms, biases and other": nbytes}
    return found


def parameters_of(model: nn.Module) -> int:
    """Parameters of the base, as its publisher counts them: packed ones as numbers, shared ones once."""
    count, seen = 0, set()
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or parameter.requires_grad:
                continue
            seen.add(id(parameter))
            if leaf in ("packed", "weight") and isinstance(shape := getattr(module, "shape", None), tuple):
                count += shape[0] * shape[1]
            else:
                count += parameter.numel()
    return count
