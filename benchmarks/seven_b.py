"""A model of Llama-2-7B's shape, random weights, NF4 with double quantization, LoRA r16 on every linear layer: one step
of 1 x 512 tokens with resident and with streamed weights, planned and measured, beside the limit of the products.

    python benchmarks/seven_b.py [--stock] [--layers N] [--steps N] [--tokens N] [--folder DIR]
                                                        writes benchmarks/results/seven_b.jsonl and prints the table
The checkpoint is written packed (3.9 GB), tensor by tensor; layers of one shape share their random weights. Each mode
is a process of its own. Peak: resident memory of the whole process, pages of mapped files included. Limit: 6 FLOP a
weight and token (forward, again, gradient of the input; 4 for the head), at the speed that bf16 products of the
layers' own shapes reach here, in processes of their own right before and after the mode: the better of the two.
--stock: only transformers + PEFT + bitsandbytes, which load the same folder. On a GPU: allocated and reserved bytes of
torch's allocator in place of the process, and also at --tokens 2048 and longer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measure import status
from results import FOLDER, machine, read_rows

RESULTS = FOLDER / "seven_b.jsonl"
SHAPE = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
MODES = {
    "resident": {},
    "streamed": {"memory.weights": "disk", "memory.boundaries": "disk"},
    "streamed, adamw8": {"memory.weights": "disk", "memory.boundaries": "disk", "train.optimizer": "adamw8"},
}
RANK, ALPHA = 16, 32.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stock", action="store_true", help="measure the stock stack instead")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a quick look, not written to the results")
    parser.add_argument("--steps", type=int, default=2, help="steps; the first one is not timed")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and take it from here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = {"stock": stock, "limit": limit}.get(options.child, ours)
        print(json.dumps(run(options.child, options)))
        return
    with tempfile.TemporaryDirectory() as fresh:
        folder = options.folder or Path(fresh)
        if not (folder / "config.json").exists():
            print(f"writing the checkpoint to {folder} ...", file=sys.stderr)
            make_checkpoint(folder, SHAPE | {"num_hidden_layers": options.layers})
        rows, before = [], child("limit", folder, options)
        for mode in ["stock"] if options.stock else MODES:
            print(f"{mode} ...", file=sys.stderr, flush=True)
            row, after = child(mode, folder, options), child("limit", folder, options)
            row["limit_seconds"], before = min(before, after), after
            where = {"command": f"python benchmarks/seven_b.py{' --stock' * options.stock}", **machine()}
            rows.append({"mode": mode, "layers": options.layers, "tokens": options.tokens, **row, **where})
            print(told(rows[-1]), file=sys.stderr, flush=True)
    if options.layers == SHAPE["num_hidden_layers"]:
        key = lambda row: (row["mode"], row["tokens"], row["device"])  # noqa: E731
        kept = [row for row in (read_rows(RESULTS) if RESULTS.exists() else []) if key(row) not in map(key, rows)]
        FOLDER.mkdir(exist_ok=True)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *rows]))
        print(f"wrote {RESULTS}; the README's table: python benchmarks/tables.py")


def child(name: str, folder: Path, options: Any) -> Any:
    """What a mode, or the limit, gives in a process of its own."""
    words = [f"--{name}={getattr(options, name)}" for name in ("layers", "steps", "tokens")]
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """The packed model, written by the product's own `save_quantized`."""
    import torch
    import transformers

    from qtune.model import save_quantized
    from qtune.model.skeleton import Origin, build
    from qtune.quant import NF4, QuantLinear
    from qtune.quant.scheme import flatten

    scheme, packed = NF4(), dict[Any, Any]()
    model = build(transformers.LlamaConfig(**shape, dtype="bfloat16"), scheme)
    torch.manual_seed(0)

    def random(size: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, 0.02)

    for module in model.modules():
        if isinstance(module, QuantLinear):
            if module.shape not in packed:
                packed[module.shape] = flatten(scheme, scheme.pack(random(module.shape)), module.shape)
            module.packed = torch.nn.Parameter(packed[module.shape], requires_grad=False)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                one = torch.ones_like(parameter, device="cpu")
                value = random(tuple(parameter.shape)) if parameter.dim() > 1 else one
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.qtune = Origin("random", scheme, None, torch.bfloat16, "packed")
    save_quantized(model, None, folder)


