"""A run folder and what is built from a recipe: base model, tokenizer, adapter.

A run holds recipe.yaml, adapter.safetensors, adapter.json, metrics.jsonl, run.json and report.html (qtune/report),
checkpoints/ (qtune/state.py), and merged/ once merged. The folder of a checkpoint serves as a run, with the adapter of
its step. Where the start of the adapter or the calibration chose codes of their own, base.safetensors holds them; where
the adapter does not start as the identity, start.safetensors holds its first values. A run that was combined from
others (qtune/combining) has combined.json in the place of metrics.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import AdapterSpec
from .adapters.files import INFO, kept_layers, load_adapter, read_adapter_json
from .adapters.many import Adapters, load_many
from .checkpoint import Entry, write
from .data import Example, load_source
from .data.words import add_words, ids_of
from .errors import QtuneError
from .keys import DATA_FILE
from .memory import DEVICE, DISK, HOST, place_of
from .memory.cuda import settle
from .memory.files import MappedFile
from .memory.host import is_here
from .memory.layers import device_of
from .memory.stream import Store, store_of
from .memory.table import table_on_host
from .model import load, load_tokenizer, save_quantized
from .model.layerwise import windows_of
from .model.loading import Packing, dense_parameters
from .model.names import KEPT
from .model.source import open_source
from .quant import QuantEmbedding, QuantLinear
from .quant.scheme import DTYPES
from .recipe import Recipe
from .safe_io import claimed
from .screen import Advance, Screen, size
from .sections import MemoryKeys, entries, moved
from .starting import Starting, start, tell, wants
from .state import adapter_in, run_of
from .vocabulary import Token, give_rows, rows_of

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
COMBINED = "combined.json"  # of a run that `qtune combine` made of others
PLACED = {  # keys of `memory` that say where something waits -> what, where nothing else tells it
    "weights": "", "boundaries": "layers' inputs", "embeddings": "input table", "optimizer": "optimizer's states",
}  # fmt: skip


@dataclass
class Run:
    """A finished or interrupted run, loaded: `model` is a transformers model that carries the adapter, whose files lie
    in `adapter`."""

    folder: Path
    adapter: Path
    recipe: Recipe
    model: Any
    tokenizer: Any


def is_run(path: str | Path) -> bool:
    """Does this folder hold a recipe and an adapter, or belong to one that does?"""
    folder = Path(path)
    return (run_of(folder) / RECIPE).is_file() and (adapter_in(folder)[0] / INFO).is_file()


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run. Raises QtuneError where the folder is no run."""
    if not is_run(folder):
        missing = [name for name in (RECIPE, INFO) if not (run_of(folder) / name).is_file()]
        raise QtuneError(
            "Q401",
            f"{folder} is not a run: it lacks {' and '.join(missing)}; give the `output` folder of a `qtune train`",
        )
    return Recipe.load(run_of(folder) / RECIPE, training=False)


