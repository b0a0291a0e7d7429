"""Fused experts (3-D parameters of transformers 5) as one linear layer a matrix, run on the tokens routed to them.

    y[t] = sum over the experts e of token t: weight[t, e] * down_e(gate(gate_up_e(x[t])))
`model.layers.0.mlp.experts.gate_up_proj` [E, 2f, h] becomes `model.layers.0.mlp.experts.3.gate_up_proj` [2f, h] and its
like, linear layers as any other: they are packed, adapted, calibrated and saved by their names. Only a class whose own
eager code computes the equation above, on random numbers, is split; any other (gpt-oss' transposed weights and biases,
norms behind an expert) keeps its dense 3-D parameters, and loading names it.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

GATED, UNGATED, DOWN = "gate_up_proj", "up_proj", "down_proj"


class Experts(nn.Module):
    """In the place of a module with fused expert weights; child `3` holds the two layers of expert 3.

    first: name of the layer that goes in. gate: [n, 2f] or [n, f] -> [n, f], what comes behind it.
    """

    def __init__(self, own: Any) -> None:
        super().__init__()
        weights = dict(own.named_parameters(recurse=False))
        self.first = GATED if GATED in weights else UNGATED
        self.count = len(weights[DOWN])
        self.shapes = {leaf: (weights[leaf].shape[1], weights[leaf].shape[2]) for leaf in (self.first, DOWN)}
        plain = {key: value for key, value in vars(own).items() if not key.startswith("_") and key != "config"}
        settings = SimpleNamespace(**plain, **dict(own.named_children()))
        self.gate = partial(type(own)._apply_gate if self.first == GATED else _activate, settings)
        for number in range(self.count):
            layers = {leaf: ExpertLinear(n, m, weights[leaf].dtype) for leaf, (m, n) in self.shapes.items()}
            self.add_module(str(number), nn.ModuleDict(layers))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [tokens, h], the experts of each token int64 [tokens, k] and their weights [tokens, k] -> [tokens, h]."""
        slots, counts = self._by_expert(top_k_index)
        tokens = (slots // top_k_index.shape[1]).split(counts)
        weights = top_k_weights.reshape(-1)[slots].split(counts)
        out, x = torch.zeros_like(hidden_states), hidden_states
        for number, (mine, weight) in enumerate(zip(tokens[: self.count], weights, strict=False)):
            if len(mine):
                expert: Any = self.get_submodule(str(number))
                x, rows = _Take.apply(x, mine)
                rows = expert[DOWN](self.gate(expert[self.first](rows)))
                out = out.index_add_(0, mine, (rows * weight.unsqueeze(-1)).to(out.dtype))
        return out

    def _by_expert(self, index: Tensor) -> tuple[Tensor, list[int]]:
        """Places in the flat [tokens * k], those of expert 0 first, and how many each expert has; beyond the last
        expert come places that no expert here serves. On meta routing has no values: the experts share evenly."""
        ordered, slots = index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(self.count, device=index.device), right=True)
        if index.is_meta:
            each, more = divmod(len(slots), self.count)
            return slots, [each + (number < more) for number in range(self.count)] + [0]
        last = [*ends.tolist(), len(slots)]
        return slots, [end - start for start, end in zip([0, *last], last, strict=False)]


class _Take(torch.autograd.Function):
    """x [T, h], rows int64 [n] -> x again, for the next expert, and x[rows] [n, h]: so the gradients of all experts are
    added into one tensor, where torch would make one of x's size for each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        ctx.set_materialize_grads(False)
        ctx.like = x.shape
        return x.view_as(x), x[rows]

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, taken: Tensor | None) -> Any:  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        if taken is None:
            return dx, None
        if dx is None:  # of the last expert: nothing comes behind it
            dx = taken.new_zeros(ctx.like)
        return dx.index_add_(0, rows, taken), None


def _activate(settings: SimpleNamespace, x: Tensor) -> Tensor:
    return settings.act_fn(x)  # type: ignore[no-any-return]


class ExpertLinear(nn.Linear):
    """One expert's matrix before it is packed: on meta, where there is nothing to draw."""

    routed = True

    def __init__(self, size_in: int, size_out: int, dtype: torch.dtype) -> None:
        super().__init__(size_in, size_out, bias=False, dtype=dtype, device="meta")
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Of thousands of layers it would take seconds."""


# ---- which classes


def split(model: nn.Module) -> None:
    """Put Experts, on meta, in the place of every module of fused experts that computes what they do."""
    known: dict[type, bool] = {}
    for name, module in list(model.named_modules()):
        if stacked(module):
            if type(module) not in known:
                known[type(module)] = _computes_the_same(module)
            if known[type(module)]:
                model.set_submodule(name, Experts(module))


def stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The fused expert weights that a module holds itself: 3-D parameters, convolutions aside."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}


def _computes_the_same(module: Any) -> bool:
    """Does the module's own eager code, on small random weights, compute what Experts do?"""
    weights = dict(module.named_parameters())
    own: Any = type(module)
    if set(weights) not in ({GATED, DOWN}, {UNGATED, DOWN}) or any(w.dim() != 3 for w in weights.values()):
        return False
    count, wide, tokens = len(weights[DOWN]), 3 * (1 + (GATED in weights)), 6
    draw = partial(torch.randn, generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)
    first, down, x = draw(count, wide, 5), draw(count, 5, 3), draw(tokens, 5)
    index = torch.arange(2 * tokens, device="cpu").view(tokens, 2) * 7 % count
    probe: Any = object.__new__(own)
    nn.Module.__init__(probe)
    vars(probe).update({key: value for key, value in vars(module).items() if key not in vars(probe)})
    probe._modules.update(module._modules)
    name = GATED if GATED in weights else UNGATED
    probe._parameters.update({name: nn.Parameter(first), DOWN: nn.Parameter(down)})
    mix = draw(tokens, 2)
    try:
        with torch.no_grad():
            theirs = inspect.unwrap(own.forward)(probe, x, index, mix)
            ours = Experts(probe)
            for number in range(count):
                expert: Any = ours.get_submodule(str(number))
                expert[name].weight, expert[DOWN].weight = nn.Parameter(first[number]), nn.Parameter(down[number])
            return torch.allclose(ours(x, index, mix), theirs, rtol=1e-4, atol=1e-4)
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError, KeyError):
        return False  # called or made in another way: not one that we know


# ---- names


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Name -> Experts, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def library_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict as transformers' own module would have it: fused experts again, on meta."""
    inside = tuple(f"{name}." for name in experts_of(model))
    left = {name: tensor for name, tensor in model.state_dict().items() if not (inside and name.startswith(inside))}
    return left | {name: torch.empty(shape, device="meta") for name, shape in fused_shapes(model).items()}


def fused_shapes(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Name of each fused weight that was split -> its shape [E, out, in]."""
    return {
        f"{path}.{leaf}": (experts.count, *shape)
        for path, experts in experts_of(model).items()
        for leaf, shape in experts.shapes.items()
    }


def part_of(fused: str, number: int) -> str:
    """The name of one expert's part of a fused weight: `x.experts.down_proj`, 3 -> `x.experts.3.down_proj.weight`."""
    path, _, leaf = fused.rpartition(".")
    return f"{path}.{number}.{leaf}.weight"
