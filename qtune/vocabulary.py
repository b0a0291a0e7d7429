"""Rows of the vocabulary that are trained, those of new tokens, over an input table and a head that stay frozen.

    table   id -> rows[place of id] where the id has a row of its own, else the frozen row
    head    logits = W x, and rows x in the places of these ids
Tied models have one matrix of rows for both. New ids lie in rows that the table has beyond its tokenizer's tokens, or
behind the last one: then the vocabulary is longer. Only the rows get a gradient; as the table lies below all layers,
it goes through all of them. First values as in Hewitt, "Initializing New Word Embeddings" (2021): a mean, so that new
tokens neither take all of the probability nor have the length of noise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import QtuneError, listed
from .quant import QuantEmbedding, QuantLinear

SHOWN = 8  # ids that an error lists
BLOCK = 4096  # rows that are read at a time for their mean
TABLE, HEAD = "tokens.table", "tokens.head"  # the rows in files


@dataclass(frozen=True)
class Token:
    """A token with rows of its own. new: added to the tokenizer; pieces: what its text was split into before that."""

    text: str
    id: int
    new: bool = True
    pieces: tuple[int, ...] = ()


class _Own(torch.autograd.Function):
    """frozen [..., hidden], rows [n, hidden], place [...] in rows, own [...]: has it one? -> [..., hidden]."""

    @staticmethod
    def forward(ctx: Any, frozen: Tensor, rows: Tensor, place: Tensor, own: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(place, own)
        ctx.count, ctx.scale = len(rows), scale
        mine = F.embedding(place, rows).to(frozen.dtype)
        return torch.where(own.unsqueeze(-1), mine if scale is None else mine * scale, frozen)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        place, own = ctx.saved_tensors
        # a product: its sums are wider than bf16 and in one order, those of an index_add are neither
        numbers = torch.arange(ctx.count, device=place.device).unsqueeze(1)
        chosen = (numbers == place.reshape(-1)) & own.reshape(-1)
        grad = chosen.to(dy.dtype) @ dy.reshape(-1, dy.shape[-1])
        return None, grad if ctx.scale is None else grad * ctx.scale, None, None, None


class _DenseLogits(torch.autograd.Function):
    """x [..., hidden], frozen W [count, hidden] and bias, rows [n, hidden] of ids [n], the first `within` of them below
    count -> logits [..., vocabulary]. No second tensor of that size: products go to their places in it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, ids: Tensor, within: int
    ) -> Tensor:
        count, flat = len(weight), x.reshape(-1, x.shape[-1])
        logits = x.new_empty(*x.shape[:-1], count + len(ids) - within)
        out = logits.view(-1, logits.shape[-1])
        torch.mm(flat, weight.t(), out=out[:, :count])
        out.index_copy_(1, ids, flat @ rows.t())
        if bias is not None:
            out[:, :count] += bias
        ctx.save_for_backward(x, weight, rows, ids)
        ctx.within = within
        return logits

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rows, ids = ctx.saved_tensors
        d = dy.reshape(-1, dy.shape[-1]).contiguous()
        own, inside = d.index_select(1, ids), ids[: ctx.within]
        dx = None
        if ctx.needs_input_grad[0]:
            d.index_fill_(1, inside, 0)
            dx = torch.mm(d[:, : len(weight)], weight).addmm_(own, rows).view(x.shape)
            d.index_copy_(1, inside, own[:, : ctx.within])  # whoever gave it finds it as it was
        return dx, None, None, own.t() @ x.reshape(-1, x.shape[-1]), None, None


class _Rows(nn.Module):
    """What table and head share. base: frozen, with `count` rows; rows [n, hidden] are of `ids`, which rise."""

    ids: Tensor

    def __init__(self, base: nn.Module, rows: nn.Parameter, tokens: Sequence[Token]) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.tokens = tuple(tokens)
        self.count = _weight(base).shape[0]
        self.register_buffer("ids", torch.tensor([t.id for t in tokens], device=rows.device), persistent=False)
        self.within = sum(token.id < self.count for token in tokens)  # the rest lies behind the last row of base

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole matrix: [vocabulary, hidden]."""
        return self.count + len(self.tokens) - self.within, self.rows.shape[1]

    def merged(self, dtype: torch.dtype) -> Tensor:
        """A fresh dense matrix [vocabulary, hidden]: the frozen rows, and the trained ones in their places. Raises
        QtuneError where a trained value is none of `dtype`."""
        whole = self.rows.new_empty(self.shape, dtype=dtype)
        for start in range(0, self.count, BLOCK):
            ids = range(start, min(start + BLOCK, self.count))
            whole[ids.start : ids.stop] = frozen_rows(self.base, ids)
        whole[self.ids] = self.rows.detach().to(dtype)
        if not torch.isfinite(whole[self.ids]).all():
            raise QtuneError("Q804", f"rows of new tokens overflow {dtype}; merge with --dtype bfloat16 or float32")
        return whole


class TokenTable(_Rows):
    """In the place of an input table."""

    def __init__(self, base: nn.Module, rows: nn.Parameter, tokens: Sequence[Token]) -> None:
        super().__init__(base, rows, tokens)
        self.scale = scale_of(base)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> rows [..., hidden]."""
        place = torch.searchsorted(self.ids, ids).clamp_(max=len(self.tokens) - 1)
        own = self.ids[place] == ids
        frozen = self.base(ids.masked_fill(own, 0))
        scale = None if self.scale is None else torch.tensor(self.scale, dtype=frozen.dtype, device="cpu")
        return _Own.apply(frozen, self.rows, place, own, scale)  # type: ignore[no-any-return]


