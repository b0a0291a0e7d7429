"""The comparison of all methods: how its options and learning rates are found, what is left to do, its table."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_laws import Tiny
from torch import nn

from qtune.adapters import METHODS, AdapterSpec, adapt
from qtune.quant import NF4


@pytest.fixture
def family(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = script("family")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "family.jsonl")
    return module


def climb(family: ModuleType, book: Any, cell: Any, best: float) -> None:
    """Pilots whose loss is least at `best`, and never finite above 1e-2."""
    while (todo := book.next(cell)) and todo[0] == "rate":
        worse = abs(math.log(todo[1] / best))
        book.add(book.key(cell, *todo), {"losses": [9.0, 3 + worse], **({"diverged": 2} if todo[1] > 0.02 else {})})


def test_what_is_left_to_do(family: ModuleType) -> None:
    book, cell = family.Book(), family.Cell("nf4", "lora")
    done = []
    while todo := book.next(cell):
        done.append(todo)
        if todo[0] == "rate":
            climb(family, book, cell, 1e-2)
        else:
            book.add(book.key(cell, *todo), {"perplexity": 20.0, "losses": [3.5, 3.6]})
    assert [kind for kind, _, _ in done] == ["start", "plan", "rate", "run", "run", "cost"]
    assert set(book.tried(cell)) == {1e-3, 3e-3, 1e-2, 3e-2} and book.chosen(cell) == 1e-2
    assert [(rate, seed) for kind, rate, seed in done if kind == "run"] == [(1e-2, 0), (1e-2, 1)]
    assert family.Book().next(cell) is None and family.Book(full=True).next(cell) == ("run", 1e-2, 2)
    refused = family.Cell("nf4", "ia3")
    book.add(book.key(refused, "start"), {"refused": "no"})
    assert book.next(refused) is None


def test_where_a_run_diverges_the_next_best_rate_is_taken(family: ModuleType) -> None:
    book, cell = family.Book(), family.Cell("nf4", "xgblora")
    runs = []
    while todo := book.next(cell):
        if todo[0] == "rate":
            climb(family, book, cell, 1e-2)
        else:
            runs += [todo[1:]] if todo[0] == "run" else []
            book.add(book.key(cell, *todo), {"losses": [3.5, 9.0 if todo[1] == 1e-2 else 3.4]})
    assert runs == [(1e-2, 0), (3e-3, 0), (3e-3, 1)] and book.chosen(cell) == 3e-3


def test_a_rate_below_the_first_is_found(family: ModuleType) -> None:
    book, cell = family.Book(), family.Cell("nf4", "qwha")
    for kind in ("start", "plan"):
        book.add(book.key(cell, kind), {})
    climb(family, book, cell, 1e-4)
    assert book.chosen(cell) == 1e-4 and min(book.tried(cell)) == 3e-5


@pytest.mark.parametrize(("target", "best"), [(1000, 10), (12345, 123), (1, 1), (10**9, 128)])
def test_options_come_nearest_to_a_number_of_trained_values(family: ModuleType, target: int, best: int) -> None:
    counts: dict[int, int | None] = {16: 1600}
    while more := family.nearest(16, counts, target):
        counts.update({value: 100 * value for value in more})
    assert min(counts, key=lambda value: family.distance(counts[value], target)) == best
    assert len(counts) < 24


def test_options_that_are_refused_are_not_taken(family: ModuleType) -> None:
    counts: dict[int, int | None] = {16: 1600}
    while more := family.nearest(16, counts, 10**6):
        counts.update({value: 100 * value if value <= 40 else None for value in more})
    assert max(value for value, count in counts.items() if count) == 40


def test_every_method_is_compared_on_a_scheme_that_takes_it(family: ModuleType) -> None:
    cells = family.cells(False)
    assert {cell.method for cell in cells} == set(METHODS) and cells[0] == family.Cell("nf4", "lora")
    for cell in cells:
        assert cell.scheme == "nf4" or family.Cell(cell.scheme, "lora") in cells
    assert len({cell.label for cell in family.cells(True)}) == len(family.cells(True)) > len(cells)


def test_ranks_of_what_was_learned(family: ModuleType) -> None:
    work = importlib.import_module("family_cell")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Tiny(NF4()) for _ in range(2)])

    model = Model()
    sites = adapt(model, AdapterSpec("lora", ("up_proj",), {"rank": 4, "alpha": 4.0}))
    first = {name: copy.deepcopy(site.adapter) for name, site in sites.items()}
    assert work.ranks(sites, first) == {}, "nothing was learned"
    for site in sites.values():
        adapter: Any = site.adapter
        with torch.no_grad():
            adapter.A.zero_()[:, :4] = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1e-6]))
            adapter.B.zero_()[:4] = torch.eye(4)
    found = work.ranks(sites, first)
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert found["effective"] == pytest.approx(math.exp(entropy), rel=1e-4)
    assert found["stable"] == pytest.approx(24 / 16, rel=1e-4) and found["numerical"] == 3
    apart = adapt(Model(), AdapterSpec("amlora", ("up_proj",)))
    assert work.ranks(apart, apart) == {}, "no weight does the same"


def test_table_and_picture(family: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = importlib.import_module("method_tables")
    monkeypatch.setattr(tables, "PICTURE", tmp_path / "docs" / "methods.svg")
    (tmp_path / "docs").mkdir()
    book = family.Book()
    ranks = {"effective": 7.25, "stable": 3.0, "numerical": 16.0, "size": 0.01}
    for method, perplexity in (("lora", 25.0), ("bhra", 24.0)):
        cell = family.Cell("nf4", method)
        started = {"options": {"rank": 16}, "trained": 4884480, "of_lora": 1.0}
        book.add(book.key(cell, "start"), started | ({"perplexity": 25.3} if method == "lora" else {}))
        book.add(book.key(cell, "plan"), {"planned": 400 << 20, "measured": 401 << 20})
        climb(family, book, cell, 1e-3)
        for seed in (0, 1):
            book.add(book.key(cell, "run", 1e-3, seed), {"perplexity": perplexity + seed, "ranks": ranks})
        book.add(book.key(cell, "cost", 1e-3, 0), {"times_lora": 1.25})
    rows = family.read_rows(family.RESULTS)
    family.picture(rows, tmp_path / "docs" / "methods.svg")
    lines = tables.family_table(rows)
    assert lines[0] == "On `nf4`:" and lines[-1] == "![Perplexity against bytes](methods.svg)"
    head, tail = "| `bhra` | rank 16 | 4,884,480 | 1.00 |", "1.25 | 24.50 (24.00 to 25.00) | 0.001 |"
    assert lines[4] == f"{head} 7.2, 3.0, 16.0 | 400.0, 401.0 | {tail}"
    assert lines[5] == "| none, the packed model |  |  |  |  |  |  | 25.30 |  |" and lines[6].startswith("| `lora` |")
    assert len({line.count("|") for line in lines[2:7]}) == 1
    assert "bhra" in (tmp_path / "docs" / "methods.svg").read_text()
