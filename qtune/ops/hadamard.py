"""The Walsh-Hadamard transform of the last axis, for sizes n = K 2^m with a Hadamard matrix H_K.

    y = scale x H^T,   H = H_K (x) H_{2^m},   row = i_K 2^m + i_2,   H_{2^m}[i, j] = (-1)^popcount(i & j)

H_K is fixed for ever, for coefficients refer to it: Paley's second construction (symmetric) where it exists, else his
first, else Williamson's for the orders of `WILLIAMSON`, else a Kronecker product of two smaller ones. H H^T = n I, so
y H / (scale n) gives x back; y H^T does not, where H_K is not symmetric. Sources: Paley, J. Math. Phys. 12 (1933);
Williamson, Duke Math. J. 11 (1944), with the sequences of Baumert, Golomb and Hall (23, 1962) and of Hall's
Combinatorial Theory (29, 43); QWHA (arXiv 2509.17428). Left out: order 156 (39 2^m goes through 312), GF(p^k), k > 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..errors import QtuneError
from .packed import CHUNK
from .registry import is_fp64, op

LARGEST, LARGEST_ORDER = 1 << 16, 1 << 10  # of n and of K

# order / 4 -> the first rows of four symmetric circulants, the first half of each: bit j is 1 where entry j is -1
WILLIAMSON = {
    23: (0x5DC, 0x192, 0x538, 0xE88),
    29: (0x6B38, 0xB3A, 0xE90, 0x116C),
    43: (0x3CDA1C, 0x342B28, 0x135E04, 0x2450CE),
}


# ---- matrices


def _character(q: int) -> Tensor | None:
    """int8 [q, q]: 1 where a_i - a_j is a square of GF(q), 0 where it is 0, else -1; None if q is no p, p^2, p^3."""
    p = next((d for d in range(2, q + 1) if q % d == 0), 0)
    k = next((k for k in (1, 2, 3) if q > 1 and p**k == q), 0)
    if not k or p == 2:
        return None
    # x^k = c[0] + c[1] x + ..., irreducible: of degree 2 or 3 that is to have no root
    digits = [tuple(e // p**i % p for i in range(k)) for e in range(q)]
    rule = next(
        c for c in digits if k == 1 or all((r**k - sum(a * r**i for i, a in enumerate(c))) % p for r in range(p))
    )

    def square(a: tuple[int, ...]) -> tuple[int, ...]:
        full = [sum(a[i] * a[s - i] for i in range(k) if 0 <= s - i < k) for s in range(2 * k - 1)]
        for s in range(2 * k - 2, k - 1, -1):
            for i in range(k):
                full[s - k + i] += full[s] * rule[i]
        return tuple(v % p for v in full[:k])

    squares = {square(a) for a in digits[1:]}
    sign = [0, *(1 if a in squares else -1 for a in digits[1:])]
    minus = torch.tensor(digits)[:, None] - torch.tensor(digits)
    place = ((minus % p) * torch.tensor([p**i for i in range(k)])).sum(-1)
    return torch.tensor(sign, dtype=torch.int8)[place]


def _bordered(q: int, corner: int) -> Tensor | None:
    """[q+1, q+1]: a row of ones, a column of `corner`, the quadratic character: C C^T = q I."""
    inner = _character(q)
    if inner is None:
        return None
    c = torch.ones(q + 1, q + 1, dtype=torch.int8)
    c[0, 0], c[1:, 0], c[1:, 1:] = 0, corner, inner
    return c


def _symmetric_paley(order: int) -> Tensor | None:
    half = order // 2
    c = _bordered(half - 1, 1) if order % 4 == 0 and half % 4 == 2 else None
    if c is None:
        return None
    eye, plus, turn = torch.eye(half, dtype=torch.int8), [[1, 1], [1, -1]], [[1, -1], [-1, -1]]
    return torch.kron(c, c.new_tensor(plus)) + torch.kron(eye, c.new_tensor(turn))


def _skew_paley(order: int) -> Tensor | None:
    c = _bordered(order - 1, -1) if order % 4 == 0 else None
    return None if c is None else c + torch.eye(order, dtype=torch.int8)


def _williamson(order: int) -> Tensor | None:
    size = order // 4
    if order % 4 or size not in WILLIAMSON:
        return None
    step = (torch.arange(size)[:, None] - torch.arange(size)) % size
    step = torch.minimum(step, size - step)
    a, b, c, d = (1 - 2 * (torch.tensor(bits) >> step & 1) for bits in WILLIAMSON[size])
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in rows]).to(torch.int8)


def _product(order: int) -> Tensor | None:
    for left in range(2, int(order**0.5) + 1, 2):
        if order % left == 0:
            a, b = _matrix(left), _matrix(order // left)
            if a is not None and b is not None:
                return torch.kron(a, b)
    return None


@cache
def _matrix(order: int) -> Tensor | None:
    """int8 [order, order], or None; Sylvester's for a power of two."""
    if not 1 <= order <= LARGEST_ORDER:
        return None
    with torch.inference_mode(False), torch.device("cpu"):  # kept for ever, whatever is the default now
        if order & (order - 1) == 0:
            i = torch.arange(order)
            both, parity = i[:, None] & i, torch.zeros(order, order, dtype=torch.int64)
            for bit in range(10):
                parity ^= both >> bit & 1
            return (1 - 2 * parity).to(torch.int8)
        made = (make(order) for make in (_symmetric_paley, _skew_paley, _williamson, _product))
        return next((h for h in made if h is not None), None)


