"""Any number of named adapters, of any methods and each on sites of its own, over one packed base in memory once.

    adapters = load_many(model, {"law": "runs/law", "code": "runs/code"})
    adapters.use("law")                          one, as in its own run
    adapters.use({"law": 0.7, "code": 0.3})      several: base + sum of weight times change
    adapters.use(["law", None, "code"])          of each sample of a batch its own; a mixture may stand there too
    adapters.use(None)                           the base alone
    with adapters.use("code"): ...               until the block ends
How a mixture is computed: mixture.py. An adapter fits one set of packed weights; one that was trained on others is
refused, layer by layer, and the model stays as it was. Left out: rows of new tokens, which are of one adapter's
tokenizer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QtuneError, one_of
from ..quant import QuantLinear
from .base import AdapterSpec
from .files import Fitted, fit_adapter, read_adapter_json
from .mixture import Mixed, Mixture, Siblings, Weights, packed_layers
from .sites import MANY, place, refuse_adapted

One = str | Weights | None  # an adapter, adapters with weights, or none
Which = One | Sequence[One]


def load_many(model: nn.Module, folders: Mapping[str, str | Path]) -> Adapters:
    """Load the adapters in `folders`, by name, onto the packed `model`; called again it loads more. None is in use yet.

    Raises QtuneError with everything that does not fit; then the model is as before.
    """
    adapters = getattr(model, MANY, None)
    if adapters is None:
        refuse_adapted(model)
        adapters = Adapters(model)
    if not folders:
        raise QtuneError("Q102", "there is no adapter to load; give names and folders of runs")
    if taken := [name for name in folders if name in adapters.specs]:
        raise QtuneError("Q103", f"an adapter of the name {taken[0]!r} is loaded already; give this one another name")
    digest = functools.cache(lambda base, whole: base.digest(whole=whole))
    layers = packed_layers(model)
    fitted = {name: _fit(model, layers, name, folder, digest) for name, folder in folders.items()}
    for name, one in fitted.items():
        adapters.take(name, one, folders[name])
    return adapters


def _fit(model: nn.Module, layers: Mapping[str, QuantLinear], name: str, folder: str | Path, digest: Any) -> Fitted:
    """An adapter for the layers of the model. Raises QtuneError where it is of another base, and says of which."""
    try:
        fitted = fit_adapter(model, layers, folder, digest=digest)
    except QtuneError as error:
        if error.code != "Q404":
            raise
        info = read_adapter_json(folder)
        origin = f"it was trained on {info['base'].get('model', 'a model without a name')}"
        if info.get("kept", 0):
            origin += f", {info['kept']} of whose layers its run gave codes of their own: only that run's base has them"
        raise QtuneError("Q404", f"adapter {name!r}: {error}\n  {origin}") from error
    if fitted.rows is not None:
        texts = ", ".join(repr(token.text) for token in fitted.rows.table.tokens[:4])
        raise QtuneError(
            "Q420",
            f"adapter {name!r} in {folder} has rows of its own for tokens ({texts}), which change the tokenizer for "
            "all: use it alone, or merge it and train the others on that",
        )
    return fitted


class Adapters:
    """The adapters that `model` has loaded. specs: method, targets and options by name; folders: where each was read
    from."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.specs: dict[str, AdapterSpec] = {}
        self.folders: dict[str, Path] = {}
        self.sites: dict[str, Mixed] = {}
        self._siblings: dict[str, Siblings] = {}
        self._mixture: Mixture | None = None
        # every way through a transformers model goes through its body
        getattr(model, "base_model", model).register_forward_pre_hook(self._look, with_kwargs=True)
        setattr(model, MANY, self)

    @property
    def names(self) -> tuple[str, ...]:
        """All that are loaded."""
        return tuple(self.specs)

    def take(self, name: str, fitted: Fitted, folder: str | Path) -> None:
        """Let an adapter that was built for the model be one of them."""
        self.model.requires_grad_(False)
        for site, one in fitted.sites.items():
            if site not in self.sites:
                parent = self._siblings.setdefault(site.rpartition(".")[0], Siblings())
                self.sites[site] = Mixed(one.base, parent)
                place(self.model, site, self.sites[site])
            self.sites[site].add(name, one.adapter)
        self.specs[name], self.folders[name] = fitted.spec, Path(folder)
        self._set(self._mixture)

    def use(self, which: Which) -> Using:
        """Use one adapter, several with weights, or none, for all samples or (a list) for each sample of the batch.
        Takes effect at once; as a context manager, until its block ends.

        Raises QtuneError for names that are not loaded, and for a list where samples are not known apart.
        """
        by_row = not (which is None or isinstance(which, (str, Mapping)))
        rows = tuple(self._weights(one) for one in which) if by_row else (self._weights(which),)  # type: ignore
        if not rows:
            raise QtuneError("Q102", "the list of adapters is empty; legal: one for each sample of the batch")
        mixture = Mixture(rows, by_row)
        if by_row and (routed := [name for name, site in self._in_use(mixture) if site.base.routed]):
            raise QtuneError(
                "Q420",
                f"{routed[0]} is an expert, to which a router sends tokens of all samples: which adapter a token "
                "belongs to is not known there; use one for all",
            )
        return self._begin(mixture if any(rows) else None)

    def select(self, which: str | Weights, count: int | None = None, sample: Iterable[Tensor] | None = None) -> Using:
        """Use several adapters as rank-one parts d_i u_i v_i^T, of which each site keeps `count`, by default the mean
        rank, (r1 + r2) / 2 of two: for each token those of the largest |d_i v_i^T x|, or, with a sample, for every
        token those for which that is the largest on average over it. As a context manager like `use`.

        sample: token ids [batch, length], which the model reads once. Raises QtuneError for adapters that are no
        product of two factors.
        """
        if count is not None and count < 1:
            raise QtuneError("Q102", f"the number of parts is {count}; legal: 1 or more")
        mixture = Mixture((self._weights(which),), select=True, count=count)
        for name, site in self._in_use(mixture):
            for own, adapter in zip(site.names, site.adapters, strict=True):
                if own in mixture.names and adapter.low_rank(site.base) is None:  # type: ignore[operator]
                    raise QtuneError(
                        "Q420",
                        f"adapter {own!r} ({self.specs[own].method}) is no product of two factors at {name}, so that "
                        "it has no rank-one parts; use it whole",
                    )
        using = self._begin(mixture if mixture.names else None)
        if sample is not None:
            self._fix(sample)
        return using

    @torch.no_grad()
    def _fix(self, sample: Iterable[Tensor]) -> None:
        sites = [site for site in self.sites.values() if site.mixture is not None]
        for site in sites:
            site.reach = torch.zeros(())
        body = getattr(self.model, "base_model", self.model)
        for ids in sample:
            body(ids)
        for site in sites:
            site.fix()

    def _weights(self, one: One) -> dict[str, float]:
        """By name, without those of weight 0."""
        given = {} if one is None else {one: 1.0} if isinstance(one, str) else dict(one)
        for name, weight in given.items():
            if name not in self.specs:
                raise one_of("adapter", name, self.specs)
            if not math.isfinite(weight):
                raise QtuneError("Q102", f"the weight of adapter {name!r} is {weight}; legal: a number")
        return {name: float(weight) for name, weight in given.items() if weight}

    def _in_use(self, mixture: Mixture) -> list[tuple[str, Mixed]]:
        names = set(mixture.names)
        return [(name, site) for name, site in self.sites.items() if names & set(site.names)]

    def _begin(self, mixture: Mixture | None) -> Using:
        before = self._mixture
        self._set(mixture)
        return Using(self, before)

    def _set(self, mixture: Mixture | None) -> None:
        self._mixture = mixture
        for site in self.sites.values():
            site.use(mixture)

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward pass: is there an adapter for each sample?"""
        mixture = self._mixture
        if mixture is None or not mixture.by_row:
            return
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        x = args[0] if given is None else given
        mixture.shape = (len(x), x.shape[1])
        if len(x) != len(mixture.rows):
            raise QtuneError(
                "Q420",
                f"adapters are in use for {len(mixture.rows)} samples, and the batch has {len(x)}; "
                "legal: a list of one for each sample, or one for all",
            )


class Using:
    """What `Adapters.use` returns: as a context manager it brings back at its end what was in use before."""

    def __init__(self, adapters: Adapters, before: Mixture | None) -> None:
        self._adapters, self._before = adapters, before

    def __enter__(self) -> Adapters:
        return self._adapters

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._adapters._set(self._before)
