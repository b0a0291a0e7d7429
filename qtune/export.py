"""Merge: base + adapter written as a plain transformers checkpoint, layer by layer, and verified before it takes its
name.

    W_out = round(dequantize(packed) + delta), the sum in fp32, rounded once to the output dtype
Packing the sum again would erase a delta below about 3 % of W; bf16 rounding alone is 17 % of a delta that is 1 % of
W, so fp32 is on offer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapters import METHODS, Adapted, Adapter
from .adapters.files import load_adapter, load_first, starts_elsewhere
from .adapters.sites import SHARED
from .adapters.starts import difference
from .card import model_card
from .checkpoint import Entry, write
from .data import read_records, tokenize
from .errors import QtuneError, one_of
from .memory.layers import device_of
from .model.experts import Experts
from .model.saving import PublishedNames
from .quant import Dense, QuantEmbedding, QuantLinear
from .quant.scheme import DTYPES
from .recipe import Recipe
from .runs import COMBINED, Run, licences, load_with_bar
from .safe_io import write_json, write_text
from .screen import Screen
from .sections import entries
from .verify import Reference, Verification, in_dtype, logits_of, verify
from .vocabulary import TokenHead, TokenTable, rows_of, tied_head

KEEP_BASE = ("trained", "original")
PROMPTS, PROMPT_TOKENS = 4, 64
REMAINDER = "remainder"  # in a packed checkpoint: the run that holds what packing lost
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees because",
)
T = TypeVar("T")
Dense32 = Callable[[], tuple[Tensor, Tensor | None]]  # makes the fp32 weight [out, in] and bias of a layer


@dataclass(frozen=True)
class MergeReport:
    """Where the merged checkpoint is and how it was verified. base_kl: with `original`, its KL from the model that
    was trained. kept: of a merge that is packed again, what packing left."""

    out: Path
    dtype: str
    keep_base: str
    nbytes: int
    verification: Verification
    base_kl: float | None = None
    kept: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**asdict(self), "passed": self.verification.passed}


def merge(
    run: Run,
    out: Path,
    *,
    dtype: str = "bfloat16",
    keep_base: str = "trained",
    screen: Screen | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write the merged checkpoint of a run, verify it, and only then give it the name `out`. dtype: bfloat16,
    float16, float32.

    keep_base: `trained` merges onto the dequantized base that was trained on; `original` onto the weights before
    quantization, which is another function (its KL from the trained one is reported). Raises QtuneError where
    verification fails; the files stay in `<out>.unverified`.
    """
    screen = screen or Screen(quiet=True)
    check_merge(run.recipe, out, dtype, keep_base, overwrite)
    return verified_as(out, lambda partial_out: _merge(run, out, partial_out, dtype, keep_base, screen))


def verified_as(out: Path, write_to: Callable[[Path], MergeReport], *, otherwise: str = "") -> MergeReport:
    """Write a checkpoint, a folder or a file, beside `out`, and give it that name if it is verified. otherwise: what to
    do if it is not."""
    partial_out = out.with_name(out.name + ".unverified")
    _remove(partial_out)
    try:
        report = write_to(partial_out)
    except BaseException as error:
        with suppress(OSError):
            _remove(partial_out)
        if isinstance(error, OSError):
            raise QtuneError("Q901", f"cannot write {partial_out}: {error}") from error
        raise
    if not report.verification.passed:
        lines = "\n".join([*report.verification.lines(), *([otherwise] if otherwise else [])])
        raise QtuneError("Q803", f"the merged checkpoint failed its verification and stays in {partial_out}:\n{lines}")
    try:
        if out.is_dir():
            shutil.rmtree(out)
        partial_out.replace(out)
    except OSError as error:
        raise QtuneError("Q901", f"{partial_out} is verified but cannot take the name {out}: {error}") from error
    return report


