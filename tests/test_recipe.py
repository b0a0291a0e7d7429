"""Recipe: all faults at once, each with what was given and what is legal; overrides; round trips; paths; example."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qtune.adapters import METHODS, AdapterSpec
from qtune.errors import QtuneError
from qtune.quant import Dense, scheme_from
from qtune.recipe import Recipe
from qtune.sections import DataKeys, MemoryKeys, TrainKeys
from qtune.yaml_text import dump_yaml, load_yaml

ROOT = Path(__file__).resolve().parents[1]
BASE = """\
model: org/name
data: {train: train.jsonl}
output: runs/x
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the data files that the recipes name."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("")
    return tmp_path


def faults(text: Any, overrides: Any = (), *, training: bool = True) -> list[str]:
    """The lines of the error that a recipe raises, the heading first."""
    with pytest.raises(QtuneError) as caught:
        Recipe.load(text, overrides, training=training)
    return str(caught.value).split("\n")


def test_defaults() -> None:
    recipe = Recipe.load(BASE)
    assert recipe == Recipe(
        model="org/name", data=DataKeys(train="train.jsonl"), train=TrainKeys(epochs=1.0), output="runs/x"
    )
    assert (recipe.dtype, recipe.device, recipe.embeddings) == ("bfloat16", "auto", None)
    assert recipe.scheme == scheme_from({"name": "nf4", "block": 64, "double": True})
    assert recipe.adapter.method == "lora"
    assert recipe.adapter.targets == ("all-linear",)
    assert recipe.adapter.options == {n: p.default for n, p in METHODS["lora"].options().items()}
    assert recipe.data == DataKeys("train.jsonl", None, max_length=512, loss_on="answer", template=None)
    assert recipe.train == TrainKeys(epochs=1.0) and (recipe.train.micro_batch, recipe.train.lr) == (4, 2e-4)
    assert recipe.memory == MemoryKeys() and set(asdict(recipe.memory).values()) == {"device", None}


