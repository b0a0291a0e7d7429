"""A recipe for a model, data and a device: what is chosen and, in few words with numbers, why.

The choices are those of QLoRA (Dettmers 2023) where neither data nor memory says otherwise: NF4 with double
quantization, LoRA on all linear layers, 2e-4. Lengths give data.max_length and packing, the number of examples the
epochs, the examples in a step and what is held out. The plan says how many of these go at a time, whether checkpointing
is needed and, where no micro-batch fits, which of `planner.fit`'s knobs are turned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .batches import Capacity, padding, steps_of
from .data import DataReport, Example, load_sets, load_source
from .data.load import Sets
from .data.records import PLAIN
from .data.sources import open_source as open_data
from .errors import QtuneError
from .model import load_tokenizer, names
from .model.skeleton import empty
from .model.source import fetched, looks_like_hub_id, open_source, read_folder
from .planner.devices import Device
from .planner.fit import fit, peak
from .planner.knobs import positions
from .planner.models import Model, catalogue_hub, find_model
from .planner.plan import Plan
from .planner.request import Lengths, Request, lengths_of, with_phases
from .quant.scheme import DTYPES
from .recipe import Recipe
from .screen import Screen, count, size
from .sections import DataKeys

MANY, SOME = 1000, 300  # examples: from so many on 16 in a step and one epoch; from SOME on 8 and two; else 4 and three
PACK = 0.15  # the part of padded micro-batches that is padding from which on packing is worth it
HELD, MOST_HELD, LEAST = 0.05, 200, 100  # held out: a part, at most so many; of fewer examples than LEAST none
WINDOW = 1024  # tokens of a piece of plain text
ROUND = 64  # lengths are multiples of it
FASTER = 1.03  # without checkpointing, by the plan: less is not worth its memory


@dataclass(frozen=True)
class Asked:
    """What the user wants. where: the recipe's `device`; limit: bytes of `device` that may be used; budget: the same
    as the user said it, None where he did not."""

    model: str
    data: str
    held_out: str | None
    device: Device
    where: str
    limit: int
    budget: str | None
    output: str


@dataclass(frozen=True)
class Proposal:
    """A recipe, the values that it gives and why, by dotted key; what was planned for it, and its examples."""

    recipe: Recipe
    values: Mapping[str, Any]
    why: Mapping[str, str]
    request: Request
    plan: Plan
    sets: Sets


class _Choices:
    """Values and reasons by dotted key."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.why: dict[str, str] = {}

    def take(self, key: str, value: Any, why: str = "") -> None:
        self.values[key], self.why[key] = value, why

    def recipe(self) -> Recipe:
        return Recipe.load({"model": self.values["model"]}, self.values)


# ---- the model


def check_model(name: str) -> Model:
    """The model to train, the names of its files looked at where they are here. Raises QtuneError, also for what can
    only be planned."""
    path = Path(name).expanduser()
    if path.exists():
        return Model(name, open_source(name).config, str(path))
    if hub := catalogue_hub(name):
        raise QtuneError(
            "Q301",
            f"{name} is a name of the catalogue, which has no weights: it can be planned (qtune plan --model {name}). "
            f"To train, give the hub id {hub}, a folder with safetensors files or a .gguf file",
        )
    if not looks_like_hub_id(name):
        raise QtuneError(
            "Q301", f"there is no file or folder {name!r}; legal: a folder, a .gguf file or a hub id (owner/name)"
        )
    return find_model(name)


def _tokenizer(name: str) -> Any:
    """Of a hub id only the small files are fetched: the weights are not needed before training."""
    if Path(name).expanduser().exists():
        return load_tokenizer(name)
    folder = fetched(name, weights=False)
    if read_folder(folder, name, weights=False).kind == "qtune":
        raise QtuneError(
            "Q313",
            f"{name} is packed already, and how is told by its weights: download it, and give the folder that it is in",
        )
    return load_tokenizer(folder)


def _stored(name: str) -> dict[str, Any] | None:
    """The recipe's `scheme` of a checkpoint that is packed already; None for any other."""
    path = Path(name).expanduser()
    if not path.exists() or (source := open_source(name)).kind != "qtune":
        return None
    found = names.plan(source, empty(source.config, DTYPES["bfloat16"]))
    if found.stored is None:
        raise QtuneError("Q305", f"cannot use {name}: {'; '.join(found.faults)}")
    table = found.stored_embeddings
    return found.stored.to_dict() | {"embeddings": table.to_dict() if table else None}


# ---- what is chosen


