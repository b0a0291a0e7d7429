"""One cell of the benchmark of quality, in a process of its own: start, errors, training, what the model knows then.

quality.py runs it. Layer errors are of outputs: the mean over layers of ||X (W - started)^T|| / ||X (W - plain)^T||,
Frobenius norms, X what the started model feeds the layer. Perplexity: 20 windows of 512 held-out tokens. Training:
AdamW with fp32 masters, cosine after a tenth of warm-up, gradients clipped at 1.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cells import TEXT
from measure import PeakMemory, status
from quality import (
    BATCH,
    CALIBRATION,
    COST_STEPS,
    ERROR_WINDOWS,
    FULL_STEPS,
    HELD_OUT,
    LENGTH,
    SCHEMES,
    STEPS,
    TASK_BATCH,
    WINDOW,
    Book,
    Cell,
)


class Bench:
    """Model file, text and task of a process."""

    def __init__(self, folder: Path) -> None:
        from qtune.demo import MODEL_FILE
        from qtune.model import load_tokenizer
        from qtune.model.layerwise import windows_of

        self.folder, self.file, self.rows = folder, folder / "model" / MODEL_FILE, BATCH  # rows: windows of a step
        self.tokenizer = load_tokenizer(self.file)
        texts = json.loads((folder / TEXT).read_text("utf-8"))
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        train = [one for number, one in enumerate(ids) if number % 5]
        self.held_out = windows_of(ids[::5], HELD_OUT, WINDOW)
        self.calibration = windows_of(train, CALIBRATION, WINDOW)
        self.train = windows_of(train, 1 << 30, LENGTH)

    @cached_property
    def weights(self) -> dict[str, Any]:
        """Every linear weight before packing, by name: fp32 [out, in]."""
        import torch

        from qtune.model import load
        from qtune.model.loading import packed_sites
        from qtune.quant import Dense

        model = load(self.file, Dense("float32"), dtype=torch.float32)
        return {name: site.dequantize(torch.float32) for name, site in packed_sites(model).items()}

    @cached_property
    def task(self) -> tuple[list[Any], list[Any]]:
        from qtune.data import load_data

        files = (self.folder / "train.jsonl", self.folder / "eval.jsonl")
        train, held_out = (load_data(file, self.tokenizer, max_length=128)[0] for file in files)
        return train, held_out

    def batches(self, kind: str, seed: int) -> Iterator[Any]:
        """Without end, in an order that hangs on the seed."""
        import torch

        from qtune.batches import Capacity, stream

        if kind == "task":
            yield from stream(self.task[0], Capacity(TASK_BATCH), seed)
        while True:
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
            for picked in order.split(self.rows)[: len(order) // self.rows]:
                yield batch_of(self.train[picked])


def batch_of(ids: Any) -> Any:
    """Every token is trained."""
    import torch

    return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def errors(model: Any, cell: Cell, bench: Bench) -> dict[str, Any]:
    """Error of each layer's output after the start by that of the base packed plainly, on what the started model feeds
    the layer: the mean over layers, of all and by kind, on calibration text and on held-out text."""
    import torch

    from qtune.adapters import adapted_sites

    sites, off = adapted_sites(model), {}
    sums: dict[str, list[float]] = {}
    for name, site in sites.items():
        w, scheme = bench.weights[name], site.base.scheme
        plain = site.base.dequantize(torch.float32)
        if cell.codes == "nearest":  # some starts pack the base anew
            plain = scheme.unpack(scheme.checked_pack(w), w.shape, torch.float32)
        off[name] = [(w - q).bfloat16() for q in (plain, site.merged()[0])]

    def hook(name: str) -> Any:
        def see(_: Any, inputs: tuple[Any, ...]) -> None:
            for which, matrix in enumerate(off[name]):
                out = torch.nn.functional.linear(inputs[0].bfloat16(), matrix)
                sums[name][which] += float(torch.linalg.vector_norm(out, dtype=torch.float32)) ** 2

        return see

    hooks = [site.register_forward_pre_hook(hook(name)) for name, site in sites.items()]
    found: dict[str, Any] = {}
    for text, windows in (("calibration", bench.calibration), ("held_out", bench.held_out)):
        some = windows[:: len(windows) // ERROR_WINDOWS][:ERROR_WINDOWS]
        sums.update({name: [0.0, 0.0] for name in sites})
        with torch.no_grad():
            for window in some:
                model.base_model(input_ids=window[None], use_cache=False)
        ratios = {name: (after / before) ** 0.5 for name, (before, after) in sums.items()}
        kinds: dict[str, list[float]] = {}
        for name, ratio in ratios.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(ratio)
        found[text] = statistics.mean(ratios.values())
        found[f"{text}_by_kind"] = {kind: statistics.mean(values) for kind, values in kinds.items()}
    for one in hooks:
        one.remove()
    return found


def nuclear(model: Any, bench: Bench) -> float:
    """What the start takes off the nuclear norm of the quantization error, as a share: mean over layers."""
    import torch

    from qtune.adapters import adapted_sites

    shares = []
    for name, site in adapted_sites(model).items():
        w, scheme = bench.weights[name], site.base.scheme
        plain = scheme.unpack(scheme.checked_pack(w), w.shape, torch.float32)
        norms = [float(torch.linalg.svdvals(w - q).sum()) for q in (plain, site.merged()[0])]
        shares.append(1 - norms[1] / norms[0])
    return statistics.mean(shares)


def perplexity(language: Any, bench: Bench) -> float | None:
    """Of held-out text; None beyond what a number is good for."""
    import torch

    language.model.eval()
    with torch.no_grad():
        total = sum(language.loss_sum(batch_of(part)).item() for part in bench.held_out.split(BATCH))
    loss = total / (bench.held_out.numel() - len(bench.held_out))
    return math.exp(loss) if loss < 100 else None


def training(language: Any, rate: float) -> Any:
    """A step over everything that the model trains."""
    from qtune.optim import optimizer_of
    from qtune.sections import TrainKeys
    from qtune.step import TrainStep

    return TrainStep(language, optimizer_of(language.model, TrainKeys(lr=rate)), clip=1.0)


def train(language: Any, bench: Bench, kind: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Train; the losses, the median step and, at the end, what the model knows."""
    from qtune.batches import Capacity
    from qtune.evaluate import evaluate
    from qtune.optim import lr_factor
    from qtune.step import NonFinite

    step, losses, seconds = training(language, rate), [], []
    language.model.train()
    with PeakMemory() as memory:
        for number, batch in zip(range(steps), bench.batches(kind, seed), strict=False):
            begun = time.perf_counter()
            try:
                losses.append(step([batch], number + 1, steps, lr_factor(number, steps, "cosine", 0.1)).loss)
            except NonFinite:
                return {"losses": losses, "perplexity": None, "diverged": number + 1}
            seconds.append(time.perf_counter() - begun)
    found = {"losses": [round(loss, 4) for loss in losses], "step_seconds": statistics.median(seconds)}
    found["peak_bytes"] = memory.peak
    if kind in ("cost", "rate"):
        return {key: found[key] for key in ("step_seconds", "peak_bytes", *["losses"] * (kind == "rate"))}
    if kind == "task":
        result = evaluate(language, bench.task[1], capacity=Capacity(TASK_BATCH))
        return found | {"accuracy": result.accuracy, "chance": result.chance, "examples": result.examples}
    return found | {"perplexity": perplexity(language, bench)}