# override -> a part of the one fault it makes
BAD = {
    "modell=x": "unknown key 'modell' (did you mean 'model'?); legal: adapter, budget, calibrate, data, device",
    "lr=1e-4": "calibrate, data, device, dtype, memory, model, output, scheme, tokens, train; it is called train.lr",
    "train.trian=x": "train: unknown key 'trian'; legal: accumulate",
    "train.model=x": "warmup, weight_decay, z_loss; it is called model at the top",
    "train.max_length=9": "train: unknown key 'max_length'; legal: accumulate, betas",
    "data.trian=x": "data: unknown key 'trian' (did you mean 'train'?); legal: columns, dedupe, eval",
    "train=fast": "train is 'fast'; legal: a mapping with the keys steps, epochs, micro_batch",
    "data=[a.jsonl]": "data is ['a.jsonl']; legal: a mapping with the keys train, eval",
    "model=": "model is null; legal: text",
    "model=' '": "model is ' ' (empty); legal: text",
    "model=3": "model is 3 (not text in YAML: put it in quotes); legal: text",
    "output=2024-01-01": "output is datetime.date(2024, 1, 1) (not text in YAML: put it in quotes); legal: text",
    "output=null": "output is missing; legal: the folder that the run is written to",
    "dtype=fp16": "dtype is 'fp16'; legal: bfloat16, float16, float32",
    "dtype=[float16]": "dtype is ['float16']; legal: bfloat16, float16, float32",
    "device=gpu": "device is 'gpu'; legal: auto, cpu, mps, cuda, or cuda:0 and so on",
    "device=cuda:x": "device is 'cuda:x'; legal: auto",
    "scheme=nf5": "scheme: unknown scheme 'nf5' (did you mean 'nf4'?); legal: dense",
    "scheme=4": "scheme: a scheme is a name or a mapping with a name, not 4; legal names: dense",
    "scheme.name=[a]": "scheme: ",
    "scheme.blok=32": "scheme: scheme nf4 has no option 'blok'; legal: block, double",
    "scheme.block=big": "scheme: scheme nf4: block must be int, not 'big'",
    "scheme.block=33": "scheme: ",
    "scheme.embeddings=int9": "scheme.embeddings: unknown scheme 'int9' (did you mean 'int8'?); legal: dense",
    "scheme.embeddings.block=1": "scheme.embeddings: ",
    "embeddings=int8": "output, scheme, tokens, train; it is called memory.embeddings; it is called scheme.embeddings",
    "adapter=lorra": "unknown adapter method 'lorra' (did you mean 'lora'?); legal:",
    "adapter=7": "adapter is 7; legal: a method's name or {method: ..., targets: ..., options}",
    "adapter.method=7": "unknown adapter method '7'; legal:",
    "adapter.rang=8": "adapter method lora has no option 'rang'; legal: alpha",
    "adapter.rank=high": "adapter.rank must be a",
    "adapter.rank=0": "adapter.rank must be at least 1, not 0",
    "adapter.targets=5": "adapter.targets is 5; legal: all-linear, a name pattern, or a list of patterns",
    "adapter.targets=[q_proj, 3]": "adapter.targets is ['q_proj', 3]; legal: all-linear",
    "data.train=": "data.train is missing; legal: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder",
    "data.train=5": "data.train is 5 (not text in YAML: put it in quotes); legal: a .jsonl, .json, .csv, .tsv",
    "data.eval=nowhere.jsonl": "data.eval is 'nowhere.jsonl': no such file in ",
    "data.max_length=1": "data.max_length is 1; legal: a whole number >= 2",
    "data.max_length=51.5": "data.max_length is 51.5; legal: a whole number >= 2",
    "data.max_length=null": "data.max_length is null; legal: a whole number >= 2",
    "data.loss_on=answers": "data.loss_on is 'answers'; legal: answer, last, all",
    "data.template=3": "data.template is 3 (not text in YAML: put it in quotes); legal: text or null",
    "train.steps=0": "train.steps is 0; legal: a whole number >= 1 or null",
    "train.steps=true": "train.steps is True; legal: a whole number >= 1 or null",
    "train.steps=many": "train.steps is 'many'; legal: a whole number >= 1 or null",
    "train.epochs=0": "train.epochs is 0; legal: a number > 0 or null",
    "train.epochs=.inf": "train.epochs is inf; legal: a number > 0 or null",
    "train.micro_batch=0": "train.micro_batch is 0; legal: a whole number >= 1 or null",
    "train.accumulate=-1": "train.accumulate is -1; legal: a whole number >= 1",
    "train.lr=0": "train.lr is 0; legal: a number > 0",
    "train.lr=.nan": "train.lr is nan; legal: a number > 0",
    "train.lr=2e-4x": "train.lr is '2e-4x'; legal: a number > 0",
    "train.lr=[1e-4]": "train.lr is [0.0001]; legal: a number > 0",
    "train.lr.max=1e-4": "override train.lr.max: train.lr is 0.0003, not a section with keys",
    "train.schedule=cos": "train.schedule is 'cos'; legal: constant, linear, cosine",
    "train.warmup=-0.1": "train.warmup is -0.1; legal: a fraction >= 0 and < 1, or a whole number of steps",
    "train.warmup=1.5": "train.warmup is 1.5; legal: a fraction >= 0 and < 1, or a whole number of steps",
    "train.weight_decay=-1": "train.weight_decay is -1; legal: a number >= 0",
    "train.betas=0.9": "train.betas is 0.9; legal: a list of two numbers >= 0 and < 1",
    "train.betas=[0.9, 1]": "train.betas is [0.9, 1]; legal: a list of two numbers >= 0 and < 1",
    "train.betas=[0.9, x]": "train.betas is [0.9, 'x']; legal: a list of two numbers >= 0 and < 1",
    "train.clip=0": "train.clip is 0; legal: a number > 0 or null",
    "train.checkpointing='yes'": "train.checkpointing is 'yes'; legal: true or false",
    "train.master_weights=1": "train.master_weights is 1; legal: true or false",
    "train.seed=-1": "train.seed is -1; legal: a whole number >= 0",
    "train.eval_every=0": "train.eval_every is 0; legal: a whole number >= 1 or null",
    "train.eval_every=5": "train.eval_every is 5, but data.eval is null; legal: null, or give data.eval",
    "train.save_every=x": "train.save_every is 'x'; legal: a whole number >= 1 or null",
    "train.keep=0": "train.keep is 0; legal: a whole number >= 1",
    "train.keep_best=true": "train.keep_best is true, but train.eval_every is null: there is nothing to choose from",
    "train.patience=0": "train.patience is 0; legal: a whole number >= 1 or null",
    "train.patience=2": "train.patience is 2, but train.eval_every is null: there is no evaluation to wait for; legal",
    "train.log_every=null": "train.log_every is null; legal: a whole number >= 1",
    "train.samples=-1": "train.samples is -1; legal: a whole number >= 0",
    "train.report=yes please": "train.report is 'yes please'; legal: true or false",
    "train.trackers=wandb": "train.trackers is 'wandb'; legal: a list of aim, clearml, comet_ml, dvclive, mlflow",
    "train.trackers=[wandb, board]": "train.trackers is ['wandb', 'board']; legal: a list of aim",
    "train.trackers=[wandb, wandb]": "train.trackers is ['wandb', 'wandb'] (one of them twice); legal: a list of aim",
    "memory.weights=gpu": "memory.weights is 'gpu'; legal: device, host, disk",
    "memory.embeddings=disk": "memory.embeddings is 'disk'; legal: device, host",
    "memory.mlp_tile=0": "memory.mlp_tile is 0; legal: a whole number >= 1 or null",
    "train.lr": "override 'train.lr' is not of the form key=value, as in train.lr=1e-4",
    "=3": "override '=3' is not of the form key=value",
    "train.lr={": "override 'train.lr={': line 1, column 2: not YAML: ",
    "train.betas={a: 1, a: 2}": "line 1: key 'a' stands twice",
}