def combined_from(folder: Path) -> list[str]:
    """A line for each run that this one was combined from, with its weight; none of a run that was trained. Raises
    QtuneError where the record is damaged."""
    path = run_of(folder) / COMBINED
    try:
        made = json.loads(path.read_text("utf-8"))
        pairs = zip(made["weights"], made["runs"], strict=True)
        return [
            f"{weight:g} x {Path(run['folder']).name} ({run['method']}, data {run['data']})" for weight, run in pairs
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QtuneError("Q411", f"{path} cannot be read: {error}") from error


def open_run(folder: str | Path, screen: Screen, *, device: str | None = None) -> Run:
    """Load base, tokenizer and adapter of a run, or of the checkpoint whose folder is given."""
    run = open_base(folder, screen, device=device)
    load_adapter(run.model, run.adapter)
    check_tokens(run.model, run.recipe, run.tokenizer, run.adapter)
    return run


def open_base(folder: str | Path, screen: Screen, *, device: str | None = None) -> Run:
    """As `open_run`, without the adapter, which the model then does not carry."""
    folder = Path(folder)
    recipe, run = read_recipe(folder), run_of(folder)
    if Path(recipe.model).is_absolute() and not Path(recipe.model).exists():
        raise QtuneError(
            "Q406",
            f"the base of {folder} is gone: there is no {recipe.model}; "
            f"put it back, or set `model` in {run / RECIPE} to where it lies now",
        )
    adapter, note = adapter_in(folder)
    if note:
        screen.line(f"note: {note}", "yellow")
    model, tokenizer = load_base(recipe, screen, device=device, kept=kept_in(run, adapter))
    return Run(run, adapter, recipe, model, tokenizer)


def load_adapters(model: Any, folders: Mapping[str, str | Path]) -> Adapters:
    """Load the adapters of runs (or of their checkpoints), by name, onto the packed base `model`, once for all:

        adapters = qtune.load_adapters(model, {"law": "runs/law", "code": "runs/code"})
        adapters.use({"law": 0.7, "code": 0.3})

    None is in use at first; called again it loads more. Raises QtuneError with everything that does not fit, such as a
    layer that an adapter was trained on with other weights; then the model is as before."""
    return load_many(model, {name: adapter_in(Path(folder).expanduser())[0] for name, folder in folders.items()})


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with its files and folders as absolute paths, so that its run can be read from any folder."""

    def absolute(value: str | None) -> str | None:
        path = Path(value or "").expanduser()
        return str(path.absolute()) if value and "{" not in value and path.exists() else value

    data, output = recipe.data, recipe.output and str(Path(recipe.output).expanduser().absolute())
    train, held_out = moved(data.train, absolute), moved(data.eval, absolute)
    data = replace(data, train=train, eval=held_out, template=absolute(data.template))
    calibrate = replace(recipe.calibrate, data=absolute(recipe.calibrate.data))
    return replace(recipe, model=absolute(recipe.model) or recipe.model, data=data, calibrate=calibrate, output=output)


def kept_in(folder: Path, adapter: Path) -> Path | None:
    """The folder of a run itself, where it keeps codes of its own. adapter: where its adapter.json lies. Raises
    QtuneError where they are gone."""
    count = read_adapter_json(adapter).get("kept", 0)
    names = (f"{KEPT}.safetensors", f"{KEPT}.safetensors.index.json")
    if count and not any((folder / name).is_file() for name in names):
        raise QtuneError(
            "Q407",
            f"{folder} lacks {KEPT}.safetensors with the codes of {count} layers, which packing the base anew does not "
            "give; the adapter is worthless without them: put the file back, or train again",
        )
    return folder if count else None


def save_kept(model: Any, folder: Path) -> int:
    """Write the codes that are the run's own, a tensor at a time. Returns their bytes."""
    entries = [
        Entry(f"{name}.weight.{part}", tensor.dtype, tuple(tensor.shape), tensor.detach)
        for name, layer in kept_layers(model).items()
        for part, tensor in layer.parts.items()
    ]
    if entries:
        write(folder, entries, KEPT)
    return sum(entry.nbytes for entry in entries)


def load_base(
    recipe: Recipe,
    screen: Screen,
    *,
    device: str | None = None,
    stored: bool = False,
    kept: Path | None = None,
    packing: Packing | None = None,
) -> tuple[Any, Any]:
    """Base and tokenizer of a recipe, quantized while loading, with a bar. stored: a packed model, kept as it is
    packed, whatever the recipe says. kept: a run whose own codes are taken. packing: what becomes of each weight."""
    tokenizer, _ = tokenizer_of(recipe)
    options = _storage(recipe, device) | ({"scheme": None, "embeddings": None} if stored else {})
    store = _store(recipe, options["device"])
    model = load_with_bar(recipe.model, screen, kept=kept, aside=store and store.put, packing=packing, **options)
    _place(model, recipe, store)
    _tell_base(model, recipe, screen)
    return model, tokenizer


def start_base(recipe: Recipe, screen: Screen, windows: Tensor | None, tokens: Sequence[Token] = ()) -> Any:
    """The base of a recipe with its adapter, which starts while the base is loaded. windows: calibration text [samples,
    length], where the recipe's method or codes ask for it. tokens: those with rows of their own."""
    options = _storage(recipe) | {"seed": recipe.train.seed, "codes": recipe.calibrate.codes, "windows": windows}
    store = _store(recipe, options["device"])
    model = load_with_bar(recipe.model, screen, start, spec=recipe.adapter, aside=store and store.put, **options)
    _place(model, recipe, store)
    _tell_base(model, recipe, screen)
    tell(model, recipe.adapter, screen)
    give_rows(model, tokens, recipe.tokens.start)
    return model


def tokenizer_of(recipe: Recipe) -> tuple[Any, tuple[Token, ...]]:
    """The tokenizer of a recipe's model with the recipe's tokens added, and the tokens that get rows of their own."""
    tokenizer = load_tokenizer(recipe.model)
    return tokenizer, add_words(tokenizer, recipe.tokens)


def check_tokens(model: Any, recipe: Recipe, tokenizer: Any, adapter: Path) -> None:
    """Raises QtuneError where the rows that an adapter brought are not those of the recipe's tokens."""
    own = rows_of(model)
    there = {} if own is None else {token.text: token.id for token in own.table.tokens}
    here = ids_of(tokenizer, recipe.tokens)
    if here != there:
        listed = ", ".join(f"{text!r} (id {id})" for text, id in sorted(set(here.items()) ^ set(there.items()))[:8])
        raise QtuneError(
            "Q404",
            f"the adapter in {adapter} has rows of other tokens than the recipe's `tokens` on the tokenizer of "
            f"{recipe.model}: {listed}",
        )


def _storage(recipe: Recipe, device: str | None = None) -> dict[str, Any]:
    target = pick_device(device or recipe.device)
    return {
        "scheme": recipe.scheme, "embeddings": recipe.embeddings, "dtype": DTYPES[recipe.dtype], "device": target,
    }  # fmt: skip


def folder_of(recipe: Recipe) -> Path:
    """Where the files of `memory` lie: in its folder, else in the run's."""
    return Path(recipe.memory.folder or recipe.output or ".").expanduser()


def away(memory: MemoryKeys, kind: str) -> list[str]:
    """The keys of `memory` by which something waits elsewhere than on a device of this kind."""
    return [key for key in PLACED if not is_here(getattr(memory, key), kind)]


def told_of_memory(recipe: Recipe, kind: str) -> str:
    """Where things wait, but for the weights; empty where all are on the device."""
    there = {HOST: "in host memory", DISK: f"in a file in {folder_of(recipe)}"}
    told = [key for key in away(recipe.memory, kind) if PLACED[key]]
    return ", ".join(f"{PLACED[key]} {there[getattr(recipe.memory, key)]}" for key in told)


def check_files(recipe: Recipe, kind: str) -> list[str]:
    """What of `memory` has no effect on a device of this kind, in words. Raises QtuneError, before anything is loaded,
    where the files that it asks for cannot be made."""
    memory, told = recipe.memory, []
    if DISK in (memory.weights, memory.boundaries):
        MappedFile(folder_of(recipe), "what waits on the disk").empty(1)
    elif memory.folder is not None:
        told.append(f"memory.folder {memory.folder} is not used: neither memory.weights nor memory.boundaries is disk")
    if same := [key for key in PLACED if getattr(memory, key) == HOST and is_here(HOST, kind)]:
        told.append(f"memory.{', memory.'.join(same)}: on a CPU host is the same as device")
    return told


def _store(recipe: Recipe, device: torch.device) -> Store | None:
    return store_of(recipe.memory.weights, device.type, device, folder_of(recipe))


def _place(model: Any, recipe: Recipe, store: Store | None) -> None:
    """What waits elsewhere than on the device, once all is loaded."""
    if store is not None:
        store.run(model)
    if recipe.memory.embeddings == HOST and (note := table_on_host(model, device_of(model).type)):
        model.qtune.notes.append(note)


def _tell_base(model: Any, recipe: Recipe, screen: Screen) -> None:
    layers = [m for m in model.modules() if isinstance(m, (QuantLinear, QuantEmbedding))]
    packed = sum(layer.packed.numel() for layer in layers)
    plain = (p for name, p in dense_parameters(model).items() if ".adapter." not in name)
    other = sum(p.numel() * p.element_size() for p in plain)
    sizes = f"{size(packed)} packed + {size(other)} in {recipe.dtype}"
    told = {DEVICE: "", HOST: ", streamed from host memory", DISK: ", streamed from a file"}
    waiting = max((place_of(layer.packed) for layer in layers if isinstance(layer, QuantLinear)), key=list(told).index)
    where = f"{device_of(model)}: {model.qtune.scheme}, {sizes}{told[waiting]}"
    screen.line(f"base  {recipe.model} on {where}")
    for note in model.qtune.notes:
        screen.line(f"note: {note}", "yellow")


def load_with_bar(source: str, screen: Screen, how: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`model.load`, or `start`, with a progress bar that appears with the first tensor."""
    with ExitStack() as stack:
        advance: Advance | None = None
        shown = 0

        def progress(name: str, done: int, total: int) -> None:
            nonlocal advance, shown
            if advance is None:
                advance = stack.enter_context(screen.bar("loading" if how is None else "loading and starting", total))
            if done > shown:
                advance(done - shown)
                shown = done

        return (how or load)(source, progress=progress, **options)


def calibration_text(recipe: Recipe, tokenizer: Any, screen: Screen, examples: Sequence[Example] = ()) -> Tensor | None:
    """Windows of token ids [samples, length] where the recipe's codes or its method ask for them: of calibrate.data, or
    of the training `examples`."""
    keys = recipe.calibrate
    if not wants(recipe.adapter, keys.codes):
        if keys.data is not None:
            screen.line(f"note: {keys.data} is not read: neither the codes nor the start ask for text", "yellow")
        return None
    if keys.data is not None:
        how = replace(recipe.data, max_length=keys.length, too_long="cut", loss_on="all", system=None)
        examples, _ = load_source(keys.data, tokenizer, how, screen=screen)
    if not examples:
        raise QtuneError(
            "Q106", f"calibrate.data is missing, and codes {keys.codes} are chosen from text; legal: {DATA_FILE}"
        )
    new = set(ids_of(tokenizer, recipe.tokens, recipe.tokens.add).values())  # which no layer has learned to read yet
    texts = [[i for i in example.input_ids if i not in new] if new else example.input_ids for example in examples]
    windows = windows_of(texts, keys.samples, keys.length)
    name = ", ".join(Path(source.file).name for source in entries(keys.data or recipe.data.train or ""))
    count, few = len(windows), f", all that there is (calibrate.samples is {keys.samples})"
    what = f"{count} window{'s' * (count != 1)} of {keys.length} tokens of {name}"
    screen.line(f"calibration  {what}{few * (count < keys.samples)}")
    return windows


def quantize(recipe: Recipe, out: Path, *, screen: Screen | None = None) -> int:
    """Write the packed checkpoint of a recipe's model, which `load` reads without the original, with the licence.
    Returns its bytes."""
    if (out / "config.json").exists():
        raise QtuneError("Q801", f"{out} already holds a checkpoint; choose another --out")
    screen = screen or Screen(quiet=True)
    recipe = replace(recipe, device="cpu", adapter=AdapterSpec())
    tokenizer = load_tokenizer(recipe.model)
    windows = calibration_text(recipe, tokenizer, screen)
    chosen: dict[str, Any] = {} if windows is None else {"packing": Starting(None, windows, recipe.calibrate.codes)}
    with claimed(out):
        model = load_with_bar(recipe.model, screen, **_storage(recipe), **chosen)
        for note in model.qtune.notes:
            screen.line(f"note: {note}", "yellow")
        save_quantized(model, tokenizer, out)
    for path in licences(recipe.model):
        shutil.copyfile(path, out / path.name)
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def licences(source: str) -> list[Path]:
    """LICENSE and NOTICE files that lie with a base model (in its folder, beside its .gguf, or in the hub's cache)."""
    path = Path(source).expanduser()
    if not path.exists():
        path = open_source(source).path
    folder = path.parent if path.is_file() else path
    starts = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    return sorted(p for p in folder.glob("*") if p.is_file() and p.name.upper().startswith(starts))


def pick_device(name: str) -> torch.device:
    """A recipe's device, with CUDA's settings made; auto is the best that there is. Raises QtuneError for one that this
    machine lacks."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    count = torch.cuda.device_count()
    legal = re.fullmatch(r"cpu|mps|cuda(:\d+)?", name)
    index = int(name.partition(":")[2] or 0) if legal else 0
    if not legal or (name.startswith("cuda") and index >= count) or (name == "mps" and not mps):
        have = [f"cuda:{i}" for i in range(count)] + ["mps"] * mps + ["cpu"]
        raise QtuneError(
            "Q601", f"device {name!r} is not there (torch {torch.__version__}); this machine has {', '.join(have)}"
        )
    device = torch.device(name)
    settle(device)
    return device


def refuse_ranks() -> None:
    """Several processes would each train a model of their own, silently apart."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise QtuneError(
            "Q604",
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: qtune trains on one device; "
            "start it without torchrun or accelerate launch",
        )
