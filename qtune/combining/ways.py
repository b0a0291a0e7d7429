"""The ways in which the deltas D_i of one layer become one, with a weight w_i for each.

    concat, svd    sum w_i D_i: task arithmetic (Ilharco et al., arXiv 2212.04089)
    ties           T_i: D_i where it is among the `density` largest |D_i| of the layer, else 0; s = sign(sum T_i); in
                   each place the mean of w_i T_i over those i whose T_i has the sign s (Yadav et al., arXiv 2306.01708)
    dare           sum w_i D_i M_i / density, M_i 1 with probability density, else 0 (Yu et al., arXiv 2311.03099)
    dare-ties      D_i M_i / density in the place of T_i in ties
    regmean        sum D_i G_i w_i (sum w_i G_i)^-1, G_i the second moments of the inputs that run i sees: the D with
                   the least sum w_i tr((D - D_i) G_i (D - D_i)^T) (Jin et al., arXiv 2212.09849)
    fisher         in each place sum w_i F_i D_i / sum w_i F_i, F_i [out, in] the diagonal Fisher information of run i
                   (fisher.py): the D with the least sum w_i F_i (D - D_i)^2 (Matena & Raffel, arXiv 2111.09832)
As in PEFT, TIES trims each layer by itself (its paper the whole model, all of it dense in memory); sum T_i = 0 counts
as positive. RegMean keeps the rank of a sum of factors, B_i and A_i G_i w_i (sum w_i G_i)^-1 side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.deltas import Delta, Factors, dense, stacked
from ..errors import QtuneError

# G_i are means over tokens, as in the authors' code, so that no run counts more for a longer text. This is the factor
# of RegMean's moments off the diagonal: the paper's number, and what makes few tokens enough. The authors' settings for
# emotions have 0.1 (`regmean_reduce_nondiag`), near to a mean weighed by each input's size alone
SHRINK = 0.9


def weighted(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """sum w_i D_i; factors where all are, else dense and fresh."""
    factors = [delta for delta in deltas if isinstance(delta, Factors)]
    if len(factors) == len(deltas):
        return stacked([one.times(weight) for one, weight in zip(factors, weights, strict=True)])
    like = deltas[0].A if isinstance(deltas[0], Factors) else deltas[0]
    total = like.new_zeros(deltas[0].shape)
    for delta, weight in zip(deltas, weights, strict=True):
        if isinstance(delta, Factors):
            total.addmm_(delta.B, delta.A, alpha=weight)
        else:
            total.add_(delta, alpha=weight)
    return total


def trim(delta: Tensor, density: float) -> Tensor:
    """The entries of the `density` largest |delta|, zero elsewhere; in place. At least one is kept."""
    keep = max(1, int(density * delta.numel()))
    least = delta.abs().flatten().kthvalue(delta.numel() - keep + 1).values
    return delta.masked_fill_(delta.abs() < least, 0.0)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry stays with probability `density`, divided by it; in place."""
    kept = torch.bernoulli(torch.full(delta.shape, density), generator=generator)
    return delta.mul_(kept.to(delta.device)).div_(density)


def agreed(sparse: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES' last two steps: the sign is elected, and those that have it are averaged."""
    positive = sum(sparse[1:], start=sparse[0]) >= 0
    total, count = torch.zeros_like(sparse[0]), torch.zeros_like(sparse[0])
    for one, weight in zip(sparse, weights, strict=True):
        agrees = torch.where(positive, one > 0, one < 0)
        total.add_(one * agrees, alpha=weight)
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))


def ties(deltas: Sequence[Delta], weights: Sequence[float], density: float) -> Tensor:
    """[out, in]; dense deltas are overwritten."""
    return agreed([trim(dense(delta), density) for delta in deltas], weights)


def dare(
    deltas: Sequence[Delta], weights: Sequence[float], density: float, generator: torch.Generator, *, elect: bool
) -> Tensor:
    """[out, in]; dense deltas are overwritten. elect: as TIES does."""
    sparse = [drop(dense(delta), density, generator) for delta in deltas]
    if elect:
        return agreed(sparse, weights)
    total = weighted(sparse, weights)
    assert isinstance(total, Tensor)
    return total


def shrunk(gram: Tensor) -> Tensor:
    """RegMean's moments: those off the diagonal times SHRINK; in place."""
    diagonal = gram.diagonal().clone()
    gram.mul_(SHRINK).diagonal().copy_(diagonal)
    return gram


def regmean(deltas: Sequence[Delta], grams: Sequence[Tensor], weights: Sequence[float], name: str) -> Delta:
    """The least squares' solution, exactly: what is not determined, inputs that are always zero, stays unchanged.

    grams: [in, in] each, positive definite in sum but for such inputs. Raises QtuneError where they are not.
    """
    total = torch.zeros_like(grams[0])
    for gram, weight in zip(grams, weights, strict=True):
        total.add_(gram, alpha=weight)
    unused = total.diagonal() <= 0
    total.diagonal()[unused] = 1.0
    lower, info = torch.linalg.cholesky_ex(total)
    if int(info):
        raise QtuneError("Q706", f"{name}: the second moments of the runs' inputs are singular; give more text")
    parts: list[Delta] = []
    for delta, gram, weight in zip(deltas, grams, weights, strict=True):
        rows = delta.A if isinstance(delta, Factors) else delta
        moved = torch.cholesky_solve((rows @ gram).T.mul_(weight), lower).T
        parts.append(Factors(moved, delta.B) if isinstance(delta, Factors) else moved)
    return weighted(parts, [1.0] * len(parts))


def fisher(
    deltas: Sequence[Delta | None], diagonals: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
) -> Tensor:
    """[out, in]. diagonals: r [out] and c [in] of each F_i = r c^T. A delta None is zero; its F_i counts. Where no run
    has any information the mean by w_i stands; the authors' code has a floor of 1e-6 there."""
    rows, columns = diagonals[0]
    whole, total = rows.new_zeros(len(rows), len(columns)), rows.new_zeros(len(rows), len(columns))
    mean = torch.zeros_like(whole)
    for delta, (rows, columns), weight in zip(deltas, diagonals, weights, strict=True):
        importance = torch.outer(weight * rows, columns)
        total += importance
        if delta is not None:
            full = dense(delta)
            mean.add_(full, alpha=weight / sum(weights))
            whole.addcmul_(importance, full)
    return torch.where(total > 0, whole.div_(total), mean)