@pytest.mark.parametrize("override", BAD)
def test_one_fault(override: str) -> None:
    found = faults(BASE.replace("output", "train: {lr: 3e-4}\noutput"), [override])
    assert BAD[override] in found[1]
    assert found[0] == "recipe has 1 fault:"
    assert len(found) == 2


BAD_YAML = {
    "": "model is missing; legal: hub id, folder, or .gguf file",
    "just text\nand more\n": "is 'just text and more'; legal: a mapping with the keys model, dtype",
    "- model: x\n- y\n": "is [{'model': 'x'}, 'y']; legal: a mapping",
    BASE + "model: other\n": "line 4: key 'model' stands twice; legal: once",
    BASE + "train:\n  lr: 1\n  lr: 2\n": "line 6: key 'lr' stands twice; legal: once",
    BASE + "train: {lr: 1, lr: 2}\n": "line 4: key 'lr' stands twice; legal: once",
    BASE + "train:\n\tlr: 1\n": "line 5, column 1: not YAML: while scanning for the next token found character '\\t'",
    BASE + "train: {lr: 1\n": "not YAML: while parsing a flow mapping expected ',' or '}'",
    BASE
    + "x: !!python/object:os.system {}\n": "line 4, column 4: not YAML: could not determine a constructor for the tag",
    BASE + "output: 2024-13-45\n": "not YAML: month must be in 1..12",
    BASE + "3: x\n": "unknown key '3'; legal: adapter",
    BASE + "---\nmodel: x\n": "expected a single document",
    BASE
    + "train: {steps: 3, epochs: 2}\n": "train.steps is 3 and train.epochs is 2; legal: one of the two, the other null",
    BASE + "train: {checkpointing: false}\nmemory: {weights: disk}\n": "legal: train.checkpointing true",
    BASE + "train: {steps: 10, warmup: 10}\n": "train.warmup is 10 steps of train.steps = 10; legal: fewer than that",
}


@pytest.mark.parametrize("text", BAD_YAML, ids=range(len(BAD_YAML)))
def test_faults_of_the_file(here: Path, text: str) -> None:
    (here / "bad.yaml").write_text(text)
    found = faults("bad.yaml")
    assert found[0].startswith("bad.yaml has ")
    assert any(BAD_YAML[text] in line for line in found[1:]), found


def test_all_faults_at_once() -> None:
    text = """\
modle: x
scheme: {name: nf4, blok: 3, embeddings: nf5}
adapter: {method: lora, rang: 3, rank: x}
data: {max_length: 0, loss: all}
train: {lr: -1, lr: -2, steps: 3, epochs: 1, betas: 3}
device: tpu
"""
    found = faults(text, ["nonsense", "train.seed=x"])
    assert found[0] == "recipe has 17 faults:"
    parts = ["'lr' stands twice", "'nonsense'", "'modle'", "device is 'tpu'", "model is missing", "no option 'blok'"]
    parts += [
        "scheme.embeddings: unknown scheme 'nf5'",
        "no option 'rang'",
        "adapter.rank",
        "data: unknown key 'loss'",
        "max_length is 0",
    ]
    parts += [
        "train.lr is -2",
        "train.betas is 3",
        "train.seed is 'x'",
        "data.train is missing",
        "train.steps is 3 and",
    ]
    parts += ["output is missing"]
    missing = [part for part in parts if not any(part in line for line in found[1:])]
    assert not missing


