"""How an op is made: a reference in torch (the truth), a shape function, and whichever kernel serves it here.

Registered through `torch.library.Library`, not `custom_op`, whose Python wrappers cost 20 microseconds a call (90 for
an op that writes into an argument): a training step makes a thousand calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backend

Scratch = dict[str, int]  # bytes that an op takes beside its results: `temporary`, or a kept buffer's name and its size
REFERENCES: dict[str, Callable[..., Any]] = {}
SCRATCH: dict[str, Callable[..., Scratch]] = {}  # op -> (device type, its arguments) -> what its kernel there takes
LIBRARY = torch.library.Library("qtune", "DEF")


def is_fp64(value: object) -> bool:
    """Kernels serve fp32, bf16 and fp16; fp64, for gradient checks and oracles, is the references' on every machine."""
    return value is torch.float64 or (isinstance(value, Tensor) and value.dtype == torch.float64)


def op(
    reference: Callable[..., Any], mutates: tuple[str, ...] = (), scratch: Callable[..., Scratch] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Register `qtune::<name>`: the decorated function is its shape function, `reference` its meaning.

    mutates: names of the arguments that it writes into. scratch(device type, *arguments): the memory that its kernel
    takes while it runs, for the planner; without it, none. A kernel may serve the op in place of the reference:
    `backend.kernel` decides once per (op, device type). No op has a gradient: autograd is its caller's.
    """
    name = reference.__name__
    if scratch is not None:
        SCRATCH[name] = scratch
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    names = list(reference.__code__.co_varnames[: reference.__code__.co_argcount])
    written = [names.index(argument) for argument in mutates]

    def body(*args: Any) -> Any:
        tensor = next(a for a in args if isinstance(a, Tensor))
        kernel = None if any(map(is_fp64, args)) else backend.kernel(name, tensor.device.type)
        out = (kernel or reference)(*args)
        for place in written:  # so that autograd refuses a backward that needs the old values
            torch.autograd.graph.increment_version(args[place])
        return out

    def above(*args: Any) -> Any:
        """What autograd finds: torch's own fallback would only warn, in the backward, and give no gradient."""
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(f"qtune::{name} has no gradient; call it inside of a torch.autograd.Function")
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.qtune, name).default(*args)

    def register(fake: Callable[..., Any]) -> Any:
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        LIBRARY.impl(name, above, "Autograd")
        torch.library.register_fake(f"qtune::{name}", fake, lib=LIBRARY)
        REFERENCES[name] = reference
        return getattr(torch.ops.qtune, name)

    return register