def _remove(path: Path) -> None:
    """A folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _merge(run: Run, out: Path, partial_out: Path, dtype: str, keep_base: str, screen: Screen) -> MergeReport:
    """Write to `partial_out` and verify."""
    prompts, model, trained = prompts_of(run), run.model, None
    if keep_base == "original":
        with in_dtype(model, torch.float32):
            trained = logits_of(model, prompts)
        model = on_original(run, dtype, screen)
    reference = Reference.of(model, prompts, DTYPES[dtype])
    nbytes = write_merged(model, partial_out, DTYPES[dtype], screen)
    _write_companions(run, model, partial_out, dtype)
    verification = verify(model, partial_out, DTYPES[dtype], reference)
    base_kl = None if trained is None else float(Reference(prompts, trained, 0.0).kl(reference.logits).mean())
    report = MergeReport(out, dtype, keep_base, nbytes, verification, base_kl)
    write_text(partial_out / "README.md", model_card(run, dtype, keep_base, verification.lines()))
    return report


def check_merge(recipe: Recipe, out: Path, dtype: str, keep_base: str, overwrite: bool) -> None:
    """Raises QtuneError for what is known to be wrong before anything is loaded: an unknown option, a method that no
    weight holds, or an `out` that is the base, is not a checkpoint, or is one and may not be replaced."""
    METHODS[recipe.adapter.method].check_merges()
    choices = (("dtype", dtype, DTYPES), ("--keep-base", keep_base, KEEP_BASE))
    faults = [str(one_of(what, given, legal)) for what, given, legal in choices if given not in legal]
    base = Path(recipe.model).expanduser()
    if out.exists() and base.exists() and out.resolve() in (base.resolve(), base.resolve().parent):
        faults.append(f"{out} holds the base model of this run; choose another --out")
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        plain = out.is_dir() and (out / "config.json").is_file() and all(map(_is_written, out.iterdir()))
        if not plain:
            faults.append(f"{out} exists and is not a checkpoint; choose another --out")
        elif not overwrite:
            faults.append(f"{out} already holds a checkpoint; choose another --out, or give --overwrite")
    if faults:
        raise QtuneError("Q801", "; ".join(faults))


def _is_written(path: Path) -> bool:
    """Is it what a merge leaves in a checkpoint's folder: a file, or a remainder from which nothing was made since?"""
    if path.is_dir():
        return path.name == REMAINDER and (path / COMBINED).is_file() and not any(p.is_dir() for p in path.iterdir())
    return True


def prompts_of(run: Run) -> list[list[int]]:
    """Token ids of prompts: real ones, and one of the tokens with rows of their own, if there are any."""
    own = rows_of(run.model)
    return _real_prompts(run) + ([] if own is None else [[t.id for t in own.table.tokens[:PROMPT_TOKENS]]])


def _real_prompts(run: Run) -> list[list[int]]:
    """From the run's own data where it can still be read, else a few sentences."""
    keys = run.recipe.data
    for given in (keys.eval, keys.train):
        if given is None:
            continue
        with suppress(QtuneError):  # the data moved or changed since: not a fault of the merge
            records = _spread(read_records(entries(given)[0], keys))
            examples, _ = tokenize(
                records, run.tokenizer, max_length=keys.max_length, loss_on="all", template=keys.template
            )
            return [list(example.input_ids[:PROMPT_TOKENS]) for example in _spread(examples)]
    return [list(run.tokenizer(text)["input_ids"]) for text in TEXTS]


