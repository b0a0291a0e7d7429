"""Training: from a recipe to a run folder. The loop over steps is in `loop`, what a run goes on from in `state`.

A folder is claimed first, data is read before the base, so that what can be refused is refused early; a train that was
refused leaves no empty folder behind, and an earlier run in the folder goes only when all of the new one stands.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .adapters import METHODS, adapted_sites
from .adapters.files import (
    FIRST,
    INFO,
    TENSORS,
    adapter_tensors,
    describe_sites,
    load_adapter,
    read_adapter_json,
    save_adapter,
    save_first,
)
from .batches import Capacity, padding
from .data import Example, load_sets, read_template, show_example
from .data.words import split_marks, unseen
from .errors import QtuneError, listed
from .headroom import check_room, peak_memory, told_out_of_memory
from .loop import Trainer, TrainResult
from .loss import loss_options
from .memory.layers import device_of
from .model.names import KEPT
from .quant import storage_from
from .recipe import Recipe
from .report.page import PAGE
from .report.read import RUN
from .report.record import Recorder
from .report.trackers import check_trackers
from .resume import about, base_digest, check_base, check_data, check_recipe, check_schedule, digests_of, tell_versions
from .runs import (
    METRICS,
    RECIPE,
    anchored,
    calibration_text,
    check_files,
    check_tokens,
    folder_of,
    kept_in,
    load_base,
    pick_device,
    refuse_ranks,
    save_kept,
    start_base,
    tokenizer_of,
    told_of_memory,
)
from .safe_io import alone, claimed, write_text
from .screen import Screen, size
from .state import Checkpoints, Saved, adapter_in, clear, newest, read_metrics, run_of, set_aside, steps_in, tidy
from .step import LanguageModel, NonFinite
from .vocabulary import Token, rows_of

__all__ = ["TrainResult", "Trainer", "train"]


def train(
    recipe: Recipe,
    *,
    screen: Screen | None = None,
    overwrite: bool = False,
    start_from: Path | None = None,
    resume: bool = False,
) -> TrainResult:
    """Run a recipe from nothing to a run folder, or go on with the run in it.

    overwrite: replace a run that lies in the output folder. start_from: a run whose adapter gives the first values
    (its optimizer state is not kept). resume: go on from the newest whole checkpoint in the output folder; where there
    is none yet, from the start. Raises QtuneError; what was saved stays.
    """
    refuse_ranks()
    screen = screen or Screen(quiet=True)
    if recipe.output is None or recipe.data.train is None:
        raise QtuneError("Q106", "a recipe to train needs `output` and `data.train`")
    if resume and overwrite:
        raise QtuneError(
            "Q103", "to go on with a run and to replace it exclude each other; give one of --resume, --overwrite"
        )
    check_trackers(recipe.train.trackers)
    folder = Path(recipe.output).expanduser()
    with claimed(folder), alone(folder):
        saved = _saved(recipe, folder, screen) if resume else None
        if saved is None and start_from is not None:
            check_start(recipe, start_from, folder)
        if saved is None and not overwrite:
            check_free(folder)
        with Recorder(recipe, folder, screen) as record:
            return _train(recipe, folder, screen, start_from, saved, record)


def _train(
    recipe: Recipe, folder: Path, screen: Screen, start_from: Path | None, saved: Saved | None, record: Recorder
) -> TrainResult:
    if recipe.dtype == "float16":
        screen.line(
            "note: float16 trains without loss scaling, so that small gradients vanish: "
            "dtype bfloat16 or float32 is safer",
            "yellow",
        )
    screen.title("Data")  # first, so that a bad record is told before a large model is loaded
    place = pick_device(recipe.device)
    for note in check_files(recipe, place.type):
        screen.line(f"note: {note}", "yellow")
    tokenizer, tokens = tokenizer_of(recipe)
    examples, held_out = _data(recipe, tokenizer, screen, record)
    tell_unread(recipe, tokenizer, tokens, examples, screen)
    data = digests_of(examples, held_out)
    if saved is not None:
        check_data(saved, recipe, data)
    check_room(recipe, [*examples, *held_out], screen)
    screen.title("Load")
    model = carrying_adapter(recipe, start_from, saved, folder, tokenizer, tokens, examples, screen)
    language = language_of(recipe, model, [*examples, *held_out], screen)
    torch.manual_seed(recipe.train.seed)
    sites = adapted_sites(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    screen.title("Train")
    screen.line(f"adapter  {recipe.adapter.method} on {len(sites)} layers, {trained:,} trained parameters")
    if told := told_of_memory(recipe, place.type):
        screen.line(f"memory  {told}")
    _tell_rows_of_tokens(model, recipe, screen)
    base = base_digest(model) if saved is None else saved.info["base"]  # which was compared with this one
    checkpoints = checkpoints_of(recipe, folder, model, about(recipe, data, base))
    trainer = Trainer(
        language, examples, held_out, recipe.train, folder=folder, screen=screen, checkpoints=checkpoints,
        record=record, memory=recipe.memory, files=folder_of(recipe),
    )  # fmt: skip
    _begin(folder, recipe, trainer, start_from, saved)
    record.begin(model, examples, held_out, trainer.steps, trainer.before[1] if trainer.before else None)
    screen.line(
        f"{trainer.steps} step{'s' * (trainer.steps != 1)} of {recipe.train.accumulate} x "
        f"{trainer.capacity}, peak lr {recipe.train.lr:g}" + (f"; on from step {saved.step}" if saved else "")
    )
    with told_out_of_memory(recipe, [*examples, *held_out], screen, trainer.last_save):
        record.sample("before", model, tokenizer, held_out)
        result = _run(trainer)
    peak = peak_memory(trainer.device)
    screen.line(
        f"{result.steps} step{'s' * (result.steps != 1)}, {result.tokens:,} tokens in {result.seconds:.0f} s"
        + (f", {result.skipped} skipped" if result.skipped else "")
        + (f"; peak memory {size(peak)}" if peak else "")
    )
    if not result.interrupted:
        record.sample("after", model, tokenizer, held_out)
    record.end(result.steps, result.interrupted, result.best, result.early)
    return result


def _run(trainer: Trainer) -> TrainResult:
    """Run it; where it stops otherwise than asked for, say what is safe and how to go on."""
    try:
        return trainer.run()
    except NonFinite:  # the same steps would come again
        raise
    except BaseException:
        if there := steps_in(trainer.folder):
            trainer.screen.line(
                f"safe: the checkpoint of step {there[-1]}. Go on from there:  {way_on(trainer.folder)}", "yellow"
            )
        raise


def way_on(folder: Path) -> str:
    """The command that goes on with a run."""
    return f"qtune train {shlex.quote(str(folder))} --resume"


def _data(recipe: Recipe, tokenizer: Any, screen: Screen, record: Recorder) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, told."""
    sets = load_sets(recipe.data, tokenizer, seed=recipe.train.seed, screen=screen)
    examples, held_out = sets.train, sets.held_out
    for report in filter(None, (sets.report, sets.held_out_report)):
        screen.line(str(report))
        record.told.append(str(report))
    Capacity.of(recipe.train).check([*examples, *held_out])
    tell_rows(recipe, examples, sets.report.format, tokenizer, screen)
    screen.line("first example, what is trained marked:")
    screen.line(show_example(examples[0], tokenizer, colour=screen.console.is_terminal))
    return examples, held_out


