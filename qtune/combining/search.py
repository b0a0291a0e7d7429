"""Mixing weights without gradients: LoraHub (Huang et al., arXiv 2307.13269).

The mean loss of a trained token on a few examples plus L1 sum |w_i|, minimised by a (1+1) evolution strategy with
Rechenberg's rule of one success in five, in the paper's box and for its number of trials. What differs:
- The paper sums the factors A and B each by itself, which mixes every A with every B; here the deltas are summed.
- It searches with nevergrad, whose NGOpt chooses a strategy by itself, and from zero; here the start is a mixture that
  serves already, the average if nothing is said, for 40 trials are few and the first is among them.
- The authors' code takes the mean of |w_i| where the paper has their sum, and divides the mean loss by the number of
  examples once more. The sum is kept: of two runs it presses twice as much as the mean, for any number of examples.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..adapters import AdapterSpec
from ..adapters.deltas import Factors, stacked, to_rank
from ..adapters.sites import build, install, place
from ..batches import Capacity
from ..data import load_data
from ..errors import QtuneError
from ..evaluate import evaluate
from ..screen import Screen
from ..step import LanguageModel
from .gather import Deltas

L1, BOX = 0.05, 1.5  # the paper's weight of sum |w|, and its bounds of each
STEP, LONGER, SHORTER = 0.3, 1.5, 1.5**-0.25  # first step; by success and failure: they balance at one in five


def minimum(
    value: Callable[[Sequence[float]], float], start: Sequence[float], trials: int, seed: int
) -> tuple[list[float], float]:
    """The best of `trials` points, the start among them, and its value."""
    draw, step = random.Random(seed), STEP
    best = [min(BOX, max(-BOX, one)) for one in start]
    least = value(best)
    for _ in range(trials - 1):
        other = [min(BOX, max(-BOX, one + step * draw.gauss(0, 1))) for one in best]
        found = value(other)
        if found < least:
            best, least, step = other, found, step * LONGER
        else:
            step *= SHORTER
    return best, least


def mixed(
    deltas: Deltas, start: Sequence[float], data: str, *, trials: int, seed: int, rank: int | None, screen: Screen
) -> dict[str, Any]:
    """Search for the weights on the records of a file. rank: deltas without factors are cut to it while searching.

    Returns `weights` (four digits), `loss`, `loss_before` (of the weights at the start) and `trials`.
    """
    recipe, model = deltas.runs[0].recipe, deltas.model
    keys = recipe.data
    examples, report = load_data(
        data, deltas.tokenizer, max_length=keys.max_length, loss_on=keys.loss_on, template=keys.template,
        system=keys.system,
    )  # fmt: skip
    screen.line(str(report))
    parts = {name: _parts(deltas, name, rank) for name in deltas.bases}
    most = max(sum(part.rank for part in some) for some in parts.values())
    spec = AdapterSpec("lora", options={"rank": most, "alpha": float(most)})
    sites, _ = build(deltas.bases, spec, any_scheme=True)
    install(model, sites, None)
    language = LanguageModel(model)
    language.choose_attention(max(len(example.input_ids) for example in examples))
    capacity = Capacity.of(recipe.train)
    capacity = Capacity(capacity.limit, by_tokens=capacity.by_tokens)

    @torch.no_grad()
    def loss(weights: Sequence[float]) -> float:
        for name, site in sites.items():
            every = [*weights, 1 - sum(weights)][: len(parts[name])]
            whole = stacked([part.times(w) for part, w in zip(parts[name], every, strict=True)]).padded(most)
            site.adapter.A.copy_(whole.A)  # type: ignore[operator,union-attr]
            site.adapter.B.copy_(whole.B)  # type: ignore[operator,union-attr]
        found = evaluate(language, examples, capacity=capacity, choice=False).loss
        return found if math.isfinite(found) else math.inf

    losses: dict[tuple[float, ...], float] = {}
    with screen.bar("searching", trials) as advance:

        def value(weights: Sequence[float]) -> float:
            given = tuple(round(weight, 4) for weight in weights)
            losses[given] = loss(given)
            advance(1)
            return losses[given] + L1 * sum(map(abs, given))

        best, _ = minimum(value, start, trials, seed)
    for name, base in deltas.bases.items():
        place(model, name, base)  # type: ignore[arg-type]
    weights = tuple(round(weight, 4) for weight in best)
    before = next(iter(losses.values()))
    if losses[weights] == math.inf:
        raise QtuneError("Q701", f"{data}: the loss is not finite with any of the weights that were tried")
    return {"weights": list(weights), "loss": losses[weights], "loss_before": before, "trials": len(losses)}


def _parts(deltas: Deltas, name: str, rank: int | None) -> list[Factors]:
    """Of each run at a site, and of the start that they share; nothing where a run has none."""
    base, found = deltas.bases[name], []
    for delta in (*deltas.whole(name), *([deltas.start(name)] if deltas.first else [])):
        if delta is None:
            found.append(Factors(torch.zeros(0, base.in_features), torch.zeros(base.out_features, 0)))
        elif isinstance(delta, Factors):
            found.append(delta)
        else:
            assert rank is not None
            found.append(to_rank(delta, rank, name)[0])
    return found
