"""What ops of a step compute and move, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qtune.planner.cost import Costs
from qtune.planner.devices import find_device
from qtune.planner.hf import plan_stack
from qtune.planner.plan import Plan, plan_recipe
from qtune.planner.roofline import _copies
from qtune.recipe import Recipe

B, H, T, D = 2, 32, 128, 64
GPU = find_device("rtx4090")


def attention(op: str, key_heads: int, bias: torch.Tensor | None = None) -> list[int]:
    """[flops, bytes, launches] of one call of torch's attention or its backward; H x 1 key heads hold T keys."""
    q, out = (torch.empty(B, H, T, D, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(B, key_heads, T, D, dtype=torch.bfloat16, device="meta") for _ in range(2))
    args = (q, k, v, bias) if not op.endswith("backward") else (out, q, k, v, bias)
    costs = Costs()
    costs.add(0, f"{op}.default", args, (out,))
    return costs.rows[0, "attention", "bfloat16"]


@pytest.mark.parametrize("key_heads", [H, 8, 1])
@pytest.mark.parametrize("kind", ["flash_attention", "efficient_attention", "flash_attention_for_cpu"])
def test_every_query_head_sees_half_of_the_keys(kind: str, key_heads: int) -> None:
    """Two products forward, five backward, 2 FLOP a multiply-add, half of them unseen; few key heads change nothing."""
    product = B * H * T * T * D
    assert attention(f"aten::_scaled_dot_product_{kind}", key_heads)[0] == 2 * product
    assert attention(f"aten::_scaled_dot_product_{kind}_backward", key_heads)[0] == 5 * product


def test_positions_of_qtune_s_attention_come_before_its_heads() -> None:
    q, k = (torch.empty(B, T, heads, D, dtype=torch.bfloat16, device="meta") for heads in (2 * T, T // 2))
    costs = Costs()
    costs.add(0, "qtune::attention", (q, k, k, None, True, 1.0), (q,))
    costs.add(1, "qtune::attention_backward", (q, q, k, k, q, q, None, True, 1.0), (q, k, k))
    assert [costs.rows[i, "attention", "bfloat16"][0] for i in (0, 1)] == [2 * q.numel() * T, 5 * q.numel() * T]


def test_what_is_expanded_is_read_once() -> None:
    """The bias of a padded batch is one matrix for all heads."""
    bias = torch.empty(B, 1, T, T, dtype=torch.bfloat16, device="meta").expand(B, H, T, T)
    op = "aten::_scaled_dot_product_efficient_attention"
    assert attention(op, H, bias)[1] - attention(op, H)[1] == B * T * T * 2


def test_the_break_even_of_streamed_weights_is_of_a_micro_batch() -> None:
    """The same for any micro-batch, and for any number of them; there, copies take as long as what hides them."""

    def told(length: int, accumulate: int, *changes: str) -> str:
        keys = ["memory.weights=host", "train.micro_batch=1", f"train.accumulate={accumulate}", *changes]
        recipe = Recipe.load({"model": "smollm2-135m", "data": {"max_length": length}}, keys, training=False)
        speed = plan_recipe(recipe, find_device("rtx3060")).speed
        assert not isinstance(speed, str)
        return next(line for line in speed.assumptions if line.startswith("copies between"))

    def tokens(line: str) -> int:
        return int(line.partition("of about ")[2].partition(" tokens")[0].replace(",", ""))

    found = [tokens(told(*sizes)) for sizes in ((512, 1), (512, 4), (2048, 1), (2048, 8))]
    assert max(found) < 1.6 * min(found), "launches and attention do not go with the tokens"
    gpu = find_device("rtx3060")
    (alone,), (beside,) = _copies(gpu, 4.0, 4.0, 64.0, 512), _copies(gpu, 36.0, 4.0, 64.0, 512)
    assert (tokens(alone), tokens(beside)) == (32, 64), "others compete for the bus"
    assert _copies(gpu, 70.0, 4.0, 64.0, 512)[0].endswith("they take longer for any micro-batch")
    only = told(512, 1, "memory.weights=device", "memory.boundaries=host")
    assert only.endswith("which hides them")


@pytest.mark.parametrize("make", [plan_recipe, pytest.param(plan_stack, marks=pytest.mark.slow)])
def test_micro_batches_multiply_the_time_and_the_tokens(make: Callable[..., Plan]) -> None:
    """However many of them were traced."""
    one, four = (
        make(Recipe.load({"model": "smollm2-135m"}, [f"train.accumulate={n}"], training=False), GPU).speed.seconds
        for n in (1, 4)
    )
    assert 3.2 * one < four < 4 * one  # one update for all
