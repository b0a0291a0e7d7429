"""The model's own forward pass over calibration text, one decoder layer at a time, so that it never has to be whole.

Layers below the one at hand answer from memory, those above are not reached: the pass stops behind the layer. Masks,
positions and what else the model hands to its layers are thus its own, for any model whose layers stand in one list.
Kept between layers: the hidden states of the text, on the CPU. Left out: encoders beside the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import QtuneError
from ..quant import QuantLinear


class _Enough(Exception):
    """The layer at hand is done."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the layers that hold most packed weights. QtuneError where the model has no such list."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {name: _packed(module) for name, module in lists.items()}
    if not lists or not max(sizes.values()):
        raise QtuneError(
            "Q707",
            f"{type(model).__name__} keeps its layers in no list, so that no text can be run through them one by one; "
            "take a start without data and calibrate.codes nearest",
        )
    name = max(sizes, key=lambda n: (sizes[n], -len(n)))
    return name, lists[name]


def by_layer(model: nn.Module, names: Iterable[str]) -> tuple[list[list[str]], list[str]]:
    """The names of modules in each decoder layer, and those outside of the layers."""
    stack, layers = decoder_layers(model)
    inside: list[list[str]] = [[] for _ in layers]
    outside: list[str] = []
    for name in names:
        at = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else None
        (outside if at is None else inside[int(at)]).append(name)
    return inside, outside


def _packed(module: nn.Module) -> int:
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, QuantLinear))


class Layerwise:
    """Runs `windows` (token ids [samples, length]) through a model layer by layer, in their order."""

    def __init__(self, model: Any, windows: Tensor, device: torch.device) -> None:
        self.model, self.windows, self.device = model, windows, device
        self.layers = decoder_layers(model)[1]
        self.states: list[Tensor] | None = None  # of each window, before the layer at hand
        self.boxed = False  # do layers return a tuple?

    def pass_through(self, index: int, *, advance: bool) -> None:
        """Run all windows through layer `index`. advance: what comes out is what the next layer sees."""
        out: list[Tensor] = []

        def keep(hidden: Any) -> None:
            self.boxed = isinstance(hidden, tuple)
            if advance:
                out.append((hidden[0] if self.boxed else hidden).cpu())
            raise _Enough

        with torch.no_grad(), self._answering(index, keep) as at:
            for number, window in enumerate(self.windows):
                at[0] = number
                try:
                    self.model(input_ids=window.unsqueeze(0).to(self.device), use_cache=False)
                except _Enough:
                    continue
                raise AssertionError(f"the pass went by layer {index}")
        if advance:
            self.states = out

    @contextmanager
    def _answering(self, index: int, keep: Callable[[Any], None]) -> Iterator[list[int]]:
        """Layer `index` real, with the states of window number at[0] as its input; those below hand on what they
        get."""
        at = [0]
        real = self.layers[index].forward
        own = [vars(layer).get("forward") for layer in self.layers[: index + 1]]  # of layers that are streamed

        def here(*args: Any, **kwargs: Any) -> None:
            if self.states is not None:
                state = self.states[at[0]].to(self.device)
                args, kwargs = _with_hidden(state, args, kwargs)
            keep(real(*args, **kwargs))

        def below(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self.boxed else hidden

        try:
            for number, layer in enumerate(self.layers[: index + 1]):
                layer.forward = here if number == index else below
            yield at
        finally:
            for layer, forward in zip(self.layers[: index + 1], own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def _with_hidden(
    state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The layer's arguments with other hidden states."""
    return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})


class Grams:
    """While entered, `sites` compute with the dense `weights` and the second moments of their inputs are summed up:
    once for all sites that read the same tensor.

    sites: name -> layer, not packed yet. weights: name -> [out, in]; None: each layer, adapted or not, computes as it
    is.
    """

    def __init__(self, sites: Mapping[str, nn.Module], weights: Mapping[str, Tensor] | None) -> None:
        self.sites, self.weights = sites, weights
        self.leader: dict[str, str] = {}  # site -> the first site that reads the same tensor
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._last: tuple[Tensor, str] | None = None

    def __enter__(self) -> Grams:
        for name, site in self.sites.items():
            if self.weights is None:
                site.forward = self._watched(name, site.forward)
            else:
                assert isinstance(site, QuantLinear)
                site.forward = self._dense(name, site, self.weights[name])  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self._last = None
        for site in self.sites.values():
            del site.forward

    def _watched(self, name: str, real: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            self._see(name, x)
            return real(x)

        return forward

    def _dense(self, name: str, site: QuantLinear, weight: Tensor) -> Callable[[Tensor], Tensor]:
        cast: list[Tensor] = []

        def forward(x: Tensor) -> Tensor:
            self._see(name, x)
            if not cast:
                cast.append(weight.to(x.dtype))
            return site.shift(F.linear(x, cast[0]))

        return forward

    def _see(self, name: str, x: Tensor) -> None:
        if name not in self.leader:
            self.leader[name] = self._last[1] if self._last is not None and self._last[0] is x else name
        if self.leader[name] == name:
            self._last = (x, name)
            rows = x.reshape(-1, x.shape[-1]).float()
            if name not in self.sums:
                self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                self.tokens[name] = 0
            self.sums[name].addmm_(rows.T, rows)
            self.tokens[name] += len(rows)

    def seen(self, site: str) -> int:
        """How many inputs of `site` there were, before its `gram` is taken."""
        return self.tokens.get(self.leader.get(site, ""), 0)

    def gram(self, site: str) -> Tensor:
        """Mean of x x^T [in, in] fp32 over the inputs of `site`. QtuneError where no token reached it."""
        leader = self.leader.get(site)
        if leader is None or not self.tokens[leader]:
            raise QtuneError("Q221", f"{site}: no token of the calibration text reached this layer; give more text")
        if self.tokens[leader] > 0:
            self.sums[leader] /= self.tokens[leader]
            self.tokens[leader] = -1  # a mean by now
        return self.sums[leader]


def windows_of(streams: Sequence[Sequence[int]], samples: int, length: int) -> Tensor:
    """Token streams joined and cut: int64 [at most samples, length], spread evenly over the text."""
    joined = torch.tensor([token for stream in streams for token in stream], dtype=torch.int64)
    count = len(joined) // length
    if count == 0:
        raise QtuneError(
            "Q221",
            f"the calibration text has {len(joined)} tokens, less than one window of calibrate.length = {length}; "
            "give more text or a smaller calibrate.length",
        )
    every = joined[: count * length].view(count, length)
    return every[torch.linspace(0, count - 1, min(samples, count)).round().long()]