class TokenHead(_Rows):
    """In the place of an output head. A bias of the head stays, and is 0 for ids behind its last."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> logits [..., vocabulary]."""
        rows = self.rows.to(x.dtype)
        if isinstance(self.base, nn.Linear):
            given = x, self.base.weight, self.base.bias, rows, self.ids, self.within
            return _DenseLogits.apply(*given)  # type: ignore[no-any-return]
        logits = self.base(x)
        own = F.linear(x, rows)
        if self.within:
            inside, ids = own[..., : self.within], self.ids[: self.within]
            bias = getattr(self.base, "bias", None)
            logits = logits.index_copy_(-1, ids, inside if bias is None else inside + bias[ids].to(own.dtype))
        return logits if self.within == len(self.tokens) else torch.cat((logits, own[..., self.within :]), -1)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias [vocabulary] of the whole matrix, if there is one."""
        given = getattr(self.base, "bias", None)
        return None if given is None else F.pad(given.detach().to(dtype), (0, self.shape[0] - self.count))


def scale_of(table: nn.Module) -> float | None:
    """What an input table multiplies its rows with (Gemma), None: nothing. Raises QtuneError for a table whose forward
    pass is its own."""
    if isinstance(table, QuantEmbedding):
        return table.scale
    kind = type(table).__name__.removeprefix("Hosted")  # memory/table.py
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    if kind.endswith("ScaledWordEmbedding") and isinstance(scale, int | float):
        return float(scale)
    if not isinstance(table, nn.Embedding) or kind != "Embedding" or table.max_norm is not None:
        raise QtuneError(
            "Q314",
            f"the input table is {type(table).__name__}, whose forward pass is its own: rows of new tokens cannot be "
            "put into it; leave `tokens` out",
        )
    return None


def bare(module: Any) -> Any:
    """The frozen table or head, without rows of new tokens."""
    return module.base if isinstance(module, _Rows) else module


def tied_head(model: Any) -> str | None:
    """The name of the output embedding if it is one with the input embedding (an adapted head is its own)."""
    head = model.get_output_embeddings()
    ends = bare(head), bare(model.get_input_embeddings())
    own, table = (getattr(m, "packed", getattr(m, "weight", None)) for m in ends)
    if own is None or own is not table:
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _weight(base: nn.Module) -> Any:
    """What has the shape [vocabulary, hidden]."""
    return base if isinstance(base, QuantEmbedding | QuantLinear) else base.weight


def frozen_rows(base: Any, ids: Sequence[int]) -> Tensor:
    """Rows of a frozen table or head, [ids, hidden] in fp32 (of float64 ones in that), not scaled."""
    if isinstance(base, QuantEmbedding | QuantLinear):
        wanted = torch.tensor(ids, device=base.packed.device)
        rows = base.scheme.rows(wanted, base.parts, base.shape, torch.float32).to(base.device)
    else:
        rows = base.weight.detach()[torch.tensor(ids, device=base.weight.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


# ---- in a model


@dataclass(frozen=True)
class Built:
    """Table and head with rows, not yet in their model. names: where they go."""

    names: tuple[str, str]
    table: TokenTable
    head: TokenHead

    def tensors(self) -> dict[str, nn.Parameter]:
        """Name in the file -> the rows; tied ones once."""
        tied = self.head.rows is self.table.rows
        return {TABLE: self.table.rows} if tied else {TABLE: self.table.rows, HEAD: self.head.rows}


def build_rows(model: Any, tokens: Sequence[Token]) -> Built:
    """Table and head of a model with room for the rows of `tokens`, which have no values yet. The model is as before.

    Raises QtuneError where it has no such table or head, and where ids between its last row and a token have none.
    """
    tokens = sorted(tokens, key=lambda token: token.id)
    table, head, kind = model.get_input_embeddings(), model.get_output_embeddings(), type(model).__name__
    if isinstance(table, _Rows):
        raise QtuneError("Q314", "this model has rows of new tokens already; load the base again to give it others")
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise QtuneError("Q314", f"{kind} has an input table for each layer, too, in which new tokens have no row")
    scale_of(table)
    if type(head) not in (nn.Linear, QuantLinear) or _weight(head).shape != _weight(table).shape:
        what = "it is adapted: leave it out of adapter.targets" if hasattr(head, "adapter") else type(head).__name__
        raise QtuneError("Q314", f"rows of new tokens cannot be put into the output head of {kind}: {what}")
    count, width = _weight(table).shape
    behind = [token.id for token in tokens if token.id >= count]
    end = min(max(behind, default=0), count + len(behind) + SHOWN)  # an id from a file may be any number
    if missing := [id for id in range(count, end) if id not in behind]:
        raise QtuneError(
            "Q314",
            f"the model has rows for the ids 0 to {count - 1}, and the tokenizer has tokens behind them: "
            f"{listed(missing, SHOWN)}; name these in tokens.train, too",
        )
    where = {module: name for name, module in model.named_modules()}
    tied = tied_head(model) is not None

    def empty(base: Any) -> nn.Parameter:
        own = base if isinstance(base, QuantEmbedding | QuantLinear) else base.weight
        device = getattr(table, "rows_go_to", own.device)  # of a table in host memory
        return nn.Parameter(torch.empty(len(tokens), width, dtype=own.dtype, device=device))

    rows = empty(table)
    made = TokenTable(table, rows, tokens), TokenHead(head, rows if tied else empty(head), tokens)
    return Built((where[table], where[head]), *made)


def install_rows(model: Any, built: Built) -> None:
    """Put them into the model, in place; its vocabulary is then as long as they make it."""
    inside = re.compile("^(" + "|".join(map(re.escape, built.names)) + r")\.")
    ties = {inside.sub(r"\1.base.", n): inside.sub(r"\1.base.", o) for n, o in model.all_tied_weights_keys.items()}
    model.all_tied_weights_keys, model._tied_weights_keys = ties, dict(ties)  # for later calls of tie_weights
    for name, module in zip(built.names, (built.table, built.head), strict=True):
        module.train(model.training)
        model.set_submodule(name, module)
    size = built.table.shape[0]
    if size > built.table.count:
        config = model.config.get_text_config()
        for owner in (config, model.config, model, model.base_model):
            if isinstance(getattr(owner, "vocab_size", None), int):
                owner.vocab_size = size


def give_rows(model: Any, tokens: Sequence[Token], how: str) -> None:
    """Rows for `tokens` in an adapted model, in place, at their start (on meta they have no values). how: as of
    `start_rows`. Without tokens nothing changes."""
    if tokens:
        built = build_rows(model, tokens)
        if not built.table.rows.is_meta:
            start_rows(built, how)
        install_rows(model, built)


def rows_of(model: Any) -> Built | None:
    """The rows that a model has, None where it has none."""
    places = {type(m): (name, m) for name, m in model.named_modules() if isinstance(m, _Rows)}
    if not places:
        return None
    (table, first), (head, last) = (places[kind] for kind in (TokenTable, TokenHead))
    return Built((table, head), first, last)  # type: ignore[arg-type]


@torch.no_grad()
def start_rows(built: Built, how: str) -> None:
    """First values. how: `mean` of the rows of all tokens that were there, or `text`, of those that a new token's text
    was split into. A token that was there keeps the row that it has."""
    known = min((token.id for token in built.table.tokens if token.new), default=built.table.count)
    tied = built.head.rows is built.table.rows
    for module in (built.table,) if tied else (built.table, built.head):
        sources = [_source(token, how, module.count) for token in module.tokens]
        mean = None if all(sources) else _mean(module.base, min(known, module.count))
        for row, source in zip(module.rows, sources, strict=True):
            row.copy_(frozen_rows(module.base, source).mean(0) if mean is None or source else mean)


def _source(token: Token, how: str, count: int) -> list[int]:
    """The frozen rows that a token's first values are the mean of; none where that is all of them."""
    if not token.new and token.id < count:
        return [token.id]
    return [piece for piece in token.pieces if piece < count] if how == "text" else []


def _mean(base: nn.Module, count: int) -> Tensor:
    """Of the first `count` rows: [hidden]."""
    blocks = (range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))
    return torch.stack([frozen_rows(base, block).sum(0) for block in blocks]).sum(0) / count
