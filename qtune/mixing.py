"""The schemes that give a model the least error at an average of bits, measured layer by layer (`qtune mix`).

LQ-LoRA's first half (Guo et al. 2023, arXiv 2311.12023). Every weight is packed with every scheme while the checkpoint
streams in; of each the bytes, scales included, and the squared error ||W - Q||^2 are noted, with calibration text the
error of the layer's outputs, tr(E G E^T). `quant.budget` chooses. What comes out names the layers, as a person could
have written it: a plan of it is exact, and nothing is measured twice. The second half, W ~ Q + s B A by turns, is the
start `loftq` with `iterations` on such a mixture.
Left out: the errors that are left at a rank, by which the authors choose, and the Fisher information of a loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import QtuneError
from .model import load_tokenizer
from .quant import Mixed, QuantLinear, Scheme
from .quant.budget import least_error
from .recipe import Recipe
from .runs import calibration_text, load_with_bar
from .screen import Screen
from .starting import Starting


class Measuring(Starting):
    """Packs each weight with every scheme of `among`. windows: calibration text, or None."""

    def __init__(self, among: Sequence[Scheme], windows: Tensor | None) -> None:
        super().__init__(None, windows, "nearest")
        self.among, self.windows, self.data = among, windows, windows is not None
        self.sizes: dict[str, int] = {}
        self.found: dict[str, list[tuple[int, float]]] = {}  # site -> of each scheme (bytes, error)

    def _refuse_little(self, layers: torch.nn.ModuleList) -> None:
        """An error needs no second moments of full rank."""

    def _pack(self, layer: QuantLinear, weight: Tensor, gram: Tensor | None) -> None:
        if self.data and gram is None:
            raise QtuneError(
                "Q707",
                f"{layer.name}: calibration text does not tell what reaches this layer; leave out calibrate.data",
            )
        self.sizes[layer.name] = weight.numel()
        self.found[layer.name] = [
            (scheme.nbytes(layer.shape), squared_error(scheme, weight, gram, layer.name)) for scheme in self.among
        ]
        super()._pack(layer, weight, gram)  # the text moves on through the best


def squared_error(scheme: Scheme, weight: Tensor, gram: Tensor | None, name: str = "weight") -> float:
    """||W - Q||^2, or with the inputs' second moments G [in, in] tr((W - Q) G (W - Q)^T). weight [out, in]."""
    left = scheme.unpack(scheme.checked_pack(weight, name), weight.shape, torch.float32).sub_(weight)
    other = left if gram is None else left @ gram.to(left)
    return float(torch.dot(left.flatten(), other.flatten()))


@dataclass(frozen=True)
class Mixture:
    """scheme: of the layers; bits: of a weight on average; nbytes, error: of all packed layers; layers: scheme -> how
    many take it; alone: scheme -> (bits, error), were all in it. Bits and bytes count scales."""

    scheme: Mixed
    bits: float
    nbytes: int
    error: float
    layers: dict[str, int]
    alone: dict[str, tuple[float, float]]


def mix(recipe: Recipe, bits: float, among: Sequence[Scheme], screen: Screen) -> Mixture:
    """The mixture of `among` with the least error at `bits` a weight, for a recipe's model; calibrate.data: by the
    errors of outputs on it.

    Raises QtuneError for fewer bits than the smallest scheme takes, and for a model that is packed already.
    """
    windows = None
    if recipe.calibrate.data is not None:
        asks = replace(recipe, calibrate=replace(recipe.calibrate, codes="gptq"))  # whose codes ask for text
        windows = calibration_text(asks, load_tokenizer(recipe.model), screen)
    measuring = Measuring(among, windows)
    best = max(among, key=lambda scheme: scheme.bits_per_weight())
    load_with_bar(recipe.model, screen, scheme=best, packing=measuring)
    if not measuring.found:
        raise QtuneError("Q313", f"{recipe.model} is packed already; to choose schemes, take the original model")
    return _chosen(measuring, bits, among)


def _chosen(measuring: Measuring, bits: float, among: Sequence[Scheme]) -> Mixture:
    weights, found = sum(measuring.sizes.values()), measuring.found
    try:
        places = least_error(list(found.values()), int(bits * weights / 8))
    except ValueError:
        least = 8 * sum(min(nbytes for nbytes, _ in choices) for choices in found.values()) / weights
        raise QtuneError(
            "Q108", f"{bits:g} bits a weight are too few for {', '.join(map(str, among))}; legal: {least:.4g} or more"
        ) from None
    taken = [choices[place] for choices, place in zip(found.values(), places, strict=True)]
    count = Counter(places)
    most = count.most_common(1)[0][0]
    rules = tuple((name, among[place]) for name, place in zip(found, places, strict=True) if place != most)
    nbytes = sum(size for size, _ in taken)
    alone = {}
    for place, scheme in enumerate(among):
        sizes, errors = zip(*(choices[place] for choices in found.values()), strict=True)
        alone[str(scheme)] = 8 * sum(sizes) / weights, sum(errors)
    return Mixture(
        scheme=Mixed(among[most], rules),
        bits=8 * nbytes / weights,
        nbytes=nbytes,
        error=sum(error for _, error in taken),
        layers={str(among[place]): count[place] for place in sorted(count)},
        alone=alone,
    )