def ours(mode: str, options: Any) -> dict[str, Any]:
    """Load, adapt, step; planned and measured."""

    from qtune.adapters import adapt
    from qtune.memory.stream import store_of
    from qtune.model import load
    from qtune.optim import optimizer_of
    from qtune.planner.devices import find_device
    from qtune.planner.plan import Shape, plan_recipe
    from qtune.recipe import Recipe
    from qtune.runs import pick_device
    from qtune.step import LanguageModel, TrainStep

    tree = {"model": str(options.folder), "scheme": "nf4", "adapter": {"method": "lora", "rank": RANK, "alpha": ALPHA}}
    memory = {"memory.folder": str(options.folder)}
    recipe = Recipe.load(tree, MODES[mode] | memory, training=False)
    device = pick_device("auto")
    kind = device.type
    shape = Shape(1, options.tokens, options.tokens - 1, False, "random tokens")
    plan = plan_recipe(recipe, find_device(kind), shape=shape)
    before = time.perf_counter()
    store = store_of(recipe.memory.weights, kind, device, options.folder)
    model = load(options.folder, None, device=device, aside=store and store.put)
    if store is not None:
        store.run(model)
    adapt(model, recipe.adapter)
    loading = time.perf_counter() - before
    loaded = status("VmHWM")
    language = LanguageModel(model)
    language.choose_attention(options.tokens)
    language.arrange(recipe.train, recipe.memory, options.folder)
    model.train()
    step = TrainStep(language, optimizer_of(model, recipe.train), clip=1.0)
    return {
        **stepped(lambda batch: step([batch], 1, options.steps, 1.0).loss, model, options, device),
        "load_seconds": loading,
        "load_peak": loaded,
        "planned": plan.process if kind == "cpu" else plan.allocated,
    }  # fmt: skip


def stock(mode: str, options: Any) -> dict[str, Any]:
    """transformers + PEFT + bitsandbytes as their documents have it: k-bit preparation, checkpointing, autocast."""
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    import peft
    import torch
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=torch.bfloat16, device_map=device.type
    )
    given = {"use_gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = peft.prepare_model_for_kbit_training(model, **given)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    loading, loaded = time.perf_counter() - before, status("VmHWM")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: Any) -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    found = stepped(step, model, options, device)
    return found | {"load_seconds": loading, "load_peak": loaded, "planned": None}


def stepped(step: Any, model: Any, options: Any, device: Any) -> dict[str, Any]:
    """Steps on random tokens, the median of all but the first."""
    import statistics

    import torch

    ids = torch.randint(SHAPE["vocab_size"], (1, options.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    batch = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    seconds, losses = [], []
    for _ in range(options.steps):
        before = time.perf_counter()
        losses.append(step(batch))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "first_seconds": seconds[0],
        "step_seconds": statistics.median(seconds[1:] or seconds), "losses": losses, "peak": peak,
        "reserved": reserved,
    }  # fmt: skip


def limit(mode: str, options: Any) -> float:
    """Seconds that the products of a step take: 6 FLOP a weight and token, 4 of the head's, at the speed measured for
    products of each shape."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden, inner, vocabulary = (SHAPE[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    total = 0.0
    for shape, flop in (
        ((hidden, hidden), 6 * 4 * options.layers), ((inner, hidden), 6 * 2 * options.layers),
        ((hidden, inner), 6 * options.layers), ((vocabulary, hidden), 4),
    ):  # fmt: skip
        x = torch.randn(options.tokens, shape[1], dtype=torch.bfloat16, device=device)
        w = torch.randn(shape, dtype=torch.bfloat16, device=device)
        best = min(_seconds(x, w, device) for _ in range(5))
        total += best * flop / 2  # a product is 2 FLOP a weight and token
    return total


def _seconds(x: Any, w: Any, device: Any) -> float:
    import torch

    before = time.perf_counter()
    torch.nn.functional.linear(x, w)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - before


def told(row: dict[str, Any]) -> str:
    """A row in a line."""
    planned = f"{row['planned'] / 2**30:.2f} GiB planned, " if row["planned"] else ""
    return (
        f"{row['mode']}: {planned}{row['peak'] / 2**30:.2f} GiB measured; step {row['step_seconds']:.1f} s, "
        f"{row['step_seconds'] / row['limit_seconds']:.2f} x the limit of {row['limit_seconds']:.1f} s; "
        f"loss {row['losses'][-1]:.4f}; loaded in {row['load_seconds']:.0f} s, up to {row['load_peak'] / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
