"""`qtune combine --how fisher`: the diagonal Fisher information and the average that it weighs, against plain
transformers and autograd in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import runs_helper
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtune.adapters import adapted_sites
from qtune.adapters.carried import generator
from qtune.adapters.deltas import Factors, dense
from qtune.combining import fisher, ways
from qtune.combining.combine import Asked, combine
from qtune.combining.gather import given, open_deltas
from qtune.data import Example
from qtune.errors import QtuneError
from qtune.quant import QuantLinear
from qtune.runs import open_run
from qtune.screen import Screen
from qtune.trainer import train

QUIET = Screen(quiet=True)
Diagonals = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRA runs on data and sites of their own; dropout would show."""
    root = tmp_path_factory.mktemp("fisher")
    for seed, targets in enumerate((["q_proj", "down_proj"], ["q_proj", "up_proj"])):
        data = str(runs_helper.write_task(root, seed=seed + 2))
        train(runs_helper.recipe(
            root, data__train=data, train__steps=3, output=str(root / f"run{seed}"), calibrate__samples=5,
            adapter__targets=targets, adapter__dropout=0.5,
        ))  # fmt: skip
    return root / "run0", root / "run1"


def exact(folder: Path, sites: Mapping[str, object], examples: list[Example], number: int) -> Diagonals:
    """Site -> the whole diagonal, of a dense model in float64 that transformers computes and autograd differentiates;
    its answers are drawn by the same random numbers."""
    run = open_run(folder, QUIET)
    model = AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=torch.float64).requires_grad_(False)
    adapted = adapted_sites(run.model)
    for name, module in run.model.named_modules():
        if isinstance(module, QuantLinear):
            site = name.removesuffix(".base")
            weight = adapted[site].merged()[0] if site in adapted else module.dequantize()
            model.get_submodule(site).weight.copy_(weight)  # type: ignore[operator]
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in sites}  # type: ignore[operator]
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    draw = generator("fisher", 7, str(number))
    for example in examples:
        logits = model(input_ids=torch.tensor([list(example.input_ids)])).logits[0]
        at = [place - 1 for place, one in enumerate(example.trained) if one and place]
        chances = logits[at].softmax(-1)
        limits = torch.rand(len(at), 1, generator=draw, dtype=torch.float64)
        drawn = (chances.cumsum(-1) <= limits).sum(-1)
        likelihood = chances.log()[range(len(at)), drawn].sum()
        for name, grad in zip(weights, torch.autograd.grad(likelihood, list(weights.values())), strict=True):
            found[name] += grad.detach() ** 2
    return {name: total / len(examples) for name, total in found.items()}


def rank_one(exacts: Diagonals) -> Diagonals:
    """By its sums, divided by the norm over all sites."""
    found = {n: torch.outer(F.sum(1), F.sum(0)) / F.sum() for n, F in exacts.items()}
    size = sum(float(F.square().sum()) for F in found.values()) ** 0.5
    return {n: F / size for n, F in found.items()}


@pytest.fixture(scope="module")
def exacts(pair: tuple[Path, Path]) -> list[Diagonals]:
    runs = [given(folder, QUIET) for folder in pair]
    sites = open_deltas(runs, QUIET, real=True).bases
    examples = [fisher.examples_of_run(run, 7, QUIET) for run in runs]
    assert [len(some) for some in examples] == [5, 5]
    return [exact(folder, sites, some, i) for i, (folder, some) in enumerate(zip(pair, examples, strict=True))]


