"""Decoder layers run one by one: recomputed in the backward, their inputs kept or put aside, their weights streamed.

    forward   y = layer(x) without a graph; x is kept (the boundary), nothing else
    backward  x comes back, layer(x) is run again with a graph, which is differentiated at once
As in torch's reentrant checkpointing (Chen et al., 1604.06174), but one Function a layer: no hooks on saved tensors;
where neither x nor the layer has anything to learn (below the first adapter) there is no graph and nothing is kept.

With `drop` (DropBP, Woo et al., 2402.17812) each layer is by that chance left out of a backward, drawn anew for each
forward pass: it computes what it always does, keeps nothing, learns nothing, and the gradient goes by it, as by its
residual connection. As published, the gradients of the others are not made larger for it. Differs from the paper: a
layer is left out as a whole, where the authors draw for its attention and its MLP; all have one chance, where theirs
can follow each layer's sensitivity, and leave out more where chance left out too few; and where no layer with
something to learn would be left, one stays. Layers that do more to what goes in than to add to it are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import QtuneError
from ..model.layerwise import decoder_layers
from ..quant import QuantLinear
from .boundaries import Boundaries, Kept
from .random import random_states, replayed
from .tiles import blank, unread

LARGE, LARGE_HALF = 2.0**24, 2.0**14  # largest value that goes into a layer to be looked at; fp16 ends at 65,504
ADDS = "qtune_adds"  # a layer that was seen to add to what goes in
OFF = 0.05  # more than rounding brings into that look


class Weights(Protocol):
    """Brings the weights of a layer to the device, and takes them away."""

    def enter(self, index: int, *, backward: bool) -> None: ...
    def leave(self, index: int) -> None: ...


class Resident:
    """All weights stay where they are."""

    def enter(self, index: int, *, backward: bool) -> None:
        pass

    def leave(self, index: int) -> None:
        pass


class Layers:
    """Stands before the `forward` of each layer of a model from its making to `remove`."""

    def __init__(self, layers: nn.ModuleList, weights: Weights, name: str) -> None:
        self.layers, self.weights, self.name = layers, weights, name
        self.boundaries: Boundaries | None = None
        self.drop = 0.0  # the chance of each layer to be left out of a backward
        self._kept = [True] * len(layers)  # in the forward pass at hand
        # so that autograd comes by where no input asks it to; one for all, or no layer would be like the next to a plan
        self._token = torch.empty(0, device="cpu", requires_grad=True)
        self._own: list[Callable[..., Any]] = [layer.forward for layer in layers]
        for index, layer in enumerate(layers):
            layer.forward = partial(self._forward, index)

    @property
    def streams(self) -> bool:
        """Do weights come and go?"""
        return not isinstance(self.weights, Resident)

    def remove(self) -> None:
        """The layers run as they were made to."""
        for layer in self.layers:
            del layer.forward

    def recompute(self, boundaries: Boundaries | None) -> None:
        """In training mode, recompute each layer in the backward, its input kept by `boundaries`; None: no more."""
        if self.boundaries is not None:
            self.boundaries.clear()
        self.boundaries = boundaries
        self._trained = [learns(layer) for layer in self.layers]
        self._unread: dict[Any, bool] = {}

    def unread(self, index: int) -> bool:
        """Is what the layer's tiled MLP gives known to be read by nobody, when the layer is recomputed?"""
        return self._unread.get(_kind(self.layers[index]), False)

    def learn(self, index: int, found: bool) -> None:
        """What the first layer of a kind tells."""
        self._unread.setdefault(_kind(self.layers[index]), found)

    def _draw(self) -> None:
        """Which layers are left out until the next forward pass, by the CPU's generator: a resumed run draws the
        same."""
        chances = torch.rand(len(self.layers), device="cpu").tolist()
        self._kept = [chance >= self.drop for chance in chances]
        able = [index for index, layer in enumerate(self.layers) if learns(layer)]
        if able and not any(self._kept[index] for index in able):
            self._kept[max(able, key=lambda index: chances[index])] = True

    @torch.no_grad()
    def _see(self, index: int, args: Any, kwargs: Any) -> None:
        """Raises QtuneError unless y(2 c x) - y(c x) is c x for a large c: branches behind norms give the same for
        both, so that this is what the layer does to x itself. Dropout off, so that nothing is drawn."""
        leaves, spec = tree_flatten((args, kwargs))
        place = _hidden(leaves)
        x = leaves[place]
        x = x * ((LARGE_HALF if x.dtype == torch.float16 else LARGE) / x.abs().max())
        modes = [(module, module.training) for module in self.layers[index].modules()]
        self.layers[index].eval()
        y: list[Tensor] = []
        try:
            for times in (1, 2):
                leaves[place] = times * x
                y.append(tree_flatten(self.run(index, *tree_unflatten(leaves, spec)))[0][0])
        finally:
            for module, training in modes:
                module.training = training
        off = float((y[1].float() - y[0].float() - x.float()).norm() / x.float().norm())
        if not off < OFF:
            raise QtuneError(
                "Q430",
                f"train.drop_backward is {self.drop:g}, and layer {index} of {self.name} does more to what goes in "
                f"than to add to it (off by {off:.0%}), so that no gradient can go by it; legal: 0",
            )
        setattr(self.layers[index], ADDS, True)

    def _by(self, index: int, args: Any, kwargs: Any) -> Any:
        """The layer, and a backward that goes by it."""
        with torch.no_grad():
            flat, spec = tree_flatten(self.run(index, args, kwargs))
        leaves = tree_flatten((args, kwargs))[0]
        return tree_unflatten([_Passed.apply(leaves[_hidden(leaves)], flat[0]), *flat[1:]], spec)

    def _forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        training = torch.is_grad_enabled() and self.layers[index].training
        if training and self.drop:
            if index == 0:
                self._draw()
            if not getattr(self.layers[index], ADDS, False):
                self._see(index, args, kwargs)
            if not self._kept[index]:
                return self._by(index, args, kwargs)
        if self.boundaries is None or not training:
            return self.run(index, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if not places and not self._trained[index]:
            with torch.no_grad():
                return self.run(index, args, kwargs)
        if not places:  # the first trained layer: its input is not learned, but must be kept as others are
            places = [_hidden(leaves)]
        call = _Call(self, self.boundaries, index, leaves, spec, places)
        given = [leaves[i] for i in places]
        for i in places:
            leaves[i] = None  # the call must not keep what the boundaries put aside
        flat = _Recomputed.apply(call, self._token, *given)
        return tree_unflatten(list(flat), call.out)

    def run(self, index: int, args: Any, kwargs: Any) -> Any:
        """The layer's own forward pass, its weights there for as long as it takes."""
        self.weights.enter(index, backward=False)
        try:
            return self._own[index](*args, **kwargs)
        finally:
            self.weights.leave(index)


class _Call:
    """One call of a layer, to be made again: its arguments but for those at `places`, and what came out."""

    def __init__(
        self,
        layers: Layers,
        boundaries: Boundaries,
        index: int,
        leaves: list[Any],
        spec: TreeSpec,
        places: list[int],
    ) -> None:
        self.layers, self.boundaries, self.index = layers, boundaries, index
        self.leaves, self.spec, self.places = leaves, spec, places
        self.device = next(x.device for x in leaves if isinstance(x, Tensor))
        self.state = random_states(self.device)  # dropout, and whatever else a layer draws
        self.out: TreeSpec
        self.kept: Kept

    def arguments(self, given: tuple[Tensor, ...] | list[Tensor]) -> tuple[Any, Any]:
        leaves = list(self.leaves)
        for place, x in zip(self.places, given, strict=True):
            leaves[place] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


class _Recomputed(torch.autograd.Function):
    """call, token, the inputs that may be learned -> the tensors of the layer's output."""

    @staticmethod
    def forward(ctx: Any, call: _Call, token: Tensor, *given: Tensor) -> tuple[Any, ...]:
        out = call.layers.run(call.index, *call.arguments(given))
        flat, call.out = tree_flatten(out)
        ctx.call = call
        call.kept = call.boundaries.put(ctx, given)
        return tuple(flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        call: _Call = ctx.call
        layers, needed = call.layers, ctx.needs_input_grad[2:]
        given = [
            x.detach().requires_grad_(ask) for x, ask in zip(call.boundaries.take(ctx, call.kept), needed, strict=True)
        ]
        layers.weights.enter(call.index, backward=True)
        try:
            with torch.enable_grad(), replayed(call.state, call.device), blank(layers.unread(call.index)):
                args, kwargs = call.arguments(given)
                flat = tree_flatten(layers._own[call.index](*args, **kwargs))[0]
            layers.learn(call.index, len(flat) == 1 and unread(flat[0]))
            pairs = [(y, g) for y, g in zip(flat, grads, strict=True) if isinstance(y, Tensor) and y.requires_grad]
            del flat, args, kwargs, grads
            ys, gs = [y for y, _ in pairs], [g for _, g in pairs]
            del pairs
            torch.autograd.backward(ys, gs)
        finally:
            layers.weights.leave(call.index)
        return (None, None, *[x.grad for x in given])


class _Passed(torch.autograd.Function):
    """What goes into a layer and what comes out of it -> what comes out; its gradient is that of what goes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


@contextmanager
def whole_backward(model: nn.Module) -> Iterator[None]:
    """Inside of the block no layer is left out of a backward."""
    layers = layers_of(model)
    drop = 0.0 if layers is None else layers.drop
    if layers is not None:
        layers.drop = 0.0
    try:
        yield
    finally:
        if layers is not None:
            layers.drop = drop


def _hidden(leaves: list[Any]) -> int:
    """The place of the hidden states among a layer's arguments: the first that is no integer."""
    return next(i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point())


def learns(layer: nn.Module) -> bool:
    """Has it anything to learn?"""
    return any(p.requires_grad for p in layer.parameters())


def _kind(layer: nn.Module) -> tuple[type, ...]:
    """Layers of a kind are put together alike."""
    return type(layer), *map(type, layer.children())


def layers_of(model: nn.Module) -> Layers | None:
    """What runs the layers of a model, where something does."""
    return getattr(model, "qtune_layers", None)


def device_of(model: Any) -> torch.device:
    """The device that a causal model computes on, wherever its weights wait."""
    head = model.get_output_embeddings()
    for module in head.modules():
        if isinstance(module, QuantLinear):
            return module.device
    return next(head.parameters()).device  # type: ignore[no-any-return]


def run_layers(model: nn.Module, weights: Weights | None = None) -> Layers:
    """Let the decoder layers of a model be run by `Layers`. Raises QtuneError where it keeps them in no list, or where
    layers take more of earlier ones than these return: keys and values, in Gemma 3n and 4, would get no gradient."""
    config: Any = model.config
    if shared := getattr(config.get_text_config(), "num_kv_shared_layers", 0):
        raise QtuneError(
            "Q505",
            f"the last {shared} layers of {type(model).__name__} take keys and values of layers before them, which "
            "cannot be run one by one; memory.weights and memory.boundaries must be device",
        )
    layers = Layers(decoder_layers(model)[1], weights or Resident(), type(model).__name__)
    model.qtune_layers = layers  # type: ignore[assignment]
    return layers


def leave_layers(model: nn.Module) -> None:
    """Undo `run_layers`."""
    layers = layers_of(model)
    if layers is not None:
        layers.remove()
        del model.qtune_layers
