"""Do other programs generate what qtune does? Greedy texts of a trained run, token for token, wherever it can go.

    python benchmarks/serving.py [--llama FOLDER] [--only WORDS] [--smoke]      adds to results/serving.jsonl
SmolLM2-135M on nf4, in fp32, trained on texts of Wikipedia: a LoRA, and a PiSSA, whose base has codes of its own. From
20 prompts that were held out (beginnings of texts, and questions in the chat template) come 32 tokens each: by qtune on
its packed base, and by transformers, PEFT, bitsandbytes and llama.cpp from what `qtune merge`, `qtune export` and
`qtune quantize` wrote, in processes that import no qtune. Each gets the same token ids and says the likeliest tokens of
each step with their log-probabilities. A row says how many texts are equal, and of each that is not at which token it
parts and by how much (nats) qtune preferred its own token there: between equals rounding decides. Control: the same
without the adapter. FOLDER is where `npm install --ignore-scripts node-llama-cpp` was run; there llama.cpp's tokenizer
is held to the tokenizer's ids as well. Without it llama.cpp is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cells import TEXT, Rows, prepare, trained
from results import FOLDER

RESULTS = FOLDER / "serving.jsonl"
PROMPTS, WORDS, NEW, TOP = 20, 16, 32, 8
RATE, STEPS, BATCH, LENGTH = 1e-3, 16, 4, 128
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 16, "alpha": 32.0},
    "pissa": {"method": "pissa", "rank": 16, "alpha": 16.0},
}
CONTROL = {"lora": "trained", "pissa": "original"}  # the base without the adapter; pissa's own lacks what it has
Step = list[tuple[int, float]]  # the likeliest tokens, each with its log-probability


# ---- what leaves, and where it runs

FILES = {  # name -> the command that writes it
    "merged-float32": ("merge", "{run}", "--dtype", "float32"),
    "merged-bfloat16": ("merge", "{run}"),
    "merged-original": ("merge", "{run}", "--dtype", "float32", "--keep-base", "original"),
    "f32.gguf": ("merge", "{run}", "--gguf", "f32"),
    "f16.gguf": ("merge", "{run}", "--gguf", "f16"),
    "q8_0.gguf": ("merge", "{run}", "--gguf", "q8_0"),
    "adapter": ("export", "{run}"),
    "lora": ("export", "{run}", "--as", "lora"),
    "lora.gguf": ("export", "{run}", "--as", "gguf"),
    "lora-original.gguf": ("export", "{run}", "--as", "gguf", "--keep-base", "original"),
    "packed": ("quantize", "{model}", "--scheme", "nf4", "--dtype", "float32"),
}
BASES = ("base-trained.gguf", "base-original.gguf")  # the model without adapter in f32: unpacked, and as published
PUBLISHED = "published"  # the file that the model is published as


@dataclass(frozen=True)
class Case:
    """A way out. model, adapter: of FILES, BASES or PUBLISHED. kind: what loads it. base: the one that qtune's own text
    stands on, `trained` or `original`."""

    run: str
    kind: str
    model: str
    adapter: str | None = None
    dtype: str = "float32"
    base: str = "trained"

    @property
    def command(self) -> str:
        """What wrote it, for a reader."""
        return " ".join(("qtune", *FILES[self.adapter or self.model])).replace("{run}", "RUN")

    @property
    def where(self) -> str:
        """What computes it, for a reader."""
        bases = {
            "packed": "the base of `qtune quantize`", PUBLISHED: "the published file",
            BASES[0]: "the unpacked base, f32", BASES[1]: "the published weights, f32",
        }  # fmt: skip
        on = f", on {bases[self.model]}" if self.model in bases else ""
        return f"{self.kind}{on}{f', {self.dtype}' if self.kind != 'llama.cpp' else ''}"

    @property
    def label(self) -> str:
        """What --only looks in."""
        return f"{self.run}/{self.command.removeprefix('qtune ')}/{self.where}"


CASES = (
    Case("lora", "transformers", "merged-float32"),
    Case("lora", "transformers", "merged-bfloat16"),
    Case("lora", "transformers", "merged-bfloat16", dtype="bfloat16"),
    Case("lora", "PEFT, 4 bits by bitsandbytes", "packed", "adapter"),
    Case("lora", "PEFT, 4 bits by bitsandbytes", "packed", "adapter", dtype="bfloat16"),
    Case("lora", "PEFT, dequantized by transformers", "packed", "adapter"),
    Case("lora", "llama.cpp", "f32.gguf"),
    Case("lora", "llama.cpp", "f16.gguf"),
    Case("lora", "llama.cpp", "q8_0.gguf"),
    Case("lora", "llama.cpp", BASES[0], "lora.gguf"),
    Case("lora", "llama.cpp", BASES[1], "lora-original.gguf", base="original"),
    Case("lora", "llama.cpp", PUBLISHED, "lora-original.gguf", base="original"),
    Case("pissa", "transformers", "merged-float32"),
    Case("pissa", "transformers", "merged-original", base="original"),
    Case("pissa", "PEFT", PUBLISHED, "adapter", base="original"),
    Case("pissa", "PEFT", PUBLISHED, "lora", base="original"),
    Case("pissa", "llama.cpp", "f32.gguf"),
    Case("pissa", "llama.cpp", BASES[1], "lora.gguf", base="original"),
)


# ---- in a process of its own, without qtune


def serve(job: dict[str, Any]) -> list[list[Step]]:
    """The steps of each prompt, by transformers, with PEFT and bitsandbytes where the job asks for them."""
    sys.path.remove(str(Path(__file__).parent))  # whose kernels.py bitsandbytes would take for Hugging Face's package
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, job["dtype"])
    path = Path(job["model"])
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
    if "dequantized" in job["kind"]:
        model = model.dequantize()
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    model.eval()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and dtype == torch.float32:
            module.compute_dtype, module.training = dtype, True  # its fast product for CPUs computes in bf16 alone
    assert "qtune" not in sys.modules
    return greedy(model, job["prompts"], job["new"])


def greedy(model: Any, prompts: list[list[int]], new: int) -> list[list[Step]]:
    """The steps of each prompt, by transformers' own `generate`, all at once and padded on the left; a token that ends
    a text is one like any."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    found: list[list[Step]] = [[] for _ in prompts]
    for tokens, logits in zip(made.sequences[:, longest:].T.tolist(), made.logits, strict=True):
        likely = logits.float().log_softmax(-1).topk(TOP)
        for steps, token, numbers, values in zip(
            found, tokens, likely.indices.tolist(), likely.values.tolist(), strict=True
        ):
            step = sorted(zip(numbers, values, strict=True), key=lambda one: one[0] != token)
            assert step[0] == (token, values[0])  # first is the one that was taken: in bf16 several are the likeliest
            steps.append(step)
    return found