def hadamard_matrix(order: int) -> Tensor:
    """H_K, int8 [K, K] of 1 and -1 on the CPU, H_K H_K^T = K I; shared, so not to be written into.

    QtuneError where none of that order is built."""
    found = _matrix(order)
    if found is None:
        raise QtuneError(
            "Q603", f"no Hadamard matrix of order {order} is built; they have order 1, 2 or 4k, at most 1024"
        )
    return found


@lru_cache(maxsize=4096)
def _split(n: int) -> tuple[int, int] | None:
    if not 1 <= n <= LARGEST:
        return None
    order = n // (n & -n)
    if order == 1:
        return 1, n
    while n % order == 0 and order <= LARGEST_ORDER:
        if _matrix(order) is not None:
            return order, n // order
        order *= 2
    return None


def factor(n: int) -> tuple[int, int]:
    """n -> (K, 2^m) with n = K 2^m and the smallest K for which H_K is built; K = 1 for a power of two.

    QtuneError where there is none, which names the nearest sizes that work. The caller may pad x with zeros to the
    size above (`torch.nn.functional.pad(x, (0, size - n))`) and keep all of y, which has that size then.
    """
    found = _split(n)
    if found is None:
        near = [next((s for s in way if _split(s)), None) for way in (range(n - 1, 0, -1), range(n + 1, LARGEST + 1))]
        sizes = " and ".join(str(s) for s in near if s is not None) if n > 0 and n <= LARGEST else f"1 to {LARGEST}"
        raise QtuneError("Q603", f"no Hadamard transform of size {n}; the nearest sizes that work: {sizes}")
    return found


# ---- ops


def hadamard_kronecker(x: Tensor, base: Tensor, scale: float, transpose: bool) -> Tensor:
    """x [..., n], base int8 [K, K] of 1 and -1, n = K 2^m -> scale x (base (x) H_{2^m})^T, in x's dtype.

    With `transpose` it multiplies by base (x) H_{2^m} itself. Computed in fp32 and rounded once; fp64 in fp64.
    """
    n, order = x.shape[-1], base.shape[0]
    inner = n // order if order else 0
    if base.dim() != 2 or base.shape[1] != order or n < 1 or inner * order != n or inner & (inner - 1):
        raise QtuneError(
            "Q603", f"a base of shape {list(base.shape)} gives no transform of size {n}: wanted [K, K], n = K 2^m"
        )
    wide = torch.float64 if is_fp64(x) else torch.float32
    factors = [(base.t() if transpose else base).to(wide)]
    while inner > 1:
        size = min(inner, 64)
        factors.append(hadamard_matrix(size).to(x.device, wide))
        inner //= size
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, out = x.reshape(-1, n), y.view(-1, n)
    rows = max(1, CHUNK // n)
    for start in range(0, flat.shape[0], rows):
        part = flat[start : start + rows].to(wide)
        for h in factors:  # each takes the first axis and puts its own last, so that in the end all are back in order
            part = part.reshape(-1, h.shape[0], n // h.shape[0]).transpose(1, 2) @ h.t()
        out[start : start + rows] = part.reshape(-1, n) * scale
    return y


@op(hadamard_kronecker)
def _(x: Tensor, base: Tensor, scale: float, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


def _transform(x: Tensor) -> Callable[..., Any]:
    kernel = None if is_fp64(x) else backend.kernel("hadamard_kronecker", x.device.type)
    return kernel or hadamard_kronecker


@lru_cache(maxsize=256)
def _base(order: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return hadamard_matrix(order).to(device)


def hadamard(x: Tensor, scale: float, transpose: bool) -> Tensor:
    """x [..., n] fp32, bf16, fp16 or fp64 -> scale x H^T of the same shape and dtype, H as in `factor(n)`.

    With `transpose` scale x H: the gradient, and with scale / n the inverse. QtuneError for an n that `factor` refuses.
    """
    return _transform(x)(x, _base(factor(x.shape[-1])[0], x.device), scale, transpose)  # type: ignore[no-any-return]


@op(hadamard)
def _(x: Tensor, scale: float, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, transpose: bool) -> Tensor:
        ctx.scale, ctx.transpose = scale, transpose
        y: Tensor = torch.ops.qtune.hadamard(x, scale, transpose)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return fwht(dy, ctx.scale, not ctx.transpose), None, None


def fwht(x: Tensor, scale: float, transpose: bool = False) -> Tensor:
    """`hadamard` with a gradient: x [..., n] -> scale x H^T, or scale x H with `transpose`; nothing is saved."""
    y: Tensor = _Transform.apply(x, scale, transpose)
    return y
