"""Orthonormal transforms T of a layer's inputs, x -> x T^T, and one of them for all layers that read the same x.

hadamard: Walsh-Hadamard, of `ops/hadamard.py`. dct: the cosine transform DCT-II. dht: Hartley's, Re - Im of Fourier's.
none: T = I. T^T is the inverse, so nothing is kept for a backward.
q, k and v get one transform, as do gate and up, by the identity of x: each thread remembers its last result until x
dies or is written to. Nothing else keeps it: x dies with the layer's forward, and with it goes the entry.
Left out: sharing under torch.compile (which sees the equal calls itself) and in inference mode (no version to check).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..errors import QtuneError
from ..ops import factor, fwht
from ..quant.linear import autocast

TRANSFORMS = ("hadamard", "none", "dct", "dht")


def check_size(n: int, kind: str, fallback: str = "") -> None:
    """QtuneError where T of size n does not exist; `fallback` is what the user may do about it."""
    if kind != "hadamard":
        return
    try:
        factor(n)
    except QtuneError as fault:
        raise QtuneError("Q107", f"input width {n}: {fault}{fallback}") from fault


def transform(x: Tensor, kind: str, inverse: bool = False) -> Tensor:
    """x [..., n] -> x T^T, or x T with `inverse`: shape and dtype of x, and a gradient."""
    if kind == "none":
        return x
    if kind == "hadamard":
        return fwht(x, x.shape[-1] ** -0.5, inverse)
    y: Tensor = _Trigonometric.apply(x, kind, inverse)
    return y


class _Trigonometric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, inverse: bool) -> Tensor:
        ctx.kind, ctx.inverse = kind, inverse
        wide = x if x.dtype == torch.float64 else x.float()
        return (_dht(wide) if kind == "dht" else (_dct_inverse if inverse else _dct)(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return transform(dy, ctx.kind, not ctx.inverse), None, None


def _dht(x: Tensor) -> Tensor:
    """sum over j of x_j (cos + sin)(2 pi j k / n), by sqrt(n): symmetric, its own inverse."""
    spectrum = torch.fft.fft(x, norm="ortho")
    return spectrum.real - spectrum.imag


def _turns(x: Tensor) -> Tensor:
    """e^(-i pi k / 2n), with the factors that make the cosine transform orthonormal: complex [n]."""
    n = x.shape[-1]
    angle = torch.arange(n, dtype=torch.float64, device=x.device) * (-torch.pi / (2 * n))
    size = torch.full_like(angle, (2 / n) ** 0.5)
    size[:1].fill_(n**-0.5)
    return torch.polar(size, angle).to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)


def _dct(x: Tensor) -> Tensor:
    """One Fourier transform of the same size, of the even places and then the odd ones backwards (Makhoul 1980)."""
    folded = torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1)
    return (torch.fft.fft(folded) * _turns(x)).real


def _dct_inverse(y: Tensor) -> Tensor:
    """The transpose of `_dct`, step by step."""
    n = y.shape[-1]
    folded = torch.fft.fft(y * _turns(y)).real
    x = torch.empty_like(y)
    half = (n + 1) // 2
    x[..., ::2], x[..., 1::2] = folded[..., :half], folded[..., half:].flip(-1)
    return x


# ---- one transform for all that read the same x


class _Last(threading.local):
    """What this thread transformed last: whose it is, what decides about the result, and the result."""

    owner: weakref.ref[Tensor] | None = None
    key: tuple[Any, ...] = ()
    version = 0
    held: Callable[[], Tensor | None] | None = None


_last = _Last()


def _key(x: Tensor, kind: str) -> tuple[Any, ...]:
    target = torch.get_autocast_dtype(x.device.type) if _casts(x) else x.dtype
    return kind, x._version, x.requires_grad, torch.is_grad_enabled(), target


def _casts(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def shared_transform(x: Tensor, kind: str) -> Tensor:
    """`transform` of x (under autocast: of x as products take it), made once for consecutive calls with the same x."""
    if kind == "none" or torch.compiler.is_compiling() or x.is_inference():
        return transform(autocast(x), kind)
    key = _key(x, kind)
    if _last.owner is not None and _last.owner() is x and _last.key == key and _last.held is not None:
        found = _last.held()
        if found is not None and found._version == _last.version:  # nobody wrote into the result
            return found
    y = transform(autocast(x), kind)
    _remember(x, key, y)
    return y


def _remember(x: Tensor, key: tuple[Any, ...], y: Tensor) -> None:
    last = _last.__dict__  # of this thread, also where x dies in another one

    def forget(gone: weakref.ref[Tensor]) -> None:
        if last.get("owner") is gone:
            last.clear()

    # a leaf lives in the graph of its y: held strongly, y would keep x, and x would never die
    leaf = x.requires_grad and x.is_leaf
    held: Callable[[], Tensor | None] = TensorWeakRef(y) if leaf else lambda: y
    last.update(owner=weakref.ref(x, forget), key=key, held=held, version=y._version)
