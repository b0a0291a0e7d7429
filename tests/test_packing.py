"""Examples packed into one row: none sees another, every one is there once, and the rows are full."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch

from qtune.adapters import AdapterSpec, adapt
from qtune.batches import Capacity, batches, collate, micro_batches, padding, stream
from qtune.data import Example
from qtune.errors import QtuneError
from qtune.headroom import largest
from qtune.memory.boundaries import Boundaries
from qtune.model import apart, load
from qtune.planner.devices import find_device
from qtune.planner.fit import smallest_change
from qtune.planner.plan import Plan, plan_recipe
from qtune.planner.request import lengths_of, request_of
from qtune.planner.step_trace import MetaBatch, step_trace
from qtune.quant import scheme_from
from qtune.recipe import Recipe
from qtune.screen import Screen
from qtune.sections import TrainKeys
from qtune.step import LanguageModel
from qtune.trainer import train

LENGTHS = (5, 11, 2, 17, 9)
REFUSED = {"gemma2": "'eager'", "gpt-oss": "'eager'"}  # soft caps and sinks, which transformers computes itself
DRAW = random.Random(0)
ALPACA = [min(372, max(20, round(DRAW.lognormvariate(4.6, 0.6)))) for _ in range(400)]  # about the lengths of its data


def examples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Example]:
    """Random tokens; all but the first half of each is trained."""
    draw = random.Random(seed)
    return [
        Example(
            array("i", (draw.randrange(3, tiny.VOCAB) for _ in range(n))),
            bytes(i >= max(1, n // 2) for i in range(n)),
            f"example {number}",
        )
        for number, n in enumerate(lengths)
    ]


def language(folder: Path, family: str, packed: bool, method: str = "lora") -> LanguageModel:
    """Adapted and with an adapter that does something."""
    if not folder.exists():
        tiny.saved(family, folder)
    model = load(folder, scheme_from("int8"), dtype=torch.float32)
    adapt(model, AdapterSpec(method))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    made = LanguageModel(model)
    made.choose_attention(max(LENGTHS), packed=packed)
    return made


def loss_and_gradients(
    made: LanguageModel, packed: bool, training: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    made.model.train(training)  # GPT-2 and OPT have dropout
    loss = made.loss_sum(collate(examples(), packed))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in REFUSED])
def test_packed_examples_learn_what_padded_ones_do(family: str, tmp_path: Path) -> None:
    """Mistral's and Gemma's windows of 8 tokens are shorter than two of the examples."""
    apart_, padded = (language(tmp_path / "model", family, packed) for packed in (True, False))
    apart_.check_apart()
    (loss, gradients), (want, wanted) = loss_and_gradients(apart_, True), loss_and_gradients(padded, False)
    assert loss == pytest.approx(want, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()))


def test_recomputed_layers_keep_packed_examples_apart_as_well(tmp_path: Path) -> None:
    kept, recomputed = (language(tmp_path / "model", "llama", True) for _ in range(2))
    recomputed.checkpointing(Boundaries())
    (loss, gradients), (want, wanted) = (loss_and_gradients(one, True, True) for one in (recomputed, kept))
    assert loss == want and all(torch.equal(gradients[name], wanted[name]) for name in wanted)


def test_padded_rows_go_on_as_before_in_a_model_that_packs(tmp_path: Path) -> None:
    both, padded = (language(tmp_path / "model", "mistral", packed) for packed in (True, False))
    assert loss_and_gradients(both, False)[0] == loss_and_gradients(padded, False)[0]


@pytest.mark.parametrize("family", REFUSED)
def test_attention_that_cannot_be_told_is_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(QtuneError, match=f"{REFUSED[family]}.*set train.packing to false"):
        language(tmp_path / "model", family, True)


def test_a_model_that_lets_examples_see_each_other_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = language(tmp_path / "model", "llama", True)
    monkeypatch.setattr("qtune.step.told", lambda lengths: apart.told([sum(lengths)]))
    with pytest.raises(QtuneError, match="see each other"):
        made.check_apart()


def test_no_example_teaches_the_first_token_of_the_next() -> None:
    batch = collate(examples(), packed=True)
    firsts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    assert (batch.labels[0, firsts] == -100).all() and batch.lengths == LENGTHS and batch.examples == len(LENGTHS)
    assert batch.trained == sum(n - max(1, n // 2) for n in LENGTHS)
    assert batch.attention_mask.all() and batch.to("cpu").lengths == LENGTHS


# ---- rows


@pytest.mark.parametrize("limit", [372, 512, 2048])
def test_rows_hold_every_example_once_and_are_full(limit: int) -> None:
    capacity = Capacity(limit, by_tokens=True, packed=True)
    rows = list(capacity.fill(range(len(ALPACA)), ALPACA))
    assert sorted(index for row in rows for index in row) == list(range(len(ALPACA)))
    assert max(sum(ALPACA[i] for i in row) for row in rows) <= limit
    assert len(rows) <= -(-sum(ALPACA) // limit) * 1.03 + 1, "best fit leaves a few hundredths"
    assert padding(ALPACA, capacity, 0) < 0.05
    assert [row[0] for row in rows] == sorted(row[0] for row in rows), "in the order of their first"


def test_the_order_of_a_seed_and_an_epoch_decides_the_rows() -> None:
    capacity, some = Capacity(300, by_tokens=True, packed=True), examples([n % 60 + 2 for n in range(80)])

    def told(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return [batch.lengths for batch in batches(some, capacity, seed=seed, epoch=epoch)]

    assert told(0, 0) == told(0, 0) != told(0, 1) and told(0, 0) != told(1, 0)
    count = micro_batches([len(one.input_ids) for one in some], capacity, 0, 0)
    first = stream(some, capacity, 0)
    assert [next(first).lengths for _ in range(count)] == told(0, 0) and next(first).lengths == told(0, 1)[0]


def test_an_example_beyond_the_row_is_told() -> None:
    with pytest.raises(QtuneError, match="train.micro_tokens is 10, and the longest example"):
        Capacity(10, by_tokens=True, packed=True).check(examples())


# ---- in a run and in its plan


def test_the_recipe_counts_packed_rows_in_tokens() -> None:
    tree = {"model": "x", "train": {"packing": True, "micro_batch": 3}, "data": {"max_length": 100}}
    keys = Recipe.load(tree, training=False).train
    assert (keys.micro_tokens, keys.micro_batch) == (300, None)
    again = Recipe.load(tree, training=False).with_({"train.micro_batch": 5}).train
    assert again.micro_tokens == 500
    assert Capacity.of(keys) == Capacity(300, True, True)


def test_a_packed_run_learns_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"train__packing": True, "train__micro_tokens": 64, "train__steps": 20}
    recipe = runs_helper.recipe(tmp_path, **changes, train__eval_at_start=True, train__dry_step=True)
    result = train(recipe, screen=Screen())
    out = capsys.readouterr().out
    for words in ("packing  rows of 64 tokens", "each example of a row by itself", "dry step  1 x 64"):
        assert words in out
    assert result.before is not None and result.after is not None and result.after.loss < result.before.loss
    padded = train(recipe.with_({"train.packing": False, "output": str(tmp_path / "padded")}, training=True))
    assert padded.before is not None
    assert padded.before.loss == pytest.approx(result.before.loss, rel=1e-5), "the same examples, padded"


def test_the_largest_row_is_the_planned_one() -> None:
    some = examples(ALPACA[:40])
    (batch,) = largest(some, Capacity(1000, True, True))
    (shape,) = lengths_of(some).worst(Capacity(1000, True, True), 1000)
    assert batch.input_ids.shape == (1, 1000) and batch.lengths == shape.lengths and sum(shape.lengths) == 1000
    assert shape.longest == max(ALPACA[:40])
    most = max(sum(map(len, (e.trained for e in some))), 0)
    assert batch.trained == shape.trained <= most
    assert lengths_of(examples()).worst(Capacity(1000, True, True), 1000)[0].length == sum(LENGTHS), "all there is"


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_trace_of_a_packed_step_is_that_of_the_real_one(checkpointing: bool, tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    real, planned = (load(tmp_path, scheme_from("nf4")) for _ in range(2))
    for model in (real, planned):
        adapt(model, AdapterSpec("lora"))
    batch = collate(examples(), packed=True)
    keys, device = TrainKeys(checkpointing=checkpointing), find_device("cpu")
    want, _ = step_trace(real, keys, [batch], device)
    meta = MetaBatch.of(1, sum(LENGTHS), batch.trained, False, LENGTHS)
    got, _ = step_trace(planned.to("meta"), keys, [meta], device)
    assert got.peak() == want.peak()


def packed_plan(**changes: Any) -> Plan:
    keys = {"train.packing": True, "train.micro_tokens": 2048, "data.max_length": 512} | changes
    recipe = Recipe.load({"model": "smollm2-135m"}, keys, training=False)
    return plan_recipe(recipe, find_device("rtx3060"))


def test_a_packed_row_takes_what_as_many_padded_tokens_take() -> None:
    """And no more than one example of that length: no mask of the row squared is ever there."""
    packed, padded = packed_plan(), packed_plan(**{"train.packing": False})
    assert packed.shape.lengths == (512,) * 4 and padded.shape.rows == 4
    assert packed.allocated <= padded.allocated * 1.02
    short, longer = (packed_plan(**{"train.micro_tokens": n}).allocated for n in (1024, 4096))
    assert longer - packed.allocated < 2.2 * (packed.allocated - short)


@pytest.mark.slow
def test_a_search_keeps_rows_that_hold_the_longest_example() -> None:
    plan = packed_plan()
    found = smallest_change(request_of(plan.recipe, plan.device, int(plan.process * 0.9)), Screen(quiet=True))
    assert found is not None and found.plan.shape.longest <= found.plan.shape.length