def test_sums_of_the_diagonal_are_exact(pair: tuple[Path, Path], exacts: list[Diagonals]) -> None:
    """And nothing of the model is changed."""
    runs = [given(folder, QUIET) for folder in pair]
    deltas = open_deltas(runs, QUIET, real=True)
    examples = [fisher.examples_of_run(run, 7, QUIET) for run in runs]
    found = fisher.information(deltas, examples, 7, QUIET)
    assert len(deltas.bases) == 6  # in two layers; each run has four of them
    for one, wanted in zip(found, map(rank_one, exacts), strict=True):
        assert one.keys() == wanted.keys() == deltas.bases.keys()
        for name, diagonal in one.items():
            full = torch.outer(diagonal.rows, diagonal.columns).double()
            torch.testing.assert_close(full, wanted[name], rtol=2e-3, atol=1e-6 * float(wanted[name].max()))
    model = deltas.model
    assert not adapted_sites(model) and not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_is_the_average_that_it_weighs(pair: tuple[Path, Path], exacts: list[Diagonals], tmp_path: Path) -> None:
    made = combine(pair, tmp_path / "out", Asked("fisher", weights=(1.0, 0.5), rank=32, seed=7), screen=QUIET)
    learned = []
    for folder in pair:
        sites = adapted_sites(open_run(folder, QUIET).model)
        learned.append({n: (site.merged()[0] - site.base.dequantize()).double() for n, site in sites.items()})
    weighed = [rank_one(one) for one in exacts]
    for name, site in adapted_sites(open_run(made.out, QUIET).model).items():
        found = (site.merged()[0] - site.base.dequantize()).double()
        F = weighed[0][name], 0.5 * weighed[1][name]
        nothing = torch.zeros_like(found)
        wanted = sum(f * d.get(name, nothing) for f, d in zip(F, learned, strict=True)) / (F[0] + F[1])
        values = torch.linalg.svdvals(wanted)
        assert float((found - wanted).norm() / values.norm()) < float(values[32:].norm() / values.norm()) * 1.05 + 0.01
    assert made.about["seed"] == 7 and made.rank == 32


def test_where_nothing_matters_the_mean_stands() -> None:
    drawn = torch.Generator().manual_seed(0)
    A, B, D = (torch.randn(*shape, generator=drawn, dtype=torch.float64) for shape in ((2, 5), (4, 2), (4, 5)))
    r, c = (
        torch.rand(2, 4, generator=drawn, dtype=torch.float64),
        torch.rand(2, 5, generator=drawn, dtype=torch.float64),
    )
    c[:, 3] = 0
    found = ways.fisher([Factors(A, B), None, D], [(r[0], c[0]), (r[1], c[1]), (r[1], c[0])], [2.0, 1.0, 0.5])
    F = torch.stack([2 * torch.outer(r[0], c[0]), torch.outer(r[1], c[1]), 0.5 * torch.outer(r[1], c[0])])
    wanted = (F[0] * (B @ A) + F[2] * D) / F.sum(0)
    wanted[:, 3] = ((2 * B @ A + 0.5 * D) / 3.5)[:, 3]
    torch.testing.assert_close(found, wanted)
    one = Factors(A, B)
    torch.testing.assert_close(ways.fisher([one], [(r[0], c[0])], [3.0])[:, :3], dense(one)[:, :3])


def test_answers_are_drawn_by_the_models_own_probabilities(pair: tuple[Path, Path]) -> None:
    language = fisher.LanguageModel(open_run(pair[0], QUIET).model)
    hidden = 3 * torch.randn(1, language.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    chances = language.head(hidden).softmax(-1)[0]
    drawn = fisher._drawn(language, hidden.expand(20000, -1), torch.Generator().manual_seed(1))
    share = torch.bincount(drawn, minlength=len(chances)) / 20000
    assert float((share - chances).abs().max()) < 4 * 0.5 / 20000**0.5
    assert float(chances.max()) > 2 / len(chances)


def test_what_cannot_be_weighed_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def told(**options: object) -> str:
        with pytest.raises(QtuneError) as caught:
            combine(pair, tmp_path / "out", Asked("fisher", **options), screen=QUIET)  # type: ignore[arg-type]
        return f"{caught.value.code} {caught.value}"

    assert "--weights of fisher weigh data; legal: above 0" in told(weights=(1.0, 0.0))
    recipe = pair[1] / "recipe.yaml"
    text = recipe.read_text()
    tree = yaml.safe_load(text)
    tree["data"]["train"] = None
    recipe.write_text(yaml.safe_dump(tree))
    try:
        assert "Q106" in told() and not (tmp_path / "out").exists()
    finally:
        recipe.write_text(text)