def propose(asked: Asked, screen: Screen) -> Proposal:
    """The recipe that fits. Raises QtuneError for a model or data that cannot be used, and where nothing fits."""
    model, tokenizer = check_model(asked.model), _tokenizer(asked.model)
    made = _Choices()
    _model_keys(made, asked, model)
    bare = Request(Recipe.load({"model": asked.model}, training=False), model, asked.device, asked.limit)
    examples, report = _read(asked, tokenizer, positions(bare), screen)
    _data_keys(made, asked, examples, report, positions(bare))
    if report.format in ("prompt", "alpaca") and tokenizer.chat_template:
        made.why["data.train"] += ", learned without the chat template that `qtune chat` uses"
    per_step = _amount(made, len(examples))
    for key, value, why in (
        ("lr", 2e-4, "usual for LoRA; lower it if the loss jumps"),
        ("schedule", "cosine", "down to 0 at the end"),
        ("warmup", 0.03, ""),
        ("checkpointing", True, "layers are computed again in the backward pass: slower, far less memory"),
        ("seed", 0, ""),
    ):
        made.take(f"train.{key}", value, why)
    if asked.budget is not None:
        made.take("budget", asked.budget, "training does not start where the plan needs more")
    made.take("output", asked.output, "the folder of the run")
    most = made.values["data.max_length"]
    lengths = Lengths(tuple((min(n, most), min(trained, most - 1)) for n, trained in lengths_of(examples).pairs))
    plan = _fitted(made, replace(bare, recipe=made.recipe(), lengths=lengths), per_step, screen)
    recipe = made.recipe()
    sets = load_sets(recipe.data, tokenizer, seed=recipe.train.seed, screen=screen)
    _counts(made, recipe, sets)
    request = replace(bare, recipe=recipe, lengths=lengths_of(sets.train))
    return Proposal(recipe, made.values, made.why, request, plan, sets)


def _model_keys(made: _Choices, asked: Asked, model: Model) -> None:
    made.take("model", asked.model, f"architecture {model.config.model_type}")
    made.take("device", asked.where, f"planned for {asked.device.name}, {size(asked.device.memory)}")
    stored = _stored(asked.model)
    four_bits: dict[str, Any] = {"name": "nf4", "block": 64, "double": True}
    why = "as the checkpoint is packed" if stored else "the frozen base in about 4.1 bits a weight"
    made.take("scheme", stored or four_bits, why)
    made.take("adapter.method", "lora")
    made.take("adapter.targets", "all-linear", "every linear layer of the decoder, as QLoRA found best")
    made.take("adapter.rank", 16, "a larger rank can learn more, and takes more memory")
    made.take("adapter.alpha", 32, "twice the rank")


def _read(asked: Asked, tokenizer: Any, longest: int, screen: Screen) -> tuple[list[Example], DataReport]:
    """The examples as long as they are, up to the model's positions."""
    keys = DataKeys(max_length=min(longest, WINDOW) if open_data(asked.data).plain else longest)
    return load_source(asked.data, tokenizer, keys, screen=screen)


