"""Cross entropy in place on the CPU: the ctypes wrapper of loss.cpp, for logits in fp32, bf16 and fp16.

The function takes the op's own arguments; `simd` (scalar, avx2, avx512, neon) forces a path, for tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtune.errors import QtuneError

from .library import DTYPES, FLAG, POINTER, SIZE, Library, fits, part, require, simd_number

DOUBLE = ctypes.c_double


def _self_test(library: ctypes.CDLL) -> bool:
    """Two equal logits, by hand: gradients 1/2 and -1/2, loss log 2; a label outside of the vocabulary is refused."""
    logits, loss, label = (ctypes.c_float * 2)(3, 3), (ctypes.c_float * 1)(), (ctypes.c_int64 * 1)(1)
    refused = library.qtune_cross_entropy(logits, 0, 1, 2, 2, (ctypes.c_int64 * 1)(2), 0.0, 0.0, 1, loss, 1, -1) == 1
    library.qtune_cross_entropy(logits, 0, 1, 2, 2, label, 0.0, 0.0, 1, loss, 1, -1)
    return refused and tuple(logits) == (0.5, -0.5) and abs(loss[0] - 0.6931472) < 1e-7


LIBRARY = Library(
    "loss.cpp",
    ("layers_exp.h", "layers_lanes.h", "loss_body.h", "simd.h", "simd_x86.h"),
    {"qtune_cross_entropy": (POINTER, FLAG, *[SIZE] * 3, POINTER, DOUBLE, DOUBLE, FLAG, POINTER, FLAG, FLAG)},
    _self_test,
)


def _refuse(logits: Tensor, labels: Tensor) -> None:
    """Raise what does not fit, labels included, if anything does not."""
    rows, vocab = logits.shape
    require([
        (fits(logits, logits.numel(), *DTYPES), f"logits of {logits.dtype} on {logits.device}; legal: {list(DTYPES)}"),
        part("labels", labels, rows, torch.int64),
    ])  # fmt: skip
    if rows and (int(labels.min()) < 0 or int(labels.max()) >= vocab):
        raise QtuneError(
            "Q222", f"cross entropy: labels {int(labels.min())} to {int(labels.max())}; legal: 0 to {vocab - 1}"
        )


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    gradient: bool = True,
    simd: str = "auto",
) -> Tensor:
    """logits [rows, vocab], with `gradient` overwritten with theirs; labels int64 [rows] -> losses fp32 [rows]."""
    rows, vocab = logits.shape
    if not (
        logits.dtype in DTYPES and logits.is_cpu and labels.is_cpu and labels.dtype == torch.int64
        and labels.shape == (rows,)
    ):  # fmt: skip
        _refuse(logits, labels)
    plain = (vocab < 2 or logits.stride(1) == 1) and (rows < 2 or logits.stride(0) >= vocab)
    goal = logits if plain else logits.clone(memory_format=torch.contiguous_format)
    labels, losses = labels.contiguous(), torch.empty(rows, dtype=torch.float32)
    size, threads = (DTYPES[goal.dtype], rows, vocab, goal.stride(0)), torch.get_num_threads()
    asked = labels.data_ptr(), smoothing, z_loss, gradient, losses.data_ptr()
    try:
        LIBRARY.call("qtune_cross_entropy", goal.data_ptr(), *size, *asked, threads, simd_number(simd))
    except QtuneError:
        _refuse(logits, labels)  # the library looks at the labels first: a fault is put into words here
        raise
    if gradient and goal is not logits:
        logits.copy_(goal)
    return losses


KERNELS: dict[str, Callable[..., Any]] = {"cross_entropy_": cross_entropy_}
