"""The input table in host memory: ids go there, rows are gathered there, only the rows come to the device.

A dense table of 128,256 x 4,096 takes 1 GiB in bf16, of which a micro-batch of 2,048 tokens reads 16 MiB at most. A
head that is the same tensor (tied) is multiplied with on the device, so there nothing can be saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QtuneError
from ..quant import QuantEmbedding
from ..vocabulary import bare
from .host import HOST, mark, on_host

TIED = (
    "memory.embeddings is host, but the output head is the input table and computes on the device: it stays there; "
    "scheme.embeddings packs both"
)


def table_on_host(model: Any, kind: str) -> str:
    """Put the input table of a loaded model into host memory, for good. kind: what its device is, or stands for on
    meta; a CPU's memory is the host's. Returns what the user must know, '' where that is nothing. Doing it again
    changes nothing. Raises QtuneError for a table of another kind than nn.Embedding and QuantEmbedding."""
    table: Any = bare(model.get_input_embeddings())
    if kind == "cpu" or hasattr(table, "rows_go_to"):
        return ""
    if not isinstance(table, nn.Embedding | QuantEmbedding):
        raise QtuneError(
            "Q505",
            f"the input embedding of {type(model).__name__} is {type(table).__name__}, which cannot lie in host "
            "memory; set memory.embeddings to device",
        )
    hosted: Any = table  # of another class below
    kept: Any = type(table)
    own = list(table.parameters())
    if any(p is q for p in own for q in bare(model.get_output_embeddings()).parameters()):
        return TIED
    hosted.rows_go_to = own[0].device
    for name, parameter in hosted.named_parameters(recurse=False):
        hosted._parameters[name] = nn.Parameter(_to_host(parameter.detach()), requires_grad=False)
    for name, buffer in hosted.named_buffers(recurse=False):
        hosted._buffers[name] = _to_host(buffer)
    hosted.__class__ = _hosted(kept)
    return ""


def _to_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor there; on meta, where a plan runs, one that is said to be there."""
    with on_host():
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta" if tensor.is_meta else "cpu")
    return mark(there, HOST).copy_(tensor)


@cache
def _hosted(own: Any) -> type[nn.Module]:
    """The subclass of a table's class whose rows go to the device."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        """ids int64 [...], on the device -> rows [..., embedding_dim] there."""
        home = next(self.parameters()).device
        with on_host():
            rows = own.forward(self, ids.to(home, copy=True))
        return rows.to(self.rows_go_to, copy=True)

    def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `Module.to` and its kin do: the table stays where it is, in the dtype that they would give it; its rows
        go to the device that they would move it to."""
        for tensors in (self._parameters, self._buffers):
            for name, tensor in tensors.items():
                like = fn(torch.empty(0, dtype=tensor.dtype, device=self.rows_go_to))
                if like.dtype != tensor.dtype:
                    cast = mark(tensor.detach().to(like.dtype), HOST)
                    tensors[name] = nn.Parameter(cast, requires_grad=False) if tensors is self._parameters else cast
        self.rows_go_to = like.device
        return self

    return type(f"Hosted{own.__name__}", (own,), {"forward": forward, "_apply": apply, "__doc__": own.__doc__})
