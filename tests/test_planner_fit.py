"""The search over the knobs: its order, that its answer fits, that nothing is changed without need."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from qtune.batches import Capacity
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.planner import fit as fits
from qtune.planner import knobs
from qtune.planner.devices import find_device
from qtune.planner.fit import Search, explain, fit, peak, refuse_beyond, shown, smallest_change
from qtune.planner.plan import Phase, Plan
from qtune.planner.request import Lengths, Request, request_of
from qtune.recipe import Recipe
from qtune.screen import Screen, size

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with room for long examples."""
    made = tmp_path_factory.mktemp("model")
    tiny.model("llama", max_position_embeddings=2048, vocab_size=1000).config.save_pretrained(made)
    return made


def asked(folder: Path, *changes: str, budget: int = 2**50) -> Request:
    recipe = Recipe.load({"model": str(folder), "scheme": {"name": "nf4", "block": 32}}, changes, training=False)
    return request_of(recipe, find_device("rtx4090"), budget)


class Ruler:
    """Plans whose peak is a formula of the recipe: the search is tested without traces."""

    def __init__(self, plan: Plan, peak: Any) -> None:
        self.plan, self.peak, self.seen = plan, peak, []  # type: ignore[var-annotated]

    def __call__(self, request: Request, recipe: Recipe | None = None, stack: str | None = None) -> Plan:
        recipe = recipe or request.recipe
        self.seen.append(recipe)
        return replace(self.plan, recipe=recipe, process=self.peak(recipe), budget=request.budget, phases=())


def additive(recipe: Recipe) -> int:
    """Bytes: each knob counts."""
    keys = recipe.train
    total = 1000 * (1 if recipe.scheme.name in ("nf4", "int3", "int2") else 4)
    total += 400 if recipe.embeddings is None else 200 if recipe.embeddings.name == "int8" else 100
    total += 10 * recipe.adapter.options.get("rank", 0) * (1 if keys.optimizer == "adamw8" else 4)
    return total + keys.micro_batch * recipe.data.max_length * (1 if keys.checkpointing else 8)


@pytest.fixture(scope="module")
def some(folder: Path) -> Plan:
    return asked(folder, "data.max_length=16").plan()


def ruled(monkeypatch: pytest.MonkeyPatch, plan: Plan, formula: Any = additive) -> Ruler:
    ruler = Ruler(plan, formula)
    monkeypatch.setattr(Request, "plan", lambda self, recipe=None, stack=None: ruler(self, recipe, stack))
    return ruler


BIG = ("train.micro_batch=8", "data.max_length=1024", "train.checkpointing=false", "scheme=int8", "adapter.rank=16")


def names(found: fits.Fit, kept: bool | None = None) -> list[str]:
    """The knobs of the ladder, by their first key."""
    return [next(iter(rung.level.change)) for rung in found.rungs if kept is None or rung.kept == kept]


# ---- the ladder


