"""Adapters of several runs on one base, from the command line: `qtune chat` and `qtune eval` with --adapter."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import torch

import qtune
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.runs import open_base, open_run
from qtune.screen import Screen
from qtune.together import mixture_of, told
from qtune.trainer import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one base: `law` of LoRA, `code` of DoRA, which learned other things; and `other` on other codes."""
    root = tmp_path_factory.mktemp("together")
    train(runs_helper.recipe(root, output=str(root / "law")))
    task = str(runs_helper.write_task(root, seed=7))
    train(
        runs_helper.recipe(
            root, output=str(root / "code"), adapter__method="dora", adapter__rank=3, train__seed=5, data__train=task
        )
    )
    train(runs_helper.recipe(root, output=str(root / "other"), scheme__block=64, train__steps=1))
    return root


def as_json(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main([*map(str, argv)]) == 1
    return " ".join(capsys.readouterr().err.split())


def loss_of(model: Any, root: Path) -> float:
    from qtune.batches import Capacity
    from qtune.evaluate import evaluate
    from qtune.evaluation.asked import held_out
    from qtune.runs import read_recipe, tokenizer_of
    from qtune.step import LanguageModel

    recipe = read_recipe(root / "law")
    held = held_out(recipe.data, tokenizer_of(recipe)[0], seed=0, screen=Screen(quiet=True), texts=False, limit=None)
    assert held is not None
    return evaluate(LanguageModel(model), held.examples, capacity=Capacity(4)).loss


def test_eval_of_each_and_of_mixtures(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("eval", root / "law", "--adapter", f"code={root / 'code'}", "--metric", "perplexity")
    each = as_json(capsys, *given, "--base")
    assert list(each) == ["base", "law", "code"]
    for name in ("law", "code"):
        alone = loss_of(open_run(root / name, Screen(quiet=True)).model, root)
        assert each[name]["eval_loss"] == pytest.approx(alone, abs=1e-6)
    mixed = as_json(capsys, *given, "--use", "law=0.5,code=0.5", "--use", "none", "--use", "code")
    assert list(mixed) == ["law=0.5,code=0.5", "none", "code"]
    assert mixed["none"] == each["base"] and mixed["code"] == each["code"]
    model = open_base(root / "law", Screen(quiet=True)).model
    qtune.load_adapters(model, {"a": root / "law", "b": root / "code"}).use({"a": 0.5, "b": 0.5})
    assert mixed["law=0.5,code=0.5"]["eval_loss"] == pytest.approx(loss_of(model, root), abs=1e-6)
    assert len({round(one["eval_loss"], 4) for one in (*each.values(), mixed["law=0.5,code=0.5"])}) == 4
    part = as_json(capsys, *given, "--use", "law", "--parts", 99)
    assert part["law"]["eval_loss"] == pytest.approx(each["law"]["eval_loss"], abs=1e-5)
    assert as_json(capsys, *given, "--use", "law", "--parts", 1)["law"]["eval_loss"] != part["law"]["eval_loss"]


def test_a_conversation_changes_its_adapters(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "w1 w20\n/use code\nw1 w20\n/use law=0.7 code=0.3\nw2\n/use cod\n/use\n/adapters\n/off\nw2\n/off now\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    argv = ["chat", str(root / "law"), "--adapter", f"code={root / 'code'}", "--max-new-tokens", "2", "--json"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    turns = json.loads(out)
    assert [turn["adapters"] for turn in turns] == [{"law": 1.0}, {"code": 1.0}, {"law": 0.7, "code": 0.3}, {}, {}]
    assert turns[-1]["prompt"] == "/off now", "what is no command is talk"
    assert "adapters law (lora), code (dora)" in " ".join(err.split())
    for words in (
        "/use NAME or /use A=0.7 B=0.3", "in use: code", "in use: law=0.7,code=0.3", "in use: none",
        "law lora weight 0.7", "code dora weight 0.3",
        "unknown adapter 'cod' (did you mean 'code'?); legal: code, law",
        "no adapter is named; legal: one of law, code",
    ):  # fmt: skip
        assert words in " ".join(err.split()), words


def test_one_answer_by_a_mixture(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("chat", root / "law", "--adapter", root / "code", "--max-new-tokens", 3, "--prompt", "w1 w20")
    alone = {name: as_json(capsys, "chat", root / name, *given[4:])["answer"] for name in ("law", "code")}
    assert as_json(capsys, *given)["answer"] == alone["law"]
    found = as_json(capsys, *given, "--use", "code")
    assert found == {"prompt": "w1 w20", "answer": alone["code"], "adapters": {"code": 1.0}}


def test_what_cannot_be_loaded_together_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law, code = root / "law", root / "code"
    for argv, words in (
        (("chat", root / "model", "--adapter", code), "is no run; the adapters go on the base of a run"),
        (("chat", law, "--adapter", f"a={root / 'nothing'}"), "nothing is not a run"),
        (("chat", law, "--adapter", law), "'law' is"),
        (("chat", law, "--adapter", f"a b={code}"), "'a b' is no name"),
        (("chat", law, "--use", "law"), "--use law: legal: with --adapter NAME=RUN"),
        (("chat", law, "--adapter", code, "--use", "law", "--use", "code"), "legal: once, with all that answer"),
        (("chat", law, "--adapter", code, "--use", "lwa"), "unknown adapter 'lwa' (did you mean 'law'?)"),
        (("eval", law, "--use", "law"), "--use and --parts choose among several adapters"),
        (("eval", law, "--adapter", code, "--use", "law=x"), "the weight of law is 'x'; legal: a number"),
        (("eval", law, "--adapter", code, "--parts", 0), "--parts is 0; legal: 1 or more"),
        (("eval", law, "--adapter", code, "--use", "code", "--parts", 2), "'code' (dora) is no product of two factors"),
        (
            ("eval", law, "--adapter", f"o={root / 'other'}"),
            "trained on nf4(block=64, double=True), here the layer is nf4(block=32",
        ),
    ):
        assert words in error_of(capsys, *argv), words


def test_words_for_mixtures() -> None:
    names = ("law", "code")
    for text, weights in (
        ("law", {"law": 1.0}), ("law code", {"law": 1.0, "code": 1.0}), ("none", {}),
        (" code=-2 ,law=.5", {"code": -2.0, "law": 0.5}),
    ):  # fmt: skip
        assert mixture_of(text, names) == weights
        assert mixture_of(told(weights), names) == weights
    assert mixture_of("none", ("none",)) == {"none": 1.0}
    with pytest.raises(QtuneError, match="law stands twice"):
        mixture_of("law law=2", names)


def test_python_as_in_the_docs(root: Path) -> None:
    """What docs/many-adapters.md shows, on this base."""
    import re

    page = (Path(__file__).parent.parent / "docs" / "many-adapters.md").read_text("utf-8")
    (first, *rest) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    model = open_base(root / "law", Screen(quiet=True)).model
    ids = torch.randint(3, 100, (3, 8))
    scope: dict[str, Any] = {"qtune": qtune, "model": model, "ids": ids, "texts": [ids], "prompts": ids.tolist()}
    for body in (first, *rest):
        exec(body.replace("runs/law", str(root / "law")).replace("runs/code", str(root / "law")), scope)
    assert scope["adapters"].names == ("law", "code")
