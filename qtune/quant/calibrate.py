"""What chooses the codes of a packed weight W [out, in], given G [in, in], the mean of x x^T over the layer's inputs x.

    nearest      round to nearest: `Scheme.pack`
    gptq         the scales of nearest; then column by column, in falling order of diag G: q_i = nearest(w_i),
                 w_j -= (w_i - q_i) / U_ii U_ij in the columns j to come, where U is upper and
                 U^T U = (G + 0.01 mean(diag G) I)^-1 (Frantar et al., arXiv 2210.17323)
    magr-gptq    the same with the scales of M, which minimises 1/2 tr((M - W) G (M - W)^T) / lambda_max(G)
                 + alpha (sum of max|m| over groups or rows), by 200 proximal gradient steps (MagR, arXiv 2406.00800);
                 where gptq's error is smaller, gptq: what MagR clips costs more than it saves at 8 and often at 4 bits

Each lowers tr((Q - W) G (Q - W)^T), the layer's squared output error. The order of columns is free, as scales are
fixed; on SmolLM2-135M at 2 to 4 bits the falling one takes a tenth off the error. MagR's authors round M instead of W:
at their alpha the error is the same to 1 %, at ten times theirs up to a sixth larger. Left out: scales that follow the
feedback, and coordinate descent after it (twice the time for 0.4 % of the error on held-out text).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import QtuneError, one_of
from .scheme import SCHEMES, Grid, Parts, Scheme

CODES = ("nearest", "gptq", "magr-gptq")
DAMPING = (0.01, 0.1, 1.0)  # of mean(diag G): the paper's; the others are tried where the factorisation fails
BLOCK = 128  # columns between two updates of all that are to come, as in the paper
ALPHA_ROW, ALPHA_GROUP = 1e-3, 1e-4  # of MagR, for weights with one scale a row and one a group; its authors' numbers
STEPS = 200  # of MagR, its authors' number
ROWS = 512  # rows that MagR takes at a time: what bounds its memory; its steps are products of [512, in] and [in, in]
POWERS = 50  # of the power iteration: (lambda_2 / lambda_1)^100 is what is left, 3e-5 where they differ by a tenth
NEWTON = 6  # steps to the level at which MagR clips; at most 4 were needed for SmolLM2's layers


def refuses(scheme: Scheme, how: str) -> str:
    """Why `how` (one of CODES) cannot choose codes of `scheme`; "" where it can. QtuneError for an unknown `how`."""
    if how not in CODES:
        raise one_of("choice of codes", how, CODES)
    if how == "nearest" or type(scheme).grid is not Scheme.grid:
        return ""
    legal = ", ".join(sorted(name for name, kind in SCHEMES.items() if kind.grid is not Scheme.grid))
    return f"scheme {scheme} has no codes for {how} to choose; legal: nearest, or one of the schemes {legal}"


def too_little(tokens: int, in_features: int) -> str | None:
    """What is wrong with a mean of x x^T over `tokens` inputs of a layer with `in_features`; None: nothing."""
    if tokens >= in_features:
        return None
    return (
        f"{tokens} tokens of calibration text are too few for a layer with {in_features} inputs: their second moments "
        f"are singular. Raise calibrate.samples or calibrate.length to at least {in_features} tokens in all, and give "
        "as much text"
    )


@torch.no_grad()
def choose(scheme: Scheme, weight: Tensor, gram: Tensor | None, how: str, *, name: str = "weight") -> Parts:
    """weight [out, in] float, gram [in, in] = mean of x x^T -> parts of `scheme`, codes chosen by `how` (one of CODES).

    gram is not read for "nearest". name: the layer's, for errors. Raises QtuneError for an unknown `how`, a scheme
    without codes, a weight that cannot be packed, and a gram that is absent, misshapen, not finite or indefinite.
    """
    if why := refuses(scheme, how):
        raise QtuneError("Q702", f"{name}: {why}")
    if how == "nearest":
        return scheme.checked_pack(weight, name)
    gram = _checked(gram, weight, how, name)
    plain = scheme.checked_pack(weight, name)
    weight = weight.detach().to(torch.float32)
    parts, error = _by_gptq(scheme, plain, weight, gram, name)
    if how == "magr-gptq":
        small = magr(weight, gram, getattr(scheme, "block", None) or getattr(scheme, "group", None))
        other, its = _by_gptq(scheme, scheme.checked_pack(small, name), weight, gram, name)
        parts = {part: torch.where(its < error, other[part], parts[part]) for part in parts}
    return parts


def _by_gptq(scheme: Scheme, parts: Parts, weight: Tensor, gram: Tensor, name: str) -> tuple[Parts, Tensor]:
    """`parts` with GPTQ's codes under their scales, and tr(E G E^T) of what they unpack to."""
    grid = scheme.grid(parts, weight.shape)
    assert grid is not None
    parts = scheme.with_codes(parts, gptq(weight, grid, gram, name=name), weight.shape)
    left = scheme.unpack(parts, weight.shape, torch.float32).sub_(weight)
    return parts, (left @ gram).mul_(left).sum()