def test_unreadable_recipe(here: Path) -> None:
    assert faults("nowhere.yaml")[0].startswith("cannot read the recipe nowhere.yaml: No such file")
    (here / "latin.yaml").write_bytes(b"model: \xff")
    assert faults("latin.yaml")[0].startswith("cannot read the recipe latin.yaml: no text in UTF-8")


# ---- what is legal ----


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.e-4", ".2e-3", "0.2e-3", "2.0e-4", "0.0002", "+2e-4", "20e-5"])
def test_numbers_with_an_exponent(text: str) -> None:
    assert Recipe.load(f"{BASE}train: {{lr: {text}}}\n").train.lr == 2e-4
    assert Recipe.load(BASE, [f"train.lr={text}"]).train.lr == 2e-4
    assert Recipe.load(BASE, ["train.steps=1e3"]).train.steps == 1000


def test_values_keep_their_types() -> None:
    train = Recipe.load(BASE, ["train.lr=1", "train.epochs=2", "train.clip=null", "train.betas=[0, 0.5]"]).train
    assert [type(v) for v in (train.lr, train.epochs, *train.betas)] == [float] * 4
    assert (train.clip, train.betas) == (None, (0.0, 0.5))


def test_short_forms() -> None:
    recipe = Recipe.load(BASE + "scheme: int8\nadapter: dora\n")
    assert recipe.scheme == scheme_from("int8")
    assert recipe.adapter.method == "dora"
    recipe = Recipe.load(BASE + "scheme: {embeddings: int8}\nadapter: {targets: 'q_proj, v_proj', rank: 4}\n")
    assert (recipe.scheme, recipe.embeddings) == (scheme_from("nf4"), scheme_from("int8"))
    assert (recipe.adapter.targets, recipe.adapter.options["rank"]) == (("q_proj", "v_proj"), 4)


def test_overrides() -> None:
    overrides = ["train.lr=1e-5", "scheme.block=128", "adapter.rank=8", "device=cuda:1", "data.eval=eval.jsonl"]
    recipe = Recipe.load(BASE + "scheme: nf4\n", overrides)
    assert recipe.train.lr == 1e-5
    assert recipe.scheme == scheme_from({"name": "nf4", "block": 128})
    assert recipe.adapter.options["rank"] == 8
    assert (recipe.device, recipe.data.eval) == ("cuda:1", "eval.jsonl")
    assert Recipe.load(BASE, ["scheme=int8"]).scheme == scheme_from("int8")
    assert Recipe.load(BASE + "scheme: {embeddings: nf4}\n", ["scheme.embeddings.block=32"]).embeddings == scheme_from(
        {"name": "nf4", "block": 32}
    )
    assert Recipe.load(BASE, {"train.lr": 1e-5, "data": {"train": "eval.jsonl"}}).data.train == "eval.jsonl"
    assert Recipe.load(BASE, ["output=a=b"]).output == "a=b"
    late = Recipe.load(BASE, ["adapter.targets=q_proj", "adapter=hira"]).adapter  # the order of the two says nothing
    assert late == Recipe.load(BASE, ["adapter=hira", "adapter.targets=q_proj"]).adapter


def test_an_override_of_steps_clears_epochs() -> None:
    resolved = Recipe.load(BASE)
    assert resolved.train.epochs == 1.0
    by_steps = resolved.with_({"train.steps": 7})
    assert (by_steps.train.steps, by_steps.train.epochs) == (7, None)
    by_epochs = by_steps.with_(["train.epochs=0.5"])
    assert (by_epochs.train.steps, by_epochs.train.epochs) == (None, 0.5)
    with pytest.raises(QtuneError, match="train.steps is 3 and train.epochs is 2"):
        resolved.with_(["train.steps=3", "train.epochs=2"])


def test_a_mapping_is_left_as_it_was() -> None:
    tree: dict[str, Any] = {"model": "m", "scheme": {"name": "nf4", "embeddings": "int8"}, "train": {"steps": 3}}
    Recipe.load(tree, ["train.lr=1", "scheme.block=32"], training=False)
    assert tree == {"model": "m", "scheme": {"name": "nf4", "embeddings": "int8"}, "train": {"steps": 3}}


RESOLVED = [
    BASE,
    BASE + "scheme: {name: dense, dtype: float32, embeddings: {name: nf4, block: 32}}\nadapter: hra\n",
    BASE + "train: {steps: 3, warmup: 2, lr: 1.0e-7, betas: [0, 0.5], clip: null}\ndtype: float32\n",
    BASE.replace("runs/x", "'1e5'") + "adapter: {targets: ['*.q_proj', \"a: 'b' #\"], alpha: 3}\n",
    BASE.replace("train: train.jsonl", "train: train.jsonl, template: \"{{ '\\n' }}\\t: #\""),
    BASE.replace("org/name", '"5"').replace("runs/x", "'läufe/null'"),
]