def started(cell: Cell, bench: Bench) -> tuple[Any, Any]:
    import torch

    from qtune.adapters import AdapterSpec
    from qtune.quant.scheme import scheme_from
    from qtune.starting import start

    spec = AdapterSpec(cell.method, (), {"rank": cell.rank, **cell.options})
    scheme = scheme_from(SCHEMES[cell.scheme])
    return spec, start(bench.file, scheme, spec, windows=bench.calibration, codes=cell.codes, dtype=torch.bfloat16)


def run_cell(cell: Cell, folder: Path, book: Book) -> None:
    """All rows of a cell that are not there yet."""
    from qtune.model.loading import give_back
    from qtune.step import LanguageModel

    bench, imports = Bench(folder), status("RssAnon")
    begun = time.perf_counter()
    spec, model = started(cell, bench)
    row: dict[str, Any] = {"start_seconds": time.perf_counter() - begun}
    new, key = book.find(book.start_key(cell)) is None, book.start_key(cell)
    if new and cell.scheme != "bf16" and cell.group != "cost":
        row["layer_error"] = errors(model, cell, bench)
        if cell.group == "nuclear":
            row["nuclear"] = nuclear(model, bench)
        del bench.weights
    first = Start(model)
    language = LanguageModel(model)
    language.choose_attention(WINDOW)
    if new:
        values = sum(p.numel() for p in model.parameters() if p.requires_grad)
        book.add(key, row | {"trained": values, "perplexity": perplexity(language, bench)})
    gc.collect()
    give_back()  # what the start freed is not the steps' memory
    clean = True
    while runs := book.runs(cell):
        for kind, rate, seed in runs:
            first.again(spec, seed)
            steps = COST_STEPS if kind == "cost" else FULL_STEPS if book.full else STEPS
            found = train(language, bench, kind, rate, seed, steps)
            peak = found.pop("peak_bytes", None)
            if clean and peak:  # a process keeps what it frees, so only its first run tells
                found["peak_bytes"] = peak - imports
            clean = False
            book.add(book.run_key(cell, kind, rate, seed), found)


class Start:
    """What the adapters of a model are before any training."""

    def __init__(self, model: Any) -> None:
        from qtune.adapters import adapted_sites
        from qtune.adapters.files import adapter_tensors

        self.model, self.sites = model, adapted_sites(model)
        self.sizes = {name: site.adapter.sizes() for name, site in self.sites.items()}
        self.values = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}

    def again(self, spec: Any, seed: int) -> None:
        """Back to it: the values that the start made, or those that a seed draws."""
        import torch

        from qtune.adapters.files import adapter_tensors
        from qtune.adapters.sites import begin

        for name, site in self.sites.items():
            site.adapter.resize(self.sizes[name])
        with torch.no_grad():
            for name, tensor in adapter_tensors(self.model).items():
                tensor.copy_(self.values[name])
        if not spec.needs():
            for name, site in self.sites.items():
                begin(name, site, spec, None, seed)
