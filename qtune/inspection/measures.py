"""Numbers of one layer: the spectrum of a delta, how two of them overlap, how an error lies in its matrix.

effective rank   exp(-sum p_i log p_i), p_i = sigma_i / sum sigma (Roy & Vetterli 2007)
stable rank      ||D||_F^2 / ||D||_2^2 (Rudelson & Vershynin 2007)
overlap          ||U_a^T U_b||_F^2 / k of the first k singular vectors, 1 for one subspace, k / size by chance
                 (Hu et al. 2021, LoRA, section 7.2): of inputs that are read, and of outputs that are written
kurtosis         E[e^4] / E[e^2]^2 of the entries about zero: 1.8 of uniform noise, 3 of normal noise
largest 1 %      share of ||E||^2 that the largest hundredth of the entries holds: 3.0 % uniform, 8.5 % normal
rows, columns    variance of the rows' (columns') sums of squares by what independent entries of the same
                 distribution have: 1 without structure
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters.deltas import Delta, Factors, inner, norm
from ..adapters.starts import of_product

SAMPLE = 1 << 20  # entries that density and shares are taken of, evenly spaced; moments are of all
DIRECTIONS = 8  # at most, of an overlap
EDGE, BINS = 4.0, 64  # of the density, in root mean squares
SHARES = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LARGEST = SHARES.index(0.01)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a delta, falling, with its singular vectors u [out, n], v [in, n]; those that are rounding are
    left out. Of a delta that is zero there are none."""

    values: Tensor
    u: Tensor
    v: Tensor

    @property
    def effective(self) -> float:
        """The effective rank; 0 of a delta that is zero."""
        if not len(self.values):
            return 0.0
        p = self.values.double() / self.values.double().sum()
        return float(torch.exp(torch.special.entr(p).sum()))

    @property
    def stable(self) -> float:
        """The stable rank; 0 of a delta that is zero."""
        return float((self.values / self.values[0]).square().sum()) if len(self.values) else 0.0


@torch.no_grad()
def spectrum(delta: Delta) -> Spectrum:
    """Of factors by a QR of each and the core's SVD, never multiplied out; of a dense delta the full SVD."""
    if isinstance(delta, Factors):
        u, s, vh = of_product(delta.A, delta.B)
    else:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    least = torch.finfo(s.dtype).eps * max(delta.shape) * float(s[0]) if len(s) else 0.0
    count = int((s > least).sum())
    return Spectrum(s[:count], u[:, :count], vh[:count].T)


@dataclass(frozen=True)
class Overlap:
    """Of two deltas: cosine <a, b> / (||a|| ||b||); read, written: of the first `directions` singular vectors of the
    inputs and of the outputs; by_chance: what random ones would have there."""

    cosine: float
    read: float
    written: float
    directions: int
    by_chance: tuple[float, float]


def overlap(a: Delta, b: Delta, of_a: Spectrum, of_b: Spectrum) -> Overlap | None:
    """None where one of them is zero."""
    k = min(DIRECTIONS, len(of_a.values), len(of_b.values))
    if not k:
        return None
    read, written = (float((x[:, :k].T @ y[:, :k]).square().sum()) / k for x, y in ((of_a.v, of_b.v), (of_a.u, of_b.u)))
    return Overlap(inner(a, b) / (norm(a) * norm(b)), read, written, k, (k / len(of_a.v), k / len(of_a.u)))


@dataclass(frozen=True)
class Spread:
    """How an error E [out, in] lies in its matrix. size: ||E||; relative: by the norm of what it is an error of;
    density: of |e| / root mean square in BINS bins up to EDGE; shares: of ||E||^2 in the largest entries, for each of
    SHARES."""

    size: float
    relative: float
    kurtosis: float
    rows: float
    columns: float
    density: Sequence[float] = field(repr=False)
    shares: Sequence[float] = field(repr=False)

    @property
    def largest(self) -> float:
        """Share of ||E||^2 in the largest hundredth of the entries."""
        return self.shares[LARGEST]


@torch.no_grad()
def spread(error: Tensor, whole: float) -> Spread | None:
    """error [out, in], overwritten; whole: the norm that it is measured by. None of an error that is zero."""
    size = norm(error)
    if not size:
        return None
    e = error.div_(size / error.numel() ** 0.5)  # of mean square 1
    flat = e.flatten()[:: max(1, e.numel() // SAMPLE)].abs()
    density = torch.histc(flat, BINS, 0, EDGE) / (len(flat) * EDGE / BINS)
    top = flat.square().sort(descending=True).values.cumsum(0, dtype=torch.float64)
    places = [max(1, round(share * len(flat))) - 1 for share in SHARES[1:]]
    squares = e.square_()
    fourth = float(squares.square().mean(dtype=torch.float64))
    rows = _structure(squares.sum(1), squares.shape[1], fourth)
    columns = _structure(squares.sum(0), squares.shape[0], fourth)
    shares = [0.0, *(top[places] / top[-1]).tolist()]
    return Spread(size, size / whole if whole else math.inf, fourth, rows, columns, density.tolist(), shares)


def _structure(sums: Tensor, count: int, fourth: float) -> float:
    """Variance of sums of `count` squares of mean 1 by that of independent ones; 1 where these have none."""
    alone = count * (fourth - 1)
    return float((sums.double() - count).square().mean()) / alone if alone > 1e-9 * count else 1.0