def carrying_adapter(
    recipe: Recipe, start_from: Path | None, saved: Saved | None, folder: Path, tokenizer: Any,
    tokens: Sequence[Token], examples: Sequence[Example], screen: Screen,
) -> Any:  # fmt: skip
    """The base with the recipe's adapter on it: as in a checkpoint of the run, with the values of another run, or at
    its start."""
    if saved is not None:
        model, _ = load_base(recipe, screen, kept=kept_in(folder, saved.folder))
        check_base(saved, recipe, base_digest(model))
        load_adapter(model, saved.folder)
        check_tokens(model, recipe, tokenizer, saved.folder)
        tell_versions(saved, lambda text: screen.line(f"note: {text}", "yellow"))
        return model
    if start_from is not None:
        adapter, _ = adapter_in(start_from)
        model, _ = load_base(recipe, screen, kept=kept_in(run_of(start_from), adapter))
        sites = load_adapter(model, adapter)
        check_tokens(model, recipe, tokenizer, adapter)
        METHODS[recipe.adapter.method].taken_over({name: site.adapter for name, site in sites.items()})
        return model
    return start_base(recipe, screen, calibration_text(recipe, tokenizer, screen, examples), tokens)


def tell_unread(
    recipe: Recipe, tokenizer: Any, tokens: Sequence[Token], examples: Sequence[Example], screen: Screen
) -> None:
    """Tokens that the data does not hold, and special ones of the chat template that are no tokens."""
    if missing := unseen(tokens, examples):
        screen.line(f"note: no training example holds {listed(missing)}", "yellow")
    template = read_template(recipe.data.template) if recipe.data.template else tokenizer.chat_template
    if isinstance(template, str) and (split := split_marks(template, tokenizer)):
        screen.line(
            f"note: the chat template writes {', '.join(split)}, which the tokenizer splits: tokens.add makes one of "
            "each", "yellow",
        )  # fmt: skip


