"""Which adapter answers is chosen by the prompt: by the nearest prototype of a run's own prompts.

    router = qtune.load_router(adapters)                    of `qtune.load_adapters`
    adapters.use(router.choose(prompts))                    of each sample of a batch its own

CoLoR (Wistuba et al. 2023, arXiv 2311.17601): the features h(x) of a data set's training examples by the frozen model,
without any adapter, are clustered by k-means, and the centres are kept; at use the nearest of all centres names the
data set, and so the adapter. What differs from the paper, which is about images: h(x) is the mean over the tokens of a
prompt of what the last layer gives, after the final norm, made of length 1; and at most 64 examples of a run are read,
of each what stands before its first answer, for that is all that there is when an adapter is chosen. 5 centres of
features of length 1 are what the code of S-Prompts (Wang et al. 2022, arXiv 2207.12819) has, an earlier method that
chooses in this way; there the distance is the sum of |differences|, here Euclid's, which k-means makes least.

The prototypes lie with the run, in prototypes.safetensors, with what they were made from: the base, the prompts, and
how many of what. Where one of these is another, or the file is damaged, they are made again.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .adapters.many import Adapters
from .batches import Capacity, collate
from .data import Example, load_sets
from .errors import QtuneError
from .memory.layers import device_of
from .resume import base_digest, data_digest
from .runs import RECIPE, read_recipe, tokenizer_of
from .safe_io import replacing
from .screen import Screen
from .state import run_of

FILE, TENSOR = "prototypes.safetensors", "centroids"
FEATURES = "1"  # of what a feature is; another one makes old files void
CLUSTERS, EXAMPLES = 5, 64
PLAIN = 64  # tokens of a text that is learned throughout
ROUNDS = 100  # of k-means; it ends where no point changes its centre
AT_ONCE = Capacity(4096, by_tokens=True)


class Router:
    """Chooses among adapters by prototypes [centres, width] in fp32, by name. At equal distance the first one wins."""

    def __init__(self, adapters: Adapters, prototypes: Mapping[str, Tensor]) -> None:
        self.prototypes = dict(prototypes)
        self._adapters = adapters

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that it chooses among."""
        return tuple(self.prototypes)

    def distances(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """From each prompt (token ids) to the nearest prototype of each adapter: fp32 [prompts, adapters], between 0
        and 2, in the order of `names`. The model runs without adapter over the prompts; what is in use stays in use.

        Raises QtuneError for an empty prompt.
        """
        found = features(self._adapters, prompts)
        return torch.stack([_distances(found, own).amin(1) for own in self.prototypes.values()], 1)

    def choose(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The adapter of each prompt, as `Adapters.use` takes it for each sample of a batch."""
        return [self.names[i] for i in self.distances(prompts).argmin(1).tolist()] if prompts else []


def load_router(
    adapters: Adapters,
    *,
    clusters: int = CLUSTERS,
    examples: int = EXAMPLES,
    seed: int = 0,
    screen: Screen | None = None,
) -> Router:
    """A router among all loaded adapters, each of a run. Prototypes that a run does not hold yet are made from its
    training data, `clusters` at most from so many `examples`, drawn by the seed, and kept in its folder.

    Raises QtuneError for a run that has neither prototypes nor its data.
    """
    if clusters < 1 or examples < 1:
        raise QtuneError("Q102", f"clusters is {clusters}, examples {examples}; legal: 1 or more")
    screen = screen or Screen(quiet=True)
    how = {
        "features": FEATURES, "base": base_digest(adapters.model), "clusters": str(clusters), "examples": str(examples),
        "seed": str(seed),
    }  # fmt: skip
    return Router(adapters, {name: _prototypes(adapters, name, how, screen) for name in adapters.names})


def prompt_of(example: Example) -> tuple[int, ...]:
    """What stands before the first answer; of a text that is learned throughout, which has at most one token there,
    the first tokens."""
    start = example.trained.find(1)
    return tuple(example.input_ids[: start if start > 1 else PLAIN])


@torch.no_grad()
def features(adapters: Adapters, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Of each prompt the mean over its tokens of the last hidden state of the model without adapter, after the final
    norm, as rows of length 1: fp32 [prompts, width] on the CPU. Raises QtuneError for an empty prompt."""
    if not all(prompts):
        raise QtuneError("Q807", "a prompt is empty: there is nothing to choose an adapter by")
    model: nn.Module = adapters.model
    body, device, mode = getattr(model, "base_model", model), device_of(model), model.training
    lengths = [len(prompt) for prompt in prompts]
    found: dict[int, Tensor] = {}
    model.eval()
    try:
        with adapters.use(None):
            for rows in AT_ONCE.fill(sorted(range(len(prompts)), key=lengths.__getitem__), lengths):
                batch = collate([Example(array("i", prompts[i]), bytes(lengths[i]), "") for i in rows]).to(device)
                mask = batch.attention_mask
                hidden = body(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
                sums = (hidden.float() * mask[:, :, None]).sum(1)  # of length 1 it is the mean's
                found |= zip(rows, nn.functional.normalize(sums, dim=1).cpu(), strict=True)
    finally:
        model.train(mode)
    return torch.stack([found[i] for i in range(len(prompts))])


def k_means(points: Tensor, clusters: int, seed: int) -> Tensor:
    """At most `clusters` centres [centres, width] of points [points, width] in fp32: Lloyd's rounds from the start of
    k-means++ (D. Arthur, S. Vassilvitskii, 2007). Fewer where fewer points differ, or a centre loses all of its own."""
    draw = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=draw)]
    while len(centres) < clusters:
        far = _distances(points, centres).amin(1).square()
        if not far.any():
            break
        centres = torch.cat([centres, points[torch.multinomial(far, 1, generator=draw)]])
    before: Tensor | None = None
    for _ in range(ROUNDS):
        nearest = _distances(points, centres).argmin(1)
        if before is not None and torch.equal(nearest, before):
            break
        centres = torch.stack([points[nearest == centre].mean(0) for centre in nearest.unique()])
        before = nearest
    return centres


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """[points, centres]; without the matrix product, which does not give 0 for equal ones."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


# ---- the prototypes of a run


def _prototypes(adapters: Adapters, name: str, how: Mapping[str, str], screen: Screen) -> Tensor:
    """Those that the run holds, if they are of just this, or new ones."""
    run = run_of(adapters.folders[name])
    kept, about = _read(run / FILE, screen)
    try:
        prompts = _prompts(run, int(how["examples"]), int(how["seed"]))
    except QtuneError as error:
        if kept is not None and how.items() <= about.items():
            screen.line(
                f"note: the data of {name} cannot be read; its prototypes are taken as they lie there", "yellow"
            )
            return kept
        raise QtuneError(
            error.code,
            f"{name} cannot be chosen by prompt: {run} holds no prototypes that fit, and they cannot be made: {error}. "
            f"Put its data back, name it in data.train of {run / RECIPE}, or leave this adapter out",
        ) from error
    how = {**how, "data": data_digest([Example(array("i", ids), b"", "") for ids in prompts])}
    if kept is not None and how.items() <= about.items():
        return kept
    made = k_means(features(adapters, prompts), int(how["clusters"]), int(how["seed"]))
    screen.line(f"prototypes  {name}: {len(made)} from {len(prompts)} prompts", "dim")
    try:
        with replacing(run / FILE) as file:
            file.write(safetensors.torch.save({TENSOR: made}, {**how, "sha256": _digest(made)}))
    except QtuneError as error:
        screen.line(f"note: {error}; the prototypes of {name} will be made again next time", "yellow")
    return made


def _prompts(run: Path, examples: int, seed: int) -> list[tuple[int, ...]]:
    """Of the run's own training examples, drawn by the seed. Raises QtuneError where its data is gone."""
    recipe = read_recipe(run)
    if recipe.data.train is None:
        raise QtuneError("Q106", "its recipe names no data.train")
    keys = replace(recipe.data, eval=None, loss_on="answer")  # whatever was learned, prompts end where answers begin
    found = load_sets(keys, tokenizer_of(recipe)[0], seed=recipe.train.seed).train
    return [prompt_of(one) for one in random.Random(seed).sample(found, min(examples, len(found)))]


def _read(path: Path, screen: Screen) -> tuple[Tensor | None, dict[str, str]]:
    """The prototypes in a file, and what they were made from; none where it is absent or damaged, which is told."""
    if not path.exists():
        return None, {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            about, found = dict(file.metadata() or {}), file.get_tensor(TENSOR)
        if about.get("sha256") != _digest(found):
            raise ValueError("its sha256 differs")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        screen.line(f"note: {path} is damaged ({error}), and is not used", "yellow")
        return None, {}
    return found, about


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