@pytest.mark.parametrize("text", RESOLVED, ids=range(len(RESOLVED)))
def test_round_trip(text: str) -> None:
    recipe = Recipe.load(text)
    written = recipe.to_yaml()
    assert Recipe.load(written) == recipe
    assert Recipe.load(written).to_yaml() == written
    assert Recipe.load(recipe.to_dict()) == recipe
    assert recipe.with_(()) == recipe


def test_round_trip_keeps_what_was_asked() -> None:
    recipe = Recipe.load(RESOLVED[1])
    assert (recipe.scheme, recipe.embeddings) == (Dense("float32"), scheme_from({"name": "nf4", "block": 32}))
    assert Recipe.load(RESOLVED[3]).output == "1e5"
    assert isinstance(recipe.adapter, AdapterSpec)


def test_yaml_quotes_what_would_read_as_a_number() -> None:
    for text in ("1e5", "2e-4", ".5e3", "null", "yes", "1.5", "0x1f", "a: b", "# x", "", "é\n "):
        notes: list[str] = []
        assert load_yaml(dump_yaml({"a": text}), notes) == {"a": text}
        assert not notes


# ---- paths ----


def test_paths_beside_the_recipe(here: Path) -> None:
    folder = here / "my recipes"
    folder.mkdir()
    for name in ("own.jsonl", "t.jinja"):
        (folder / name).write_text("")
    (folder / "model").mkdir()
    text = "model: model\ndata: {train: own.jsonl, eval: eval.jsonl, template: t.jinja}\noutput: o\n"
    (folder / "r.yaml").write_text(text)
    recipe = Recipe.load(folder / "r.yaml")
    assert recipe.data.train == str(folder / "own.jsonl")
    assert recipe.data.eval == "eval.jsonl"  # found here, so kept
    assert (recipe.data.template, recipe.model) == (str(folder / "t.jinja"), str(folder / "model"))
    assert recipe.output == "o"
    assert Recipe.load("my recipes/r.yaml").data.train == "my recipes/own.jsonl"
    found = faults(folder / "r.yaml", ["data.train=gone.jsonl"])
    assert f"data.train is 'gone.jsonl': no such file in {here} nor beside the recipe in {folder}; legal:" in found[1]


def test_without_training_the_data_may_be_gone() -> None:
    recipe = Recipe.load("model: m\ndata: {train: gone.jsonl}\n", training=False)
    assert (recipe.data.train, recipe.output) == ("gone.jsonl", None)
    assert Recipe.load("model: m\n", training=False).data.train is None


# ---- documentation ----


def test_the_example_names_every_key_with_its_default() -> None:
    path = ROOT / "configs" / "first.yaml"
    recipe = Recipe.load(path, training=False)
    tree = load_yaml(path.read_text(), [])
    written = {f"{k}.{n}" for k, v in tree.items() if isinstance(v, dict) for n in v} | set(tree)
    rows = Recipe.keys()
    assert {row.name for row in rows} <= written
    assert recipe == Recipe.load(
        {"model": recipe.model, "data": {"train": "train.jsonl"}, "output": recipe.output}, training=False
    )
    assert set(METHODS["lora"].options()) <= set(tree["adapter"])


def test_keys_for_the_docs() -> None:
    table = Recipe.keys()
    rows = {row.name: row for row in table}
    assert rows["train.lr"] == ("train.lr", 2e-4, "a number > 0", "peak learning rate")
    assert rows["model"].default == "required"
    assert (rows["scheme"].default, rows["adapter"].default) == ("nf4", "lora")
    assert len(rows) == len(table) == 70
    assert all(row.doc and row.legal for row in rows.values())
    assert not [name for name in rows if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", name)]


def test_every_method_has_a_recipe_that_says_what_came_out(script: Callable[[str], Any]) -> None:
    recipes = script("recipes")
    rows = {row["recipe"]: row for row in recipes.read_rows(recipes.RESULTS)}
    found = {path.stem: path for path in (ROOT / "configs" / "methods").glob("*.yaml")}
    assert set(found) == set(METHODS)
    for name, path in found.items():
        assert Recipe.load(path, training=False).adapter.method == name
        said = recipes.told(rows[name]) if name in rows else "not yet"
        assert recipes.MEASURED.search(path.read_text("utf-8"))[0] == f"# measured: {said}", name
