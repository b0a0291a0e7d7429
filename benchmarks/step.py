"""A whole training step, qtune against PEFT + bitsandbytes: time, peak memory, loss.

    python benchmarks/step.py [--rounds N]          prints the table, writes benchmarks/results/step.jsonl
LoRA rank 16 on every linear layer of an NF4 base with double quantization, bf16, AdamW. SmolLM2-135M (fetched as the
demo does) on 2 x 512 tokens of the demo's task, without and with gradient checkpointing; one layer of Llama-2-7B's
shape on 256 tokens and all of Llama-3.2-1B's on 512 (random weights). Each provider is a process of its own; they take
turns, step by step, on the same batches from the same first A, and wait while the other runs. The PEFT stack is set up
as its documentation says (prepare_model_for_kbit_training, autocast to bf16, torch's fused AdamW); `all bf16` leaves
the preparation out. Neither is evaluated before it trains: on CPUs with AVX512-BF16, bitsandbytes 0.50 re-packs its
weights in the first forward in evaluation mode, and every gradient after that is wrong. Memory: peak anonymous memory
above the imports, loading left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from load import SHAPE, make_checkpoint
from measure import PeakMemory, percentiles, status
from results import FOLDER, write_rows

RESULTS = FOLDER / "step.jsonl"
PROVIDERS = {"qtune": "qtune", "peft": "PEFT + bitsandbytes", "peft-bf16": "PEFT + bitsandbytes, all bf16"}
RANK, ALPHA, LR = 16, 32, 1e-4
LAYER = {
    "vocab_size": 256, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {"layer": LAYER, "1b": SHAPE}
# name -> (model, batch, tokens, checkpointing)
RECIPES: dict[str, tuple[str, int, int, bool]] = {
    "SmolLM2-135M, 2 x 512": ("smollm2", 2, 512, False),
    "SmolLM2-135M, 2 x 512, checkpointing": ("smollm2", 2, 512, True),
    "one layer of 7B shape, 1 x 256": ("layer", 1, 256, False),
    "1B shape, 1 x 512, checkpointing": ("1b", 1, 512, True),
}


# ---- models and batches, made once


def make_models(folder: Path) -> None:
    """The bf16 checkpoints that both stacks read, and the tokens of the task."""
    import torch

    from qtune.demo import MODEL_FILE, fetch
    from qtune.model import load, load_tokenizer, save_quantized
    from qtune.quant import Dense
    from qtune.screen import Screen

    fetch(folder / "demo", Screen(quiet=True))
    path = folder / "demo" / "model" / MODEL_FILE
    tokenizer = load_tokenizer(path)
    save_quantized(load(path, Dense("bfloat16"), dtype=torch.bfloat16), tokenizer, folder / "smollm2")
    for name, shape in SHAPES.items():
        make_checkpoint(folder / name, shape)
    records = (folder / "demo" / "train.jsonl").read_text("utf-8").splitlines()
    texts = (message["content"] for record in records for message in json.loads(record)["messages"])
    ids = tokenizer("\n".join(texts))["input_ids"]
    (folder / "tokens.json").write_text(json.dumps(ids))


def batches(folder: Path, model: str, size: int, length: int) -> Iterator[Any]:
    """input_ids [size, length]: another stretch of the task's text at each step."""
    import torch

    ids = json.loads((folder / "tokens.json").read_text())
    if model == "layer":
        ids = [i % LAYER["vocab_size"] for i in ids]
    step = size * length
    while True:
        for start in range(0, len(ids) - step, step):
            yield torch.tensor(ids[start : start + step]).view(size, length)


def first_values(named: Iterator[tuple[str, Any]], is_a: Callable[[str], bool]) -> None:
    """The same A in every stack, by the name of its layer; B is zero in all."""
    import torch

    for name, parameter in named:
        if is_a(name):
            site = name.removeprefix("base_model.model.").split(".lora_A")[0].split(".adapter")[0]
            generator = torch.Generator().manual_seed(zlib.crc32(site.encode()))
            bound = parameter.shape[1] ** -0.5
            parameter.data.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)


# ---- the stacks: each a function of one batch that trains one step and returns its loss


def qtune_step(folder: Path, checkpointing: bool) -> Callable[[Any], float]:
    import torch

    from qtune.adapters import AdapterSpec, adapt
    from qtune.memory.boundaries import Boundaries
    from qtune.model import load
    from qtune.optim import Optimizer
    from qtune.quant import NF4
    from qtune.runs import pick_device
    from qtune.step import LanguageModel, TrainStep

    pick_device("cpu")
    model = load(folder, NF4(double=True), dtype=torch.bfloat16)
    adapt(model, AdapterSpec("lora", (), {"rank": RANK, "alpha": ALPHA}))
    first_values(model.named_parameters(), lambda name: name.endswith(".A"))
    language = LanguageModel(model)
    language.choose_attention(1 << 20)
    language.checkpointing(Boundaries() if checkpointing else None)
    model.train()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    step = TrainStep(language, Optimizer(trained, lr=LR), clip=1.0)

    def run(ids: Any) -> float:
        batch = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        return step([batch], 1, 1, 1.0).loss

    return run


