"""How much each weight of a layer matters to a run, on that run's own data: what `--how fisher` weighs by.

    F = mean over records of (sum over trained positions t of  d log p(y_t | x_<t) / d W)^2,  y_t drawn from p(.| x_<t)
entry by entry, W [out, in] the weight with the run's adapter in it: the diagonal of the Fisher information (Matena &
Raffel, arXiv 2111.09832, section 3). x are the tokens of the record; y_t are the model's own, one a position, and not
the record's, which would give the empirical Fisher information.

Of F only the sums of its rows r and of its columns c are kept, out + in numbers a layer instead of out x in, and
F ~ r c^T / sum(r): of all matrices of rank one the nearest by generalized Kullback-Leibler divergence (Shazeer & Stern,
arXiv 1804.04235, section 3). The sums themselves are exact, and taken without a gradient of W: with X [tokens, in] and
G [tokens, out] of a record, r = diag(G^T X X^T G) and c = diag(X^T G G^T X). A record is one pass with its layers
recomputed one by one, so that no more than one layer's X and G are there at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.carried import generator
from ..adapters.sites import place
from ..batches import collate
from ..data import Example
from ..errors import QtuneError
from ..loss import IGNORED, cross_entropy_sum
from ..memory.boundaries import Boundaries
from ..memory.layers import device_of, layers_of
from ..screen import Screen
from ..step import LanguageModel
from .gather import Deltas, Given
from .moments import bases_by_layer, own_examples


@dataclass(frozen=True)
class Diagonal:
    """F ~ r c^T. rows [out], columns [in], fp32."""

    rows: Tensor
    columns: Tensor


def examples_of_run(run: Given, seed: int, screen: Screen) -> list[Example]:
    """Of the run's own training data as many records as its recipe's calibrate.samples, drawn by the seed."""
    every = own_examples(run, "fisher weighs by what it answers")
    found = random.Random(seed).sample(every, min(len(every), run.recipe.calibrate.samples))
    screen.line(f"data  {run.folder}: {len(found)} records")
    return found


def information(
    deltas: Deltas, examples: Sequence[Sequence[Example]], seed: int, screen: Screen
) -> list[dict[str, Diagonal]]:
    """Of each run: site -> the diagonal of its Fisher information, each run's divided by its norm over all sites (as
    the authors' code does), so that none weighs more for longer answers. The model has its bases again afterwards.

    Raises QtuneError for sites outside of the decoder's layers, and for a run whose gradients are zero or not finite.
    """
    bases_by_layer(deltas)  # refuses what cannot be looked at
    model = deltas.model
    language = LanguageModel(model)
    language.choose_attention(max(len(example.input_ids) for some in examples for example in some))
    found = []
    with screen.bar("gradients", sum(map(len, examples))) as advance:
        for number, (read, some) in enumerate(zip(deltas.read, examples, strict=True)):
            for name, site in read.sites.items():
                place(model, name, site.requires_grad_(False))
            try:
                draw = generator("fisher", seed, str(number))
                sums = Sums({name: model.get_submodule(name) for name in deltas.bases})
                with sums, _differentiable(language):
                    for example in some:
                        _backward(language, example, draw)
                        advance(1)
            finally:
                for name, base in deltas.bases.items():
                    place(model, name, base)
            found.append(sums.normalized(deltas.runs[number]))
    return found


class Sums:
    """While entered, every backward through `sites` adds the squares of one record's gradient of their weights to sums
    over rows and over columns. One call of a site in a pass is a record."""

    def __init__(self, sites: Mapping[str, nn.Module]) -> None:
        self.sites = sites
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Sums:
        self._handles = [site.register_forward_hook(partial(self._see, name)) for name, site in self.sites.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if y.requires_grad:  # not in the pass before the layer is recomputed
            y.register_hook(partial(self._add, name, inputs[0].detach()))

    def _add(self, name: str, x: Tensor, grad: Tensor) -> None:
        X, G = x.reshape(-1, x.shape[-1]).float(), grad.reshape(-1, grad.shape[-1]).float()
        rows, columns = (X @ X.T @ G).mul_(G).sum(0), (G @ G.T @ X).mul_(X).sum(0)
        if name in self.found:
            rows, columns = rows + self.found[name][0], columns + self.found[name][1]
        self.found[name] = rows, columns

    def normalized(self, run: Given) -> dict[str, Diagonal]:
        """Site -> F / ||F||, the norm of all sites together."""
        whole = {name: float(rows.sum(dtype=torch.float64)) for name, (rows, _) in self.found.items()}
        if missing := [name for name in self.sites if name not in whole]:
            raise QtuneError("Q221", f"{missing[0]}: no token of {run.folder} reached this layer; raise "
                             "calibrate.samples")  # fmt: skip
        shares = {name: (r.double() / (whole[name] or 1.0), c.double()) for name, (r, c) in self.found.items()}
        size = math.sqrt(sum(float(r.norm() * c.norm()) ** 2 for r, c in shares.values()))
        if not 0 < size < math.inf:
            raise QtuneError("Q706", f"{run.folder}: the gradients on its own data are {size or 'zero'}, "
                             "so that nothing tells which weights matter")  # fmt: skip
        return {name: Diagonal(r.float(), (c / size).float()) for name, (r, c) in shares.items()}


@contextmanager
def _differentiable(language: LanguageModel) -> Iterator[None]:
    """Gradients reach every layer though nothing is trained, and layers are recomputed in the backward pass; dropout
    stays off."""
    model = language.model
    mode = model.training
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_())
    language.checkpointing(Boundaries())
    layers = layers_of(model)
    for layer in layers.layers if layers is not None else ():
        layer.training = True  # of the layer alone and nothing in it: what recomputes asks just this
    try:
        yield
    finally:
        language.checkpointing(None)
        handle.remove()
        model.train(mode)


def _backward(language: LanguageModel, example: Example, draw: torch.Generator) -> None:
    """From the likelihood of answers that the model gives itself."""
    batch = collate([example]).to(device_of(language.model))
    if not batch.trained:
        return
    hidden = language.hidden(batch.input_ids, batch.attention_mask)
    kept = batch.labels[:, 1:] != IGNORED
    labels = batch.labels.clone()
    labels[:, 1:][kept] = _drawn(language, hidden.detach()[:, :-1][kept], draw)
    vocabulary = language.config.get_text_config().vocab_size
    cross_entropy_sum(hidden, labels, language.head, vocabulary, language.transform, language.loss.plain()).backward()


@torch.no_grad()
def _drawn(language: LanguageModel, hidden: Tensor, draw: torch.Generator) -> Tensor:
    """A token [positions] for each of hidden [positions, width], by the model's own probabilities."""
    found = []
    for part in hidden.split(language.loss.rows(language.config.get_text_config().vocab_size)):
        sums = language.transform(language.head(part)).softmax(-1, torch.float32).cumsum(-1, dtype=torch.float64)
        at = torch.rand(len(part), 1, generator=draw, dtype=torch.float64).to(sums.device) * sums[:, -1:]
        found.append(torch.searchsorted(sums, at, right=True).clamp_(max=sums.shape[1] - 1)[:, 0])
    return torch.cat(found)