def _data_keys(made: _Choices, asked: Asked, examples: Sequence[Example], report: DataReport, limit: int) -> None:
    """limit: positions of the model."""
    number, lengths = len(examples), sorted(len(example.input_ids) for example in examples)
    made.take("data.train", asked.data, f"{report.records:,} record{'s' * (report.records != 1)} ({report.format})")
    if asked.held_out is not None:
        made.take("data.eval", asked.held_out)
    elif number >= LEAST:
        made.take("data.split", round(min(HELD, MOST_HELD / number), 4))
    if report.duplicates:
        made.take("data.dedupe", True, f"{report.duplicates:,} records are equal to an earlier one")
    longest, most = lengths[-1], lengths[math.ceil(0.99 * number) - 1]
    if longest > 2 * most:  # a few long ones would make all rows long
        longest = most
    made.take("data.max_length", min(-(-longest // ROUND) * ROUND, limit))


def _amount(made: _Choices, number: int) -> int:
    """Epochs; returns the examples in a step."""
    per_step, epochs = (16, 1) if number >= MANY else (8, 2) if number >= SOME else (4, 3)
    made.take("train.epochs", epochs)
    return per_step


def _counts(made: _Choices, recipe: Recipe, sets: Sets) -> None:
    """The reasons that hang on the examples as the recipe has them."""
    report, number, held = sets.report, len(sets.train), len(sets.held_out)
    within = f"{1 - report.truncated / report.records:.1%} of the examples have no more tokens"
    made.why["data.max_length"] = made.why["data.max_length"] or (
        "tokens of the pieces that text is cut into" if report.format == PLAIN
        else f"{within}; {report.truncated:,} longer ones, of up to {report.longest:,}, are cut" if report.truncated
        else f"tokens; the longest example has {report.longest:,}"
    )  # fmt: skip
    steps = steps_of(recipe.train, [len(example.input_ids) for example in sets.train])
    again = ", as there are few of them" * (number < MANY)
    made.why["train.epochs"] = f"passes over {number:,} examples{again}: {steps:,} step{'s' * (steps != 1)}"
    for key, why in (("data.split", "examples are held out to measure on"), ("data.eval", "examples to measure on")):
        if key in made.values:
            made.why[key] = f"{held:,} {why}"
    rises = max(1, round(recipe.train.warmup * steps))
    made.why["train.warmup"] = f"the part in which the rate rises: {rises:,} step{'s' * (rises != 1)}"


# ---- what fits


def _fitted(made: _Choices, request: Request, per_step: int, screen: Screen) -> Plan:
    """Choose how many examples go at a time, packed where that is worth it; the plan with its phases. Raises QtuneError
    where nothing fits."""
    assert request.lengths is not None
    lengths = [tokens for tokens, _ in request.lengths.pairs]
    empty_part = padding(lengths, Capacity(per_step), 0) if len(lengths) > 1 else 0.0
    found, why = None, f"{empty_part:.0%} of it is padding"
    if empty_part >= PACK:
        try:
            found = _largest(request, _packed(lengths, per_step), screen)
        except QtuneError as error:  # an architecture that cannot keep examples apart; else the next one says it again
            why += f"; not packed: {str(error).partition(',')[0].partition(';')[0]}"
    plan, change = found or _largest(request, _padded(per_step), screen)
    for key, value in change.items():
        made.take(key, value)
    accumulate = plan.recipe.train.accumulate
    made.why["train.accumulate"] = "micro-batches in a step" + "; one of all examples would not fit" * (accumulate > 1)
    if plan.recipe.train.packing:
        made.why["train.packing"] = f"examples end to end; padded, {empty_part:.0%} of a micro-batch would be padding"
        made.why["train.micro_tokens"] = f"tokens of a row: about {_in_row(plan.recipe, lengths):.0f} examples"
    else:
        made.why["train.micro_batch"] = f"example{'s' * (plan.recipe.train.micro_batch != 1)} at a time; {why}"
    if plan.verdict != "fits":
        plan = _turned(made, replace(request, recipe=plan.recipe), screen)
    elif not plan.recipe.train.checkpointing:
        made.why["train.checkpointing"] = "there is memory to keep what the backward pass needs, which is faster"
    plan = with_phases(plan)
    if plan.verdict == "no":
        raise _too_large(plan)
    part = f"{count(plan.trained)} trained parameters, {plan.trained / plan.parameters:.1%} of the model's"
    made.why["adapter.method"] = f"{part}; `qtune methods` lists others"
    return plan


def _in_row(recipe: Recipe, lengths: Sequence[int]) -> float:
    assert recipe.train.micro_tokens is not None
    return recipe.train.micro_tokens / (sum(lengths) / len(lengths))


def _packed(lengths: Sequence[int], per_step: int) -> Iterator[dict[str, Any]]:
    """Rows of about as many tokens as the examples of a step have, whole or in parts."""
    mean, longest = sum(lengths) / len(lengths), max(lengths)
    tokens = max(longest, -(-math.ceil(mean * per_step) // ROUND) * ROUND)
    for parts in (1, 2, 4, 8, 16):
        if parts == 1 or tokens // parts >= longest:
            yield {"train.packing": True, "train.micro_tokens": tokens // parts, "train.accumulate": parts}


def _padded(per_step: int) -> Iterator[dict[str, Any]]:
    rows = per_step
    while rows:
        yield {"train.micro_batch": rows, "train.accumulate": per_step // rows}
        rows //= 2


def _largest(request: Request, changes: Iterator[dict[str, Any]], screen: Screen) -> tuple[Plan, dict[str, Any]]:
    """The first change that fits, with checkpointing off where that fits as well and is faster; else the last one.
    Raises QtuneError where the model cannot be planned."""
    tried = list(changes)
    with screen.bar("planning", len(tried) + 1) as advance:
        for change in tried:
            plan = request.plan(request.recipe.with_(change))
            advance()
            if plan.verdict == "fits":
                keeps = {**change, "train.checkpointing": False}
                bare = request.plan(request.recipe.with_(keeps))
                faster = bare.verdict == "fits" and _rate(bare) > FASTER * _rate(plan)
                advance(len(tried) - tried.index(change))
                return (bare, keeps) if faster else (plan, change)
    return plan, change


def _rate(plan: Plan) -> float:
    """Tokens a second; where they are not known, nothing is faster than another."""
    return 1.0 if isinstance(plan.speed, str) else plan.speed.tokens_per_second or 1.0


def _turned(made: _Choices, request: Request, screen: Screen) -> Plan:
    """The knobs that make it fit, in the words of the ladder. Raises QtuneError where none does."""
    found = fit(request, screen)
    if found.plan.verdict == "no":
        raise _too_large(found.plan)
    for rung in found.rungs:
        for key, value in rung.level.change.items() if rung.kept else ():
            made.take(key, value, f"to fit: {rung.level.words} ({rung.level.cost})")
    return found.plan


def _too_large(plan: Plan) -> QtuneError:
    return QtuneError(
        "Q502",
        f"{plan.model.name} cannot be trained in {size(plan.budget)} on {plan.device.name}: with every knob at its "
        f"smallest it takes {size(peak(plan))}; take a smaller model, or more memory (--device, --budget)",
    )
