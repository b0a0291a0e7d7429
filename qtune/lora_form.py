"""What an adapter of any method adds to its weights, as a plain LoRA: exact where the change has factors, else the best
factors of a rank by the SVD (Eckart & Young 1936), with what they lose.

Factors are cut through a QR of each and the SVD of the small core between them: nothing of the weight's size is made.
Other changes are made dense, a layer at a time. Where a share says what may be lost, the rank is doubled until the
sketch holds enough: ||D - Q Q^T D||^2 = ||D||^2 - ||Q^T D||^2 (Halko et al. 2011, section 4.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters import Adapted, AdapterSpec, adapted_sites
from .adapters.deltas import Factors, delta_of, norm
from .adapters.lora import LoRA
from .adapters.sites import SHARED
from .adapters.starts import Triplets, of_product, top
from .errors import QtuneError

ERROR = 0.05  # what a layer's change may lose of its norm, where nothing else is said and it has no factors
NITER = 4  # subspace iterations of the fast SVD


@dataclass(frozen=True)
class Cut:
    """What became of one layer's change. rank: of its LoRA; norm: Frobenius, of the change; lost: as a share of it."""

    site: str
    rank: int
    norm: float
    lost: float


def to_lora(
    model: nn.Module, targets: Sequence[str], rank: int | None, error: float | None, advance: Callable[[int], None]
) -> tuple[AdapterSpec, list[Cut]]:
    """Put a plain LoRA of scale 1, in fp32, in the place of each adapter of `model`. Returns its spec, and what each
    layer lost.

    rank: the same in all layers, as far as they have it. error: instead, the smallest rank by which a layer loses at
    most this share of its change's norm. Neither: changes with factors are kept whole, the others as by ERROR. Raises
    QtuneError for both, and where an adapter does something else than to change the weight; then nothing is changed.
    """
    if rank is not None and error is not None:
        raise QtuneError("Q103", "--rank and --error both say what is cut off; give one of them")
    if rank is not None and rank < 1:
        raise QtuneError("Q102", f"--rank must be at least 1, not {rank}")
    if error is not None and not 0 < error < 1:
        raise QtuneError("Q102", f"--error is a share of a layer's change, above 0 and below 1, not {error}")
    made, cuts = {}, []
    for name, site in adapted_sites(model).items():
        A, B, cut = _factors(name, site, rank, error)
        lora = LoRA(site.base, rank=len(A), alpha=float(len(A)))
        lora.A.data, lora.B.data = A, B
        made[name] = lora.requires_grad_(False).eval()
        cuts.append(cut)
        advance(1)
    for name, site in adapted_sites(model).items():
        site.adapter = made[name]
    if hasattr(model, SHARED):
        delattr(model, SHARED)
    most = max(cut.rank for cut in cuts)
    return AdapterSpec("lora", tuple(targets), {"rank": most, "alpha": float(most)}), cuts


@torch.no_grad()
def _factors(name: str, site: Adapted, rank: int | None, error: float | None) -> tuple[Tensor, Tensor, Cut]:
    """A [r, in] and B [out, r] of a layer's change B A, fp32."""
    delta = delta_of(site, name)
    size = norm(delta)
    if not isinstance(delta, Factors):
        u, s, vh = _dense(delta, rank, error or ERROR)
    elif rank is None and error is None:
        return delta.A.contiguous(), delta.B.contiguous(), Cut(name, delta.rank, size, 0.0)
    else:
        u, s, vh = of_product(delta.A, delta.B)
    kept = _kept(s, size, rank, error or ERROR)
    root = s[:kept].sqrt()
    A, B = (vh[:kept] * root.unsqueeze(1)).contiguous(), (u[:, :kept] * root).contiguous()
    lost = s[kept:].norm() if isinstance(delta, Factors) else delta.addmm_(B, A, alpha=-1).norm()
    return A, B, Cut(name, kept, size, float(lost) / size if size else 0.0)


def _dense(delta: Tensor, rank: int | None, error: float) -> Triplets:
    """As many triplets of a dense change as a rank has, or as are needed to lose at most a share."""
    if rank is not None:
        return top(delta, min(rank, *delta.shape), "fast", NITER)
    size, enough = float(delta.double().square().sum()), 16
    while True:
        found = top(delta, min(enough, *delta.shape), "fast", NITER)
        if enough >= min(delta.shape) or size - float(found[1].double().square().sum()) <= error**2 * size:
            return found
        enough *= 2


def _kept(s: Tensor, size: float, rank: int | None, error: float) -> int:
    """How many of the singular values s, of a change of norm `size`, are kept; at least one."""
    if rank is not None:
        return min(rank, len(s))
    left = size**2 - s.double().square().cumsum(0)
    return min(len(s), 1 + int((left > (error * size) ** 2).sum()))