def test_the_order_is_what_costs_the_user_least_first(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled(monkeypatch, some)
    found = fit(asked(folder, *BIG, budget=1480))  # 1000 + 100 + 40 + 256 = 1396 is the least
    assert names(found) == [
        "train.checkpointing", "train.optimizer", "train.micro_batch", "scheme.embeddings", "scheme", "data.max_length",
        "adapter.rank",
    ]  # fmt: skip
    assert found.plan.verdict == "fits" and found.missing == 0
    assert [rung.saved for rung in found.rungs] == [
        peak(a) - peak(b)
        for a, b in zip([found.start, *(r.plan for r in found.rungs)], [r.plan for r in found.rungs])  # noqa: B905
    ]


def test_it_stops_at_the_first_that_fits(folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    ruler = ruled(monkeypatch, some)
    start = additive(asked(folder, *BIG).recipe)
    assert fit(asked(folder, *BIG, budget=2 * start)).rungs == () and len(ruler.seen) == 1
    found = fit(asked(folder, *BIG, budget=start // 4))
    assert names(found) == ["train.checkpointing"] and found.change == {"train.checkpointing": True}


def test_the_mildest_value_of_a_knob_is_taken(folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(monkeypatch, some)
    changes = ("train.micro_batch=6", "train.accumulate=2", "data.max_length=1024", "train.optimizer=adamw8")
    fixed = 1000 + 400 + 160
    found = fit(asked(folder, *changes, budget=int((fixed + 3 * 1024) / 0.94)))
    assert found.change == {"train.micro_batch": 3, "train.accumulate": 4}, "12 examples a step, as before"
    found = fit(asked(folder, *changes, budget=int((fixed + 3 * 1024) / 0.94) - 200))
    assert found.change == {"train.micro_batch": 2, "train.accumulate": 6}


def test_what_is_not_needed_is_taken_back(folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(monkeypatch, some)
    recipe = ("train.micro_batch=8", "data.max_length=1024")
    fixed = 1000 + 400 + 4 * 160
    found = fit(asked(folder, *recipe, budget=int((fixed + 1024) / 0.94)))
    assert names(found, kept=False) == ["train.optimizer"] and set(found.change) == {
        "train.micro_batch",
        "train.accumulate",
    }
    assert found.plan.recipe.train.optimizer == "adamw" and found.plan.verdict == "fits"


def test_what_is_learned_is_changed_only_if_nothing_else_helps(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled(monkeypatch, some)
    recipe = ("train.micro_batch=1", "data.max_length=1024", "train.optimizer=adamw8")
    least = 1000 + 100 + 160 + 1024  # with nf4 embeddings
    found = fit(asked(folder, *recipe, budget=least + 20))
    assert found.plan.verdict == "barely" and found.change == {"scheme.embeddings": "nf4"}
    found = fit(asked(folder, *recipe, budget=least - 1))
    assert found.change["data.max_length"] == 512 and "adapter.rank" not in found.change


def test_length_and_rank_have_floors_and_alpha_goes_with_the_rank(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled(monkeypatch, some)
    search = Search(asked(folder, "data.max_length=1100", "adapter.rank=24", "adapter.alpha=48.0"))
    recipe, shape = search.request.recipe, search.request.shape()
    assert [level.change["data.max_length"] for level in knobs.length(recipe, shape, "cuda")] == [550, 275]
    assert [level.change for level in knobs.rank(recipe, shape, "cuda")] == [
        {"adapter.rank": 12, "adapter.alpha": 24.0}, {"adapter.rank": 6, "adapter.alpha": 12.0},
    ]  # fmt: skip
    short = replace(search.request, lengths=Lengths(((300, 9),)))
    assert [level.change["data.max_length"] for level in knobs.length(recipe, short.shape(), "cuda")] == [275], (
        "550 cuts nothing"
    )


def test_a_method_without_a_rank_has_no_such_knob(folder: Path) -> None:
    request = asked(folder, "adapter=ia3")
    assert list(knobs.rank(request.recipe, request.shape(), "cuda")) == []


def test_if_nothing_fits_it_is_said_after_three_plans(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruler = ruled(monkeypatch, some)
    request = asked(folder, *BIG, budget=1000)
    found = fit(request)
    assert found.plan.verdict == "no" and len(ruler.seen) == 3
    assert found.missing == 1000 + 100 + 40 + 256 - 1000 and len(found.rungs) == 1
    assert smallest_change(request) is None
    assert fit(replace(request, budget=1396)).plan.verdict == "barely"


def test_packed_embeddings_that_take_more_are_no_obstacle(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled(monkeypatch, some, lambda recipe: additive(recipe) + (0 if recipe.embeddings is None else 5000))
    found = fit(asked(folder, *BIG, budget=int((1000 + 400 + 40 + 256) / 0.94)))
    assert found.plan.verdict == "fits" and found.plan.recipe.embeddings is None


def test_a_change_that_cannot_be_built_is_passed_over(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def formula(recipe: Recipe) -> int:
        if recipe.embeddings is not None:
            raise QtuneError("Q305", "these cannot be packed")
        return additive(recipe)

    ruled(monkeypatch, some, formula)
    request = asked(folder, *BIG, budget=int((1000 + 400 + 40 + 256) / 0.94))
    assert fit(request).plan.verdict == "fits"
    rows = explain(request)[1]
    refused = [row for row in rows if row.plan is None]
    assert [row.words for row in refused] == ["embeddings in int8", "embeddings in nf4"]
    assert rows[-2:] == refused and "cannot be packed" in refused[0].cost


def test_few_bits_come_before_what_is_learned_and_only_if_nothing_else_helps(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def formula(recipe: Recipe) -> int:
        bits = {"nf4": 4, "int3": 3, "int2": 2}
        return additive(recipe) + 250 * (bits.get(recipe.scheme.name, 4) - 4)

    ruled(monkeypatch, some, formula)
    small = ("train.micro_batch=1", "data.max_length=256", "train.optimizer=adamw8", "scheme.embeddings=nf4")
    least = 1000 + 100 + 160 + 256
    assert fit(asked(folder, *small, budget=least + 20)).change == {}, "barely is enough"
    found = fit(asked(folder, *small, budget=int((least - 250) / 0.94) + 1))
    assert found.change.keys() == {"scheme"} and found.change["scheme"]["name"] == "int3"
    cost = found.rungs[-1].level.cost
    assert cost == "rounded to 3 bits; better with adapter.method=qwha or cloq"
    rows = explain(asked(folder, "scheme={bits: 2.5, high: nf4, low: nf2}", "adapter=loftq"))[1]
    words = {row.words: row.cost for row in rows}
    assert words["scheme int2"] == "rounded to 2 bits" and words["scheme nf4"] == "rounded to 4 bits"
    assert "scheme int3" not in words


def test_fewer_windows_are_a_knob_where_loading_is_the_peak(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(plan: Plan) -> Phase:
        if plan.recipe.calibrate.samples < 4:
            raise QtuneError("Q221", "too little text")
        return Phase("load", 300 * plan.recipe.calibrate.samples)

    ruler = ruled(monkeypatch, some)
    monkeypatch.setattr(fits, "load_phase", loaded)
    changes = ("train.micro_batch=1", "data.max_length=256", "calibrate.codes=gptq")
    found = fit(asked(folder, *changes, budget=6000))
    assert found.change == {"calibrate.samples": 16} and found.plan.verdict == "fits"
    steps = [json.dumps(recipe.to_dict() | {"calibrate": None}) for recipe in ruler.seen]
    assert len(steps) == len(set(steps)), "the step does not hang on the text"
    words = {row.words for row in explain(asked(folder, *changes))[1]}
    assert {"32 calibration windows", "codes nearest"} <= words
    assert not list(knobs.samples(asked(folder).recipe, some.shape, "cuda")), "nothing starts from text"


# ---- for real


@pytest.mark.slow
def test_the_answer_really_fits_as_the_command_says_it(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changes = ("train.micro_batch=8", "data.max_length=1024", "train.checkpointing=false")
    request = asked(folder, *changes)
    start, least = peak(request.plan()), peak(request.plan(request.recipe.with_(["train.micro_batch=1"])))
    budget = (start + least) // 2
    found = fit(replace(request, budget=budget))
    assert found.plan.verdict == "fits" and found.start.verdict == "no" and found.change
    path = tmp_path / "recipe.yaml"
    path.write_text(request.recipe.to_yaml())
    argv = ["plan", str(path), "--device", "rtx4090", "--budget", f"{budget}B", "--json", *shown(found.change)]
    assert main(argv) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["peak"] == peak(found.plan) <= budget
    assert main(["plan", str(path), "--device", "rtx4090", "--fit", f"{budget}B"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("qtune train"))
    assert shlex.split(line)[2:] == [str(path), *shown(found.change)]
    assert "the recipe as it is" in out and all(rung.level.words in out for rung in found.rungs)


@pytest.mark.parametrize(("budget", "by_rule"), [("3000B", True), pytest.param("600MB", False, marks=pytest.mark.slow)])
def test_fit_as_json(
    folder: Path,
    some: Plan,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    budget: str,
    by_rule: bool,
) -> None:
    if by_rule:
        ruled(monkeypatch, some)
    argv = ["plan", "--model", str(folder), "--seq", "64", "--device", "rtx4090", "--fit", budget, "--json"]
    assert main(argv) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["budget"] == (3000 if by_rule else 600 * 10**6) and value["verdict"] == value["plan"]["verdict"]
    assert isinstance(value["overrides"], list) and value["start"]["process"] >= value["plan"]["process"]


def test_changes_are_shown_as_the_recipe_reads_them(folder: Path) -> None:
    recipe = asked(folder, "scheme.embeddings=int8").recipe
    change = {"scheme": knobs.scheme_tree(recipe, "dense"), "train.checkpointing": True, "adapter.alpha": 16.0}
    again = recipe.with_(shown(change))
    assert again == recipe.with_(change) and again.embeddings == recipe.embeddings
    assert shown({"scheme": {"name": "nf4", "embeddings": None}}) == ["scheme=nf4"]


# ---- one at a time


def test_explain_has_a_row_for_every_knob_sorted_by_what_it_saves(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled(monkeypatch, some)
    start, rows = explain(asked(folder, "train.micro_batch=4", "data.max_length=512"))
    by_words = {row.words: row.difference for row in rows}
    assert by_words == {
        "micro-batch 2, accumulate 2": -1024, "max_length 256": -1024, "optimizer adamw8": -480, "rank 8": -320,
        "embeddings in nf4": -300, "embeddings in int8": -200, "no master weights": 0, "rank 32": 640,
        "scheme int3": 0, "scheme int2": 0,
        "micro-batch 8": 2048, "max_length 1,024": 2048, "scheme int8": 3000, "scheme dense": 3000,
        "checkpointing off": 4 * 512 * 7,
        "input table on the host": 0, "layers' inputs on the host": 0, "layers' weights on the host": 0,
        "layers' inputs on disk": 0, "layers' weights on disk": 0, "A frozen (LoRA-FA)": 0,
        "optimizer on the host": 0, "updates in the backward": 0, "MLPs in tiles of 512 tokens": 0,
        "loss in chunks of 128": 0, "loss in chunks of 1,024": 0, "optimizer lion": 0, "optimizer adafactor": 0,
    }  # fmt: skip
    assert [row.difference for row in rows] == sorted(by_words.values())
    assert all(row.plan is not None and peak(row.plan) - peak(start) == row.difference for row in rows)


def test_explain_shows_the_other_way_where_a_knob_is_turned(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled(monkeypatch, some)
    changes = (
        "train.checkpointing=false",
        "train.optimizer=adamw8",
        "scheme=int8",
        "scheme.embeddings=nf4",
        "train.micro_batch=1",
        "data.max_length=2048",
    )
    words = {row.words for row in explain(asked(folder, *changes))[1]}
    assert {"checkpointing on", "optimizer adamw", "scheme nf4", "scheme dense", "embeddings dense"} <= words
    assert not {"scheme int8", "max_length 4,096", "embeddings in nf4"} & words, "as it is, or beyond the positions"


def test_explain_as_a_table_and_as_json(
    folder: Path, capsys: pytest.CaptureFixture[str], some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled(monkeypatch, some)
    argv = ["plan", "--model", str(folder), "--device", "rtx4090", "--explain"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    lines = [line.split("  ")[0] for line in out.splitlines()]
    assert lines.index("optimizer adamw8") < lines.index("the recipe as it is") < lines.index("checkpointing off")
    assert main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["difference"] for row in rows] == sorted(row["difference"] for row in rows)


# ---- before training


def test_a_recipe_beyond_its_budget_is_refused_with_what_would_fit(
    folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruled(monkeypatch, some)
    monkeypatch.setattr("qtune.planner.fit.with_phases", lambda plan: plan)  # the made-up plan has no other stages
    recipe, device = asked(folder, *BIG).recipe, find_device("rtx4090")
    start = additive(recipe)
    assert peak(refuse_beyond(recipe, start, device)) == start, "what just fits is not refused"
    with pytest.raises(QtuneError) as error:
        refuse_beyond(recipe, start // 4, device, screen=Screen(quiet=True))
    assert size(start) in str(error.value) and size(start // 4) in str(error.value)
    assert str(error.value).endswith("train.checkpointing=true")
    with pytest.raises(QtuneError, match="are missing"):
        refuse_beyond(recipe, 1000, device)


def test_a_known_micro_batch_is_what_is_refused(folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Lengths(((300, 9), (100, 5), (20, 1))).worst(Capacity(2), 1024)[0]
    recipe = asked(folder, "train.micro_batch=2", "data.max_length=1024").recipe
    request = request_of(recipe, find_device("rtx4090"), 2**30, shape)
    assert request.shape() == shape, "as it was found, with the words that say where"
    one = request.shape(recipe.with_(["train.micro_batch=1"]))
    assert (one.rows, one.length, one.trained) == (1, 300, 7)
    ruled(monkeypatch, some, lambda recipe: 1000 * recipe.train.micro_batch)
    with pytest.raises(QtuneError, match=r"train\.micro_batch=1 train\.accumulate=2$"):
        refuse_beyond(recipe, 1500, find_device("rtx4090"), shape=shape)


def test_each_recipe_is_planned_once(folder: Path, some: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    ruler = ruled(monkeypatch, some)
    fit(asked(folder, *BIG, budget=1480))
    seen = [json.dumps(recipe.to_dict()) for recipe in ruler.seen]
    assert len(seen) == len(set(seen))
    assert Search(asked(folder)).plan({}).trace is None, "traces are large"
