"""What stands at a site where many adapters are loaded, and how a mixture of them is computed there.

    y = base(x) + sum_i w_i (adapter_i(x, base) - base(x))

Adapters that are s B A x beside the base (`Adapter.low_rank`) are stacked, s and w folded into B once. One mixture for
all samples: A [ranks, in], B [out, ranks], added inside of the base's product. A mixture for each sample: A [n, rank,
in] of the n adapters, and batched products with those of each sample, of which a copy lives for the moment of the
product only. (Measured on a CPU: a loop over groups of rows is as fast on long rows, slower at one token a row; one
product with all A, masked, is slower on long rows.) Sites that are seen to read the same tensor (q, k, v; gate, up)
share the product with A. Other methods run their own forward over `Known`, a base whose product with x is there
already. One adapter alone at weight 1 runs its own forward too: it is then computed as in its own run.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import QtuneError
from ..quant import QuantLinear
from ..quant.linear import autocast
from . import parts as rank_one
from .base import Adapter

Weights = Mapping[str, float]


@dataclass
class Mixture:
    """What is in use. rows: weights by name, for each sample of a batch (`by_row`), or once for all.

    select: keep the parts of largest reach only, `count` of them or the mean rank; chosen for each token, or fixed
    at the sites that `chosen` has places of parts for. shape: batch and length of the forward pass at hand.
    """

    rows: tuple[Weights, ...]
    by_row: bool = False
    select: bool = False
    count: int | None = None
    shape: tuple[int, int] = (0, 0)
    chosen: dict[nn.Module, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The adapters in use."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


class Known:
    """A base whose product with one x is there already: what an adapter's own forward is given in a mixture."""

    def __init__(self, base: QuantLinear, x: Tensor, product: Tensor) -> None:
        self._base, self._x, self._product = base, x, product

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def product(self, x: Tensor) -> Tensor:
        """As QuantLinear's, which a method may write into."""
        return self._product.clone() if x is self._x else self._base.product(x)

    def product_plus(self, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """As QuantLinear's."""
        if x is not self._x:
            return self._base.product_plus(x, A, B, scale)
        return self._product + F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return self._base.shift(self.product(x))


class Mixed(nn.Module):
    """A base with any number of adapters by name: what stands in the model at a site. Without a mixture it is the base
    alone. Never in training mode."""

    def __init__(self, base: QuantLinear, siblings: Siblings) -> None:
        super().__init__()
        self.base, self.names, self.adapters = base, list[str](), nn.ModuleList()
        self.siblings = siblings
        self.mixture: Mixture | None = None
        self.members: Mapping[str, Adapter] = {}  # those that are in use
        self.reach: Tensor | None = None  # summed over a sample, while one runs
        self.tokens = 0
        self._stack: Summed | ByRow | None = None
        self._group = _Group([self])

    def add(self, name: str, adapter: Adapter) -> None:
        """Take one more adapter, for use alone."""
        self.names.append(name)
        self.adapters.append(adapter.requires_grad_(False))
        self.train(False)

    def train(self, mode: bool = True) -> Mixed:
        """Stays out of training mode: what is loaded here is used."""
        return super().train(False)

    def use(self, mixture: Mixture | None) -> None:
        """From the next call on."""
        loaded = dict(zip(self.names, self.adapters, strict=True))
        names = [] if mixture is None else [name for name in mixture.names if name in loaded]
        self.members = {name: cast(Adapter, loaded[name]) for name in names}
        self.mixture = mixture if names else None
        self.reach = self._stack = None
        self.tokens = 0
        self._group = _Group([self])
        self.siblings.held = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; in a mixture for each sample [batch, length, in], or the same rows one by one."""
        mixture = self.mixture
        if mixture is None:
            return self.base(x)  # type: ignore[no-any-return]
        if mixture.by_row:
            return self._mix(self._by_row(x, mixture)).view(*x.shape[:-1], -1)
        if not mixture.select and len(self.members) == 1:
            ((name, adapter),) = self.members.items()
            if mixture.rows[0][name] == 1:
                return adapter(x, self.base)  # type: ignore[no-any-return]
        return self._mix(x)

    def _by_row(self, x: Tensor, mixture: Mixture) -> Tensor:
        """x as [batch, length, in]."""
        batch, length = mixture.shape
        if x.dim() == 3 and len(x) == batch == len(mixture.rows):
            return x
        if x.dim() == 2 and len(x) == batch * length and batch == len(mixture.rows):
            return x.view(batch, length, -1)
        raise QtuneError(
            "Q420",
            f"{self.base.name or 'a layer'} reads {' x '.join(map(str, x.shape))} values where the batch has "
            f"{len(mixture.rows)} samples: which adapter a row belongs to is not known there; use one for all",
        )

    def _mix(self, x: Tensor) -> Tensor:
        x = autocast(x)
        if self._stack is None or not self._stack.fits(x):
            self._stack, self._group = self._stacked(x), _Group([self])
        stack, others = self._stack, self._stack.others
        if not stack.names:
            plain, y = self.base.product(x), None
        elif not others:
            return self.base.shift(stack.over(self.base, x, self._inner(stack, x)))
        else:
            plain = self.base.product(x)
            y = stack.plus(plain.clone(), self._inner(stack, x))
        before = self.base.shift(plain)
        total = before.clone() if y is None else self.base.shift(y)
        for adapter, at, weight in others:
            if at is None:
                own = adapter(x, Known(self.base, x, plain))
                total += (own - before) * weight
            else:
                some = x[at]
                own = adapter(some, Known(self.base, some, plain[at]))
                total.index_add_(0, at, (own - before[at]) * weight)
        return total

    def _inner(self, stack: Summed | ByRow, x: Tensor) -> Tensor:
        """What B is multiplied with: A x of the stack, its largest entries alone where parts are selected."""
        inner = self.siblings.inner(self, stack, x)
        if self.reach is not None:
            flat = inner.detach().reshape(-1, inner.shape[-1]).float().abs()
            self.reach, self.tokens = flat.sum(0) + self.reach, self.tokens + len(flat)
        elif isinstance(stack, Summed) and stack.count is not None:
            inner = rank_one.keep_strongest(inner, stack.count)
        return inner

    def fix(self) -> None:
        """Keep, for every token from now on, the parts whose reach over the sample was the largest on average."""
        stack, reach, mixture = self._stack, self.reach, self.mixture
        self.reach = None
        if mixture is not None and reach is not None and self.tokens and isinstance(stack, Summed) and stack.count:
            mixture.chosen[self] = reach.topk(min(stack.count, len(reach))).indices
        self._stack, self._group, self.tokens = None, _Group([self]), 0

    @torch.no_grad()
    def _stacked(self, x: Tensor) -> Summed | ByRow:
        assert self.mixture is not None
        low: dict[str, tuple[Tensor, Tensor, float]] = {}
        for name, one in self.members.items():
            whole = self.mixture.select or not one.has_own("shared")  # what sites share is not copied to each of them
            if whole and (found := one.low_rank(self.base)) is not None:
                low[name] = found
        others = {name: one for name, one in self.members.items() if name not in low}
        if self.mixture.by_row:
            return ByRow(low, others, self.mixture.rows, x)
        return Summed(low, others, self.mixture, self.mixture.chosen.get(self), x)


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The packed linear layers of a model by name, as if it carried no adapter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    inside = {f"{name}.base" for name, module in model.named_modules() if isinstance(module, Mixed)}
    return {name.removesuffix(".base") if name in inside else name: layer for name, layer in layers.items()}


LowRank = Mapping[str, tuple[Tensor, Tensor, float]]
Others = Sequence[tuple[Adapter, Tensor | None, Any]]  # adapter, its rows (None: all), its weight or weights


class Stack:
    """The factors of the adapters `names` in one tensor A. others: those of other forms."""

    names: tuple[str, ...]
    others: Others
    A: Tensor

    def fits(self, x: Tensor) -> bool:
        """Was it made for values like these?"""
        return not self.names or (self.A.dtype == x.dtype and self.A.device == x.device)


class Summed(Stack):
    """One mixture for all samples: A [ranks, in] and B [out, ranks], and the adapters of other forms."""

    def __init__(
        self, low: LowRank, others: Mapping[str, Adapter], mixture: Mixture, chosen: Tensor | None, x: Tensor
    ) -> None:
        (weights,) = mixture.rows
        self.names = tuple(low)
        self.count: int | None = None  # of the parts that a token keeps; None: all
        self.others = [(adapter, None, weights[name]) for name, adapter in others.items()]
        if not low:
            return
        if mixture.select:
            split = [rank_one.split(*factors) for factors in low.values()]
            parts = rank_one.join(split, [weights[name] for name in low])
            if chosen is None:
                self.count = mixture.count or rank_one.default_count([len(part) for part in split])
            A, B = (parts if chosen is None else parts.take(chosen)).factors()
        else:
            A = torch.cat([A.to(x) for A, _, _ in low.values()])
            B = torch.cat([(B.float() * (s * weights[name])).to(x) for name, (_, B, s) in low.items()], 1)
        self.A, self.B = A.to(x), B.to(x)

    def inner(self, x: Tensor, A: Tensor) -> Tensor:
        """x [..., in], A [n, in] -> [..., n]."""
        return F.linear(x, A)

    def split(self, inner: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """The parts of several sites."""
        return [part.contiguous() for part in inner.split(list(widths), -1)]

    def over(self, base: QuantLinear, x: Tensor, inner: Tensor) -> Tensor:
        """Base and adapters, without the bias."""
        return base.product_and(x, inner, self.B)

    def plus(self, y: Tensor, inner: Tensor) -> Tensor:
        """y [..., out], overwritten, with the adapters."""
        return y.add_(F.linear(inner, self.B))


class ByRow(Stack):
    """A mixture for each sample: A [n, rank, in] and B [n, rank, out] of all adapters, smaller ranks filled with zeros,
    and for each of the samples that have some, `places` [rows, k] of their adapters."""

    def __init__(self, low: LowRank, others: Mapping[str, Adapter], rows: Sequence[Weights], x: Tensor) -> None:
        self.names = tuple(low)
        self.others = [(adapter, *_rows_of(name, rows, x)) for name, adapter in others.items()]
        if not low:
            return
        rank = max(len(A) for A, _, _ in low.values())
        (_, B, _) = next(iter(low.values()))
        self.A = x.new_zeros(len(low), rank, x.shape[-1])
        self.B = x.new_zeros(len(low), rank, len(B))
        for place, (A, B, scale) in enumerate(low.values()):
            self.A[place, : len(A)] = A
            self.B[place, : len(A)] = (B.float() * scale).T
        order = {name: place for place, name in enumerate(low)}
        own = [[(order[name], weight) for name, weight in row.items() if name in order] for row in rows]
        some = [place for place, row in enumerate(own) if row]
        self.at = None if len(some) == len(rows) else torch.tensor(some, device=x.device)
        most = max(map(len, own))
        filled = [own[place] + [(own[place][0][0], 0.0)] * (most - len(own[place])) for place in some]
        places, weights = ([[pair[i] for pair in row] for row in filled] for i in (0, 1))
        self.in_order = places == [[place] for place in range(len(low))]
        self.places = torch.tensor(places, device=x.device)
        self.weights = torch.tensor(weights, device=x.device).to(x)
        self.plain = all(weight == 1 for row in weights for weight in row)

    def _of_rows(self, factors: Tensor) -> Tensor:
        """factors [n, rank, size] -> [rows, k rank, size]: those of each row's adapters."""
        return factors if self.in_order else factors[self.places].flatten(1, 2)

    def inner(self, x: Tensor, A: Tensor) -> Tensor:
        """x [batch, length, in], A [n, rank, in] -> [rows, length, k, rank]."""
        some = x if self.at is None else x[self.at]
        found = torch.bmm(some, self._of_rows(A).mT).unflatten(-1, (self.places.shape[1], -1))
        return found if self.plain else found * self.weights[:, None, :, None]

    def split(self, inner: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """The parts of several sites."""
        return list(inner.split(list(widths), -1))

    def over(self, base: QuantLinear, x: Tensor, inner: Tensor) -> Tensor:
        """Base and adapters, without the bias."""
        return self.plus(base.product(x), inner)

    def plus(self, y: Tensor, inner: Tensor) -> Tensor:
        """y [batch, length, out], overwritten, with the adapters."""
        inner, B = inner.flatten(2), self._of_rows(self.B)
        if self.at is None:
            return y.baddbmm_(inner, B)
        return y.index_add_(0, self.at, torch.bmm(inner, B))


def _rows_of(name: str, rows: Sequence[Weights], x: Tensor) -> tuple[Tensor | None, Any]:
    """The rows that use an adapter, None for all, and their weights [rows, 1, 1]."""
    at = [place for place, row in enumerate(rows) if name in row]
    weights = torch.tensor([rows[place][name] for place in at], device=x.device, dtype=x.dtype)
    return None if len(at) == len(rows) else torch.tensor(at, device=x.device), weights[:, None, None]


@dataclass
class _Group:
    """Sites that read the same tensor, and of several the A of all, of which each holds its part."""

    sites: list[Mixed]
    A: Tensor | None = None

    def takes(self, site: Mixed) -> bool:
        """Can one product serve `site` too?"""
        own, others = site._stack, [one._stack for one in self.sites]
        return all(
            other is not None and type(other) is type(own) and (isinstance(own, Summed) or other.names == own.names)
            for other in others
        )

    def join(self, site: Mixed) -> None:
        """Let it be one of the group."""
        self.sites.append(site)
        site._group = self
        stacks = [one._stack for one in self.sites if one._stack is not None]
        widths = [stack.A.shape[-2] for stack in stacks]
        self.A = torch.cat([stack.A for stack in stacks], -2)
        for stack, part in zip(stacks, self.A.split(widths, -2), strict=True):
            stack.A = part


@dataclass
class _Held:
    """Whose A x was made last, and what the sites of the group have yet to take of it."""

    owner: weakref.ref[Tensor]
    version: int
    group: _Group
    left: dict[Mixed, Tensor]


class Siblings:
    """The sites of one module (an attention, an MLP). Those which are seen to read the same tensor form a group, and
    the first of it that comes multiplies the tensor with the A of all."""

    held: _Held | None = None

    def inner(self, site: Mixed, stack: Summed | ByRow, x: Tensor) -> Tensor:
        """A x of one site."""
        if x.is_inference() or (torch.is_grad_enabled() and x.requires_grad):  # no version, or a graph of its own
            return stack.inner(x, stack.A)
        held = self.held
        if held is not None and held.owner() is x and held.version == x._version:
            if site in held.left:
                return held.left.pop(site)
            if site not in held.group.sites and held.group.takes(site):
                held.group.join(site)
            return stack.inner(x, stack.A)
        group, left = site._group, {}
        if group.A is None:
            own = stack.inner(x, stack.A)
        else:
            widths = [one._stack.A.shape[-2] for one in group.sites if one._stack is not None]
            left = dict(zip(group.sites, stack.split(stack.inner(x, group.A), widths), strict=True))
            own = left.pop(site)
        self.held = _Held(weakref.ref(x), x._version, group, left)
        return own
