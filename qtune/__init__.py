"""qtune: fine-tune large language models on quantized bases.

    from qtune.adapters import AdapterSpec
    model = qtune.load("model-folder", qtune.SCHEMES["nf4"]())
    qtune.adapt(model, AdapterSpec("lora", targets=("all-linear",)))

The public names are read from their rooms at first use (PEP 562), so that importing qtune does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same table for type checkers and editors; a test compares the two
    from .adapters import METHODS as METHODS
    from .adapters import adapt as adapt
    from .export import merge as merge
    from .model import load as load
    from .planner.plan import plan as plan
    from .quant import SCHEMES as SCHEMES
    from .routing import load_router as load_router
    from .runs import load_adapters as load_adapters
    from .runs import quantize as quantize
    from .starting import start as start
    from .trainer import train as train

    __version__: str

_PUBLIC = {
    "METHODS": "adapters:METHODS",
    "SCHEMES": "quant:SCHEMES",
    "adapt": "adapters:adapt",
    "load": "model:load",
    "load_adapters": "runs:load_adapters",
    "load_router": "routing:load_router",
    "merge": "export:merge",
    "plan": "planner.plan:plan",
    "quantize": "runs:quantize",
    "start": "starting:start",
    "train": "trainer:train",
}

__all__ = [
    "METHODS", "SCHEMES", "__version__", "adapt", "load", "load_adapters", "load_router", "merge", "plan", "quantize",
    "start", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .version import version

        value: Any = version()
    elif name in _PUBLIC:
        room, _, attribute = _PUBLIC[name].partition(":")
        value = getattr(import_module(f".{room}", __name__), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
