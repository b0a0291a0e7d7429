"""The knobs of a recipe that memory hangs on: their values beside the recipe's own, in words, and what each costs.

KNOBS is the order in which `fit` climbs: what costs the user least comes first; what changes what is learned (low bits,
length, rank) last. `both_ways` is what `explain` shows: each knob alone, up and down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..adapters import METHODS
from ..memory.host import is_here
from ..quant import Average, Mixed, Storage, scheme_from
from ..recipe import Recipe
from ..starting import wants
from .plan import Shape
from .request import Request, scheme_tree

Change = dict[str, Any]  # recipe key -> value
FOUR_BITS = ("nf4", "fp4")
LOW_BITS = ("int3", "int2")  # the groups of whole steps, which QWHA's authors start from
LENGTH_FLOOR, RANK_FLOOR = 256, 4  # --fit goes no lower: below, a run is another task than the one asked for
PLACED = {
    "boundaries": "layers' inputs", "weights": "layers' weights", "embeddings": "input table", "optimizer": "optimizer",
}  # fmt: skip
LOSS_CHUNKS = (128, 1024)
OTHER_RULES = {"lion": "one state; wants a lower lr", "adafactor": "hardly any states, and learns in another way"}
FILED = "are read from a file's pages"
MLP_TILES = (2048, 512)  # tokens: below, products are too small to be quick


@dataclass(frozen=True)
class Level:
    """One value of a knob. words: the change as a person reads it; cost: what the user pays for it."""

    change: Change
    words: str
    cost: str


def checkpointing(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    if not recipe.train.checkpointing:
        yield Level({"train.checkpointing": True}, "checkpointing on", "a second forward pass")


def boundaries(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    if recipe.train.checkpointing:
        yield from _elsewhere(recipe, "boundaries", kind, "layers' inputs", "are copied out and back")


def weights(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    if recipe.train.checkpointing:
        yield from _elsewhere(recipe, "weights", kind, "layers' weights", "are copied in twice a micro-batch")


def home(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    """Where host memory or disk are too small, the device may have room."""
    moved: list[str] = []
    for key in reversed(PLACED):
        if not is_here(getattr(recipe.memory, key), kind):
            moved.append(key)
            words = " and ".join(PLACED[one] for one in moved)
            yield Level({f"memory.{one}": "device" for one in moved}, f"{words} on the device", "no copies")


def to_disk(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    """What waits in the host's memory beside a GPU may be too much for that."""
    moved: list[str] = []
    for key in ("weights", "boundaries"):
        if kind != "cpu" and getattr(recipe.memory, key) == "host":
            moved.append(key)
            words = " and ".join(PLACED[one] for one in moved)
            yield Level({f"memory.{one}": "disk" for one in moved}, f"{words} on disk", FILED)


