"""Second moments of what each layer reads, of several runs on their own data, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..adapters.sites import place
from ..data import Example, load_source
from ..errors import QtuneError, listed
from ..memory.layers import device_of
from ..model.layerwise import Grams, Layerwise, by_layer, windows_of
from ..quant import QuantLinear
from ..runs import tokenizer_of
from ..screen import Screen
from .gather import Deltas, Given
from .ways import shrunk


def own_examples(run: Given, why: str) -> list[Example]:
    """The run's own training data. Raises QtuneError, with `why` it is asked for, where its recipe names none."""
    recipe = run.recipe
    if recipe.data.train is None:
        raise QtuneError("Q106", f"{run.folder}: its recipe names no data.train, and {why}")
    return load_source(recipe.data.train, tokenizer_of(recipe)[0], recipe.data, seed=recipe.train.seed)[0]


def windows_of_run(run: Given, screen: Screen) -> Tensor:
    """Token ids [samples, length] of the run's own training data, by its recipe's calibrate.samples and length."""
    examples, keys = own_examples(run, "regmean weighs by what it reads"), run.recipe.calibrate
    length = min(keys.length, sum(len(example.input_ids) for example in examples))
    windows = windows_of([example.input_ids for example in examples], keys.samples, length)
    screen.line(f"data  {run.folder}: {len(windows)} x {length} tokens")
    return windows


def moments(deltas: Deltas, windows: Sequence[Tensor]) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Of each decoder layer: site -> run's number -> mean of x x^T [in, in], those off the diagonal shrunk. Each run's
    text moves up through the base with that run's adapters.

    Raises QtuneError for sites outside of the layers.
    """
    model, inside = deltas.model, bases_by_layer(deltas)
    device = device_of(model)
    walks = [Layerwise(model, text, device) for text in windows]
    for index, names in enumerate(inside):
        found: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        for number, (read, walk) in enumerate(zip(deltas.read, walks, strict=True)):
            sites: dict[str, nn.Module] = {name: read.sites.get(name, base) for name, base in names.items()}
            for name, site in sites.items():
                place(model, name, site)  # type: ignore[arg-type]
                site.eval()
            with Grams(sites, None) as grams:
                walk.pass_through(index, advance=True)
            for name in names:
                if name in grams.leader:
                    found[name][number] = grams.gram(name)
        for name, base in names.items():
            place(model, name, base)  # type: ignore[arg-type]
        yield {name: _whole(name, some, len(walks)) for name, some in found.items()}


def bases_by_layer(deltas: Deltas) -> list[dict[str, QuantLinear]]:
    """The bases in each decoder layer, by site. Raises QtuneError for sites outside of the layers."""
    inside, outside = by_layer(deltas.model, deltas.bases)
    if outside:
        raise QtuneError("Q707", f"{listed(outside, 3)}: what a layer outside of the decoder reads is not gathered")
    return [{name: deltas.bases[name] for name in names} for names in inside]


def _whole(name: str, found: dict[int, Tensor], runs: int) -> dict[int, Tensor]:
    if len(found) < runs:
        raise QtuneError("Q221", f"{name}: no token of a run's text reached this layer; raise calibrate.samples")
    return {number: shrunk(gram.clone()) for number, gram in found.items()}
