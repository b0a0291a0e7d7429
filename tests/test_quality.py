"""The benchmark of quality: what it finds to do, which rate it chooses, and the tables that come of its rows."""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

import pytest

PERPLEXITY = {"lora": (60.0, 61.0, 62.0), "qwha": (40.0, 41.0, 42.0), "cloq": (41.5, 43.0, 44.0)}
LR = {"lora": 1e-3, "qwha": 1e-4, "cloq": 3e-4}


@pytest.fixture
def quality(script, monkeypatch, tmp_path) -> ModuleType:
    module = script("quality")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "quality.jsonl")
    monkeypatch.setattr(script("tables"), "FOLDER", tmp_path)
    return module


def cell_of(quality: ModuleType, label: str) -> Any:
    return next(cell for cell in quality.cells() if cell.label == label)


def error(ratio: float) -> dict[str, float]:
    return {"calibration": ratio, "held_out": ratio + 0.05}


def fill(quality: ModuleType, book: Any) -> None:
    """A tiny results file: three starts at 3 bits with every run, one ablation, one nuclear norm."""
    for number, name in enumerate(PERPLEXITY):
        cell = cell_of(quality, f"main/int3-g64/{name}")
        start = {"start_seconds": 9.0, "trained": 1, "layer_error": error(1 - number / 4), "perplexity": 2e5}
        book.add(book.start_key(cell), start)
        while runs := book.runs(cell):
            for kind, rate, seed in runs:
                perplexity = PERPLEXITY[name][seed] + (rate != LR[name])
                found = {"accuracy": 0.75} if kind == "task" else {"perplexity": perplexity, "peak_bytes": 1 << 30}
                book.add(book.run_key(cell, kind, rate, seed), found | {"step_seconds": 1.5})
    for times, name in ((1, "lora"), (2, "qwha")):
        cell = cell_of(quality, f"cost/int3-g64/{name}")
        book.add(book.start_key(cell), {"start_seconds": 9.0, "trained": 1, "perplexity": 30.0})
        ((kind, rate, seed),) = book.runs(cell)
        book.add(book.run_key(cell, kind, rate, seed), {"step_seconds": 1.5 * times, "peak_bytes": times << 30})
    for label in ("ablation/int3-g64/qwha", "nuclear/nf4-single/pissa T=5"):
        start = {"start_seconds": 9.0, "trained": 1, "layer_error": error(0.5), "nuclear": 0.19, "perplexity": 30.0}
        book.add(book.start_key(cell_of(quality, label)), start)


def test_a_rate_is_chosen_on_seed_0_and_what_is_there_is_not_done_again(quality):
    book = quality.Book(full=False, same_code=True)
    cell = cell_of(quality, "main/int3-g64/qwha")
    assert book.runs(cell) == [("run", rate, 0) for rate in quality.SPARSE]
    fill(quality, book)
    assert book.done(cell) and book.chosen(cell) == 1e-4
    assert not book.done(cell_of(quality, "main/int3-g64/pissa"))
    assert not quality.Book(full=True, same_code=True).done(cell)
    book.code = "other"
    assert not book.done(cell)
    labels = [cell.label for cell in quality.cells()]
    assert len(set(labels)) == len(labels) and not [label for label in labels if "int4-g32" in label]


def test_a_start_that_diverges_is_not_chosen(quality):
    book = quality.Book(full=False, same_code=True)
    cell = cell_of(quality, "main/int2-g64/lora")
    for rate, perplexity in zip(cell.rates, (None, 50.0, 60.0), strict=True):
        book.add(book.run_key(cell, "run", rate, 0), {"perplexity": perplexity})
    assert book.chosen(cell) == cell.rates[1]


def test_tables(quality, monkeypatch, tmp_path, capsys):
    fill(quality, quality.Book(full=False, same_code=True))
    tables = importlib.import_module("tables")
    names = ("quality", "quality-cost", "quality-starts", "quality-papers")
    monkeypatch.setattr(tables, "README", tmp_path / "README.md")
    monkeypatch.setattr(tables, "TABLES", {name: tables.TABLES[name] for name in (*names, "merge")})
    tables.README.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in names))
    tables.fill_all()
    text = tables.README.read_text()
    assert "| int3-g64 | lora | 1.000, 1.050 | 200,000 | 61.00 (60.00 to 62.00) | 0.001 | 75.0% |" in text
    assert "41.00 (40.00 to 42.00) | 0.0001 | 75.0% |" in text
    assert "| nf4-single | nearest | pissa T=5 | 18 | 0.500, 0.550 | 19.0% | 30.00 |" in text
    assert "loftq > lora (LoftQ, table 5) | qwha ~ cloq > lora |" in text
    assert "| qwha | 9 | 3.00 | 2.00 | 2,048 MiB | 2.00 |" in text, "of lora's"
    assert "| qwha |  |  | 0.50 |" in text and "merge: no results yet" in capsys.readouterr().out
    assert all(row["code"] for row in map(json.loads, quality.RESULTS.read_text().splitlines()))


@pytest.mark.parametrize("record", [None, {}, {"ended": {"interrupted": True}}, {"ended": {"interrupted": False}}])
def test_a_run_that_was_stopped_is_trained_again(record, script, tmp_path, monkeypatch) -> None:
    trained = []
    monkeypatch.setattr("qtune.trainer.train", lambda *_, **__: trained.append(1))
    if record is not None:
        (tmp_path / "run.json").write_text(json.dumps(record))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "a"}) + "\n")
    tree = {"model": str(tmp_path), "data": {"train": str(data)}, "train": {"steps": 1}}
    assert script("cells").trained(tmp_path, tree) == tmp_path
    assert len(trained) == (0 if record == {"ended": {"interrupted": False}} else 1)