def states(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    if kind != "cpu" and recipe.memory.optimizer == "device":
        yield Level({"memory.optimizer": "host"}, "optimizer on the host", "states are copied in and out each step")


def table(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    if kind != "cpu" and recipe.memory.embeddings == "device":
        yield Level({"memory.embeddings": "host"}, "input table on the host", "rows are copied in")


def early(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    keys = recipe.train
    if not keys.update_in_backward and keys.accumulate == 1:
        change = {"train.update_in_backward": True, "train.clip": None}
        yield Level(change, "updates in the backward", "gradients are not clipped")


def frozen_a(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    if recipe.adapter.options.get("freeze_a") is False:
        yield Level({"adapter.freeze_a": True}, "A frozen (LoRA-FA)", "only B learns, of half the weights")


def _elsewhere(recipe: Recipe, key: str, kind: str, what: str, cost: str) -> Iterator[Level]:
    """To the host, or on a CPU, whose memory that is, to disk."""
    at = getattr(recipe.memory, key)
    if at == "device" and kind != "cpu":
        yield Level({f"memory.{key}": "host"}, f"{what} on the host", cost)
    if is_here(at, kind) and kind == "cpu":
        yield Level({f"memory.{key}": "disk"}, f"{what} on disk", FILED)


def mlp_tile(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    for tokens in MLP_TILES:
        if tokens < min(shape.tokens, recipe.memory.mlp_tile or shape.tokens):
            yield Level({"memory.mlp_tile": tokens}, f"MLPs in tiles of {tokens:,} tokens", "smaller products")


def loss_chunk(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    for positions in sorted(LOSS_CHUNKS, reverse=True):
        if positions < min(shape.trained, recipe.memory.loss_chunk or shape.trained):
            yield Level({"memory.loss_chunk": positions}, f"loss in chunks of {positions:,}", "smaller products")


def optimizer(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    if recipe.train.optimizer == "adamw":
        yield Level({"train.optimizer": "adamw8"}, "optimizer adamw8", "8-bit states")


def micro_batch(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    rows, times = recipe.train.micro_batch or 1, recipe.train.accumulate
    tokens = recipe.train.micro_tokens or 0
    while (tokens := tokens // 2) >= shape.longest:
        change = {"train.micro_tokens": tokens, "train.accumulate": (recipe.train.micro_tokens or 0) // tokens * times}
        yield Level(change, f"micro-batches of {tokens:,} tokens", "smaller products")
    for fewer in range(rows - 1, 0, -1):
        if rows % fewer == 0:  # the same examples in each step
            more = times * rows // fewer
            change = {"train.micro_batch": fewer, "train.accumulate": more}
            yield Level(change, f"micro-batch {fewer}, accumulate {more}", "smaller products")


def embeddings(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    held = recipe.embeddings.name if recipe.embeddings else None
    if held is None:
        yield Level({"scheme.embeddings": "int8"}, "embeddings in int8", "rounded to 8 bits")
    if held not in FOUR_BITS:
        yield Level({"scheme.embeddings": "nf4"}, "embeddings in nf4", "rounded to 4 bits")


def samples(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    """Too few for the widest layer are refused when they are planned."""
    samples = recipe.calibrate.samples if wants(recipe.adapter, recipe.calibrate.codes) else 0
    while (samples := samples // 2) >= 1:
        words = f"{samples} calibration window{'s' * (samples > 1)}"
        yield Level({"calibrate.samples": samples}, words, "starts from less text")


def scheme(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    if _bits(recipe.scheme) > scheme_from("nf4").code_bits:
        yield _stored(recipe, "nf4")


def low_bits(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    for name in LOW_BITS:
        if _bits(recipe.scheme) > scheme_from(name).code_bits:
            yield _stored(recipe, name)


def _stored(recipe: Recipe, name: str) -> Level:
    """All layers under one scheme. At few bits the start decides: where it is the identity, others are named."""
    bits = scheme_from(name).code_bits
    cost = "not rounded" if name == "dense" else f"rounded to {bits:g} bits"
    if name in LOW_BITS and METHODS[recipe.adapter.method].bound is None:
        cost += "; better with adapter.method=qwha or cloq"
    return Level({"scheme": scheme_tree(recipe, name)}, f"scheme {name}", cost)


def _bits(scheme: Storage) -> float:
    """Bits of a code, where schemes are mixed the most that a layer has."""
    if isinstance(scheme, Average):
        return scheme.bits
    if isinstance(scheme, Mixed):
        return max(one.code_bits for one in (scheme.default, *(one for _, one in scheme.rules)))
    return scheme.code_bits


def length(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    length = recipe.data.max_length
    while (length := length // 2) >= LENGTH_FLOOR:
        if length < shape.longest:
            change = {"data.max_length": length}
            yield Level(change, f"max_length {length:,}", "examples are cut")


def rank(recipe: Recipe, shape: Shape, kind: str) -> Iterator[Level]:
    options = recipe.adapter.options
    rank = options.get("rank", 0)
    while (rank := rank // 2) >= RANK_FLOOR:
        change = {"adapter.rank": rank}
        if "alpha" in options:  # the update is scaled by alpha / rank: that stays
            change["adapter.alpha"] = options["alpha"] * rank / options["rank"]
        yield Level(change, f"rank {rank}", "learns less")


Knob = Callable[[Recipe, Shape, str], Iterator[Level]]
KNOBS: tuple[Knob, ...] = (
    home, checkpointing, table, boundaries, mlp_tile, loss_chunk, optimizer, states, micro_batch, early, samples,
    weights, to_disk, embeddings, scheme, low_bits, length, rank,
)  # fmt: skip
ROOM = (home, to_disk)  # they help where host memory or disk are too small, and nowhere else
LAST = (low_bits, length, rank)  # they change what is learned, or how well


# ---- one knob at a time


def both_ways(request: Request) -> Iterator[Level]:
    """Every knob alone, up and down, from the recipe as it is."""
    recipe, keys, kind, shape = request.recipe, request.recipe.train, request.device.kind, request.shape()
    knobs = (checkpointing, table, boundaries, weights, to_disk, optimizer, states, early, frozen_a, scheme, low_bits)
    for knob in knobs:
        yield from knob(recipe, shape, kind)
    if kind != "cpu" and keys.checkpointing:
        for key in ("boundaries", "weights"):
            if getattr(recipe.memory, key) == "device":
                yield Level({f"memory.{key}": "disk"}, f"{PLACED[key]} on disk", FILED)
    for few in (mlp_tile, micro_batch, samples, length, rank):  # one level down is enough to see what a knob does
        yield from list(few(recipe, shape, kind))[:1]
    yield from embeddings(recipe, shape, kind)
    if keys.checkpointing and recipe.memory.weights == "device":
        yield Level({"train.checkpointing": False}, "checkpointing off", "faster")
    for key, what in PLACED.items():
        if getattr(recipe.memory, key) != "device":
            yield Level({f"memory.{key}": "device"}, f"{what} on the device", "no copies")
    if recipe.memory.mlp_tile is not None:
        yield Level({"memory.mlp_tile": None}, "MLPs whole", "larger products")
    for chunk in LOSS_CHUNKS:
        if chunk != recipe.memory.loss_chunk and chunk < shape.trained:
            yield Level({"memory.loss_chunk": chunk}, f"loss in chunks of {chunk:,}", "products of another size")
    for rule, cost in OTHER_RULES.items():
        if keys.optimizer != rule:
            yield Level({"train.optimizer": rule, "train.betas": None}, f"optimizer {rule}", cost)
    if keys.optimizer == "adamw8":
        yield Level({"train.optimizer": "adamw"}, "optimizer adamw", "fp32 states and masters")
    elif keys.master_weights and recipe.dtype == "bfloat16":
        yield Level({"train.master_weights": False}, "no master weights", "small updates are lost")
    if recipe.embeddings is not None:
        yield Level({"scheme.embeddings": None}, "embeddings dense", "not rounded")
    for name in ("nf4", "int8", "dense"):
        if recipe.scheme.name != name and (name != "nf4" or _bits(recipe.scheme) < scheme_from(name).code_bits):
            yield _stored(recipe, name)
    if recipe.calibrate.codes != "nearest":
        yield Level({"calibrate.codes": "nearest"}, "codes nearest", "rounded without regard to the inputs")
    if tokens := keys.micro_tokens:
        yield Level({"train.micro_tokens": 2 * tokens}, f"micro-batches of {2 * tokens:,} tokens", "larger products")
    if rows := keys.micro_batch:
        yield Level({"train.micro_batch": 2 * rows}, f"micro-batch {2 * rows}", "larger products")
    longer = 2 * recipe.data.max_length
    if request.lengths is None and longer <= positions(request):
        yield Level({"data.max_length": longer}, f"max_length {longer:,}", "fewer examples are cut")
    if more := 2 * recipe.adapter.options.get("rank", 0):
        yield Level({"adapter.rank": more}, f"rank {more}", "learns more")


def positions(request: Request) -> int:
    """The longest sequence that the model takes."""
    limit = getattr(request.model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else 2**30
