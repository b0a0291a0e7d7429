"""What an adapter changes at its site: delta = W' - W, as factors where the method has them, else dense, a layer at a
time.

Factors are never multiplied out: norms and inner products are traces of small matrices, and singular values come from
a QR of each factor and the SVD of the core between them (`starts.of_product`). All in fp32 at least, scales folded in.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import QtuneError
from .base import Adapted, Adapter
from .carried import cut
from .lora import LoRA
from .starts import halves, top

ITERATIONS = 4  # of the subspace of a dense delta: what TIES and DARE leave falls slowly
ROUNDING = 1e-6  # of a bias: fp32's


@dataclass(frozen=True)
class Factors:
    """delta = B A. A [rank, in], B [out, rank], of one floating dtype, fp32 or wider."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def times(self, weight: float) -> Factors:
        """weight B A."""
        return Factors(self.A, self.B * weight)

    def padded(self, rank: int) -> Factors:
        """The same delta at a rank that is no smaller, with zeros."""
        extra = rank - self.rank
        B = torch.nn.functional.pad(self.B, (0, extra))
        return Factors(torch.nn.functional.pad(self.A, (0, 0, 0, extra)), B)


Delta: TypeAlias = Factors | Tensor


def is_lora(method: type[Adapter]) -> bool:
    """Is a trained adapter of this method a LoRA: A, B and a scale, and nothing of the base?"""
    return method.low_rank is LoRA.low_rank


def has_factors(method: type[Adapter]) -> bool:
    """Is the delta a product of two factors that the method has?"""
    return method.low_rank is not Adapter.low_rank


@torch.no_grad()
def delta_of(site: Adapted, name: str) -> Delta:
    """What the adapter at site `name` adds to the weight of its base. A dense one, [out, in] fp32, is fresh.

    Raises QtuneError where it changes the bias too, which is no delta of the weight.
    """
    adapter = site.adapter
    if (found := adapter.low_rank(site.base)) is not None:
        A, B, scale = found
        wide = torch.promote_types(A.dtype, torch.float32)
        return Factors(A.detach().to(wide), B.detach().to(wide) * scale)
    weight, bias = site.merged()
    own = site.base.bias
    if bias is not None and (own is None or bool((bias - own.float()).norm() > ROUNDING * own.float().norm())):
        raise QtuneError(
            "Q419", f"{name}: the adapter ({adapter.method}) changes the layer's bias, which a LoRA cannot hold; merge "
            "the run by itself"
        )  # fmt: skip
    return weight.sub_(site.base.dequantize(torch.float32))


def dense(delta: Delta) -> Tensor:
    """The delta [out, in], fresh where it was factors."""
    return delta.B @ delta.A if isinstance(delta, Factors) else delta


def stacked(parts: Sequence[Factors]) -> Factors:
    """The sum of the deltas, exactly: the rank adds up."""
    return Factors(torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts], 1))


def inner(a: Delta, b: Delta) -> float:
    """<a, b> = tr(a^T b), summed in fp64."""
    if isinstance(a, Factors) and isinstance(b, Factors):
        return float(((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum())
    if isinstance(a, Factors):
        return inner(b, a)
    if isinstance(b, Factors):
        return float(((a @ b.A.T) * b.B).sum(dtype=torch.float64))
    return float((a * b).sum(dtype=torch.float64))


def norm(delta: Delta) -> float:
    """Frobenius'."""
    if isinstance(delta, Factors):
        return max(inner(delta, delta), 0.0) ** 0.5
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64))


@torch.no_grad()
def to_rank(delta: Delta, rank: int, name: str, seed: int = 0) -> tuple[Factors, float]:
    """The nearest delta of at most this rank in Frobenius' norm, and what it loses of ||delta||.

    Factors exactly; a dense one, which is overwritten, by a randomized SVD whose random numbers depend on `seed` and
    the site's `name` alone.
    """
    if isinstance(delta, Factors):
        if delta.rank <= rank:
            return delta, 0.0
        A, B, lost = cut(delta.A, delta.B, rank)
        return Factors(A, B), lost
    size = norm(delta)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{seed}.{name}".encode()))
        u, s, vh = top(delta, rank, "fast", ITERATIONS)
    B, A = halves(u, s, vh)
    return Factors(A, B), norm(delta.addmm_(B, A, alpha=-1)) / size if size else 0.0
