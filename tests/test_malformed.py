"""What is malformed is refused: an error with a code that names the file or the key, no traceback, no input changed.

By hand first, one list a kind of input, then by chance: bytes flipped, files cut off, values of JSON and YAML replaced,
from fixed seeds. What chance makes legal again may be accepted; what it may not be is a bug, or a changed file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import safetensors.torch
import torch
import yaml

from qtune.cli import main
from qtune.explain import KINDS

Make = Callable[["Bench", Path], list[str]]


@dataclass
class Bench:
    """A tiny model, data, a recipe and a run of two steps that are whole; what a case damages it copies first."""

    root: Path

    def model(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.root / "model", folder / "model"))

    def run(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.root / "run", folder / "run"))

    def recipe(self, folder: Path, text: str | bytes) -> list[str]:
        path = folder / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["train", str(path)]

    def whole(self, **changes: Any) -> str:
        """A legal recipe with some of its sections or keys replaced; None leaves one out."""
        tree = {
            "model": str(self.root / "model"), "data": {"train": str(self.root / "task0.jsonl")}, "output": "out",
            "dtype": "float32", "adapter": {"method": "lora", "rank": 4}, "train": {"steps": 2, "report": False},
        } | changes  # fmt: skip
        return yaml.safe_dump({key: value for key, value in tree.items() if value is not None}, sort_keys=False)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("whole")
    (root / "recipe.yaml").write_text(runs_helper.recipe(root).to_yaml())
    assert main(["train", str(root / "recipe.yaml"), "train.steps=2", "--json"]) == 0
    return Bench(root)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, and what a command writes without being told where, lie in the test's folder."""
    monkeypatch.chdir(tmp_path)