# ---- what came out


def compared(ours: list[list[Step]], theirs: list[list[Step]]) -> dict[str, Any]:
    """Texts that are equal; the differences of the others; the largest difference of a log-probability at the same
    prefix, of the tokens that both name among the likeliest."""
    differences, moved, same = [], 0.0, 0
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        for at, (a, b) in enumerate(zip(own, other, strict=True)):
            first, second = dict(a), dict(b)
            moved = max([moved, *(abs(first[token] - second[token]) for token in first.keys() & second.keys())])
            mine, chosen = a[0][0], b[0][0]
            if mine != chosen:
                gap = a[0][1] - first[chosen] if chosen in first else None
                back = b[0][1] - second[mine] if mine in second else None
                differences.append({"prompt": number, "at": at, "gap": gap, "their_gap": back})
                break
            same += 1
    equal = len(ours) - len(differences)
    return {"equal": equal, "same_tokens": same, "moved": moved, "differences": differences}


class Work:
    """The runs, what they left as, and the rows."""

    def __init__(self, book: Rows, folder: Path, scratch: Path, llama: Path | None, smoke: bool) -> None:
        self.book, self.folder, self.scratch, self.llama, self.smoke = book, folder, scratch, llama, smoke
        self.runs = scratch / "runs" if smoke else folder / "serving" / book.code
        self.steps, self.count = (2, 2) if smoke else (STEPS, PROMPTS)
        self.model = next((folder / "model").glob("*.gguf"))
        self.texts, self.prompts = self._prompts()

    def _prompts(self) -> tuple[list[str], list[list[int]]]:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.model.parent, gguf_file=self.model.name)
        held_out = json.loads((self.folder / TEXT).read_text("utf-8"))[-PROMPTS:][: self.count]
        texts = [" ".join(text.split()[:WORDS]) for text in held_out]
        for number in range(1, len(texts), 2):
            asked = [{"role": "user", "content": f"Write more about this: {texts[number]}"}]
            texts[number] = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return texts, [tokenizer(text)["input_ids"] for text in texts]

    def all(self, only: str) -> None:
        """Every row that is missing."""
        for name in RUNS:
            if not self.book.find(self.key(name, "control", "")):
                base = CONTROL[name]
                without = self.own(name, base, adapter=False)
                self.book.add(self.key(name, "control", ""), compared(self.own(name, base), without))
        for case in CASES:
            if only not in case.label or self.book.find(key := self.key(case.run, case.command, case.where)):
                continue
            if case.kind == "llama.cpp" and self.llama is None:
                print(f"{case.label}: left out, no --llama", file=sys.stderr)
                continue
            print(f"{case.label} ...", file=sys.stderr, flush=True)
            self.book.add(key, self.measured(case))

    def key(self, run: str, command: str, where: str) -> dict[str, Any]:
        """The settings that tell a row apart."""
        shape = {"prompts": self.count, "new": NEW, "steps": self.steps, "batch": [BATCH, LENGTH], "lr": RATE}
        return {"run": run, "adapter": RUNS[run], "command": command, "where": where, **shape}

    def measured(self, case: Case) -> dict[str, Any]:
        """What comes out of a case, beside what qtune says."""
        job = {
            "kind": case.kind, "model": str(self.made(case.model, case.run)), "dtype": case.dtype,
            "adapter": case.adapter and str(self.made(case.adapter, case.run)), "prompts": self.prompts,
            "texts": self.texts, "new": NEW, "top": TOP,
        }  # fmt: skip
        given, result = self.scratch / "job.json", self.scratch / "result.json"
        given.write_text(json.dumps(job))
        if case.kind != "llama.cpp":
            subprocess.run([sys.executable, __file__, "--serve", str(given), str(result)], check=True)
            return compared(self.own(case.run, case.base), json.loads(result.read_text()))
        script = Path(__file__).with_suffix(".mjs")
        subprocess.run(["node", script, str(self.llama), str(given), str(result)], check=True)
        found = json.loads(result.read_text())
        same = sum(a == b for a, b in zip(found["tokens"], self.prompts, strict=True))
        return {**compared(self.own(case.run, case.base), found["steps"]), "tokenized": same, "llama": found["version"]}

    # ---- files

    def run(self, name: str) -> Path:
        """A run, trained unless it is there."""
        from qtune.safe_io import write_text

        texts = json.loads((self.folder / TEXT).read_text("utf-8"))[:-PROMPTS]
        self.runs.mkdir(parents=True, exist_ok=True)
        write_text(self.runs / "texts.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
        return trained(self.runs / name, {
            "model": str(self.model), "dtype": "float32", "scheme": "nf4", "adapter": RUNS[name],
            "data": {"train": str(self.runs / "texts.jsonl"), "max_length": LENGTH},
            "train": {"steps": self.steps, "micro_batch": BATCH, "lr": RATE},
        })  # fmt: skip

    def made(self, name: str, run: str) -> Path:
        """A file or folder of a run, written unless it is there."""
        if name == PUBLISHED:
            return self.model
        if name in BASES:
            return self.bare(name)
        words = [word.format(run=self.run(run), model=self.model) for word in FILES[name]]
        out = self.scratch / (name if name == "packed" else f"{run}-{name}")
        if not out.exists():
            subprocess.run([sys.executable, "-m", "qtune", *words, "--out", str(out)], check=True, stdout=sys.stderr)
        return out

    def bare(self, name: str) -> Path:
        """The base without an adapter as a GGUF file, for llama.cpp's adapters to go on."""
        import torch

        from qtune.export import merged_entries
        from qtune.gguf import write
        from qtune.model import load, load_tokenizer
        from qtune.model.gguf_out import header, tensors
        from qtune.model.source import open_source
        from qtune.quant import NF4, Dense

        out = self.scratch / name
        if not out.exists():
            source, scheme = open_source(str(self.model)), NF4() if name == BASES[0] else Dense("float32")
            model = load(str(self.model), scheme, dtype=torch.float32)
            fields = header(model, source, load_tokenizer(str(self.model)), "base", "f32")
            write(out, fields, tensors(model, source, merged_entries(model, torch.float32)), "f32")
        return out

    @cache  # noqa: B019 (one object lives as long as the process)
    def own(self, run: str, base: str = "trained", *, adapter: bool = True) -> list[list[Step]]:
        """What qtune says."""
        from qtune.adapters.sites import enable_adapters
        from qtune.export import on_original
        from qtune.runs import open_run
        from qtune.screen import Screen

        quiet = Screen(quiet=True)
        opened = open_run(self.run(run), quiet, device="cpu")
        model = on_original(opened, "float32", quiet) if base == "original" else opened.model
        enable_adapters(model, adapter)
        return greedy(model.eval(), self.prompts, NEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama", type=Path, metavar="FOLDER", help="where node_modules/node-llama-cpp lies")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose RUN/COMMAND/WHERE holds this")
    parser.add_argument("--smoke", action="store_true", help="2 steps, 2 prompts, into a file that is not kept")
    parser.add_argument("--same-code", action="store_true", help="measure again what other code measured")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where model and data lie (default: demo)")
    parser.add_argument("--serve", nargs=2, type=Path, metavar=("JOB", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        job, result = options.serve
        result.write_text(json.dumps(serve(json.loads(job.read_text()))))
        return
    prepare(options.folder)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        path = Path(name) / RESULTS.name if options.smoke else RESULTS
        book = Rows(path, "python benchmarks/serving.py", options.same_code)
        Work(book, options.folder.absolute(), Path(name).absolute(), options.llama, options.smoke).all(options.only)
        if options.smoke:
            print(path.read_text("utf-8"))
    print(f"rows are in {RESULTS}; the table: python benchmarks/tables.py")


if __name__ == "__main__":
    main()
