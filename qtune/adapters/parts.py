"""Adapters as sums of rank-one parts, s B A = sum_i d_i u_i v_i^T, and which of them to keep.

u_i and v_i are the singular vectors, d_i > 0 the singular values of the delta, found from its factors (a QR of each and
the SVD of the small core between them), never from a dense [out, in]. Of several adapters the parts lie side by side.
A part adds d_i (v_i^T x) u_i to the output, whose length is |d_i v_i^T x|: its reach. By token the parts of the largest
reach are kept; fixed, those of the largest average reach over a sample of inputs, which gives a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .starts import of_product


@dataclass(frozen=True)
class Parts:
    """n rank-one parts: d [n], u [out, n] and v [n, in], columns of u and rows of v of length 1; fp32 or wider."""

    d: Tensor
    u: Tensor
    v: Tensor

    def __len__(self) -> int:
        return len(self.d)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [n, in] = d v and B [out, n] = u, with B A their sum: (A x)_i is the reach of part i, with its sign."""
        return self.d.unsqueeze(1) * self.v, self.u

    def take(self, places: Tensor) -> Parts:
        """The parts at these places."""
        return Parts(self.d[places], self.u[:, places], self.v[places])


@torch.no_grad()
def split(A: Tensor, B: Tensor, scale: float = 1.0) -> Parts:
    """The parts of scale B A, the largest first. A [rank, in], B [out, rank]; as many as the rank, or as the smaller
    side of the layer."""
    u, d, v = of_product(A, B.to(torch.promote_types(B.dtype, torch.float32)) * scale)
    return Parts(d, u, v)


def join(parts: Sequence[Parts], weights: Sequence[float] | None = None) -> Parts:
    """The parts of several adapters on one layer, side by side. weights: of each adapter; a negative one turns u."""
    weights = [1.0] * len(parts) if weights is None else weights
    pairs = list(zip(parts, weights, strict=True))
    d = torch.cat([part.d * abs(weight) for part, weight in pairs])
    u = torch.cat([part.u * (-1.0 if weight < 0 else 1.0) for part, weight in pairs], 1)
    return Parts(d, u, torch.cat([part.v for part in parts]))


def default_count(ranks: Sequence[int]) -> int:
    """How many parts are kept where nobody says: the mean rank, for two adapters (r1 + r2) / 2; at least 1."""
    return max(1, sum(ranks) // max(1, len(ranks)))


def mean_reach(parts: Parts, x: Tensor) -> Tensor:
    """The average |d_i v_i^T x| [n] over inputs x [..., in] of the layer."""
    A = parts.factors()[0]
    return (x.reshape(-1, x.shape[-1]).to(A) @ A.T).abs().mean(0)


def strongest(parts: Parts, reach: Tensor, count: int) -> Parts:
    """The `count` parts of the largest reach [n], the largest first; all where there are fewer."""
    return parts.take(reach.topk(min(count, len(parts))).indices)


def keep_strongest(inner: Tensor, count: int) -> Tensor:
    """inner [..., n] = A x with all but the `count` entries of largest magnitude of each token set to zero."""
    if count >= inner.shape[-1]:
        return inner
    places = inner.abs().topk(count, -1, sorted=False).indices
    return torch.zeros_like(inner).scatter_(-1, places, inner.gather(-1, places))