def digests(*folders: Path) -> dict[Path, str]:
    found = (p for folder in folders for p in folder.rglob("*") if p.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def told(bench: Bench, folder: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of a command that changes none of the files in `folder` and of the bench."""
    before = digests(folder, bench.root)
    capsys.readouterr()
    status = main(argv)
    out, err = capsys.readouterr()
    after = digests(folder, bench.root)
    changed = [str(path) for path, digest in before.items() if after.get(path) != digest]
    assert not changed, f"{argv}: changed or removed {changed}"
    assert "Traceback" not in out + err, err
    return status, err


def refused(bench: Bench, folder: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = told(bench, folder, argv, capsys)
    lines = [line for line in err.splitlines() if line.startswith("error ")]
    assert status == 1 and len(lines) == 1, f"{argv} ended with {status}: {err[-500:]}"
    code = lines[0][6:10]
    assert code in KINDS and code not in ("Q000", "Q902"), err
    paragraph = err[err.index(lines[0]) :]
    assert words in paragraph, paragraph
    for bare in ("KeyError", "TypeError", "IndexError", "AttributeError", "RecursionError", "'NoneType' object"):
        assert bare not in paragraph, paragraph


def some(names: Iterable[str], every: int) -> list[Any]:
    """The cases of a list: one of `every` runs in every suite, the others are slow together."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (i % every > 0)) for i, name in enumerate(names)]


# ---- recipes

DEEP = 1000  # brackets in one another


def _recipes() -> dict[str, tuple[Callable[[Bench], str | bytes], str]]:
    """name -> (the file, what its error names)."""

    def of(**changes: Any) -> Callable[[Bench], str]:
        return lambda bench: bench.whole(**changes)

    def more(text: str) -> Callable[[Bench], str]:
        return lambda bench: bench.whole(train=None) + text

    file = "recipe.yaml"
    return {
        "empty": (lambda b: "", "model is missing"),
        "binary": (lambda b: bytes(range(256)), file),
        "nul bytes": (lambda b: b"model: a\0b\n", file),
        "utf-16": (lambda b: b.whole().encode("utf-16"), file),
        "latin-1": (lambda b: "model: caf\xe9\n".encode("latin-1"), file),
        "tabs": (lambda b: "model: x\ntrain:\n\tlr: 1\n", "line 3"),
        "a list": (lambda b: "- model\n- data\n", file),
        "a number": (lambda b: "7\n", file),
        "only a word": (lambda b: "model\n", file),
        "two documents": (lambda b: b.whole() + "---\n" + b.whole(), "document"),
        "open bracket": (lambda b: "model: [a, b\n", "line"),
        "open quote": (lambda b: "model: 'a\n", "line"),
        "doubled key": (lambda b: b.whole() + "model: y\n", "stands twice"),
        "unknown alias": (lambda b: "model: *a\n", "undefined alias"),
        "alias to itself": (lambda b: "model: &a [*a]\n", "model is"),
        "unhashable key": (lambda b: "? [a]\n: b\n", "line 1"),
        "python tag": (lambda b: "model: !!python/object/apply:os.system [ls]\n", "line 1"),
        "tag int of nothing": (lambda b: "model: !!int ''\n", file),
        "tag int of text": (lambda b: "model: !!int abc\n", file),
        "tag bool of text": (lambda b: "model: !!bool abc\n", file),
        "tag date of text": (lambda b: "model: !!timestamp abc\n", file),
        "tag binary of text": (lambda b: "model: !!binary '%'\n", file),
        "deep nesting": (lambda b: "model: " + "[" * DEEP + "]" * DEEP, file),
        "bomb": (lambda b: "a0: &a0 [x]\n" + "".join(
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)) + "train: {lr: *a11}\n",
            "train.lr"),
        "unknown keys": (of(trian={"lr": 1}, lr=1e-4), "train.lr"),
        "keys that are numbers": (of(train={1: 2, None: 3}), "train"),
        "train a list": (of(train=[1, 2]), "train is"),
        "train a text": (of(train="fast"), "train is"),
        "data a number": (of(data=5), "data is"),
        "lr text": (of(train={"lr": "fast"}), "train.lr"),
        "lr nan": (of(train={"lr": float("nan")}), "train.lr"),
        "lr inf": (of(train={"lr": float("inf")}), "train.lr"),
        "lr a list": (of(train={"lr": [1e-4]}), "train.lr"),
        "lr true": (of(train={"lr": True}), "train.lr"),
        "steps negative": (of(train={"steps": -1}), "train.steps"),
        "steps a fraction": (of(train={"steps": 1.5}), "train.steps"),
        "steps beyond a float": (more(f"train: {{steps: {10**400}}}\n"), "train.steps"),
        "steps beyond text": (more(f"train: {{steps: 0x{'f' * 5000}}}\n"), "train.steps"),
        "steps of 5000 digits": (more(f"train: {{steps: {'9' * 5000}}}\n"), file),
        "rank huge": (of(adapter={"method": "lora", "rank": 10**12}), "allocate"),
        "rank beyond a float": (more(f"# \nadapter: {{method: lora, rank: {10**400}}}\n"), "rank"),
        "rank text": (of(adapter={"method": "lora", "rank": "4"}), "adapter.rank"),
        "method unknown": (of(adapter="lroa"), "lora"),
        "method a list": (of(adapter={"method": ["lora"]}), "adapter"),
        "adapter keys": (of(adapter={1: 2, "method": "lora"}), "adapter"),
        "targets a mapping": (of(adapter={"method": "lora", "targets": {"a": 1}}), "adapter.targets"),
        "targets match nothing": (of(adapter={"method": "lora", "targets": ["nowhere"]}), "nowhere"),
        "scheme unknown": (of(scheme="nf5"), "nf4"),
        "scheme a list": (of(scheme=["nf4"]), "scheme"),
        "scheme without a name": (of(scheme={"name": None}), "scheme"),
        "scheme's name a mapping": (of(scheme={"name": {"a": 1}}), "scheme"),
        "block text": (of(scheme={"name": "nf4", "block": "64"}), "block"),
        "bits nan": (of(scheme={"bits": float("nan"), "high": "nf4", "low": "int2"}), "bits"),
        "bits text": (of(scheme={"bits": "2.5", "high": "nf4", "low": "int2"}), "bits"),
        "a pattern a number": (of(scheme={"default": "nf4", 7: "int8"}), "7"),
        "dtype unknown": (of(dtype="float8"), "dtype"),
        "device unknown": (of(device="gpu"), "device"),
        "device beyond": (of(device="cuda:99999999999999999999"), "device"),
        "model a number": (of(model=7), "model is 7"),
        "model empty": (of(model="  "), "model is"),
        "model absent": (of(model="no/such"), "no/such"),
        "model with a nul": (of(model="a\0b"), "model is"),
        "model with half a character": (
                                        (lambda b: b.whole(model=None) + 'model: "a\\ud800"\n'), "model is"),
        "output with a nul": (of(output="a\0b"), "output is"),
        "home of nobody": (of(output="~nobody-of-this-name/x"), "output is"),
        "data absent": (of(data={"train": "nowhere.jsonl"}), "nowhere.jsonl"),
        "data entries": (of(data={"train": [{"fiel": "x"}, 7]}), "entry 1"),
        "columns unknown": (of(data={"train": "x.jsonl", "columns": {"question": "q"}}), "data.columns"),
        "split and eval": (of(data={"train": "x.jsonl", "eval": "y.jsonl", "split": 0.5}), "data.split"),
        "max_length zero": (of(data={"train": "x.jsonl", "max_length": 0}), "data.max_length"),
        "budget without unit": (of(budget="24"), "budget"),
        "budget a list": (of(budget=[24]), "budget"),
        "betas": (of(train={"betas": [0.9, 2]}), "train.betas"),
        "a date": (more("budget: 2020-01-01\n"), "budget"),
        "an impossible date": (more("budget: 2020-13-45\n"), file),
    }  # fmt: skip


RECIPES = _recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = RECIPES[name]
    refused(bench, tmp_path, bench.recipe(tmp_path, text(bench)), words, capsys)


@pytest.mark.parametrize("argv", [
    ["train", "."], ["train", "nowhere.yaml"], ["train", "~nobody-of-this-name/r.yaml"], ["plan", "nowhere.yaml"],
    ["plan", "--model", "no-such-model"], ["plan", "--model", "llama-3.1-8b", "--device", "gtx1"],
    ["plan", "--model", "llama-3.1-8b", "--fit", "24"], ["plan", "--model", "llama-3.1-8b", "train.lr=x"],
    ["data", "nowhere.jsonl"], ["data", "."], ["data", "~nobody-of-this-name/a.jsonl"], ["data", "hf:"],
    ["quantize", "nowhere", "--out", "q"], ["quantize", "nowhere", "--codes", "best", "--out", "q"],
    ["chat", "nowhere"], ["chat", "nowhere", "--temperature", "nan"], ["report", "nowhere"], ["compare", "a", "b"],
    ["eval", "nowhere"], ["merge", "nowhere"], ["export", "nowhere", "--out", "x"], ["explain", "Q999"],
    ["train", "nowhere.yaml", "=", "train.lr=[", "train.lr.x=1"],
], ids=" ".join)  # fmt: skip
def test_what_is_not_there(argv: list[str], bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(bench, tmp_path, argv, "", capsys)


# ---- data

ROW = '{"prompt": "w1 w2", "completion": "w5"}\n'
NEST = "[" * 100_000
USER = '{"messages": [{"role": "user", "content": "a"}, '

DATA: dict[str, tuple[str, str | bytes, str]] = {
    # name -> (name of the file, its content, what the error names)
    "cut off": ("a.jsonl", ROW + ROW[:20], "line 2"),
    "not JSON": ("a.jsonl", "prompt: w1\n", "line 1"),
    "a list a line": ("a.jsonl", '[1, 2]\n', "a.jsonl"),
    "numbers": ("a.jsonl", "1\n2\n", "line 1"),
    "text a line": ("a.jsonl", '"w1"\n', "line 1"),
    "null a line": ("a.jsonl", "null\n", "line 1"),
    "empty objects": ("a.jsonl", "{}\n", "line 1"),
    "wrong keys": ("a.jsonl", '{"question": "w1", "answer": "w2"}\n', "question"),
    "null answer": ("a.jsonl", '{"prompt": "w1", "completion": null}\n', "completion"),
    "empty answer": ("a.jsonl", '{"prompt": "w1", "completion": ""}\n', "completion"),
    "number for an answer": ("a.jsonl", ROW + '{"prompt": "w1", "completion": 5}\n', "line 2"),
    "mixed formats": ("a.jsonl", ROW + '{"text": "w1"}\n', "line 2"),
    "messages a text": ("a.jsonl", '{"messages": "hello"}\n', "messages"),
    "messages empty": ("a.jsonl", '{"messages": []}\n', "line 1"),
    "messages of numbers": ("a.jsonl", '{"messages": [1, 2]}\n', "message 1"),
    "role unknown": ("a.jsonl", '{"messages": [{"role": "wizard", "content": "a"}]}\n', "wizard"),
    "role a list": ("a.jsonl", '{"messages": [{"role": ["user"], "content": "a"}]}\n', "role"),
    "no answer": ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "assistant"),
    "content a number": ("a.jsonl", USER + '{"role": "assistant", "content": 1}]}\n', "content"),
    "tool calls a number": ("a.jsonl", USER + '{"role": "assistant", "tool_calls": 3}]}\n', "tool_calls"),
    "tools a number": ("a.jsonl", USER + '{"role": "assistant", "content": "a"}], "tools": 3}\n', "tools"),
    "history of numbers": ("a.jsonl", '{"instruction": "a", "output": "b", "history": [1]}\n', "history"),
    "half a character": ("a.jsonl", '{"prompt": "w1", "completion": "\\ud800"}\n', "completion"),
    "infinite number": ("a.jsonl", '{"prompt": "w1", "completion": Infinity}\n', "completion"),
    "number of 5000 digits": ("a.jsonl", '{"prompt": "w1", "completion": ' + "9" * 5000 + "}\n", "line 1"),
    "deep nesting": ("a.jsonl", NEST + "\n", "a.jsonl"),
    "deep nesting in a record": ("a.jsonl", '{"prompt": ' + NEST + "\n", "line 1"),
    "nul bytes": ("a.jsonl", b"\0" * 64, "a.jsonl"),
    "binary": ("a.jsonl", bytes(range(256)) * 4, "a.jsonl"),
    "empty": ("a.jsonl", "", "no records"),
    "blank lines": ("a.jsonl", "\n  \n\n", "no records"),
    "only a BOM": ("a.jsonl", b"\xef\xbb\xbf", "no records"),
    "utf-16": ("a.jsonl", ROW.encode("utf-16"), "UTF-16"),
    "latin-1": ("a.jsonl", '{"prompt": "caf\xe9", "completion": "w1"}\n'.encode("latin-1"), "line 1"),
    "gz in another name": ("a.jsonl", gzip.compress(ROW.encode()), "a.jsonl"),
    "no gz in its name": ("a.jsonl.gz", ROW, "gzip"),
    "gz cut off": ("a.jsonl.gz", gzip.compress(ROW.encode() * 500)[:-20], "gzip"),
    "gz damaged": ("a.jsonl.gz", gzip.compress(ROW.encode())[:12] + b"\xff" * 30, "gzip"),
    "huge line": ("a.jsonl", '{"prompt": "' + "w1 " * 300_000, "line 1"),
    "a list in a jsonl": ("a.jsonl", "[\n" + ROW + "]", ".json"),
    "lines in a json": ("a.json", ROW * 2, ".jsonl"),
    "object in a json": ("a.json", ROW, "list"),
    "json cut off": ("a.json", "[" + ROW + ",", "a.json"),
    "json of numbers": ("a.json", "[1, 2, 3]", "a.json"),
    "json empty": ("a.json", "", "a.json"),
    "json deep": ("a.json", NEST, "a.json"),
    "json empty list": ("a.json", "[]", "no records"),
    "csv uneven": ("a.csv", "prompt,completion\nw1,w2\nw3\n", "line 3"),
    "csv too wide": ("a.csv", "prompt,completion\nw1,w2,w3\n", "line 2"),
    "csv without header": ("a.csv", "w1,w2\nw3,w4\n", "a.csv"),
    "csv header twice": ("a.csv", "prompt,prompt\nw1,w2\n", "twice"),
    "csv open quote": ("a.csv", 'prompt,completion\n"w1,w2\n', "a.csv"),
    "csv empty": ("a.csv", "", "a.csv"),
    "csv huge cell": ("a.csv", "prompt,completion\nw1," + "x" * 200_000 + "\nw\n", "line 3"),
    "tsv as csv": ("a.csv", "prompt\tcompletion\nw1\tw2\n", "a.csv"),
    "parquet of text": ("a.parquet", ROW, "a.parquet"),
    "parquet of magic": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "a.parquet"),
    "parquet empty": ("a.parquet", b"", "a.parquet"),
    "other ending": ("a.xlsx", "x", ".xlsx"),
    "no ending": ("a", ROW, "kind of data file"),
    "parquet gz": ("a.parquet.gz", b"x", "kind of data file"),
    "text of nothing": ("a.txt", "  \n", "a.txt"),
    "text latin-1": ("a.txt", b"caf\xe9", "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, words = DATA[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    number = list(DATA).index(name)
    argv = ["data", str(path)]
    if number % 3 == 1:
        argv = bench.recipe(tmp_path, bench.whole(data={"train": str(path)}))
    elif number % 3 == 2:
        argv = ["data", str(path), "--model", str(bench.root / "model")]
    refused(bench, tmp_path, argv, words, capsys)


# ---- checkpoints


def put(path: Path, content: bytes | str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tree = json.loads(content[8 : 8 + length])
    text = json.dumps(change(tree) or tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; ... removes one."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = safetensors.torch.load_file(path)
    change(held)
    safetensors.torch.save_file(held, path)


def _index(folder: Path, weights: Any) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    put(folder / "model.safetensors.index.json", json.dumps(weights) if not isinstance(weights, str) else weights)


WEIGHTS, CONFIG = "model.safetensors", "config.json"
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    # name -> (what is done to the folder, what the error names)
    "weights cut off": (lambda m: put(m / WEIGHTS, (m / WEIGHTS).read_bytes()[:-100]), WEIGHTS),
    "weights cut in the header": (lambda m: put(m / WEIGHTS, (m / WEIGHTS).read_bytes()[:100]), WEIGHTS),
    "weights of 3 bytes": (lambda m: put(m / WEIGHTS, b"abc"), WEIGHTS),
    "weights empty": (lambda m: put(m / WEIGHTS, b""), WEIGHTS),
    "weights text": (lambda m: put(m / WEIGHTS, "version https://git-lfs.github.com/spec/v1\n" * 3), WEIGHTS),
    "header beyond the file": (lambda m: put(m / WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), WEIGHTS),
    "header of no JSON": (lambda m: put(m / WEIGHTS, struct.pack("<Q", 4) + b"{{{{" + bytes(64)), WEIGHTS),
    "header a list": (lambda m: header(m / WEIGHTS, lambda t: [1, 2]), WEIGHTS),
    "header deep": (lambda m: put(m / WEIGHTS, struct.pack("<Q", len(NEST)) + NEST.encode()), WEIGHTS),
    "entry a number": (lambda m: header(m / WEIGHTS, lambda t: t.update({Q_PROJ: 7})), WEIGHTS),
    "dtype unknown": (lambda m: header(m / WEIGHTS, lambda t: t[Q_PROJ].update(dtype="F4")), "F4"),
    "shape negative": (lambda m: header(m / WEIGHTS, lambda t: t[Q_PROJ].update(shape=[-64, -64])), "model"),
    "shape infinite": (lambda m: header(m / WEIGHTS, lambda t: t[Q_PROJ].update(shape=[float("inf"), 64])), WEIGHTS),
    "shape text": (lambda m: header(m / WEIGHTS, lambda t: t[Q_PROJ].update(shape="64")), WEIGHTS),
    "offsets turned": (lambda m: header(m / WEIGHTS, lambda t: t[Q_PROJ]["data_offsets"].reverse()), WEIGHTS),
    "offsets beyond": (
        lambda m: header(m / WEIGHTS, lambda t: t[Q_PROJ].update(data_offsets=[2**40, 2**40 + 16384])), WEIGHTS),
    "offsets text": (lambda m: header(m / WEIGHTS, lambda t: t[Q_PROJ].update(data_offsets=["0", "1"])), WEIGHTS),
    "tensor missing": (lambda m: tensors(m / WEIGHTS, lambda t: t.pop(Q_PROJ)), "q_proj"),
    "tensor of another shape": (
        lambda m: tensors(m / WEIGHTS, lambda t: t.update({Q_PROJ: torch.zeros(3, 5)})), "q_proj"),
    "tensor of whole numbers": (
        lambda m: tensors(m / WEIGHTS, lambda t: t.update({Q_PROJ: t[Q_PROJ].long()})), "q_proj"),
    "tensor of NaN": (lambda m: tensors(m / WEIGHTS, lambda t: t[Q_PROJ].fill_(float("nan"))), "q_proj"),
    "tensor of infinity": (lambda m: tensors(m / WEIGHTS, lambda t: t[Q_PROJ].fill_(float("inf"))), "q_proj"),
    "no weights": (lambda m: (m / WEIGHTS).unlink(), WEIGHTS),
    "pickle": (lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"), "pickle"),
    "index broken": (lambda m: _index(m, '{"weight_map": {'), "index.json"),
    "index a list": (lambda m: _index(m, [1]), "index.json"),
    "index without map": (lambda m: _index(m, {"metadata": {}}), "index.json"),
    "index to absent files": (lambda m: _index(m, {"weight_map": {Q_PROJ: "gone.safetensors"}}), "gone.safetensors"),
    "index out of the folder": (lambda m: _index(m, {"weight_map": {Q_PROJ: "../../x.safetensors"}}), "outside"),
    "index of a tensor that is not there": (
        lambda m: _index(m, {"weight_map": {"nowhere": "part.safetensors"}}), "nowhere"),
    "index deep": (lambda m: _index(m, NEST), "index.json"),
    "config missing": (lambda m: (m / CONFIG).unlink(), CONFIG),
    "config cut off": (lambda m: put(m / CONFIG, (m / CONFIG).read_text()[:100]), CONFIG),
    "config a list": (lambda m: put(m / CONFIG, "[]"), CONFIG),
    "config empty": (lambda m: put(m / CONFIG, ""), CONFIG),
    "config binary": (lambda m: put(m / CONFIG, bytes(range(256))), CONFIG),
    "config deep": (lambda m: put(m / CONFIG, NEST), CONFIG),
    "model_type absent": (lambda m: edit(m / CONFIG, model_type=...), "model_type"),
    "model_type unknown": (lambda m: edit(m / CONFIG, model_type="lama"), "lama"),
    "model_type a list": (lambda m: edit(m / CONFIG, model_type=["llama"]), "model_type"),
    "no language model": (lambda m: edit(m / CONFIG, model_type="vit"), "vit"),
    "hidden_size text": (lambda m: edit(m / CONFIG, hidden_size="64"), "model"),
    "hidden_size negative": (lambda m: edit(m / CONFIG, hidden_size=-64), "model"),
    "hidden_size zero": (lambda m: edit(m / CONFIG, hidden_size=0), "model"),
    "heads zero": (lambda m: edit(m / CONFIG, num_attention_heads=0), "model"),
    "heads null": (lambda m: edit(m / CONFIG, num_attention_heads=None), "model"),
    "layers negative": (lambda m: edit(m / CONFIG, num_hidden_layers=-1), "model"),
    "layers text": (lambda m: edit(m / CONFIG, num_hidden_layers="two"), "model"),
    "vocabulary small": (lambda m: edit(m / CONFIG, vocab_size=7), "model"),
    "activation unknown": (lambda m: edit(m / CONFIG, hidden_act="glue"), "glue"),
    "rope unknown": (lambda m: edit(m / CONFIG, rope_parameters={"rope_type": "knot", "rope_theta": 1.0}), "model"),
    "rope a list": (lambda m: edit(m / CONFIG, rope_parameters=[1]), "model"),
    "quantized otherwise": (lambda m: edit(m / CONFIG, quantization_config={"quant_method": "gptq"}), "gptq"),
    "quantized as text": (lambda m: edit(m / CONFIG, quantization_config="nf4"), "quantization_config"),
    "quantized as a list": (lambda m: edit(m / CONFIG, quantization_config=[1]), "quantization_config"),
    "packed as text": (lambda m: edit(m / CONFIG, qtune="yes"), "qtune"),
    "packed of another format": (lambda m: edit(m / CONFIG, qtune={"format": 99}), "99"),
    "packed without a scheme": (lambda m: edit(m / CONFIG, qtune={"format": 1}), "packed"),
    "packed with a scheme of numbers": (lambda m: edit(m / CONFIG, qtune={"format": 1, "scheme": 7}), "7"),
    "packed with an unknown scheme": (lambda m: edit(m / CONFIG, qtune={"format": 1, "scheme": "nf5"}), "nf5"),
    "packed with a list for a scheme": (
        lambda m: edit(m / CONFIG, qtune={"format": 1, "scheme": {"name": []}}), "scheme"),
    "generation config broken": (lambda m: put(m / "generation_config.json", "{"), "generation_config.json"),
    "generation config a list": (lambda m: put(m / "generation_config.json", "[1]"), "generation_config.json"),
    "tokenizer missing": (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "tokenizer"),
    "tokenizer cut off": (lambda m: put(m / "tokenizer.json", (m / "tokenizer.json").read_text()[:500]), "tokenizer"),
    "tokenizer a list": (lambda m: put(m / "tokenizer.json", "[]"), "tokenizer"),
    "tokenizer empty": (lambda m: put(m / "tokenizer.json", ""), "tokenizer"),
    "tokenizer of another kind": (lambda m: edit(m / "tokenizer.json", model={"type": "Magic"}), "tokenizer"),
    "tokenizer config broken": (lambda m: put(m / "tokenizer_config.json", "{"), "tokenizer"),
    "tokenizer config a list": (lambda m: put(m / "tokenizer_config.json", "[1]"), "tokenizer"),
    "tokenizer class unknown": (lambda m: edit(m / "tokenizer_config.json", tokenizer_class=7), "tokenizer"),
    "chat template broken": (lambda m: put(m / "chat_template.jinja", "{% for %}"), "template"),
}  # fmt: skip


@pytest.mark.parametrize("name", some(CHECKPOINTS, 3))
def test_checkpoints(name: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = CHECKPOINTS[name]
    model = bench.model(tmp_path)
    damage(model)
    argv = ["chat", str(model), "--prompt", "w1", "--max-new-tokens", "1"]
    if list(CHECKPOINTS).index(name) % 2 and "template" not in name:
        argv = bench.recipe(tmp_path, bench.whole(model=str(model)))
    refused(bench, tmp_path, argv, words, capsys)


def gguf(*, magic: bytes = b"GGUF", version: int = 3, counts: tuple[int, int] = (0, 0), rest: bytes = b"") -> bytes:
    return magic + struct.pack("<IQQ", version, *counts) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARCH = text("general.architecture") + struct.pack("<I", 8) + text("llama")
GGUFS: dict[str, bytes] = {
    "empty": b"",
    "three bytes": b"GGU",
    "bad magic": gguf(magic=b"GGML"),
    "version 1": gguf(version=1),
    "big-endian": gguf(version=3 << 24),
    "only a head": gguf()[:10],
    "nothing in it": gguf(),
    "a count beyond": gguf(counts=(2**60, 0)),
    "keys beyond": gguf(counts=(0, 2**60)),
    "key cut off": gguf(counts=(0, 1), rest=struct.pack("<Q", 2**40)),
    "value of an unknown type": gguf(counts=(0, 1), rest=text("a") + struct.pack("<I", 77)),
    "array beyond": gguf(counts=(0, 1), rest=text("a") + struct.pack("<IIQ", 9, 8, 2**60)),
    "array of arrays": gguf(counts=(0, 1), rest=text("a") + struct.pack("<IIQ", 9, 9, 1)),
    "alignment zero": gguf(counts=(0, 1), rest=text("general.alignment") + struct.pack("<II", 4, 0)),
    "alignment text": gguf(counts=(0, 1), rest=text("general.alignment") + struct.pack("<I", 8) + text("x")),
    "alignment infinite": gguf(counts=(0, 1), rest=text("general.alignment") + struct.pack("<If", 6, float("inf"))),
    "tensor of an unknown type": gguf(counts=(1, 0), rest=text("a") + struct.pack("<IQIQ", 1, 32, 999, 0)),
    "tensor without dimensions": gguf(counts=(1, 0), rest=text("a") + struct.pack("<IIQ", 0, 0, 0)),
    "tensor beyond": gguf(counts=(1, 0), rest=text("a") + struct.pack("<IQIQ", 1, 2**40, 0, 0)),
    "tensor of half a block": gguf(counts=(1, 0), rest=text("a") + struct.pack("<IQIQ", 1, 7, 2, 0)),
    "architecture unknown": gguf(counts=(0, 1), rest=ARCH.replace(b"llama", b"lamma")),
    "architecture alone": gguf(counts=(0, 1), rest=ARCH),
    "architecture a number": gguf(counts=(0, 1), rest=text("general.architecture") + struct.pack("<II", 4, 7)),
}


@pytest.mark.parametrize("name", GGUFS)
def test_gguf(name: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUFS[name])
    argv = ["quantize", str(path), "--out", str(tmp_path / "q")]
    if list(GGUFS).index(name) % 2 and name != "architecture alone":  # which transformers fills up
        argv = ["plan", "--model", str(path), "--device", "24GB"]
    refused(bench, tmp_path, argv, "model.gguf", capsys)


# ---- adapters and runs

INFO, TENSORS, METRICS, RUN, RECIPE = "adapter.json", "adapter.safetensors", "metrics.jsonl", "run.json", "recipe.yaml"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(bytes(content))


def _alone(run: Path) -> None:
    """Without checkpoints, which stand in for a damaged pair."""
    shutil.rmtree(run / "checkpoints")


def _both(*steps: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for step in steps:
            step(run)

    return damage


def _sites(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        tree = json.loads((run / INFO).read_text())
        change(tree["sites"])
        put(run / INFO, json.dumps(tree))

    return damage


def _first(sites: dict[str, Any]) -> dict[str, Any]:
    return next(iter(sites.values()))


ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "recipe missing": (lambda r: (r / RECIPE).unlink(), RECIPE),
    "recipe empty": (lambda r: put(r / RECIPE, ""), RECIPE),
    "recipe binary": (lambda r: put(r / RECIPE, bytes(range(256))), RECIPE),
    "recipe cut off": (lambda r: put(r / RECIPE, (r / RECIPE).read_text().partition("}")[0]), RECIPE),
    "recipe of another method": (lambda r: put(r / RECIPE, (r / RECIPE).read_text().replace("lora", "lroa")), RECIPE),
    "base gone": (lambda r: put(r / RECIPE, (r / RECIPE).read_text().replace("/model\n", "/nowhere\n")), "nowhere"),
    "adapter missing": (_both(_alone, lambda r: (r / INFO).unlink()), "not a run"),
    "adapter cut off": (_both(_alone, lambda r: put(r / INFO, (r / INFO).read_text()[:300])), INFO),
    "adapter empty": (_both(_alone, lambda r: put(r / INFO, "")), INFO),
    "adapter a list": (_both(_alone, lambda r: put(r / INFO, "[1]")), INFO),
    "adapter binary": (_both(_alone, lambda r: put(r / INFO, bytes(range(256)))), INFO),
    "adapter deep": (_both(_alone, lambda r: put(r / INFO, NEST)), INFO),
    "adapter of another format": (_both(_alone, lambda r: edit(r / INFO, format=99)), "99"),
    "adapter without sites": (_both(_alone, lambda r: edit(r / INFO, sites=...)), "sites"),
    "sites a list": (_both(_alone, lambda r: edit(r / INFO, sites=[1])), "sites"),
    "sites empty": (_both(_alone, lambda r: edit(r / INFO, sites={})), "adapter"),
    "bytes text": (_both(_alone, lambda r: edit(r / INFO, bytes="many")), "bytes"),
    "sha256 a number": (_both(_alone, lambda r: edit(r / INFO, sha256=7)), "sha256"),
    "method unknown": (_both(_alone, lambda r: edit(r / INFO, adapter={"method": "lroa", "targets": []})), "lroa"),
    "method absent": (_both(_alone, lambda r: edit(r / INFO, adapter={})), INFO),
    "method a list": (_both(_alone, lambda r: edit(r / INFO, adapter={"method": ["lora"], "targets": []})), INFO),
    "targets a number": (_both(_alone, lambda r: edit(r / INFO, adapter={"method": "lora", "targets": 7})), INFO),
    "option unknown": (
        _both(_alone, lambda r: edit(r / INFO, adapter={"method": "lora", "targets": [], "rnak": 4})), "rnak"),
    "rank of another size": (
        _both(_alone, lambda r: edit(r / INFO, adapter={"method": "lora", "targets": ["q_proj"], "rank": 5})), "(5"),
    "site that the model lacks": (_both(_alone, _sites(lambda s: s.update({"nowhere": _first(s)}))), "nowhere"),
    "site of another scheme": (_both(_alone, _sites(lambda s: _first(s).update(scheme="int8"))), "int8"),
    "site of other weights": (_both(_alone, _sites(lambda s: _first(s).update(digest="0" * 64))), "other weights"),
    "digest a list": (_both(_alone, _sites(lambda s: _first(s).update(digest=[1]))), "other weights"),
    "magnitude text": (_both(_alone, _sites(lambda s: _first(s).update(magnitude="1"))), "sites"),
    "start a number": (_both(_alone, _sites(lambda s: _first(s).update(start=7))), "sites"),
    "start of other keys": (_both(_alone, _sites(lambda s: _first(s).update(start={"x": 1}))), "sites"),
    "weights missing": (_both(_alone, lambda r: (r / TENSORS).unlink()), TENSORS),
    "weights cut off": (_both(_alone, lambda r: put(r / TENSORS, (r / TENSORS).read_bytes()[:-7])), TENSORS),
    "weights empty": (_both(_alone, lambda r: put(r / TENSORS, b"")), TENSORS),
    "a bit of the weights": (_both(_alone, lambda r: flip(r / TENSORS, 20_000)), TENSORS),
    "a bit of their header": (_both(_alone, lambda r: flip(r / TENSORS, 30)), TENSORS),
    "kept codes gone": (_both(_alone, lambda r: edit(r / INFO, kept=3)), "base.safetensors"),
    "kept a text": (_both(_alone, lambda r: edit(r / INFO, kept="x")), "kept"),
}  # fmt: skip


@pytest.mark.parametrize("name", some(ADAPTERS, 3))
def test_adapters(name: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = ADAPTERS[name]
    run = bench.run(tmp_path)
    damage(run)
    argv = [["eval", str(run)], ["merge", str(run)], ["export", str(run), "--out", str(tmp_path / "peft")],
            ["chat", str(run), "--prompt", "w1"]][list(ADAPTERS).index(name) % 4]  # fmt: skip
    if argv[0] == "chat" and name.startswith(("recipe missing", "adapter missing")):
        argv = ["eval", str(run)]
    refused(bench, tmp_path, argv, words, capsys)


def _row(**changes: Any) -> Callable[[Path], None]:
    """Damage the last row of the training metrics."""

    def damage(run: Path) -> None:
        rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
        rows.append({key: value for key, value in (rows[-2] | {"step": 3} | changes).items() if value is not ...})
        put(run / METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    return damage


def _record(**changes: Any) -> Callable[[Path], None]:
    return lambda run: edit(run / RUN, **changes)


SESSION = {"started": "2026-01-01T00:00:00+00:00", "command": "qtune", "folder": "/", "versions": {}, "hardware": {}}
REPORTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "metrics missing": (lambda r: (r / METRICS).unlink(), METRICS),
    "metrics empty": (lambda r: put(r / METRICS, ""), METRICS),
    "metrics binary": (lambda r: put(r / METRICS, bytes(range(256)) * 3), METRICS),
    "metrics of other values": (lambda r: put(r / METRICS, "1\n[2]\nnull\n"), METRICS),
    "metrics without steps": (lambda r: put(r / METRICS, '{"loss": 1}\n'), METRICS),
    "metrics deep": (lambda r: put(r / METRICS, NEST + "\n"), METRICS),
    "loss text": (_row(loss="low"), "loss"),
    "loss a list": (_row(loss=[1.0]), "loss"),
    "eval_loss text": (_row(eval_loss="low"), "eval_loss"),
    "lr a mapping": (_row(lr={"a": 1}), "lr"),
    "memory text": (_row(memory="much"), "memory"),
    "skipped a list": (_row(skipped=[1]), "skipped"),
    "step beyond": (_row(step=10**400), "step"),
    "loss beyond": (_row(loss=10**400), "loss"),
    "recipe a list": (lambda r: put(r / RECIPE, "[1]"), RECIPE),
    "recipe binary": (lambda r: put(r / RECIPE, bytes(range(256))), RECIPE),
    "record cut off": (lambda r: put(r / RUN, (r / RUN).read_text()[:99]), RUN),
    "record a list": (lambda r: put(r / RUN, "[1]"), RUN),
    "record deep": (lambda r: put(r / RUN, NEST), RUN),
    "adapter cut off": (lambda r: put(r / INFO, (r / INFO).read_text()[:99]), INFO),
    "adapter's sites": (lambda r: edit(r / INFO, sites=[1, 2]), INFO),
    "adapter's parameters": (_both(_record(trained=[]), lambda r: edit(r / INFO, parameters="many")), INFO),
    "sessions a number": (_record(sessions=7), "sessions"),
    "sessions of numbers": (_record(sessions=[7]), "sessions"),
    "session without hardware": (_record(sessions=[{**SESSION, "hardware": 7}]), "hardware"),
    "session at no time": (_record(sessions=[{**SESSION, "started": "noon"}]), "started"),
    "steps text": (_record(steps="two"), "steps"),
    "model a text": (_record(model="llama"), "model"),
    "trained a mapping": (_record(trained={"a": 1}), "trained"),
    "trained without counts": (_record(trained=[{"kind": "q_proj"}]), "trained"),
    "data a list": (_record(data=[1]), "data"),
    "data without bins": (_record(data={"train": {"tokens": 3}}), "data"),
    "bins text": (
        _record(data={"train": {"examples": 1, "tokens": 1, "trained": 1, "median": 1, "longest": 1, "width": 1,
        "bins": "x"}}), "bins"),
    "ended a text": (_record(ended="yes"), "ended"),
    "ended at no time": (_record(ended={"at": "late", "steps": 2, "interrupted": False, "best": None}), "ended"),
    "plan a text": (_record(plan="12 GiB"), "plan"),
    "plan of text": (_record(plan={"process": "12 GiB"}), "plan"),
    "plan's groups": (_record(plan={"device": "cpu", "process": 1, "groups": {"a": "b"}}), "groups"),
    "samples of numbers": (_record(samples=[1]), "samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", some(REPORTS, 2))
def test_reports(name: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = REPORTS[name]
    run = bench.run(tmp_path)
    damage(run)
    argv = ["report", str(run)]
    if list(REPORTS).index(name) % 3 == 0:
        argv = ["compare", str(bench.root / "run"), str(run), "--out", str(tmp_path / "both.html")]
    refused(bench, tmp_path, argv, words, capsys)


STATE = "checkpoints/step-2/state.json"


def _states(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Damage both checkpoints alike."""
    return lambda run: [change(run / "checkpoints" / f"step-{i}") for i in (1, 2)] and None


RESUMES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no checkpoints": (_alone, "no checkpoint"),
    "states cut off": (_states(lambda s: put(s / "state.json", (s / "state.json").read_text()[:99])), "state.json"),
    "states a list": (_states(lambda s: put(s / "state.json", "[1]")), "state.json"),
    "states deep": (_states(lambda s: put(s / "state.json", NEST)), "state.json"),
    "states of another format": (_states(lambda s: edit(s / "state.json", format=99)), "99"),
    "states edited": (_states(lambda s: edit(s / "state.json", tokens=7)), "state.json"),
    "steps text": (_states(lambda s: edit(s / "state.json", step="two")), "step"),
    "states without files": (_states(lambda s: edit(s / "state.json", files=...)), "files"),
    "tensors cut off": (
        _states(lambda s: put(s / "state.safetensors", (s / "state.safetensors").read_bytes()[:-9])),
        "state.safetensors"),
    "a bit of the tensors": (_states(lambda s: flip(s / "state.safetensors", 9999)), "state.safetensors"),
    "adapters missing": (_states(lambda s: (s / TENSORS).unlink()), TENSORS),
    "adapters' bits": (_states(lambda s: flip(s / TENSORS, 9999)), TENSORS),
    "recipe missing": (lambda r: (r / RECIPE).unlink(), RECIPE),
    "recipe edited": (lambda r: put(r / RECIPE, (r / RECIPE).read_text().replace("lr: 0.01", "lr: 0.02")), "lr"),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMES)
def test_resume(name: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = RESUMES[name]
    run = bench.run(tmp_path)
    recipe = run / RECIPE
    put(recipe, recipe.read_text().replace(str(bench.root / "run"), str(run)))
    damage(run)
    refused(bench, tmp_path, ["train", str(run), "--resume"], words, capsys)


# ---- by chance

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    7,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    [[]],
    1e308,
    float("nan"),
    "\ud800",
    "a\0b",
]
SEEDS = range(25)


def at_random(tree: Any, draw: random.Random) -> Any:
    """The tree with one of its values replaced or left out."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(tree)
    holder, key = draw.choice(places)
    if isinstance(holder, dict) and draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(ODD)
    return tree


def bytes_at_random(content: bytes, draw: random.Random) -> bytes:
    """The content with bits flipped, a part cut off, filled, doubled or put in."""
    at, length = draw.randrange(max(1, len(content))), draw.randint(1, 64)
    kind = draw.randrange(5)
    if kind == 0:
        changed = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[:at]
    middle = [b"", bytes(length), content[at : at + length] * 2, draw.randbytes(length)][kind - 1]
    return content[:at] + middle + content[at + length * (kind != 4) :]


def in_json(path: Path, draw: random.Random) -> None:
    put(path, json.dumps(at_random(json.loads(path.read_text()), draw)))


def in_bytes(path: Path, draw: random.Random) -> None:
    put(path, bytes_at_random(path.read_bytes(), draw))


def in_lines(path: Path, draw: random.Random) -> None:
    rows = at_random([json.loads(line) for line in path.read_text().splitlines()], draw)
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def _recipe(bench: Bench, folder: Path, draw: random.Random, damage: bool) -> list[str]:
    whole = bench.whole()
    if damage:
        return bench.recipe(folder, bytes_at_random(whole.encode(), draw))
    return bench.recipe(folder, yaml.safe_dump(at_random(yaml.safe_load(whole), draw), allow_unicode=False))


def _data(bench: Bench, folder: Path, draw: random.Random, how: Callable[[Path, random.Random], None]) -> list[str]:
    path = Path(shutil.copy(bench.root / "task1.jsonl", folder / "a.jsonl"))
    how(path, draw)
    return ["data", str(path), "--model", str(bench.root / "model")]


def _model(bench: Bench, folder: Path, draw: random.Random, file: str, how: Any) -> list[str]:
    model = bench.model(folder)
    how(model / file, draw)
    return ["chat", str(model), "--prompt", "w1", "--max-new-tokens", "1"]


def _run(bench: Bench, folder: Path, draw: random.Random, file: str, how: Any, command: str) -> list[str]:
    run = bench.run(folder)
    if command == "eval":
        _alone(run)
    how(run / file, draw)
    return [command, str(run)]


def in_header(path: Path, draw: random.Random) -> None:
    header(path, lambda tree: at_random(tree, draw))


def in_front(path: Path, draw: random.Random) -> None:
    """Bytes of the header of a safetensors file, and of the length before it."""
    content = path.read_bytes()
    put(path, bytes_at_random(content[:2000], draw) + content[2000:])


FUZZ: dict[str, Callable[[Bench, Path, random.Random], list[str]]] = {
    "recipe's bytes": lambda b, f, d: _recipe(b, f, d, True),
    "recipe's values": lambda b, f, d: _recipe(b, f, d, False),
    "data's bytes": lambda b, f, d: _data(b, f, d, in_bytes),
    "data's values": lambda b, f, d: _data(b, f, d, in_lines),
    "config's values": lambda b, f, d: _model(b, f, d, CONFIG, in_json),
    "config's bytes": lambda b, f, d: _model(b, f, d, CONFIG, in_bytes),
    "weights' header": lambda b, f, d: _model(b, f, d, WEIGHTS, in_header),
    "weights' front": lambda b, f, d: _model(b, f, d, WEIGHTS, in_front),
    "tokenizer's values": lambda b, f, d: _model(b, f, d, "tokenizer.json", in_json),
    "tokenizer's bytes": lambda b, f, d: _model(b, f, d, "tokenizer.json", in_bytes),
    "tokenizer config's values": lambda b, f, d: _model(b, f, d, "tokenizer_config.json", in_json),
    "generation config's values": lambda b, f, d: _model(b, f, d, "generation_config.json", in_json),
    "adapter's values": lambda b, f, d: _run(b, f, d, INFO, in_json, "eval"),
    "adapter's bytes": lambda b, f, d: _run(b, f, d, TENSORS, in_bytes, "eval"),
    "metrics' values": lambda b, f, d: _run(b, f, d, METRICS, in_lines, "report"),
    "metrics' bytes": lambda b, f, d: _run(b, f, d, METRICS, in_bytes, "report"),
    "record's values": lambda b, f, d: _run(b, f, d, RUN, in_json, "report"),
    "a run's recipe": lambda b, f, d: _run(b, f, d, RECIPE, in_bytes, "report"),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", FUZZ)
def test_by_chance(kind: str, seed: int, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = told(bench, tmp_path, FUZZ[kind](bench, tmp_path, random.Random(f"{kind} {seed}")), capsys)
    if status == 0:
        return  # what chance made is legal: a number for another, a key that may be absent, a text for another
    code = err[err.index("error Q") :][6:10]
    assert status == 1 and code in KINDS and code != "Q000", err
