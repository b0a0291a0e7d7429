"""Tasks one after another: what earlier ones learned stays, and the next one keeps out of its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs_helper
import torch
from safetensors.torch import load_file
from test_restarts import Ours, rank_of
from torch import Tensor

from qtune.adapters.files import TENSORS
from qtune.adapters.olora_cl import ContinualLoRA
from qtune.errors import QtuneError
from qtune.export import merge
from qtune.runs import open_run
from qtune.screen import Screen
from qtune.trainer import train

STEPS = 13


def trained(tmp: Path, **options: Any) -> Ours:
    """Behind one task."""
    ours = Ours("olora_cl", tmp, rank=4, **options)
    for step in range(1, STEPS + 1):
        ours.step(step)
    return ours


def second(ours: Ours) -> None:
    """A task more, of other data."""
    ours.method.taken_over(ours.adapters)
    for step in range(1, STEPS + 1):
        for one in ours.adapters.values():  # as TrainStep adds it to the loss
            if (term := one.penalty()) is not None:
                term.backward()
        ours.step(step + 100)


def overlap(one: ContinualLoRA) -> Tensor:
    """The mean cosine, without sign, between rows of A and of the earlier tasks' A."""
    rows = [matrix / matrix.norm(dim=1, keepdim=True) for matrix in (one.carried_A, one.A.detach())]
    return (rows[0] @ rows[1].T).abs().mean()


def test_the_next_task_starts_as_the_last_one_ended(tmp_path: Path) -> None:
    ours = trained(tmp_path)
    before = ours.weights()
    ours.method.taken_over(ours.adapters)
    for name, weight in ours.weights().items():
        assert torch.allclose(weight, before[name], rtol=0, atol=1e-12)
    for one in ours.adapters.values():
        assert one.carried_A.shape[0] == 4 and not one.B.any() and one.carried_B.any()


def test_the_penalty_is_that_of_the_paper_and_keeps_tasks_apart(tmp_path: Path) -> None:
    ours, free = trained(tmp_path, penalty=0.5), trained(tmp_path, penalty=0.0)
    assert all(one.penalty() is None for one in ours.adapters.values()), "the first task has none before it"
    ours.method.taken_over(ours.adapters)
    for one in ours.adapters.values():
        by_hand = sum(float((old @ new).abs()) for old in one.carried_A for new in one.A.detach())
        assert one.penalty().item() == pytest.approx(0.5 * by_hand, rel=1e-5)
    ours = trained(tmp_path, penalty=0.5)
    second(ours)
    second(free)
    for name, one in ours.adapters.items():
        assert overlap(one) < 0.5 * overlap(free.adapters[name])


def test_ranks_of_tasks_add_up_until_the_chain_is_full(tmp_path: Path) -> None:
    ours = Ours("olora_cl", tmp_path, rank=4, carry=4)
    start = ours.weights()
    for step in range(1, STEPS + 1):
        ours.step(step)
    second(ours)
    assert all(rank_of(weight - start[name]) == 8 for name, weight in ours.weights().items())
    before = ours.weights()
    with pytest.raises(QtuneError, match="carry does not hold one more task without loss at up_proj") as caught:
        ours.method.taken_over(ours.adapters)
    assert caught.value.code == "Q416"
    assert all(torch.equal(weight, before[name]) for name, weight in ours.weights().items())


def test_a_chain_of_runs(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"adapter": "olora_cl", "adapter__rank": 4, "train__steps": 3, "data__eval": None}
    first = train(runs_helper.recipe(tmp_path, **keys))
    other = runs_helper.recipe(tmp_path, **keys, output=str(tmp_path / "two"))
    result = train(other, start_from=first.folder)
    held, began = load_file(result.folder / TENSORS), load_file(first.folder / TENSORS)
    for name, value in began.items():
        if name.endswith(".A"):
            assert torch.equal(held[name.removesuffix("A") + "carried_A"], value)
            assert not torch.equal(held[name], value)
    assert merge(open_run(result.folder, Screen(quiet=True)), tmp_path / "merged").verification.passed
