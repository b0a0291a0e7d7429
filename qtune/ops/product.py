"""The product with a dequantized weight: the buffer that W is unpacked into, and what every packed format shares.

    y = x W^T + inner factor^T, W dense for the moment of the product only
A W of more than TILE weights (an output head, a layer of a 70B model) is unpacked TILE at a time, some of its rows:
    y[:, rows] = x W[rows]^T;    with `transpose`  y = sum over tiles of x[:, rows] W[rows], summed in fp32
Left out: the kernels that unpack inside of the product, which the formats' own ops ask for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from .. import backend
from .registry import Scratch, is_fp64

TILE = 1 << 26  # weights that are dense at a time: 128 MiB in bf16. No layer of a 7B or 8B model has more, heads do
Fill = Callable[[int, int, Tensor], None]  # (first, last, w): rows first to last - 1 of W, dense, into w [rows, in]


class _Arenas(threading.local):
    """Per thread: (dtype, device, stream) -> buffer."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}


_arenas = _Arenas()
_streams: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}  # CUDA's, of all threads
_lock = threading.RLock()


def arena(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer for one dequantized weight, reused from call to call: fresh pages cost as much as the dequantization.

    One per dtype, device and thread; on CUDA per stream, which orders what autograd's thread and the caller's do: hold
    `arena_turn` from here to the last use. As large as the largest weight or tile so far. Its content lives until
    the next call: only the ops of packed weights may use it. Never an inference tensor, which an evaluation before
    training would else leave behind and training could not write.
    """
    cuda = device.type == "cuda"
    key = (dtype, device, torch.cuda.current_stream(device).cuda_stream if cuda else 0)
    buffers = _streams if cuda else _arenas.buffers
    if key not in buffers or buffers[key].numel() < numel:
        buffers.pop(key, None)  # release before growing
        with torch.inference_mode(False):
            buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffers[key][:numel]


def arena_turn(device: torch.device) -> AbstractContextManager[Any]:
    """Two threads of one CUDA stream must not launch into the arena between each other."""
    return _lock if device.type == "cuda" else nullcontext()


def serving(reference: Callable[..., None], out: Tensor) -> Callable[..., None]:
    """What fills `out` on its device: the kernel of that name, else the reference."""
    kernel = None if is_fp64(out) else backend.kernel(reference.__name__, out.device.type)
    return kernel or reference


def product(x: Tensor, w: Tensor, transpose: bool) -> Tensor:
    """x W^T, or with `transpose` x W; W dense, [out, in]."""
    return x @ w if transpose else torch.nn.functional.linear(x, w)


def plus(y: Tensor, inner: Tensor | None, factor: Tensor | None, transpose: bool) -> Tensor:
    """y [..., n], fresh, with inner factor^T (`transpose`: inner factor) added in place, if they are given."""
    if inner is not None and factor is not None:
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(inner.reshape(-1, inner.shape[-1]), factor if transpose else factor.t())
    return y


def without_unpacking(name: str, x: Tensor, *rest: object) -> Tensor | None:
    """The product by a kernel that dequantizes inside of it, where there is one and it takes these arguments."""
    kernel = None if is_fp64(x) else backend.kernel(f"{name}_fused", x.device.type)
    return kernel(x, *rest) if kernel else None


# ---- tiles


def tile_rows(shape: Sequence[int], step: int) -> int:
    """Rows of W [out, in] that are dense at a time, a multiple of `step`; all, where they are no more than TILE."""
    if prod(shape) <= TILE:
        return shape[0]
    return min(shape[0], max(1, TILE // (shape[1] * step)) * step)


def rows_of_blocks(width: int, block: int) -> int:
    """The smallest number of rows that is a whole number of blocks of the flat weight."""
    return block // gcd(max(1, width), block)


def _narrow(dtype: torch.dtype) -> bool:
    """Would a sum over tiles lose bits in it?"""
    return dtype.itemsize < 4


def _group(width: int) -> int:
    """Rows of x whose sums over tiles are held at a time: with the product of one tile no more than a tile in bf16."""
    return max(1, TILE // (3 * max(1, width)))


def product_scratch(
    name: str, device_type: str, shape: Sequence[int], step: int, transpose: bool, x: Tensor, *rest: object
) -> Scratch:
    """What a product of a packed W [out, in] takes: the kernel's own, or W, or a tile of it, in the arena.

    step: as `arena_product`'s; rest: the op's arguments behind x. Kernels for GPUs serve few tokens only and take
    nothing: there the arena is the upper bound.
    """
    sizes = backend.scratch(f"{name}_fused", device_type) if device_type == "cpu" and not is_fp64(x) else None
    taken = sizes(x, *rest) if sizes else None
    return arena_scratch(device_type, x, shape, step, transpose) if taken is None else taken


def arena_scratch(device_type: str, x: Tensor, shape: Sequence[int], step: int, transpose: bool) -> Scratch:
    """What `arena_product` takes: W, or a tile of it, and with `transpose` sums over tiles and the product of one."""
    rows, size = tile_rows(shape, step), x.element_size()
    taken = {f"arena {x.dtype}": rows * shape[1] * size}
    if transpose and rows < shape[0]:
        many = min(x.numel() // shape[0], _group(shape[1]))
        each = size if not _narrow(x.dtype) else 4 + size + (4 if device_type == "cpu" else 0)  # a CPU casts to add
        taken["temporary"] = many * shape[1] * each
    return taken


def arena_product(
    fill: Fill,
    step: int,
    x: Tensor,
    shape: Sequence[int],
    transpose: bool,
    inner: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """x W^T or x W, plus what inner and factor add, W [out, in] unpacked by `fill` into the arena, in x's dtype.

    step: a tile begins at a multiple of so many rows, where the format's blocks do.
    """
    with arena_turn(x.device):
        rows = tile_rows(shape, step)
        w = arena(rows * shape[1], x.dtype, x.device).view(rows, shape[1])
        if rows == shape[0]:
            fill(0, rows, w)
            return plus(product(x, w, transpose), inner, factor, transpose)
        y, flat = product_like(x, shape, transpose), x.reshape(-1, x.shape[-1])
        out = y.view(len(flat), y.shape[-1])  # y itself is no view: the loss writes into it, which autograd then allows
        if transpose:
            for part in _parts(len(flat), _group(shape[1])):
                out[part] = _summed(fill, flat[part], w, shape)
        else:
            for part, tile in _tiles(fill, w, shape):
                torch.mm(flat, tile.t(), out=out[:, part])
        return plus(y, inner, factor, transpose)


def _parts(count: int, step: int) -> Iterator[slice]:
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _tiles(fill: Fill, w: Tensor, shape: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """The rows of W that are dense now, and they themselves."""
    for part in _parts(shape[0], w.shape[0]):
        tile = w[: part.stop - part.start]
        fill(part.start, part.stop, tile)
        yield part, tile


def _summed(fill: Fill, x: Tensor, w: Tensor, shape: Sequence[int]) -> Tensor:
    """x [rows, out] -> x W [rows, in], in fp32 where x is narrower: added up in bf16, every tile would cost a
    rounding of the sum."""
    wide = torch.float32 if _narrow(x.dtype) else x.dtype
    sums = torch.zeros(x.shape[0], shape[1], dtype=wide, device=x.device)
    for part, tile in _tiles(fill, w, shape):
        if wide == x.dtype:
            sums.addmm_(x[:, part], tile)
        else:
            sums += x[:, part] @ tile
    return sums


def product_like(x: Tensor, shape: Sequence[int], transpose: bool) -> Tensor:
    """What a product's shape function returns."""
    return x.new_empty((*x.shape[:-1], shape[1] if transpose else shape[0]))