def peft_step(folder: Path, checkpointing: bool, prepared: bool) -> Callable[[Any], float]:
    import contextlib

    import peft
    import torch
    import transformers

    asked = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=asked)
    if prepared:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=prepared)
    first_values(model.named_parameters(), lambda name: "lora_A" in name)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)

    def run(ids: Any) -> float:
        context = torch.autocast("cpu", dtype=torch.bfloat16) if prepared else contextlib.nullcontext()
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return run


# ---- one process per provider


def child(provider: str, recipe: str, folder: Path) -> None:
    """Load, say `ready`, then train a step for every line on stdin; a JSON line each."""
    # this folder's kernels.py would stand in for Hugging Face's `kernels`, which bitsandbytes asks for
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import qtune.step  # noqa: F401

    name, size, length, checkpointing = RECIPES[recipe]
    imports = status("RssAnon")
    if provider == "qtune":
        step = qtune_step(folder / name, checkpointing)
    else:
        step = peft_step(folder / name, checkpointing, provider == "peft")
    stream = batches(folder, name, size, length)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what a loader freed is not the steps' memory
    print(json.dumps({"loaded": status("RssAnon") - imports}), flush=True)
    with PeakMemory() as memory:
        for _ in sys.stdin:
            ids = next(stream)
            start = time.perf_counter()
            loss = step(ids)
            print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)
    print(json.dumps({"peak_bytes": memory.peak - imports}), flush=True)


def measure(recipe: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Rows of one recipe: all providers step by step in turns, two steps of each not counted."""
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "BITSANDBYTES_NOWELCOME": "1"}
    children = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--child", name, recipe, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )
        for name in PROVIDERS
    }  # fmt: skip

    def answer(name: str) -> dict[str, Any]:
        line = children[name].stdout.readline()
        if not line:
            raise SystemExit(f"{PROVIDERS[name]} died on {recipe}")
        return dict(json.loads(line))

    loaded = {name: answer(name)["loaded"] for name in children}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in children}
    for _ in range(rounds + 2):
        for name, process in children.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            steps[name].append(answer(name))
    rows = []
    for name, process in children.items():
        process.stdin.close()
        peak = answer(name)["peak_bytes"]
        process.wait()
        times = percentiles([1e3 * s["seconds"] for s in steps[name][2:]])
        apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps[name], steps["qtune"], strict=True))
        rows.append(
            {"recipe": recipe, "provider": PROVIDERS[name], **{f"{k}_ms": v for k, v in times.items()}}
            | {"peak_bytes": peak, "loaded_bytes": loaded[name], "losses": [s["loss"] for s in steps[name]]}
            | {"largest_loss_difference": apart}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of all recipes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="one training step: LoRA r16 on every linear layer, NF4 double", title_justify="left")
    for column in ("recipe", "provider"):
        table.add_column(column)
    for column in ("ms (p20 p50 p80)", "times qtune's", "peak MiB", "times qtune's", "last loss"):
        table.add_column(column, justify="right")
    own = {row["recipe"]: row for row in rows if row["provider"] == "qtune"}
    for row in rows:
        base = own[row["recipe"]]
        table.add_row(
            row["recipe"],
            row["provider"],
            f"{row['p20_ms']:,.0f} {row['p50_ms']:,.0f} {row['p80_ms']:,.0f}",
            f"{row['p50_ms'] / base['p50_ms']:.2f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['peak_bytes'] / base['peak_bytes']:.2f}",
            f"{row['losses'][-1]:.4f}",
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="steps of each provider that are counted")
    parser.add_argument("--only", help="recipes whose name holds this; nothing is written then")
    parser.add_argument("--child", nargs=3, metavar=("PROVIDER", "RECIPE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child[:2], Path(options.child[2]))
        return
    if not Path("/proc/self/status").exists():
        raise SystemExit("this benchmark reads /proc/self/status, so it runs on Linux only")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name))
        for recipe in RECIPES:
            if options.only is None or options.only in recipe:
                print(f"{recipe} ...", file=sys.stderr, flush=True)
                rows += measure(recipe, Path(name), options.rounds)
    show(rows)
    if options.only is None:
        write_rows(RESULTS, "python benchmarks/step.py", rows)


if __name__ == "__main__":
    main()
