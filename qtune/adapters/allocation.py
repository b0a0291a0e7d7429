"""Where a sparse update X [out, in] has its values, and what they start with: min tr((F - X) G (F - X)^T).

F is the quantization error and G the mean of x x^T over the layer's inputs, both in the basis of the adapter's
transform. Each row is a problem of its own, given how many values it gets (QWHA, arXiv 2509.17428, section 3.2):
    AdaAlloc      p_i ~ ||F_i||_G^t, the rest one each to the rows with the fewest; here at least two and at most `in`
    selection     in a row the p_i largest |f_j|, or largest G_jj f_j^2 (the authors' code)
    refinement    G_SS x_S = (G f)_S, the least squares of their eq. 8-9 without a singular value decomposition
Ours is the exchange after it: `rounds` times the values of least x_j^2 G_jj leave, the places of most r_j^2 / G_jj,
r = G (f - x), come in, and the row is solved again; a row that got worse stays as it was. The share that leaves falls
from EXCHANGED to 0. Rows go in chunks of one padded size, on any device, without a loop over rows.
Left out: exchange between rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import QtuneError
from ..quant import Dense, QuantLinear

ALLOCATIONS, SELECTIONS = ("activation", "weight", "uniform"), ("magnitude", "energy", "random")
LEAST = 2  # values a row: with two a row and a column the update has full rank almost surely (paper, 3.1)
DAMPING = 1e-4  # of the mean of G's diagonal (paper, appendix C.1)
EXCHANGED = 0.3  # of a row's values, at first: measured on SmolLM2-135M, where 0.2 to 0.5 came out within 0.01
WORK = 1 << 26  # bytes of the systems solved at a time


@dataclass(frozen=True)
class Rule:
    """How places and first values are found; the options of a method."""

    select: str
    allocate: str
    temperature: float
    refine: bool
    rounds: int


def is_dense(base: QuantLinear) -> bool:
    """Is the base not quantized, so that there is no error to start from?"""
    return isinstance(base.scheme, Dense)


def check_budget(rank: int, out: int, width: int) -> int:
    """LoRA's number of parameters at this rank, rank (in + out); QtuneError where a row would get fewer than two values
    or more than there are."""
    budget, most = rank * (width + out), out * width // (width + out)
    least = -(-LEAST * out // (width + out))
    if not LEAST * out <= budget <= out * width:
        legal = f"here rank may be {least} to {most}" if least <= most else "no rank fits: leave it out of the targets"
        raise QtuneError(
            "Q107",
            f"adapter.rank {rank} gives {budget} values to {out} x {width} places, {budget / out:.3g} a row; a row "
            f"takes {LEAST} to {width}, so {legal}",
        )
    return budget


def budgets(strength: Tensor, total: int, most: int) -> Tensor:
    """strength [out] of the rows, not negative -> int64 [out] on the CPU of sum `total`, each LEAST to `most`.

    In proportion to strength, rounded down, as far as the bounds allow; the rest goes one each to the rows with the
    fewest.
    """
    s = strength.double().cpu()
    s = s / s.max().clamp(min=1e-300)
    s = s.nan_to_num(1.0).clamp(min=1e-12)  # a row of no strength takes more only where all others are full
    low, high = torch.zeros((), dtype=torch.float64), total / s.min()
    for _ in range(200):  # bisection: the sum of the shares rises with their unit
        middle = (low + high) / 2
        enough = (middle * s).clamp(LEAST, most).sum() > total
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    share = (low * s).clamp(LEAST, most) * (1 + 1e-12)  # 5 must not become 4.999...
    counts = share.floor().long().clamp(max=most)
    order = torch.where(counts < most, counts, most + 1).argsort(stable=True)
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def fit(
    f: Tensor, gram: Tensor | None, total: int, rule: Rule, store: Callable[[Tensor], Tensor], unit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """f fp32 [out, in], gram fp32 [in, in] or None for I -> row pointers int32 [out + 1], columns int64 [total], rising
    in each row, and the first values, as store(values / unit) keeps them.

    A row that its values would leave worse than none starts with zeros. Memory: f, one more of its size, and some
    times WORK. On meta, where how many values a row gets is not known, one chunk stands for all.
    """
    out, width = f.shape
    target = f if gram is None else f @ gram
    if f.is_meta:
        return _largest_chunk(f, target, gram, total, rule, store, unit)
    counts = budgets(_strength(f, target, rule), total, width)
    starts = torch.zeros(out + 1, dtype=torch.int64)
    starts[1:] = counts.cumsum(0)
    chance = torch.rand(f.shape).to(f.device) if rule.select == "random" else None
    places = torch.zeros(total + 1, dtype=torch.int64, device=f.device)  # padding writes into the last one
    values = store(torch.zeros(total + 1, dtype=torch.float32, device=f.device))
    for rows in _chunks(counts, width):
        at = rows.to(f.device)
        part = _Rows(target[at], gram, counts[rows].to(f.device), int(counts[rows].max()))
        part.select(f[at] if chance is None else chance[at], rule.select == "energy")
        x = part.refined(rule.rounds) if rule.refine and gram is not None else f[at].gather(1, part.places)
        stored = store(x / unit)
        stored = stored * (part.gain(stored.double() * unit) > 0)[:, None]
        column, order = part.places.masked_fill(~part.valid, width).sort(1)
        slot = starts[rows].to(f.device)[:, None] + torch.arange(column.shape[1], device=f.device)
        slot = torch.where(part.valid.gather(1, order), slot, total)
        places.scatter_(0, slot.flatten(), column.flatten())
        values.scatter_(0, slot.flatten(), stored.gather(1, order).flatten())
    return starts.int().to(f.device), places[:total], values[:total]


def _largest_chunk(
    f: Tensor,
    target: Tensor,
    gram: Tensor | None,
    total: int,
    rule: Rule,
    store: Callable[[Tensor], Tensor],
    unit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fit` takes on meta: a chunk of as many values a row as fill WORK, where rows may get so many."""
    out, width = f.shape
    most = min(width, max(total // out, math.isqrt(WORK // (32 * out))))
    rows = next(_chunks(torch.full((out,), most), width)).to(f.device)
    part = _Rows(target[rows], gram, torch.full((len(rows),), most, device=f.device), most)
    part.select(f[rows], rule.select == "energy")
    x = part.refined(min(rule.rounds, 2)) if rule.refine and gram is not None else f[rows].gather(1, part.places)
    part.gain(store(x / unit).double() * unit)
    pointers, places = f.new_empty(out + 1, dtype=torch.int32), f.new_empty(total, dtype=torch.int64)
    return pointers, places, store(f.new_empty(total))


def _strength(f: Tensor, target: Tensor, rule: Rule) -> Tensor:
    """What a row's budget is in proportion to: [out]."""
    if rule.allocate == "uniform":
        return f.new_ones(f.shape[0])
    square = (f * (target if rule.allocate == "activation" else f)).sum(1)
    return square.clamp_(min=0).double().pow(rule.temperature / 2)


def _chunks(counts: Tensor, width: int) -> Iterator[Tensor]:
    """Rows of about as many values together, so that padding costs little: their numbers, on the CPU."""
    order = counts.argsort(stable=True)
    last = order.numel()
    while last > 0:
        most = int(counts[order[last - 1]])
        first = max(0, last - max(1, WORK // (32 * most * most + 32 * width)))
        yield order[first:last]
        last = first


class _Rows:
    """Some rows of the problem: target [m, in], the rows of f G; places [m, k], where `valid` is not set padding."""

    places: Tensor

    def __init__(self, target: Tensor, gram: Tensor | None, counts: Tensor, most: int) -> None:
        self.target, self.gram, self.counts, self.most = target, gram, counts, most
        self.valid = torch.arange(most, device=target.device) < counts[:, None]
        own = target.new_ones(target.shape[1]) if gram is None else gram.diagonal()
        self.damping = own.mean() * DAMPING
        self.diagonal = own + self.damping

    def select(self, f: Tensor, energy: bool) -> None:
        score = f.square() * self.diagonal if energy else f.abs()
        self.places = score.topk(self.most, 1).indices

    def system(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """G_SS fp64 [m, k, k] and (G f)_S [m, k], zero at the padding."""
        assert self.gram is not None
        both = self.valid[:, :, None] & self.valid[:, None, :]
        return self.gram[places[:, :, None], places[:, None, :]].double() * both, self.wanted(places)

    def wanted(self, places: Tensor) -> Tensor:
        return self.target.gather(1, places).double() * self.valid

    def solve(self, a: Tensor, b: Tensor, kept: Tensor) -> Tensor:
        """x [m, k] of least error on the kept places, zero elsewhere."""
        a = a * (kept[:, :, None] & kept[:, None, :])
        a.diagonal(dim1=1, dim2=2).add_(self.damping).add_(~kept)
        factor, _ = torch.linalg.cholesky_ex(a)
        x = torch.cholesky_solve((b * kept)[..., None], factor)[..., 0]
        return x.nan_to_num(0.0, 0.0, 0.0) * kept

    @staticmethod
    def saved(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        """By how much x lessens the squared error: [m]."""
        return ((2 * b - (a @ x[..., None])[..., 0]) * x).sum(1)

    def gain(self, x: Tensor) -> Tensor:
        """`saved` of x [m, k] fp64 at `places`."""
        if self.gram is None:
            return ((2 * self.wanted(self.places) - x) * x * self.valid).sum(1)
        a, b = self.system(self.places)
        return self.saved(a, b, x * self.valid)

    def refined(self, rounds: int) -> Tensor:
        """The best values at `places`, after `rounds` exchanges of places: [m, k] fp32."""
        a, b = self.system(self.places)
        x = self.solve(a, b, self.valid)
        best = self.saved(a, b, x)
        for number in range(rounds):
            share = EXCHANGED * (1 - number / rounds)
            places = self.exchange(a, b, x, share)
            a_new, b_new = self.system(places)
            x_new = self.solve(a_new, b_new, self.valid)
            saved = self.saved(a_new, b_new, x_new)
            better = saved > best
            self.places = torch.where(better[:, None], places, self.places)
            x, b = torch.where(better[:, None], x_new, x), torch.where(better[:, None], b_new, b)
            a = torch.where(better[:, None, None], a_new, a)
            best = torch.maximum(best, saved)
        return x.float()

    def exchange(self, a: Tensor, b: Tensor, x: Tensor, share: float) -> Tensor:
        """Places [m, k] of which in each row a share, at least one, is new or taken back."""
        assert self.gram is not None
        leaving = (self.counts * share).long().clamp(min=1)[:, None]
        most = max(1, min(self.most, int(self.most * share)))
        cost = (x.square() * self.diagonal[self.places]).masked_fill(~self.valid, torch.inf)
        rank = cost.argsort(1).argsort(1)
        kept = self.valid & (rank >= leaving)
        y = self.solve(a, b, kept).float()
        m, k = y.shape
        pointers = torch.arange(0, m * k + 1, k, dtype=torch.int32, device=y.device)
        known = torch.ops.qtune.sparse_matmul(self.gram, pointers, self.places.int().flatten(), y.flatten(), m).t()
        score = (self.target - known).square_().div_(self.diagonal)
        taken = torch.where(kept, self.places, self.places.gather(1, kept.long().argmax(1, keepdim=True)))
        score.scatter_(1, taken, -1.0)
        new = score.topk(most, 1).indices.gather(1, rank.clamp(max=most - 1))
        return torch.where(kept | ~self.valid, self.places, new)
