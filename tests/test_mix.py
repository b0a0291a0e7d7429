"""`qtune mix`: the choice against every possible one, the errors against float64, and a recipe that plans and loads."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import torch

from qtune.cli import main
from qtune.errors import QtuneError
from qtune.mixing import mix, squared_error
from qtune.model import load
from qtune.planner.devices import find_device
from qtune.planner.plan import plan_recipe
from qtune.quant import Mixed, scheme_from
from qtune.quant.budget import least_error
from qtune.quant.linear import QuantLinear
from qtune.recipe import Recipe
from qtune.screen import Screen

AMONG = [scheme_from(name) for name in ("nf2", "nf4", "int8")]
QUIET = Screen(quiet=True)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    layers = [
        [(draw.randrange(1, 12), float(draw.randrange(20))) for _ in range(draw.randrange(1, 5))]
        for _ in range(draw.randrange(1, 7))
    ]
    least = sum(min(nbytes for nbytes, _ in layer) for layer in layers)
    room = least + draw.randrange(20)
    best = min(
        sum(error for _, error in ways) for ways in itertools.product(*layers) if sum(n for n, _ in ways) <= room
    )
    taken = [layer[place] for layer, place in zip(layers, least_error(layers, room), strict=True)]
    assert sum(nbytes for nbytes, _ in taken) <= room and sum(error for _, error in taken) == best
    with pytest.raises(ValueError, match=f"{least} bytes are the least"):
        least_error(layers, least - 1)


def test_a_model_of_many_layers_is_chosen_for_at_once() -> None:
    """The shapes of Llama 2 7B: 224 layers, four schemes."""
    draw = random.Random(0)
    sizes = [4096 * 4096] * 4 + [4096 * 11008] * 3
    layers = [
        [(size * bits // 32, draw.uniform(0.5, 2) * size / 4**bits) for bits in (9, 13, 17, 33)] for size in sizes * 32
    ]
    weights = sum(sizes) * 32
    room = int(weights * 2.75 / 8)
    taken = [layer[place] for layer, place in zip(layers, least_error(layers, room), strict=True)]
    used = sum(nbytes for nbytes, _ in taken)
    assert used <= room and room - used < max(sizes)


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_those_of_the_weights_or_of_the_outputs(weighted: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=draw), torch.randn(200, 64, generator=draw) * torch.linspace(0.1, 3, 64)
    layer = QuantLinear(64, 48, AMONG[0], bias=False, dtype=torch.float32)
    layer.set_weight(weight)
    left = weight.double() - layer.dequantize(torch.float32).double()
    want = (x.double() @ left.T).square().sum() / len(x) if weighted else left.square().sum()
    gram = x.T @ x / len(x) if weighted else None
    assert squared_error(AMONG[0], weight, gram) == pytest.approx(float(want), rel=1e-4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mix")
    runs_helper.recipe(root)
    return root


@pytest.mark.parametrize("text", [False, True])
def test_the_mixture_errs_less_than_a_pattern_of_its_bytes(root: Path, text: bool) -> None:
    changes = {"calibrate__length": 32, "calibrate__samples": 8} | (
        {"calibrate__data": str(root / "task0.jsonl")} if text else {}
    )
    found = mix(runs_helper.recipe(root, **changes), 5.5, AMONG, QUIET)
    assert found.bits <= 5.5 and sum(found.layers.values()) == 14 and len(found.layers) > 1
    errors = [error for _, error in found.alone.values()]
    assert errors == sorted(errors, reverse=True) and errors[-1] < found.error < errors[0]
    model = load(str(root / "model"), found.scheme)
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert sum(layer.packed.numel() for layer in packed) == found.nbytes


def test_too_few_bits_are_refused(root: Path) -> None:
    with pytest.raises(QtuneError, match=r"1 bits a weight are too few for .*; legal: \d\.\d+ or more"):
        mix(runs_helper.recipe(root), 1.0, AMONG, QUIET)


def test_the_command_writes_a_recipe_that_plans(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(runs_helper.recipe(root, data__max_length=48).to_yaml())
    out = tmp_path / "mixed.yaml"
    argv = ["mix", str(tmp_path / "recipe.yaml"), "--bits", "5.5", "--among", "nf2,nf4,int8", "--out", str(out)]
    assert main(argv) == 0
    assert "bits a weight" in capsys.readouterr().out
    recipe: Any = Recipe.load(out)
    assert isinstance(recipe.scheme, Mixed)
    assert plan_recipe(recipe, find_device("cpu")).process > 0
    assert main(argv) == 1 and "is there already" in capsys.readouterr().err
    argv[-1] = str(tmp_path / "other.yaml")
    assert main([*argv[:5], "nf4", *argv[6:]]) == 1 and "two schemes or more" in capsys.readouterr().err
