"""QuantLinear: a frozen linear layer over a packed weight, the only base that an adapter ever sees; QuantEmbedding:
the same for a table.

    y = x W^T + b, dx = dy W; the backward keeps the packed weight only, and there is no gradient for it.
Autograd of the frozen product lives here and nowhere else, so ops and kernels are pure functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QtuneError
from .scheme import Parts, Scheme, flatten, views


class _FrozenMatmul(torch.autograd.Function):
    """x [..., in], packed uint8 [bytes] -> x W^T [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.scheme, ctx.shape = scheme, shape
        return scheme.matmul(x, views(scheme, packed, shape), shape, False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        return ctx.scheme.matmul(dy, views(ctx.scheme, packed, ctx.shape), ctx.shape, True), None, None, None


class _FrozenPlusLowRank(torch.autograd.Function):
    """x [..., in], packed, A [rank, in], B [out, rank] -> x W^T + (s x A^T) B^T [..., out].

    The low-rank parts are added inside of the products, in place: no tensor of the size of x or y but the results.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scheme: Scheme, shape: tuple[int, int], A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        inner = torch.mm(x.reshape(-1, shape[1]), A.t()).mul_(scale)
        learned = ctx.needs_input_grad[4:6]  # x and x A^T are kept for the gradients of A and of B alone
        ctx.save_for_backward(x if learned[0] else None, packed, A, B, inner if learned[1] else None)
        ctx.scheme, ctx.shape, ctx.scale = scheme, shape, scale
        inner = inner.view(*x.shape[:-1], -1)
        return scheme.matmul(x, views(scheme, packed, shape), shape, False, inner, B)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, packed, A, B, inner = ctx.saved_tensors
        rows = dy.reshape(-1, ctx.shape[0])
        dx, dA, dB = None, None, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
            d_inner = torch.mm(rows, B).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            parts, below = views(ctx.scheme, packed, ctx.shape), d_inner.view(*dy.shape[:-1], -1)
            dx = ctx.scheme.matmul(dy, parts, ctx.shape, True, below, A)
        if ctx.needs_input_grad[4]:
            dA = torch.mm(d_inner.t(), x.reshape(-1, ctx.shape[1]))
        if ctx.needs_input_grad[5]:
            dB = torch.mm(rows.t(), inner)
        return dx, None, None, None, dA, dB, None


def autocast(x: Tensor) -> Tensor:
    """x as torch's own products and attention would take it: inside of an op, autocast would change the dtype unseen by
    its fake."""
    kind = x.device.type
    # "meta" is no device of autocast's: asking for it raises
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


class _Packed(nn.Module):
    """What QuantLinear and QuantEmbedding share: one flat frozen uint8 parameter and what is read from it."""

    packed: nn.Parameter
    own = False  # are the codes others than packing the checkpoint gives, so that a run must keep them?
    pack: Callable[[Tensor], Parts] | None = None  # chooses the codes of `set_weight`; None: rounds to nearest
    home: torch.device | None = None  # where it computes, if `packed` waits elsewhere (memory/stream.py)
    release: Callable[[Tensor], None] | None = None  # told when a reader outside of a step is done with `packed`

    def __init__(
        self, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, device: torch.device | str | None, name: str
    ) -> None:
        super().__init__()
        self.shape, self.scheme, self.dtype, self.name = shape, scheme, dtype, name
        self.packed = nn.Parameter(
            torch.empty(scheme.nbytes(shape), dtype=torch.uint8, device=device), requires_grad=False
        )

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self.home or self.packed.device

    @property
    def here(self) -> Tensor:
        """`packed` on the device that it computes on: a copy where it waits elsewhere, and nobody has brought it."""
        return self.packed if self.packed.device == self.device else self.packed.to(self.device)

    @property
    def parts(self) -> Parts:
        """The named parts, as views of `packed`."""
        return views(self.scheme, self.packed, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A fresh dense copy [out, in] that the caller may keep. Costly: not for a forward pass."""
        w = self.scheme.unpack(views(self.scheme, self.here, self.shape), self.shape, dtype)
        self._done()
        return w

    def set_weight(self, w: Tensor) -> None:
        """Pack w [out, in] anew; the codes are then the run's own. Raises QtuneError for another shape, NaN or
        infinity."""
        if tuple(w.shape) != self.shape:
            raise QtuneError("Q305", f"{self.name or 'weight'} is {tuple(w.shape)}, the layer is {self.shape}")
        pack = self.pack or (lambda w: self.scheme.checked_pack(w, self.name or "weight"))
        self.set_parts(pack(w.detach()))

    def set_parts(self, parts: Parts) -> None:
        """Take parts that something else chose; `own` from then on. Raises QtuneError where they are not the
        scheme's."""
        self.own = True
        flat = flatten(self.scheme, parts, self.shape)
        if self.packed.is_meta:
            self.packed = nn.Parameter(flat, requires_grad=False)
        else:
            with torch.no_grad():  # not through .data: a backward that still needs the old bytes must be told
                self.packed.copy_(flat)
            self._done()

    def _done(self) -> None:
        if self.release is not None:
            self.release(self.packed)

    def magnitude(self) -> float:
        """A number to compare within 1e-4 beside `digest`, which does not see all of a doubly quantized scale."""
        return self.scheme.magnitude(self.parts)

    def digest(self, *, whole: bool = False) -> str:
        """sha256 of what identifies the packed weight: scheme, shape and the parts that `scheme.identity()` names, or
        with `whole` all of them."""
        text = hashlib.sha256(f"{self.scheme}{self.shape}".encode())
        parts = self.parts
        for name in parts if whole else self.scheme.identity():
            text.update(parts[name].detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        self._done()
        return text.hexdigest()


class QuantLinear(_Packed):
    """Frozen y = x W^T + b over a packed W [out, in].

    name: the module's name in the model. dtype: the model's compute dtype, in which adapters are made; the product
    itself is in x's dtype. conv1d: the checkpoint stores W transposed (GPT-2's Conv1D); here it is always [out, in].
    """

    bias: nn.Parameter | None
    routed = False  # one of a mixture's experts: only the tokens that a router sends reach it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        name: str = "",
        conv1d: bool = False,
    ) -> None:
        super().__init__((out_features, in_features), scheme, dtype, device, name)
        self.in_features, self.out_features, self.conv1d = in_features, out_features, conv1d
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> x W^T [..., out], without the bias; in x's dtype, under autocast in autocast's."""
        return _FrozenMatmul.apply(autocast(x), self.here, self.scheme, self.shape)

    def product_plus(self, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """x [..., in], A [rank, in], B [out, rank] -> x W^T + scale x A^T B^T [..., out], without the bias.

        A and B get gradients where they ask for them; what is kept for the backward is A, B, x for the gradient of A
        and x A^T for that of B. All in x's dtype, under autocast in
        autocast's.
        """
        x = autocast(x)
        return _FrozenPlusLowRank.apply(x, self.here, self.scheme, self.shape, A.to(x.dtype), B.to(x.dtype), scale)

    def product_and(self, x: Tensor, inner: Tensor, B: Tensor) -> Tensor:
        """x [..., in], inner [..., rank], B [out, rank] -> x W^T + inner B^T [..., out], without the bias; all in x's
        dtype."""
        if torch.is_grad_enabled() and (x.requires_grad or inner.requires_grad or B.requires_grad):
            return self.product(x) + nn.functional.linear(inner, B)
        return self.scheme.matmul(x, views(self.scheme, self.here, self.shape), self.shape, False, inner, B)

    def shift(self, y: Tensor) -> Tensor:
        """y [..., out] plus the bias, if there is one."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.shift(self.product(x))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.scheme}, bias={self.bias is not None}"


class QuantEmbedding(_Packed):
    """Frozen table over packed rows: ids [...] -> [..., embedding_dim] in `dtype`, times `scale` (Gemma)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        *,
        padding_idx: int | None = None,
        scale: float | None = None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        name: str = "",
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), scheme, dtype, device, name)
        self.num_embeddings, self.embedding_dim, self.padding_idx, self.scale = (
            num_embeddings,
            embedding_dim,
            padding_idx,
            scale,
        )

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> rows [..., embedding_dim]."""
        rows = self.scheme.rows(ids, self.parts, self.shape, self.dtype)
        # a scalar on the CPU, whatever torch's default device is: it goes along without a copy
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype, device="cpu")

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"