def _tell_rows_of_tokens(model: Any, recipe: Recipe, screen: Screen) -> None:
    """Which tokens have rows of their own, and what that costs."""
    own = rows_of(model)
    if own is None:
        return
    table, keys = own.table, recipe.tokens
    kinds = [f"{len(keys.add)} new"] * bool(keys.add) + [f"{len(keys.train)} that were there"] * bool(keys.train)
    longer = (
        f"; the vocabulary grows from {table.count:,} to {table.shape[0]:,}" if table.shape[0] > table.count else ""
    )
    both = "one row each for input and output" if len(own.tensors()) == 1 else "a row each for input and for output"
    screen.line(f"tokens  {' and '.join(kinds)}, {both}{longer}; gradients go through all layers down to them")


def language_of(recipe: Recipe, model: Any, examples: Sequence[Example], screen: Screen) -> LanguageModel:
    """The model as it is trained on these examples. Raises QtuneError where its architecture does not allow it."""
    language = LanguageModel(model, loss_options(recipe.train, recipe.memory, device_of(model).type))
    language.check()
    longest = max(len(example.input_ids) for example in examples)
    if chosen := language.choose_attention(longest, packed=recipe.train.packing, dropped=bool(recipe.train.drop_keys)):
        screen.line(f"attention  {chosen}")
    if recipe.train.packing:
        language.check_apart()
    return language


def checkpoints_of(recipe: Recipe, folder: Path, model: Any, same: Mapping[str, Any]) -> Checkpoints:
    """What writes the checkpoints. same: what must be the same when the run goes on."""
    base = {"model": recipe.model, "scheme": recipe.scheme.to_dict(), "dtype": recipe.dtype}
    sites = describe_sites(model)

    def adapter(where: Path, step: int) -> None:
        save_adapter(model, recipe.adapter, where, {**base, "step": step}, run=folder, sites=sites)

    return Checkpoints(folder, adapter, same, recipe.train.keep)


def tell_rows(recipe: Recipe, examples: Sequence[Example], form: str, tokenizer: Any, screen: Screen) -> None:
    """How full the rows are, and what the format of the records means for `qtune chat`."""
    if len(examples) > 1:
        capacity, lengths = Capacity.of(recipe.train), [len(example.input_ids) for example in examples]
        empty = padding(lengths, capacity, recipe.train.seed)
        if capacity.packed:
            screen.line(f"packing  rows of {capacity} are {1 - empty:.1%} full")
        elif empty >= 0.005:
            screen.line(f"padding  {empty:.0%} of micro-batches of {capacity}")
    if form in ("prompt", "alpaca") and tokenizer.chat_template:
        screen.line(
            f"note: {form} records are learned as they stand, without the chat template that `qtune chat` "
            "and most servers put around a question; records with messages are learned with it",
            "yellow",
        )


def _saved(recipe: Recipe, folder: Path, screen: Screen) -> Saved | None:
    """The checkpoint that a run goes on from; None, told, where nothing was saved yet. Raises QtuneError where it is of
    another recipe, or where there is an adapter without one."""
    saved = newest(folder, lambda text: screen.line(f"note: {text}", "yellow"))
    if saved is not None:
        check_recipe(saved, recipe)
        return saved
    if (folder / TENSORS).exists():
        raise QtuneError(
            "Q413",
            f"{folder} holds an adapter, but no checkpoint to go on from; take its weights alone into another run with "
            "--from RUN and another output",
        )
    screen.line(f"note: nothing was saved in {folder} yet: the run begins at its start", "yellow")
    return None


def check_free(folder: Path) -> None:
    """Raises QtuneError rather than train over another run."""
    if (folder / TENSORS).exists() or steps_in(folder):
        raise QtuneError(
            "Q410",
            f"{folder} already holds a trained adapter; choose another folder with output=..., "
            f"go on with it ({way_on(folder)}), or give --overwrite to replace it",
        )


