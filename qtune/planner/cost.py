"""Costs: what the ops of a trace compute and move, for the time estimate; by segment, class of op and dtype.

A multiply-add counts 2. Bytes are those of all tensors that an op reads and writes; what is expanded counts once. A
product with a packed weight also counts, as `unpack`, the dense copy that is written and read again. Copies between
host and device are a class of their own, LINK, whose bytes go over the bus once. Bytes of mapped files are READ once in
a layer's pass, however many products read them there, and WRITTEN as they are copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from torch import Tensor

from ..memory import DISK, HOST, place_of

FREE = {
    f"aten::{name}" for name in ("_unsafe_view", "empty", "empty_like", "new_empty", "detach", "_local_scalar_dense")
}
Key = tuple[int, str, str]  # segment, class, dtype
Made = Sequence[Tensor]
LINK = "copies between host and device"
READ, WRITTEN = "read from files", "written to files"
WAITS = {HOST: "host memory", DISK: "files"}  # what waits in a place
JOINED = -1  # the segment of what was traced apart: forward and backward of a step's micro-batches


class Costs:
    """rows: (segment, class, dtype) -> [flops, bytes, launches]."""

    def __init__(self) -> None:
        self.rows: dict[Key, list[int]] = {}
        self._read: set[tuple[int, int]] = set()  # segment and storage
        self._files = False  # are there any?

    def add(self, segment: int, op: str, args: tuple[Any, ...], made: Made) -> None:
        """Count one call of an op with these arguments and results."""
        name = op.partition(".")[0]
        if name in FREE:
            return
        made = [t for t in made if isinstance(t, Tensor)]
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if not (tensors or made):
            return
        if self._files:
            self._disk(segment, name, tensors)
        if name == "aten::copy_" and isinstance(args[1], Tensor) and place_of(args[0]) != place_of(args[1]):
            self._count((segment, LINK, str(args[0].dtype).removeprefix("torch.")), 0, made[0].nbytes)
            return
        kind, flops = FLOPS.get(name, (_kind(name), None))
        dtype = str((made or tensors)[0].dtype).removeprefix("torch.")
        nbytes = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*tensors, *made))
        self._count((segment, kind, dtype), flops(args, made) if flops else 0, nbytes)
        if name in UNPACKED:
            dense = UNPACKED[name](args) * args[0].element_size()
            self._count((segment, "unpack", dtype), 0, 2 * dense)

    def _disk(self, segment: int, name: str, tensors: Sequence[Tensor]) -> None:
        """What an op reads of mapped files, or writes to them."""
        for number, tensor in enumerate(tensors):
            if place_of(tensor) != DISK:
                continue
            if name == "aten::copy_" and number == 0:
                self._count((segment, WRITTEN, ""), 0, tensor.nbytes, 0)
                continue
            once = segment, tensor.untyped_storage()._cdata
            if name == "aten::copy_" or once not in self._read:
                whole = tensor.nbytes if name == "aten::copy_" else tensor.untyped_storage().nbytes()
                self._count((segment, READ, ""), 0, whole, 0)
                self._read.add(once)

    def wait(self, segment: int, nbytes: int, place: str = HOST) -> None:
        """A tensor in host memory beside the device, or in a file."""
        self._files |= place == DISK
        self._count((segment, WAITS[place], ""), 0, nbytes, 0)

    def waiting(self, place: str = HOST) -> int:
        """Bytes of all such tensors; they are no costs of a step, so they are taken out."""
        keys = [key for key in self.rows if key[1] == WAITS[place]]
        return sum(self.rows.pop(key)[1] for key in keys)

    def join(self, other: Costs) -> None:
        """Add another trace's costs, all to the segment JOINED."""
        for (_, kind, dtype), (flops, nbytes, launches) in other.rows.items():
            self._count((JOINED, kind, dtype), flops, nbytes, launches)

    def _count(self, key: Key, flops: int, nbytes: int, launches: int = 1) -> None:
        row = self.rows.setdefault(key, [0, 0, 0])
        row[0] += flops
        row[1] += nbytes
        row[2] += launches


def _kind(name: str) -> str:
    return "optimizer" if "adam" in name else "elementwise"


def _mm(args: Any, made: Made) -> int:
    """[..., m, k] times [..., k, n]: the result has m n values a matrix."""
    return 2 * made[0].numel() * args[0].shape[-1]


def _addmm(args: Any, made: Made) -> int:
    return 2 * args[0].numel() * args[1].shape[-1]


def _packed(inner: int) -> Callable[[Any, Made], int]:
    """x [tokens, k] times a packed W, which is k x n or n x k. inner: the argument that a low-rank part's is."""

    def flops(args: Any, made: Made) -> int:
        low = 2 * args[inner].shape[-1] * made[0].numel() if len(args) > inner and args[inner] is not None else 0
        return 2 * args[0].numel() * made[0].shape[-1] + low

    return flops


def _attention(products: int, query: int, keys: int) -> Callable[[Any, Made], int]:
    """Products of [T, D] with [S, D] a query head; causal kernels leave out half of them. query: the argument that q
    is, k follows; keys: the dimension of k that counts positions."""

    def flops(args: Any, made: Made) -> int:
        q, k = args[query], args[query + 1]
        return products * int(q.numel()) * int(k.shape[keys])  # 2 for multiply and add, half of it unseen

    return flops


FLOPS: dict[str, tuple[str, Callable[[Any, Made], int]]] = {
    "aten::mm": ("mm", _mm),
    "aten::bmm": ("mm", _mm),
    "aten::addmm": ("mm", lambda args, made: 2 * made[0].numel() * args[1].shape[-1]),
    "aten::addmm_": ("mm", _addmm),
    "aten::_grouped_mm": ("mm", _mm),
    "qtune::blockwise4_matmul": ("mm", _packed(9)),
    "qtune::grouped_matmul": ("mm", _packed(10)),
    "qtune::int8_matmul": ("mm", lambda args, made: 2 * args[0].numel() * made[0].shape[-1]),
    "qtune::attention": ("attention", _attention(2, 0, 1)),
    "qtune::attention_backward": ("attention", _attention(5, 1, 1)),
    **{
        f"aten::_scaled_dot_product_{kind}": ("attention", _attention(2, 0, 2))
        for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention")
    },
    **{
        f"aten::_scaled_dot_product_{kind}_backward": ("attention", _attention(5, 1, 2))
        for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention")
    },
}
UNPACKED: dict[str, Callable[[Any], int]] = {
    "qtune::blockwise4_matmul": lambda args: prod(args[7]),
    "qtune::grouped_matmul": lambda args: prod(args[8]),
    "qtune::int8_matmul": lambda args: int(args[1].numel()),
}