def _checked(gram: Tensor | None, weight: Tensor, how: str, name: str) -> Tensor:
    """The gram in fp32, where the weight is."""
    inputs = weight.shape[1]
    if gram is None:
        raise QtuneError(
            "Q706", f"{name}: {how} chooses codes by the second moments of the layer's inputs, and there are none"
        )
    if tuple(gram.shape) != (inputs, inputs):
        raise QtuneError(
            "Q706",
            f"{name}: the second moments are {tuple(gram.shape)}; a layer with {inputs} inputs has {(inputs, inputs)}",
        )
    if not gram.is_meta and not bool(torch.isfinite(gram).all()):
        raise QtuneError("Q706", f"{name}: the second moments of the layer's inputs have NaN or infinite values")
    return gram.detach().to(weight.device, torch.float32)


def _steps(count: int, like: Tensor) -> range:
    """On meta one step stands for all: each takes the memory that the first takes."""
    return range(min(count, 1) if like.is_meta else count)


# ---- GPTQ


def gptq(weight: Tensor, grid: Grid, gram: Tensor, *, act_order: bool = True, name: str = "weight") -> Tensor:
    """weight fp32 [out, in], gram fp32 [in, in] -> codes uint8 [out, in], places in grid.table.

    act_order: columns by falling diagonal of the gram, else as stored. A column whose input is always zero is tied to
    no other and rounds to nearest. Raises QtuneError where the damped gram is not positive definite.
    """
    inputs = weight.shape[1]
    grid = Grid(grid.table, grid.scale.expand(weight.shape), grid.shift.expand(weight.shape))
    order = torch.arange(inputs, device=weight.device)
    if act_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = _factor(gram, order, name)
    rest = weight.t().index_select(0, order)  # [in, out]: a column is contiguous
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=weight.device)
    starts = range(0, inputs, BLOCK)
    for start in starts[:2] if weight.is_meta else starts:  # on meta: the second takes the most memory of all
        end = min(start + BLOCK, inputs)
        chosen, errors = _round_block(rest[start:end], grid, order[start:end], upper[start:end, start:end])
        codes.index_copy_(0, order[start:end], chosen)
        rest[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def _round_block(rest: Tensor, grid: Grid, columns: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Columns as rows [n, out], their numbers [n], their corner of U [n, n] -> codes, (w - q) / U_ii, both [n, out]."""
    codes, errors = torch.empty_like(rest, dtype=torch.uint8), torch.empty_like(rest)
    scale, shift = (part.index_select(1, columns).t().contiguous() for part in (grid.scale, grid.shift))
    divisor = torch.where(scale == 0, 1.0, scale)  # of an all-zero group, where any code will do
    middle = (grid.table[1:] + grid.table[:-1]) / 2
    for i in _steps(len(rest), rest):
        w = torch.addmv(rest[i], errors[:i].t(), upper[:i, i], alpha=-1)
        code = torch.bucketize((w - shift[i]) / divisor[i], middle, out_int32=True)
        codes[i] = code
        errors[i] = (w - torch.addcmul(shift[i], grid.table[code], scale[i])) / upper[i, i]
    return codes, errors


def _factor(gram: Tensor, order: Tensor, name: str) -> Tensor:
    """Upper U [in, in] with U^T U = (G + damping mean(diag G) I)^-1, rows and columns of G taken in `order`.

    G turned round is L L^T; U is L^-1 turned round: one factorisation, and G^-1 is never formed. fp32 does: its
    rounding moves G by about in 6e-8 mean(diag G), small beside the damping.
    """
    back = order.flip(0)
    turned = gram.index_select(0, back).index_select(1, back)
    mean = gram.diagonal().mean()
    mean, given = torch.where(mean > 0, mean, 1.0), 0.0
    for damping in DAMPING:
        turned.diagonal().add_(mean * (damping - given))
        given = damping
        lower, info = torch.linalg.cholesky_ex(turned)
        if info.is_meta or int(info) == 0:
            del turned
            one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)
    raise QtuneError(
        "Q706",
        f"{name}: the second moments of the layer's inputs have no Cholesky factor, not even with {DAMPING[-1]:g} x "
        "mean diagonal added: no inputs have such moments",
    )


# ---- MagR


def magr(weight: Tensor, gram: Tensor, group: int | None, alpha: float | None = None, steps: int = STEPS) -> Tensor:
    """weight fp32 [out, in] -> one with smaller max|w| in each `group` of a row's columns (None: in each row), and
    nearly the same output for inputs of second moments `gram` [in, in].

    alpha: what a unit of max|w| costs, where lambda_max(gram) is 1; None: its authors' numbers.
    """
    if alpha is None:
        alpha = ALPHA_GROUP if group else ALPHA_ROW
    gram = gram / _largest(gram)
    result = torch.empty_like(weight)
    for old, new in zip(weight.split(ROWS), result.split(ROWS), strict=True):
        w = old
        for _ in _steps(steps, weight):
            w = shrink(torch.addmm(w, w - old, gram, alpha=-1), alpha, group)
        new.copy_(w)
    return result


def shrink(w: Tensor, alpha: float, group: int | None) -> Tensor:
    """The proximal step of alpha max|w|, for each group of columns [out, in] -> [out, in].

    It takes the projection onto the l1 ball of radius alpha off w, which is to clip w at the level t >= 0 with
    sum(|w| - t)+ = alpha (0 where sum|w| <= alpha). The sum is convex in t: Newton's steps from below rise to the exact
    level, and end there, without a sort.
    """
    width = w.shape[1]
    size = group or width
    padded = torch.nn.functional.pad(w, (0, -width % size)) if width % size else w
    groups = padded.view(len(w), -1, size)
    high = groups.abs()
    level = torch.maximum(high.amax(-1, True) - alpha, (high.sum(-1, keepdim=True) - alpha) / size).clamp_min_(0)
    for _ in _steps(NEWTON, w):
        above = (high - level).clamp_min_(0)
        count = torch.count_nonzero(above, -1).unsqueeze(-1).clamp_min_(1)
        level += (above.sum(-1, keepdim=True) - alpha).div_(count).clamp_min_(0)
    return torch.minimum(torch.maximum(groups, -level), level).view(len(w), -1)[:, :width]


def _largest(gram: Tensor) -> Tensor:
    """lambda_max of gram [in, in], by power iteration from a fixed start; above 0."""
    vector = torch.randn(len(gram), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(gram)
    size = vector.norm()
    for _ in _steps(POWERS, gram):
        vector = gram @ (vector / size)
        size = vector.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return size