def check_start(recipe: Recipe, start_from: Path, folder: Path) -> None:
    """The adapter to start from, and its base, must be those that the recipe describes, or the new run's would lie."""
    if run_of(start_from).resolve() == folder.resolve():
        raise QtuneError(
            "Q410", f"{folder} is both the run to start from and the output; choose another folder with output=..."
        )
    info = read_adapter_json(adapter_in(start_from)[0])
    taken = sorted(token["text"] for token in info.get("tokens", ()))
    if taken != (own := sorted((*recipe.tokens.add, *recipe.tokens.train))):
        raise QtuneError(
            "Q414",
            f"the recipe's tokens are {own}, those of {start_from} are {taken}: their rows are a part of what is taken "
            "over; give the recipe the same `tokens`",
        )
    saved = {"model": recipe.model, "adapter": info["adapter"]}
    there, here = Recipe.load(saved, training=False).adapter.to_dict(), recipe.adapter.to_dict()
    faults = [f"{k} is {here.get(k)}, there {there.get(k)}" for k in {**here, **there} if here.get(k) != there.get(k)]
    if faults:
        raise QtuneError(
            "Q414",
            f"the recipe's adapter is another one than that of {start_from}: {'; '.join(faults)}. "
            f"Give the recipe the same `adapter` section, or train {run_of(start_from) / RECIPE} with another output",
        )
    scheme = info["base"].get("scheme", recipe.scheme.to_dict())
    if scheme != recipe.scheme.to_dict():
        faults.append(f"scheme is {recipe.scheme}, there {storage_from(scheme)}")
    if (run_of(start_from) / RECIPE).is_file():
        other, codes = Recipe.load(run_of(start_from) / RECIPE, training=False), recipe.calibrate.codes
        if codes != other.calibrate.codes and other.model == anchored(recipe).model:  # else packed with those, maybe
            faults.append(f"calibrate.codes is {codes}, there {other.calibrate.codes}")
    if faults:
        raise QtuneError(
            "Q414",
            f"the recipe packs its base otherwise than {start_from}: {'; '.join(faults)}. An adapter fits the codes "
            f"that it was trained on: give the recipe the same, or train {run_of(start_from) / RECIPE}",
        )


def check_disk(trainer: Trainer, recipe: Recipe, left: int) -> tuple[int, int]:
    """Bytes that the checkpoints of the steps that are left will take, and that are there. Raises QtuneError where that
    is too little."""
    adapter = sum(tensor.nbytes for tensor in adapter_tensors(trainer.model.model).values())
    state = trainer.train_step.optimizer.state_bytes()
    return trainer.checkpoints.check_room(adapter, state, -(left // -trainer.save_every), recipe.train.keep_best)


def _begin(folder: Path, recipe: Recipe, trainer: Trainer, start_from: Path | None, saved: Saved | None) -> None:
    """Make the folder that of this run: its recipe, and what the start chose. What an earlier run left goes first: its
    adapter would lie beside a recipe that is not its own until the first save."""
    model, screen, step = trainer.model.model, trainer.screen, saved.step if saved else 0
    if saved is not None:
        check_schedule(saved, recipe.train, trainer.steps)
    check_disk(trainer, recipe, trainer.steps - step)
    try:
        tidy(folder)
        if saved is not None:
            set_aside(folder, step)
            trainer.checkpoints.publish(step)
            trainer.go_on_from(saved, read_metrics(folder / METRICS, step))
        else:
            clear(folder)
            for path in (
                *(folder / name for name in (INFO, TENSORS, METRICS, FIRST, RUN, PAGE)),
                *folder.glob(f"{KEPT}*.safetensors*"),
            ):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise QtuneError("Q901", f"cannot replace the run in {folder}: {error}") from error
    if saved is None:
        if kept := save_kept(model, folder):
            screen.line(f"base  the codes that the start chose, {size(kept)}, are kept in {folder / KEPT}.safetensors")
        if start_from is None:
            save_first(model, folder)
        elif (run_of(start_from) / FIRST).is_file():
            shutil.copyfile(run_of(start_from) / FIRST, folder / FIRST)
    if (folder / "merged").exists() and step < trainer.steps:
        screen.line(f"note: {folder / 'merged'} is of the run before; merge anew with --overwrite", "yellow")
    write_text(folder / RECIPE, anchored(recipe).to_yaml())