def _spread(items: Sequence[T]) -> Sequence[T]:
    """A few of them, from all over."""
    return items[:: max(1, len(items) // PROMPTS)][:PROMPTS]


# ---- writing ----


def write_merged(model: nn.Module, out: Path, dtype: torch.dtype, screen: Screen) -> int:
    """All tensors of the model, merged and dense, to safetensors; one in memory at a time. Returns bytes."""
    entries = list(merged_entries(model, dtype))
    with screen.bar("merging", len(entries)) as advance:
        write(out, [_counted(entry, advance) for entry in entries])
    return sum(entry.nbytes for entry in entries)


def _counted(entry: Entry, advance: Callable[..., None]) -> Entry:
    def tensor() -> Tensor:
        value = entry.tensor()
        advance(1)
        return value

    return replace(entry, tensor=tensor)


def merged_entries(model: nn.Module, dtype: torch.dtype) -> Iterator[Entry]:
    """Name, dtype, shape and a way to make each tensor of the plain checkpoint, in the model's order; a tied head is
    left out."""
    names, inside = PublishedNames(model), SHARED + "."
    tied = tied_head(model)
    for path, module in model.named_modules():
        if (path + ".").startswith((inside, SHARED + ".", f"{tied}.")):
            continue
        name = names.of(f"{path}.weight").removesuffix(".weight")
        if isinstance(module, Adapted):
            inside = path + "."
            yield from _linear_entries(name, module.base, module.merged, dtype, path)
        elif isinstance(module, Experts):
            inside = path + "."
            yield from names.experts(path, module, partial(_expert, module, path, dtype), dtype)
        elif isinstance(module, TokenTable | TokenHead):
            inside = path + "."
            yield Entry(f"{name}.weight", dtype, module.shape, partial(module.merged, dtype), path)
            if isinstance(module, TokenHead) and (bias := module.bias(dtype)) is not None:
                yield Entry(f"{name}.bias", dtype, tuple(bias.shape), bias.detach, path)
        elif isinstance(module, QuantLinear):
            yield from _linear_entries(name, module, partial(_plain, module), dtype, path)
        elif isinstance(module, QuantEmbedding):
            yield Entry(f"{name}.weight", dtype, module.shape, partial(module.dequantize, dtype), path)
        else:
            for key, tensor in _own_tensors(module):
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                named = names.of(f"{path}.{key}".lstrip("."))
                yield Entry(named, kind, tuple(tensor.shape), partial(tensor.to, kind), path)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of a module itself, not of its children."""
    yield from ((key, p) for key, p in module._parameters.items() if p is not None)
    hidden = module._non_persistent_buffers_set
    yield from ((key, b) for key, b in module._buffers.items() if b is not None and key not in hidden)


def _plain(module: QuantLinear) -> tuple[Tensor, Tensor | None]:
    return module.dequantize(torch.float32), module.bias


def _expert(experts: Experts, path: str, dtype: torch.dtype, number: int, leaf: str) -> Tensor:
    """One expert's merged matrix [out, in]."""
    layer: Any = experts.get_submodule(f"{number}.{leaf}")
    adapted = isinstance(layer, Adapted)
    dense = layer.merged if adapted else partial(_plain, layer)
    site = f"{path}.{number}.{leaf}"
    return next(_linear_entries(site, layer.base if adapted else layer, dense, dtype, site)).tensor()


def _linear_entries(name: str, base: QuantLinear, dense: Dense32, dtype: torch.dtype, site: str) -> Iterator[Entry]:
    def weight() -> Tensor:
        full, bias = dense()
        if bias is not None and base.bias is None:
            raise QtuneError(
                "Q805", f"{name}: the adapter adds a bias, which a plain checkpoint of this model cannot hold"
            )
        w = full.to(dtype)
        if not torch.isfinite(w).all():
            raise QtuneError(
                "Q804", f"{name}.weight: merged values overflow {dtype}; merge with --dtype bfloat16 or float32"
            )
        return w.T if base.conv1d else w

    def bias() -> Tensor:
        value = dense()[1]
        assert value is not None, name
        return value.to(dtype)

    yield Entry(f"{name}.weight", dtype, base.shape[::-1] if base.conv1d else base.shape, weight, site)
    if base.bias is not None:
        yield Entry(f"{name}.bias", dtype, (base.out_features,), bias, site)


def _write_companions(run: Run, model: Any, out: Path, dtype: str) -> None:
    """Config, generation config, tokenizer, and the base's licence."""
    config = model.config.to_dict()
    for key in ("quantization_config", "qtune", "_name_or_path"):
        config.pop(key, None)
    changes = {"dtype": dtype, "tie_word_embeddings": tied_head(model) is not None}
    for inner in config.values():  # a text_config, as in multimodal models, says it again
        if isinstance(inner, dict):
            inner.update({key: value for key, value in changes.items() if key in inner})
    write_json(out / "config.json", config | {"architectures": [type(model).__name__]} | changes)
    if (generation := getattr(model, "generation_config", None)) is not None:
        # not save_pretrained: it refuses values that many published models hold (a temperature without sampling)
        write_text(out / "generation_config.json", generation.to_json_string())
    run.tokenizer.save_pretrained(out)
    for path in licences(run.recipe.model):
        shutil.copyfile(path, out / path.name)


def on_original(run: Run, dtype: str, screen: Screen) -> Any:
    """The run's model again, over the weights before quantization. Of an adapter that did not start as the identity
    only what it learned goes on top: its start made up for the quantization, which is not there."""
    recipe = run.recipe
    device = device_of(run.model)
    options: dict[str, Any] = {"scheme": Dense(dtype), "dtype": DTYPES[recipe.dtype], "device": device}
    model = load_with_bar(recipe.model, screen, **options)
    sites = load_adapter(model, run.adapter, other_base=True)
    if starts_elsewhere(model):
        trained = {name: deepcopy(site.adapter) for name, site in sites.items()}
        load_first(model, run.folder, run.adapter)
        for name, site in sites.items():
            site.adapter = Learned(trained[name], site.adapter)  # type: ignore[assignment]
    return model


class Learned(nn.Module):
    """In an adapter's place: what it computes less what its first values did, y = base(x) + trained(x) - first(x)."""

    def __init__(self, trained: Adapter, first: Adapter) -> None:
        super().__init__()
        self.trained, self.first = trained, first

    def forward(self, x: Tensor, base: QuantLinear) -> Tensor:
        return base(x) + (self.trained(x, base) - self.first(x, base))

    def merged(self, base: QuantLinear) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.trained.merged(base)
        return weight.sub_(self.first.merged(base)[0]).add_(base.dequantize()), bias

    def low_rank(self, base: QuantLinear) -> tuple[Tensor, Tensor, float] | None:
        """The difference of two changes that have factors, as one."""
        parts = [one.low_rank(base) for one in (self.trained, self.first)]
        if parts[0] is None or parts[1] is None:
            return None
        (A, B, s), (A0, B0, s0) = parts[0], parts[1]
        return *difference(A.float(), s * B.float(), A0.float(), s0 * B0.float()), 1.0

    def peft_state(self) -> dict[str, Tensor]:
        """The difference as a LoRA of twice the rank; no other kind of method has such a form."""
        names = ("lora_A.weight", "lora_B.weight")
        trained, first = ([a.peft_state()[name] for name in names] for a in (self.trained, self.first))
        return dict(zip(names, difference(*trained, *first), strict=True))

    def peft_lists(self) -> tuple[str, ...]:
        """As the trained adapter's."""
        return self.trained.peft_lists()
