"""What the starts of two-factor methods share: truncated SVDs, second moments as weights, factors and residuals.

The fast SVD is Halko, Martinsson & Tropp 2011 (arXiv 0909.4061, algorithms 4.4 and 5.1): a Gaussian sketch of rank +
OVERSAMPLE columns, `niter` subspace iterations with a QR after each product. Its random numbers come from the CPU's
generator, so that a seed means the same start on every device. Nothing of the weight's size is made but what the
caller passes. With `right` it decomposes M R without forming it.

A start's product enters the forward with a factor of exactly 1: `put` divides both factors by the root of LoRA's scale
alpha/rank. What is built on factors (a residual, an error) takes them as the parameters hold them, rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import QtuneError, one_of
from ..quant import Dense, QuantLinear, Scheme
from .base import Source
from .lora import LoRA

OVERSAMPLE = 10  # columns beyond the rank: Halko et al. section 1.3 call 5 or 10 enough
RELATIVE = 1e-6  # of the largest eigenvalue: directions of a small Gram matrix below it are noise of fp32
SVDS = ("fast", "full")
NO_ERROR = "a dense base has no quantization error to correct; take lora or pissa"

Triplets = tuple[Tensor, Tensor, Tensor]


# ---- options and second moments


def check_gram(gram: Tensor | None, base: QuantLinear, name: str) -> None:
    """Raises QtuneError for second moments that are absent, of another shape than the layer's inputs, NaN or
    infinite."""
    width = base.in_features
    if gram is None or gram.shape != (width, width):
        found = gram if gram is None else tuple(gram.shape)
        raise QtuneError("Q706", f"{name}: second moments must be {width} x {width}, not {found}")
    if not gram.is_meta and not torch.isfinite(gram).all():
        raise QtuneError(
            "Q706", f"{name}: second moments are not finite; did the model overflow on the calibration text?"
        )


def check_rank(base: QuantLinear, rank: int, slices: int = 1) -> None:
    """Raises QtuneError for a rank, or slices of it, that no decomposition of the layer has."""
    most = min(base.shape) // slices
    if not 1 <= rank <= most:
        given = f"adapter.rank {rank}" if slices == 1 else f"adapter.rank {rank} in adapter.slices {slices}"
        raise QtuneError(
            "Q107",
            f"{given} is beyond a layer of {base.shape[0]} x {base.shape[1]}; legal: "
            + (f"1 to {most}" if most else f"at most {min(base.shape)} slices"),
        )


def faults(options: Mapping[str, Any], **least: int) -> list[str]:
    """Faults of the options that starts share, and of each named one that must be at least `least`."""
    found = []
    if options.get("svd", SVDS[0]) not in SVDS:
        found.append(str(one_of("adapter.svd", options["svd"], SVDS)))
    for name, low in {"niter": 0, **least}.items():
        if options.get(name, low) < low:
            found.append(f"adapter.{name} must be at least {low}, not {options[name]}")
    if not 0 < options.get("damping", 1) <= 1:
        found.append(f"adapter.damping must be above 0 and at most 1, not {options['damping']}")
    return found


def without_error(scheme: Scheme) -> str:
    """Why a method that corrects the quantization error refuses `scheme`, or nothing."""
    return NO_ERROR if isinstance(scheme, Dense) else ""


# ---- truncated decompositions


def top(m: Tensor, rank: int, svd: str, niter: int, right: Tensor | None = None) -> Triplets:
    """U [out, rank], S [rank] falling, Vh [rank, in] of M R, by its largest singular values.

    m [out, in] fp32. right: R as a matrix [in, in], as the diagonal [in] of one, or None for the identity.
    """
    if svd == "full" or rank + OVERSAMPLE >= min(m.shape):
        u, s, vh = torch.linalg.svd(_times(m, right), full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    sketch = torch.randn(m.shape[1], rank + OVERSAMPLE, device="cpu").to(m)
    q = torch.linalg.qr(_forth(m, sketch, right)).Q
    for _ in range(niter):
        q = torch.linalg.qr(_back(m, q, right)).Q
        q = torch.linalg.qr(_forth(m, q, right)).Q
    u, s, vh = torch.linalg.svd(_back(m, q, right).T, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vh[:rank]


def bottom(m: Tensor, rank: int, right: Tensor | None = None) -> Triplets:
    """As `top` by the smallest singular values of the min(out, in) that there are, from the full SVD."""
    u, s, vh = torch.linalg.svd(_times(m, right), full_matrices=False)
    return u[:, -rank:], s[-rank:], vh[-rank:]


def of_product(A: Tensor, B: Tensor) -> Triplets:
    """All of B A, in fp32 at least, by a QR of each factor and the SVD of the core between them; B A is never formed.

    A [n, in], B [out, n]; as many triplets as the rank, or as the smaller side of the layer.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    left, right = torch.linalg.qr(B.to(wide)), torch.linalg.qr(A.to(wide).T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ u, s, vh @ right.Q.T


def _times(m: Tensor, right: Tensor | None) -> Tensor:
    return m if right is None else m * right if right.dim() == 1 else m @ right


def _forth(m: Tensor, v: Tensor, right: Tensor | None) -> Tensor:
    """M R v for v [in, k]."""
    if right is not None:
        v = right.unsqueeze(1) * v if right.dim() == 1 else right @ v
    return m @ v


def _back(m: Tensor, u: Tensor, right: Tensor | None) -> Tensor:
    """(M R)^T u for u [out, k]."""
    v = m.T @ u
    return v if right is None else right.unsqueeze(1) * v if right.dim() == 1 else right.T @ v


# ---- second moments


def checked_gram(base: QuantLinear, source: Source | None) -> Tensor:
    """The source's gram in fp32. Raises QtuneError for another shape, NaN or infinity."""
    assert source is not None
    check_gram(source.gram, base, base.name or "the layer")
    assert source.gram is not None
    return source.gram.float()


def damped(gram: Tensor, damping: float) -> Tensor:
    """gram + damping * the mean of its diagonal on the diagonal: invertible also after too little text or none."""
    mean = gram.diagonal().mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return gram + torch.diag_embed((damping * mean).expand(len(gram)))


def channels(gram: Tensor, floor: float) -> Tensor:
    """The root mean square [in] of each input channel, at least `floor` of the average one."""
    squares = gram.diagonal().clamp(min=0)
    mean = squares.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return squares.clamp(min=floor**2 * mean).sqrt()


def root(gram: Tensor) -> Tensor:
    """Lower L with gram = L L^T."""
    return torch.linalg.cholesky(gram)


def fit(error: Tensor, A: Tensor, gram: Tensor) -> Tensor:
    """B [out, rank] that minimizes tr((E - B A) G (E - B A)^T) for A as it is: E G A^T (A G A^T)^+.

    A projection, so that the error weighted by the gram can only fall, whatever A is and however it was rounded.
    """
    ga = gram @ A.T
    small = (A @ ga).double()
    size = small.diagonal().clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    inverse = torch.linalg.pinv(small * size * size.unsqueeze(1), rtol=RELATIVE, hermitian=True)
    return error @ (ga @ (inverse * size * size.unsqueeze(1)).to(ga))


# ---- factors


def weight_of(source: Source | None) -> Tensor:
    """The weight before packing, fp32 [out, in]; may be the source's own: not to be written to."""
    assert source is not None
    return source.weight.detach().float()


def error_of(base: QuantLinear, w: Tensor) -> Tensor:
    """W - Q, fresh fp32, with Q as the engine dequantizes it."""
    return base.dequantize(torch.float32).neg_().add_(w)


def halves(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """B [out, rank] and A [rank, in], each with the root of S."""
    s = s.clamp(min=0).sqrt()
    return u * s, s.unsqueeze(1) * vh


@torch.no_grad()
def put(adapter: LoRA, B: Tensor, A: Tensor) -> None:
    """Give the adapter factors of the product B A, LoRA's scale folded in, rounded to the parameters' dtype."""
    adapter.A.copy_(A / adapter.scale**0.5)
    adapter.B.copy_(B / adapter.scale**0.5)


@torch.no_grad()
def subtract(adapter: LoRA, w: Tensor) -> Tensor:
    """w - scale B A of the rounded factors; fp32, in place. w [out, in]."""
    return w.addmm_(adapter.B.float(), adapter.A.float(), alpha=-adapter.scale)


def residual(adapter: LoRA, base: QuantLinear, w: Tensor) -> None:
    """Pack W - scale B A as the base. w [out, in] fp32 is not written to."""
    base.set_weight(subtract(adapter, w.clone()))


@torch.no_grad()
def refit(adapter: LoRA, error: Tensor, gram: Tensor) -> None:
    """Give B the best values for `error` under the gram beside A as it was rounded."""
    adapter.B.copy_(fit(error, adapter.A.float(), gram) / adapter.scale)


class Best:
    """The iterate with the least error of those `offer`ed: an alternation may rise. No value is read."""

    error: Tensor | None = None

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def offer(self, adapter: LoRA, base: QuantLinear, error: Tensor) -> None:
        """Remember the factors and the codes where `error`, of what base and adapter leave of W, is less than before;
        it is overwritten."""
        found = error.square_().sum(dtype=torch.float64)
        now = {"A": adapter.A.detach().clone(), "B": adapter.B.detach().clone()}
        now |= {f"base.{name}": part.clone() for name, part in base.parts.items()}
        if self.error is not None:
            less = found < self.error
            now = {name: torch.where(less, value, self.state[name]) for name, value in now.items()}
            found = torch.minimum(found, self.error)
        self.error, self.state = found, now

    @torch.no_grad()
    def restore(self, adapter: LoRA, base: QuantLinear) -> None:
        adapter.A.copy_(self.state["A"])
        adapter.B.copy_(self.state["B"])
        base.set_parts({name: self.state[f"base.{name}"] for name in base.parts})


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """A2 [2 rank, in], B2 [out, 2 rank] with B2 A2 = B A - B0 A0, bit for bit: what training changed, as a plain LoRA
    relative to the base before a start that moved it.

    LoRA's scale alpha/rank stays the same if the caller doubles alpha (with rslora: times the root of 2).
    """
    return torch.cat((A, A0)), torch.cat((B, -B0), dim=1)
