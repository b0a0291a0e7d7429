"""How an op is made: a reference in torch (the truth), a shape function, and whichever kernel serves it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backend

REFERENCES: dict[str, Callable[..., Any]] = {}


def is_fp64(value: object) -> bool:
    """Kernels serve fp32, bf16 and fp16; fp64, for gradient checks and oracles, is the references' on every machine."""
    return value is torch.float64 or (isinstance(value, Tensor) and value.dtype == torch.float64)


def op(reference: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register `qtune::<name>`: the decorated function is its shape function, `reference` its meaning.

    mutates: names of the arguments that it writes into. A kernel may serve the op in place of the reference:
    `backend.kernel` decides once per (op, device type). No op has a gradient: autograd is its caller's.
    """
    name = reference.__name__

    def body(*args: Any) -> Any:
        tensor = next(a for a in args if isinstance(a, Tensor))
        kernel = None if any(map(is_fp64, args)) else backend.kernel(name, tensor.device.type)
        return (kernel or reference)(*args)

    def register(fake: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        made = torch.library.custom_op(f"qtune::{name}", body, mutates_args=mutates, schema=schema)
        made.register_fake(fake)
        REFERENCES[name] = reference
        return made

    return register
