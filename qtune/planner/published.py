"""A base as its publisher wrote it, without its file: the pieces that the loader would read, on meta or random.

Names and shapes are the skeleton's; tied tensors are in the file once. A weight of a safetensors file is a view of the
mapped file and takes no memory; a weight of a GGUF file is dequantized to fp32, and an expert's matrix is put together
from the file's gate and up, as fused experts (3-D) that stay dense are from all of theirs: these do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..checkpoint import Piece, Pieces
from ..gguf import CHUNK

Read = Callable[[str, tuple[int, ...]], Tensor]
Rows = Callable[[str, tuple[int, ...]], Iterator[Tensor]]


def published(skeleton: Any, read: Read, rows: Rows | None = None) -> Pieces:
    """The pieces of an unpacked skeleton in the loader's order. read(name, shape) -> the tensor; rows: the same in
    blocks, for tensors that are not packed."""
    from transformers.core_model_loading import dot_natural_key

    tied, found = skeleton.all_tied_weights_keys, Pieces()
    for name, tensor in skeleton.state_dict().items():
        if name not in tied:
            found.pieces.append(_piece(name, tuple(tensor.shape), read, rows))
    found.pieces.sort(key=lambda piece: dot_natural_key(piece.source))
    return found


def _piece(name: str, shape: tuple[int, ...], read: Read, rows: Rows | None) -> Piece:
    blocks = None if rows is None or not shape else lambda: rows(name, shape)
    return Piece(name, {name: shape}, lambda: {name: read(name, shape)}, blocks)


def random_blocks(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Random bf16 rows, a few at a time."""
    step = max(1, CHUNK // max(1, prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield random_weight(name, (min(step, shape[0] - first), *shape[1:]))


def random_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """bf16 values of the size that initialisation gives, 0.02."""
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02)


class MetaFile:
    """Reads on meta, for a trace that counts what the target's device holds.

    dtype: the file's; fresh: reading makes a new tensor (GGUF); on_device: is what is read in host memory the device's,
    as on a CPU? site: the packed layer of a name, or None. host: the most bytes of host memory that one reading took.
    """

    def __init__(self, dtype: torch.dtype, *, fresh: bool, on_device: bool, site: Callable[[str], Any]) -> None:
        self.dtype, self.fresh, self.on_device, self.site = dtype, fresh, on_device, site
        self.host = 0

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of this name; a weight that will be packed is copied to a GPU first."""
        nbytes, layer = prod(shape) * self.dtype.itemsize, self.site(name)
        stacked = len(shape) == 3 or getattr(layer, "routed", False)
        if self.fresh:
            self.host = max(self.host, nbytes + 4 * min(prod(shape), CHUNK))
        elif stacked:
            self.host = max(self.host, 2 * nbytes)
        if self.on_device and self.fresh:
            blocks = self._made((min(prod(shape), CHUNK),))
            made = self._made(shape)
            del blocks
            return made
        if self.on_device and stacked:
            experts = self._made(shape)
            made = self._made(shape)
            del experts
            return made
        if not self.on_device and layer is not None:
            return self._made(shape)
        with _disable_current_modes():
            return self._made(shape)

    def _made(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")
