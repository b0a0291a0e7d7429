"""Going on from a checkpoint: what of a run must be as it was, and what may change.

The promise is that the losses are those of a run that was never stopped, bit for bit on the same machine. So the recipe
must be the same in all that the numbers depend on, the examples token by token, and the base by its digests. Free are
where things lie and run (model, output, data files, device, memory, budget), what is only told (log_every, eval_every),
and what is kept. More or fewer steps are legal where the learning rates of the steps that are done stay the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.sites import SHARED
from .data import Example
from .errors import QtuneError
from .keys import dotted
from .model.loading import dense_parameters
from .optim import lr_factor
from .quant import QuantEmbedding, QuantLinear
from .recipe import Recipe
from .runs import anchored
from .sections import TrainKeys
from .state import Saved
from .version import version
from .vocabulary import rows_of

FREE = (
    "model", "output", "device", "budget", "data", "calibrate.data", "memory", "train.steps", "train.epochs",
    "train.checkpointing", "train.max_skipped", "train.eval_every", "train.eval_at_start", "train.save_every",
    "train.keep", "train.keep_best", "train.patience", "train.log_every", "train.dry_step", "train.samples",
    "train.trackers", "train.report",
)  # fmt: skip
SAMPLE = 1 << 16  # bytes of each tensor of the base that its digest is made of
FROM = "To take the adapter's weights alone into another run, use --from RUN and another output"


def about(recipe: Recipe, data: Digests, base: str) -> dict[str, Any]:
    """What a checkpoint keeps to compare with. data: of `digests_of`; base: of `base_digest`."""
    return {
        "recipe": anchored(recipe).to_dict(),
        "data": dict(data),
        "base": base,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"qtune": version(), "torch": torch.__version__}


# ---- digests

Digests = Mapping[str, str | None]  # of the examples: "train", and "eval", which may be none


def digests_of(examples: Sequence[Example], held_out: Sequence[Example]) -> Digests:
    """Reads every token, so once is enough."""
    return {"train": data_digest(examples), "eval": data_digest(held_out) if held_out else None}


def data_digest(examples: Sequence[Example]) -> str:
    """sha256 of all tokens, of which are trained, and of where each example ends."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(memoryview(example.input_ids))
        digest.update(example.trained)
    return digest.hexdigest()


def base_digest(model: nn.Module) -> str:
    """sha256 of the names, shapes and first bytes of every frozen tensor of a base: enough to know it by. What the
    adapters depend on bit by bit is in adapter.json."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            codes = max(module.parts.items(), key=lambda part: (part[1].nbytes, part[0]))[1]
            _add(digest, f"{name.removesuffix('.base')} {module.scheme}", codes)
    own = rows_of(model)
    rows = [] if own is None else [*own.tensors().values()]
    for name, parameter in dense_parameters(model).items():
        loaded = ".adapter." in name or ".adapters." in name or name.startswith(f"{SHARED}.")
        if not loaded and not any(parameter is one for one in rows):
            _add(digest, name.replace(".base.", "."), parameter)
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    values = tensor.detach().reshape(-1)[: SAMPLE // tensor.element_size()]
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(values.cpu().contiguous().view(torch.uint8).numpy().data)


# ---- what must be the same


def check_recipe(saved: Saved, recipe: Recipe) -> None:
    """Before anything is loaded. Raises QtuneError with every key that is another and may not be."""
    there, here = _flat(saved_recipe(saved)), _flat(recipe)
    faults = [
        _differs(key, here, there) for key in {**here, **there} if here.get(key) != there.get(key) and not _free(key)
    ]
    if here["model"] != there["model"] and not Path(recipe.model).expanduser().exists():  # one that lies elsewhere now
        faults.insert(0, _differs("model", here, there))
    _refuse(saved, faults)


def saved_recipe(saved: Saved) -> Recipe:
    """The recipe of the run as it was. Raises QtuneError where this qtune does not read it."""
    try:
        return Recipe.load(saved.info["recipe"], training=False)
    except QtuneError as error:
        raise QtuneError(
            "Q409", f"the recipe in {saved.folder} is not one of this qtune {version()}: {error}"
        ) from error


def check_data(saved: Saved, recipe: Recipe, data: Digests) -> None:
    """Raises QtuneError where the examples, by their `digests_of`, are not those of the run; the held-out ones matter
    to keep_best and patience alone."""
    there, kept = saved.info["data"], _flat(saved_recipe(saved))
    here = _flat(recipe)
    keys = [_differs(k, here, kept) for k in here if k.startswith("data.") and here[k] != kept.get(k)]
    faults = []
    if there.get("train") != data["train"]:
        faults.append(f"the training examples are others ({'; '.join(keys) or 'the files have changed'})")
    compares = [f"train.{key}" for key in ("keep_best", "patience") if getattr(recipe.train, key)]
    if compares and there.get("eval") != data["eval"]:
        verb = "compares" if len(compares) == 1 else "compare"
        faults.append(f"the held-out examples, by which {' and '.join(compares)} {verb}, are others")
    _refuse(saved, faults)


def check_base(saved: Saved, recipe: Recipe, base: str) -> None:
    """Raises QtuneError where the base, by its `base_digest`, is another one."""
    if saved.info["base"] != base:
        _refuse(saved, [f"{_differs('model', _flat(recipe), _flat(saved_recipe(saved)))}: not the same weights"])


def check_schedule(saved: Saved, keys: TrainKeys, steps: int) -> None:
    """Raises QtuneError where other steps in all would have given the steps that are done other learning rates."""
    before = int(saved.info["steps"])
    rates = [[lr_factor(step, n, keys.schedule, keys.warmup) for step in range(saved.step)] for n in (before, steps)]
    if steps < saved.step:
        _refuse(saved, [f"the run ends after {steps} steps, and {saved.step} are done"])
    if rates[0] != rates[1]:
        _refuse(saved, [
            f"the run has {steps} steps, there {before}: with schedule {keys.schedule} and warmup {keys.warmup:g} the "
            f"{saved.step} steps that are done would have had other learning rates"
        ])  # fmt: skip


def tell_versions(saved: Saved, tell: Callable[[str], None]) -> None:
    """A line where another version computes from now on."""
    there = saved.info["versions"]
    changed = [f"{name} {there.get(name)} -> {value}" for name, value in versions().items() if there.get(name) != value]
    if changed:
        tell(f"{', '.join(changed)} since the checkpoint: the last bits of the losses may be others")


def _refuse(saved: Saved, faults: Sequence[str]) -> None:
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise QtuneError("Q409", f"cannot go on from {saved.folder}, it is of another run:{listed}\n{FROM}")


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value, paths absolute."""
    return dotted(anchored(recipe).to_dict())


def _differs(key: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    return f"{key} is {here.get(key)}, there {there.get(key)}"
