"""The adapter by the prompt: k-means against every partition, features against the model's own hidden states, two tasks
told apart in Python, chat and eval, and what becomes of the prototypes' file."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import safetensors
import torch
import yaml
from test_together import as_json, error_of

import qtune
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.routing import FILE, Router, features, k_means, load_router
from qtune.runs import open_base, read_recipe
from qtune.screen import Screen
from qtune.trainer import train

FIRST = {"law": 10, "code": 60}  # the words of a task's prompts: 5 from here on


def prompts_of(name: str, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randint(FIRST[name], FIRST[name] + 4)}" for _ in range(draw.randint(3, 9)))
        for _ in range(count)
    ]


def write(path: Path, name: str, count: int, seed: int) -> Path:
    """A task: prompts of its words; the answer is one of two."""
    rows = [{"prompt": p + " ", "completion": f"w{5 + i % 2}"} for i, p in enumerate(prompts_of(name, count, seed))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one base, `law` of LoRA and `code` of DoRA, and held-out records of both tasks, one after another."""
    root = tmp_path_factory.mktemp("routing")
    for name, method in (("law", "lora"), ("code", "dora")):
        data = write(root / f"{name}.jsonl", name, 40, seed=1)
        train(
            runs_helper.recipe(
                root, output=str(root / name), adapter__method=method, data__train=str(data), data__eval=None,
                train__steps=4,
            )
        )  # fmt: skip
    both = [write(root / f"{name}-held.jsonl", name, 8, seed=2).read_text().splitlines() for name in FIRST]
    lines = [line for pair in zip(*both, strict=True) for line in pair]
    (root / "both.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy in which files may change."""
    for name in FIRST:
        shutil.copytree(trained / name, tmp_path / name)
        (tmp_path / name / FILE).unlink(missing_ok=True)
        text = (tmp_path / name / "recipe.yaml").read_text()
        (tmp_path / name / "recipe.yaml").write_text(text.replace(str(trained), str(tmp_path)))
    for path in (*trained.glob("*.jsonl"), trained / "model"):
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    return tmp_path


class Told(Screen):
    """Keeps what was told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: Any = "", style: str | None = None) -> None:
        self.lines.append(str(text))


def opened(root: Path, names: tuple[str, ...] = ("law", "code")) -> Any:
    model = open_base(root / names[0], Screen(quiet=True)).model
    return qtune.load_adapters(model, {name: root / name for name in names})


def ids_of(root: Path, name: str, count: int = 20) -> list[list[int]]:
    from qtune.runs import tokenizer_of

    tokenizer = tokenizer_of(read_recipe(root / "law"))[0]
    return [tokenizer(prompt)["input_ids"] for prompt in prompts_of(name, count, seed=3)]


# ---- k-means


def spread(points: torch.Tensor, places: Any) -> float:
    """The sum of squared distances to the mean of the own group, in float64."""
    places, points = torch.as_tensor(places), points.double()
    groups = [points[places == place] for place in places.unique()]
    return float(sum((group - group.mean(0)).square().sum() for group in groups))


@pytest.mark.parametrize("clusters", [2, 3])
def test_k_means_finds_the_best_of_all_partitions(clusters: int) -> None:
    for case in range(4):
        points = torch.randn(7, 3, generator=torch.Generator().manual_seed(case))
        best = min(spread(points, (0, *places)) for places in itertools.product(range(clusters), repeat=6))
        found = []
        for seed in range(60):
            centres = k_means(points, clusters, seed)
            nearest = torch.cdist(points, centres).argmin(1)
            means = torch.stack([points[nearest == place].mean(0) for place in range(len(centres))])
            assert torch.allclose(means, centres, atol=1e-6), "each centre is the mean of the points nearest to it"
            found.append(spread(points, nearest))
        assert min(found) == pytest.approx(best, rel=1e-5)


def test_k_means_starts_far_apart() -> None:
    """40 points in one place and two alone: a start drawn evenly would miss those."""
    points = torch.cat([torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.full((40, 2), -3.0)])
    points += 1e-3 * torch.randn(42, 2, generator=torch.Generator().manual_seed(0))
    for seed in range(8):
        centres = k_means(points, 3, seed)
        assert len(centres) == 3
        assert spread(points, torch.cdist(points, centres).argmin(1)) < 1e-3, seed


def test_k_means_of_few_points() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert sorted(k_means(points, 5, 0).tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    assert torch.allclose(k_means(points, 1, 0), points.mean(0)[None])
    wide = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(k_means(wide, 5, 3), k_means(wide, 5, 3)) and len(k_means(wide, 5, 3)) == 5


# ---- the router


@torch.no_grad()
def test_features_are_means_of_the_last_hidden_states(root: Path) -> None:
    adapters = opened(root)
    prompts = [[5, 6, 7], [9], [20, 21, 22, 23, 24], [30, 31]]
    bare = open_base(root / "law", Screen(quiet=True)).model.eval()
    adapters.use("code")
    found = features(adapters, prompts)
    for row, prompt in zip(found, prompts, strict=True):
        mean = bare(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].double().mean(0)
        assert torch.allclose(row.double(), mean / mean.norm(), atol=1e-5)
    assert adapters._mixture is not None, "what was in use is still"
    with pytest.raises(QtuneError, match="a prompt is empty"):
        features(adapters, [[1], []])


@torch.no_grad()
def test_prompts_find_their_adapters(root: Path) -> None:
    adapters = opened(root)
    router = load_router(adapters)
    assert router.names == ("law", "code")
    law, code = ids_of(root, "law"), ids_of(root, "code")
    mixed = [prompt for pair in zip(law, code, strict=True) for prompt in pair]
    assert router.choose(mixed) == ["law", "code"] * 20
    assert router.choose([]) == []
    distances = router.distances(mixed)
    assert distances.shape == (40, 2) and bool((distances[::2, 0] < distances[::2, 1]).all())
    own = router.prototypes["law"]
    wanted = (features(adapters, law[:1])[:, None].double() - own.double()).norm(dim=-1).amin(1)
    assert float(distances[0, 0]) == pytest.approx(float(wanted), abs=1e-6)
    ids = torch.tensor([law[0][:3], code[0][:3]])  # each row by its own adapter
    adapters.use(router.choose(ids.tolist()))
    rows = adapters.model(ids).logits
    for row, name in enumerate(FIRST):
        adapters.use(name)
        assert torch.allclose(adapters.model(ids[row : row + 1]).logits[0], rows[row], atol=1e-5)


def test_a_checkpoints_folder_has_the_prototypes_of_its_run(root: Path) -> None:
    model = open_base(root / "law", Screen(quiet=True)).model
    step = next((root / "law" / "checkpoints").glob("step-*"))
    load_router(qtune.load_adapters(model, {"early": step}))
    assert (root / "law" / FILE).is_file() and not (step / FILE).exists()


def test_what_is_no_number_of_clusters(root: Path) -> None:
    with pytest.raises(QtuneError, match="clusters is 0, examples 64; legal: 1 or more"):
        load_router(opened(root), clusters=0)


# ---- the file


def stamp(root: Path) -> dict[str, int]:
    return {name: (root / name / FILE).stat().st_mtime_ns for name in FIRST}


def test_prototypes_are_kept_and_made_again_where_something_differs(root: Path) -> None:
    adapters, told = opened(root), Told()
    first = load_router(adapters, screen=told)
    assert told.lines == ["prototypes  law: 5 from 40 prompts", "prototypes  code: 5 from 40 prompts"]
    before, told.lines = stamp(root), []
    again = load_router(opened(root, ("code", "law")), screen=told)  # other adapters carried, the same base
    assert told.lines == [] and stamp(root) == before
    assert all(torch.equal(again.prototypes[name], first.prototypes[name]) for name in FIRST)
    for options, text in (
        ({"clusters": 3}, "3 from 40"), ({"examples": 9}, "5 from 9"), ({"seed": 1}, "5 from 40"), ({}, "5 from 40"),
    ):  # fmt: skip
        told.lines = []
        load_router(adapters, screen=told, **options)  # type: ignore[arg-type]
        assert told.lines == [f"prototypes  {name}: {text} prompts" for name in FIRST], options
    write(root / "law.jsonl", "law", 30, seed=9)
    told.lines = []
    load_router(adapters, screen=told)
    assert told.lines == ["prototypes  law: 5 from 30 prompts"], "its data is another; that of code is not"
    with torch.no_grad():
        adapters.model.get_input_embeddings().weight[3] += 1.0
    told.lines = []
    load_router(adapters, screen=told)
    assert len(told.lines) == 2, "another base"


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "empty"])
def test_a_damaged_file_is_told_and_made_again(root: Path, damage: str) -> None:
    adapters, told = opened(root), Told()
    first, path = load_router(adapters), root / "law" / FILE
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes({"cut": content[:-9], "bit": flipped, "text": b"no tensors", "empty": b""}[damage])
    again = load_router(adapters, screen=told)
    assert f"{path} is damaged (" in told.lines[0] and told.lines[1:] == ["prototypes  law: 5 from 40 prompts"]
    assert torch.equal(again.prototypes["law"], first.prototypes["law"])
    told.lines = []
    load_router(adapters, screen=told)
    assert told.lines == []


def test_data_that_is_gone(root: Path) -> None:
    adapters, told = opened(root), Told()
    first = load_router(adapters)
    (root / "law.jsonl").unlink()
    kept = load_router(adapters, screen=told)
    assert told.lines == ["note: the data of law cannot be read; its prototypes are taken as they lie there"]
    assert torch.equal(kept.prototypes["law"], first.prototypes["law"])
    wanted = r"law cannot be chosen by prompt(?s:.*)law\.jsonl(?s:.*)Put its data back"
    with pytest.raises(QtuneError, match=wanted) as error:
        load_router(adapters, seed=5)
    assert error.value.code == "Q201"
    (root / "law" / FILE).unlink()
    with pytest.raises(QtuneError, match=wanted):
        load_router(adapters)


def test_a_run_without_data_of_its_own(root: Path) -> None:
    path = root / "code" / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["data"]["train"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(QtuneError, match=r"code cannot be chosen by prompt.*names no data\.train.*leave this") as error:
        load_router(opened(root))
    assert error.value.code == "Q106"


def test_a_folder_that_takes_no_file(root: Path) -> None:
    (root / "law" / f".{FILE}.{os.getpid()}.partial").mkdir()  # whoever is root may write anywhere else
    adapters, told = opened(root), Told()
    router = load_router(adapters, screen=told)
    assert "cannot write" in told.lines[1] and "will be made again next time" in told.lines[1]
    assert router.choose(ids_of(root, "law", 2)) == ["law", "law"]
    assert not (root / "law" / FILE).exists() and (root / "code" / FILE).is_file()


def test_the_file_says_what_it_is(root: Path) -> None:
    router: Router = load_router(opened(root))
    with safetensors.safe_open(root / "law" / FILE, "pt") as file:
        about = file.metadata()
        assert torch.equal(file.get_tensor("centroids"), router.prototypes["law"])
    assert set(about) == {"features", "base", "data", "examples", "clusters", "seed", "sha256"}
    assert (about["clusters"], about["examples"], about["seed"]) == ("5", "64", "0")


# ---- from the command line


def test_chat_is_routed(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (law, code) = (prompts_of(name, 1, seed=4)[0] for name in FIRST)
    said = (
        code, law, "/new", law, "/use code", law, "/new", law, "/route", law, "/off", "/new", law, "/route", "/new",
        code,
    )  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(said) + "\n"))
    argv = ["chat", str(root / "law"), "--adapter", str(root / "code"), "--route", "--max-new-tokens", "2", "--json"]
    capsys.readouterr()
    assert main(argv) == 0
    out, err = capsys.readouterr()
    found = ["".join(turn["adapters"]) for turn in json.loads(out)]
    assert found == ["code", "code", "law", "code", "code", "law", "", "code"]
    told = [line.removeprefix("route: ") for line in err.splitlines() if line.startswith("route: ")]
    assert told == ["code", "law", "law", "code"]
    assert "/route lets the next prompt choose" in " ".join(err.split())


def test_one_answer_is_routed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("chat", root / "law", "--adapter", root / "code", "--max-new-tokens", 3)
    for name in FIRST:
        prompt = prompts_of(name, 1, seed=5)[0]
        found = as_json(capsys, *given, "--route", "--prompt", prompt)
        assert found == as_json(capsys, *given, "--use", name, "--prompt", prompt)
        assert found["adapters"] == {name: 1.0}


def test_eval_by_prompt_is_each_adapter_on_its_own(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By loss, by answers and by choice, on records of both tasks in turn."""
    given = ("eval", root / "law", "--adapter", root / "code", "--batch", 3)
    asked = ("--metric", "perplexity", "--metric", "exact-match", "--metric", "choice", "--max-new-tokens", 2)
    apart = {
        name: as_json(capsys, *given, *asked, "--use", name, "--data", root / f"{name}-held.jsonl")[name]
        for name in FIRST
    }
    out = root / "rows.jsonl"
    both = as_json(capsys, *given, *asked, "--route", "--data", root / "both.jsonl", "--out", out)
    assert list(both) == ["law", "code", "route"]
    route = both["route"]
    assert route["routed"] == {"law": 8, "code": 8}
    for key in ("eval_loss", "exact-match", "accuracy"):
        assert route[key] == pytest.approx(sum(one[key] for one in apart.values()) / 2, abs=1e-5), key
    rows = [row for row in map(json.loads, out.read_text().splitlines()) if row["model"] == "route"]
    assert [row["adapter"] for row in rows] == ["law", "code"] * 16
    assert [row["where"] for row in rows[:16]] == [
        row["where"] for row in map(json.loads, out.read_text().splitlines()) if row["model"] == "law"
    ][:16], "the rows are in the order of the records"
    few = as_json(capsys, *given, "--route", "--use", "none", "--base", "--data", root / "both.jsonl")
    assert list(few) == ["base", "none", "route"] and few["route"]["choices"] == few["base"]["choices"] == 2
    assert few["route"]["eval_loss"] == pytest.approx(route["eval_loss"], abs=1e-5)
    assert few["route"]["chance"] == few["base"]["chance"] and few["route"]["eval_examples"] == 16
    assert few["route"]["accuracy"] == pytest.approx(route["accuracy"])


def test_what_cannot_be_routed_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law, code = root / "law", root / "code"
    for argv, words in (
        (("chat", law, "--route"), "--route: legal: with --adapter NAME=RUN"),
        (("chat", law, "--adapter", code, "--route", "--use", "law"), "--route: legal: without --use"),
        (("eval", law, "--route"), "--route: prompts choose among several adapters; legal with --adapter"),
        (("eval", law, "--adapter", code, "--route", "--tasks", "x"), "legal: without --tasks"),
        (("eval", law, "--adapter", f"route={code}", "--route"), "an adapter has this name already"),
    ):
        assert words in error_of(capsys, *argv), words
    path = law / "recipe.yaml"
    path.write_text(path.read_text().replace("loss_on: answer", "loss_on: all"))
    found = error_of(capsys, "eval", law, "--adapter", code, "--route", "--data", root / "both.jsonl")
    assert "learns all tokens (data.loss_on all)" in found
