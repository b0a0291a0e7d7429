"""The one door to optimizers: from a recipe's keys and an adapted model."""

from __future__ import annotations

import torch
from torch import nn

from ..adapters import adapted_sites
from ..memory import HOST
from ..sections import MemoryKeys, TrainKeys
from .early import Early
from .update import Optimizer, layer_of


def optimizer_of(
    model: nn.Module, keys: TrainKeys, memory: MemoryKeys | None = None, device: torch.device | None = None
) -> Optimizer:
    """The optimizer that a recipe asks for, over all trained parameters of an adapted model.

    memory: None is its defaults. device: where the model will run, if it is not there yet; only CUDA has memory of its
    own, so that elsewhere host is device.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    scales = {
        f"{site}.adapter.{name}": scale
        for site, one in adapted_sites(model).items()
        for name, scale in one.adapter.lr_scale().items()
    }
    named = [(found[0], parameter) for parameter, found in names.items()]
    kind = (device or (named[0][1].device if named else torch.device("cpu"))).type
    make = Early if keys.update_in_backward else Optimizer
    return make(
        named,
        keys.optimizer,
        lr=keys.lr,
        betas=keys.betas or (),
        weight_decay=keys.weight_decay,
        master_weights=keys.master_weights,
        scales=scales,
        seed=keys.seed,
        host=(memory or MemoryKeys()).optimizer == HOST and kind == "cuda",
        apart=[found[0] for found in names.values() if len({layer_of(name) for name in found}) > 1],
    )
