"""`qtune combine`: each way against PEFT or a formula in float64, what holds of the run that is written, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import runs_helper
import tiny
import torch
from peft.utils import merge_utils
from test_laws import SHIPPED, Case
from torch import Tensor

from qtune.adapter_export import export_peft
from qtune.adapters import METHODS, adapted_sites
from qtune.adapters.deltas import Factors, delta_of, dense, has_factors, inner, norm, stacked, to_rank
from qtune.cli import main
from qtune.combining import ways
from qtune.combining.combine import Asked, Combined, combine
from qtune.combining.search import minimum
from qtune.errors import QtuneError
from qtune.export import merge
from qtune.recipe import Recipe
from qtune.runs import combined_from, open_run
from qtune.screen import Screen
from qtune.trainer import train

QUIET = Screen(quiet=True)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("combine")


@pytest.fixture(scope="module")
def trained(root: Path) -> Make:
    """A run of a method, trained for a few steps; made once."""

    def make(name: str, method: str = "lora", seed: int = 0, **changes: Any) -> Path:
        out = root / name
        if not out.exists():
            data = str(runs_helper.write_task(root, seed=seed + 2))
            changes = {"train__steps": 3, "data__train": data, "output": str(out), **changes}
            changes |= {"calibrate__length": 32, "calibrate__samples": 4}
            train(runs_helper.recipe(root, adapter__method=method, **changes))
        return out

    return make


@pytest.fixture(scope="module")
def pair(trained: Make) -> tuple[Path, Path]:
    """Two LoRA runs on data of their own, of other ranks and scales and on other sites."""
    return (
        trained("one"),
        trained("two", seed=1, adapter__rank=2, adapter__alpha=3.0, adapter__targets=["q_proj", "o_proj", "down_proj"]),
    )  # fmt: skip


def make(runs: tuple[Path, ...], out: Path, how: str, **options: Any) -> Combined:
    return combine(runs, out, Asked(how, **options), screen=QUIET)


def weights_of(run: Path) -> dict[str, Tensor]:
    """Site -> merged weight less the base, by the model itself."""
    sites = adapted_sites(open_run(run, QUIET).model)
    return {name: site.merged()[0] - site.base.dequantize() for name, site in sites.items()}


def random(rank: int, seed: int, out: int = 40, inputs: int = 56) -> Factors:
    drawn = torch.Generator().manual_seed(seed)
    return Factors(*(torch.randn(*shape, generator=drawn) for shape in ((rank, inputs), (out, rank))))


# ---- the arithmetic


def test_factors_are_measured_without_their_product() -> None:
    a, b = random(4, 0), random(3, 1)
    A, B = dense(a).double(), dense(b).double()
    for left, right in ((a, b), (dense(a), b), (a, dense(b)), (dense(a), dense(b))):
        assert inner(left, right) == pytest.approx(float((A * B).sum()), rel=1e-5, abs=1e-3)
    assert norm(a) == pytest.approx(float(A.norm()), rel=1e-6)
    torch.testing.assert_close(dense(stacked([a, b])).double(), A + B, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", SHIPPED)
def test_every_method_has_a_delta(method: str, tmp_path: Path) -> None:
    """With values as after training: W' - W; a changed bias is refused, and what no weight does."""
    case = Case(method, "nf4", tmp_path)
    case.scheme = "int4" if case.refused() else "nf4"
    for name, site in adapted_sites(case.model(stirred=True)).items():
        if not site.adapter.mergeable:
            with pytest.raises(QtuneError, match="no weight does the same"):
                delta_of(site, name)
            continue
        weight, bias = site.merged()
        if bias is not None and not torch.equal(bias, site.base.bias.float()):
            with pytest.raises(QtuneError, match="changes the layer's bias"):
                delta_of(site, name)
            assert method in ("ia3", "hyperadapt") and name == "up_proj"
            continue
        delta, wanted = delta_of(site, name), weight - site.base.dequantize()
        assert isinstance(delta, Factors) == has_factors(METHODS[method])
        assert float(wanted.norm()) > 0
        torch.testing.assert_close(dense(delta), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_a_cut_is_the_best_there_is_and_says_what_it_loses(whole: bool) -> None:
    delta = stacked([random(4, 0), random(6, 1)])
    values = torch.linalg.svdvals(dense(delta).double())
    cut, lost = to_rank(dense(delta) if whole else delta, 3, "site")
    assert lost == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-3)
    left = (dense(cut) - dense(delta)).double().norm() / values.norm()
    assert float(left) == pytest.approx(lost, rel=1e-3)


def test_ties_and_dare_are_pefts() -> None:
    deltas, weights = [dense(random(8, seed)) for seed in range(3)], [0.7, -0.3, 1.2]
    theirs = merge_utils.ties([d.clone() for d in deltas], torch.tensor(weights), 0.2)
    torch.testing.assert_close(ways.ties([d.clone() for d in deltas], weights, 0.2), theirs)
    for elect, name in ((False, "dare_linear"), (True, "dare_ties")):
        torch.manual_seed(5)
        theirs = getattr(merge_utils, name)([d.clone() for d in deltas], torch.tensor(weights), 0.3)
        drawn = torch.Generator().manual_seed(5)
        ours = ways.dare([d.clone() for d in deltas], weights, 0.3, drawn, elect=elect)
        torch.testing.assert_close(ours, theirs)


def test_dare_keeps_the_mean() -> None:
    delta = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    kept = ways.drop(delta.clone(), 0.25, torch.Generator().manual_seed(1))
    share = float((kept != 0).float().mean())
    assert share == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(kept[kept != 0], delta[kept != 0] * 4)


def moments(seed: int, tokens: int = 200, size: int = 56) -> Tensor:
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / tokens


@pytest.mark.parametrize("factors", [True, False])
def test_regmean_solves_the_least_squares_problem(factors: bool) -> None:
    parts = [random(3, seed) for seed in range(2)]
    parts = [Factors(p.A.double(), p.B.double()) for p in parts]
    weights, grams = [0.6, 1.5], [moments(10), moments(11)]
    grams[0][7] = grams[0][:, 7] = grams[1][7] = grams[1][:, 7] = 0  # an input that is always zero
    found = ways.regmean(parts if factors else [dense(p) for p in parts], grams, weights, "site")
    assert isinstance(found, Factors) == factors
    # the same as rows of an ordinary least squares problem: sqrt(w_i) L_i^T D^T = sqrt(w_i) L_i^T D_i^T
    rows, wanted = [], []
    for part, gram, weight in zip(parts, grams, weights, strict=True):
        values, vectors = torch.linalg.eigh(gram)
        half = (weight * values.clamp(min=0)).sqrt()[:, None] * vectors.T
        rows.append(half)
        wanted.append(half @ dense(part).T)
    solved = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd", rcond=1e-6).solution.T
    torch.testing.assert_close(dense(found), solved, rtol=1e-8, atol=1e-8)


def test_regmean_of_one_text_is_the_mean() -> None:
    deltas, gram = [dense(random(3, seed)) for seed in range(2)], moments(0).float()
    found = ways.regmean([d.clone() for d in deltas], [gram, gram.clone()], [1.0, 1.0], "site")
    torch.testing.assert_close(found, (deltas[0] + deltas[1]) / 2, rtol=1e-3, atol=1e-3)


def test_the_search_finds_a_minimum_and_is_seeded() -> None:
    def bowl(w: Any) -> float:
        return (w[0] - 0.9) ** 2 + 3 * (w[1] + 0.4) ** 2

    best, value = minimum(bowl, [0.5, 0.5], 200, 0)
    assert best == pytest.approx([0.9, -0.4], abs=0.05) and value < 1e-3
    assert minimum(bowl, [0.5, 0.5], 200, 0) == (best, value)
    assert minimum(bowl, [0.5, 0.5], 1, 3) == ([0.5, 0.5], bowl([0.5, 0.5]))


# ---- runs


def test_concat_is_the_weighted_sum_and_a_run_like_any(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = make(pair, tmp_path / "out", "concat", weights=(0.7, -0.4))
    one, two = (weights_of(run) for run in pair)
    found = weights_of(made.out)
    assert list(found) == list(one) and set(two) < set(one) and made.rank == 6 and made.lost == 0
    for name, delta in found.items():
        wanted = 0.7 * one[name] - 0.4 * two.get(name, torch.zeros(()))
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-6)
    run = open_run(made.out, QUIET)
    assert run.recipe.adapter.method == "lora" and run.recipe.adapter.options["rank"] == 6
    assert [Path(s.file).name for s in run.recipe.data.train] == ["task2.jsonl", "task3.jsonl"]  # type: ignore[union-attr]
    report = merge(run, tmp_path / "merged", screen=QUIET)
    assert report.verification.passed
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "combined with qtune" in card and "- 0.7 x one (lora, data task2.jsonl)" in card
    assert "trained with qtune" not in card
    assert main(["eval", str(made.out)]) == 0
    assert len(combined_from(made.out)) == 2 and not combined_from(pair[0])


def test_real_peft_computes_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """PEFT's own concatenation of both exports, and our export of ours, over one dense base."""
    made = make(pair, tmp_path / "out", "concat", weights=(0.5, 0.25))
    for name, run in (("a", pair[0]), ("b", pair[1]), ("c", made.out)):
        export_peft(open_run(run, QUIET), tmp_path / name, QUIET, "trained")
    base = tiny.model("llama")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    for name in "bc":
        model.load_adapter(tmp_path / name, name)
    ours = {}
    for name in "abc":
        model.set_adapter(name)
        ours[name] = tiny.logits(model)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 14
    for layer in layers:
        wanted = sum(w * layer.get_delta_weight(n) for n, w in (("a", 0.5), ("b", 0.25)) if n in layer.lora_A)
        torch.testing.assert_close(layer.get_delta_weight("c"), wanted, rtol=1e-4, atol=1e-6)
    assert not torch.equal(ours["a"], ours["c"])


@pytest.mark.parametrize("how", ["svd", "ties", "dare-ties"])
def test_ways_with_a_rank_are_pefts(how: str, trained: Make, tmp_path: Path) -> None:
    """PEFT's add_weighted_adapter on the same adapters: the same cut of the same dense delta."""
    runs = trained("one"), trained("three", seed=1, adapter__rank=2)
    density = {} if how == "svd" else {"density": 1.0 if how == "dare-ties" else 0.4}  # 1: nothing is drawn
    made = make(runs, tmp_path / "out", how, weights=(0.7, 0.3), rank=3, **density)
    for name, run in zip("ab", runs, strict=True):
        export_peft(open_run(run, QUIET), tmp_path / name, QUIET, "trained")
    model = peft.PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    theirs = {"svd": "svd", "ties": "ties_svd", "dare-ties": "dare_ties_svd"}[how]
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type=theirs, svd_rank=3, **density)
    found = weights_of(made.out)
    for name, delta in found.items():
        layer = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(delta, layer.get_delta_weight("c"), rtol=2e-3, atol=2e-4)


def test_dare_depends_on_the_seed_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, again, other = (
        weights_of(make(pair, tmp_path / name, "dare", seed=seed, rank=8).out)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", ["dora", "hira", "lora_xs"])
def test_any_method_goes_in(method: str, trained: Make, tmp_path: Path) -> None:
    runs = trained("one"), trained(method, method, seed=1)
    most = 32  # of the smallest side
    made = make(runs, tmp_path / "out", "svd", weights=(1.0, 0.5), rank=most)
    one, two = (weights_of(run) for run in runs)
    record = json.loads((made.out / "combined.json").read_text())
    for name, delta in weights_of(made.out).items():
        wanted = one[name] + 0.5 * two[name]
        lost = float((delta - wanted).norm() / wanted.norm())
        assert lost == pytest.approx(record["sites"][name]["lost"], abs=1e-5)
        values = torch.linalg.svdvals(wanted)
        assert lost <= 1.02 * float(values[most:].norm() / values.norm()) + 1e-5


@pytest.mark.parametrize(("method", "kept"), [("loftq", False), ("pissa", True)])
def test_a_start_that_is_shared_stays_whole(method: str, kept: bool, trained: Make, tmp_path: Path) -> None:
    """What was learned is averaged, the start is in it once; on the original weights only what was learned counts."""
    start = {"adapter__iterations": 1} if method == "loftq" else {}
    runs = trained(f"{method}1", method, **start), trained(f"{method}2", method, seed=1, **start)
    made = make(runs, tmp_path / "out", "concat", weights=(1.0, 1.0))
    assert (made.out / "base.safetensors").exists() == kept
    one, two = (weights_of(run) for run in runs)
    model = open_run(runs[0], QUIET)
    from qtune.adapters.files import load_first

    load_first(model.model, model.folder, model.adapter)
    first = {n: dense(delta_of(site, n)) for n, site in adapted_sites(model.model).items()}
    for name, delta in weights_of(made.out).items():
        torch.testing.assert_close(delta, one[name] + two[name] - first[name], rtol=1e-3, atol=1e-5)
    report = merge(open_run(made.out, QUIET), tmp_path / "merged", keep_base="original", screen=QUIET)
    assert report.verification.passed


@pytest.mark.parametrize("how", ["regmean", "lorahub"])
def test_ways_with_data(how: str, pair: tuple[Path, Path], root: Path, tmp_path: Path) -> None:
    calibrate = {"data": str(root / "task2.jsonl"), "trials": 4, "seed": 1} if how == "lorahub" else {}
    made = make(pair, tmp_path / "out", how, **calibrate)
    one, two = (weights_of(run) for run in pair)
    found = weights_of(made.out)
    if how == "lorahub":
        assert made.about["trials"] == 4
        mixed = [
            w * d.get(n, torch.zeros(1)) for n in one for w, d in zip(made.about["weights"], (one, two), strict=True)
        ]
        wanted = {n: mixed[2 * i] + mixed[2 * i + 1] for i, n in enumerate(one)}
        for name in found:
            torch.testing.assert_close(found[name], wanted[name].expand_as(found[name]), rtol=1e-3, atol=1e-5)
        return
    assert made.rank == 6
    far = {n: float((found[n] - (one[n] + two[n]) / 2).norm() / found[n].norm()) for n in two}
    assert all(0 < share < 1 for share in far.values()), far  # weighed by inputs, and no other thing than a mean


def test_regmean_takes_moments_of_the_adapted_model(pair: tuple[Path, Path]) -> None:
    """Against hooks in the whole model."""
    from qtune.combining.gather import check_together, given, open_deltas
    from qtune.combining.moments import moments as by_layer
    from qtune.combining.moments import windows_of_run

    runs = [given(folder, QUIET) for folder in pair]
    check_together(runs)
    deltas = open_deltas(runs, QUIET, real=True)
    windows = [windows_of_run(run, QUIET) for run in runs]
    found = {name: grams for layer in by_layer(deltas, windows) for name, grams in layer.items()}
    assert not adapted_sites(deltas.model)
    for number, folder in enumerate(pair):
        model, sums = open_run(folder, QUIET).model, dict.fromkeys(found, torch.zeros(()))

        def see(name: str, sums: dict[str, Tensor], _: Any, inputs: Any) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums[name] + x.T @ x

        for name in found:
            model.get_submodule(name).register_forward_pre_hook(partial(see, name, sums))
        with torch.no_grad():
            for window in windows[number]:
                model(input_ids=window[None], use_cache=False)
        for name, grams in found.items():
            wanted = ways.shrunk(sums[name] / windows[number].numel())
            torch.testing.assert_close(grams[number], wanted, rtol=1e-4, atol=1e-5)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"how": "sum"}, "unknown --how 'sum'; legal: concat"),
        ({"how": "concat", "weights": (1.0,)}, "--weights has 1 numbers for 2 runs"),
        ({"how": "concat", "weights": (1.0, float("nan"))}, "finite"),
        ({"how": "concat", "rank": 3}, "--rank has no effect with --how concat; legal with svd"),
        ({"how": "svd", "rank": 0}, "--rank is 0; legal: 1 or more"),
        ({"how": "svd", "rank": 33}, "--rank 33 is beyond model.layers.0.self_attn.k_proj, 32 x 64; legal: 1 to 32"),
        ({"how": "ties", "density": 1.5}, "--density is 1.5; legal: above 0, at most 1"),
        ({"how": "svd", "density": 0.5, "seed": 1}, "--density has no effect with --how svd; legal with ties"),
        ({"how": "lorahub"}, "give --data FILE"),
        ({"how": "regmean", "weights": (0.5, -0.5)}, "legal: above 0"),
    ],
)
def test_options_are_refused(options: dict[str, Any], told: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(QtuneError) as caught:
        make(pair, tmp_path / "out", **options)
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_that_do_not_go_together(trained: Make, root: Path, tmp_path: Path) -> None:
    one, out = trained("one"), tmp_path / "out"

    def told(*runs: Path, how: str = "concat", to: Path = out) -> str:
        with pytest.raises(QtuneError) as caught:
            make(runs, to, how)
        assert not out.exists()
        return f"{caught.value.code} {caught.value}"

    other = root / "other"
    if not other.exists():
        runs_helper.write_model(other, initializer_range=0.2)
    assert "was trained on other weights than" in told(one, trained("moved", model=str(other)))
    assert "Q419" in told(one, trained("int8", scheme={"name": "int8"}))
    assert "was trained on int8" in told(one, trained("int8"))
    assert "started from other values" in told(one, trained("loftq1", "loftq", adapter__iterations=1))
    assert "give two runs or more, each once" in told(one, one)
    assert "give two runs or more" in told(one)
    assert "is one of the runs" in told(one, trained("three", seed=1, adapter__rank=2), to=one)
    assert "holds something already" in told(one, trained("three"), to=root)
    assert "give a rank: --how svd --rank R" in told(one, trained("dora", "dora", seed=1))
    assert "Q401" in told(one, root)
    new = {"tokens__add": ["<a>"]}
    both = trained("new1", **new), trained("new2", seed=1, **new)
    assert "have rows of tokens of their own" in told(*both)


def test_tokens_of_one_run_go_along(trained: Make, tmp_path: Path) -> None:
    new = trained("new1", tokens__add=["<a>"])
    made = make((trained("one"), new), tmp_path / "out", "concat")
    ours, theirs = (open_run(run, QUIET) for run in (made.out, new))
    assert ours.recipe.tokens == theirs.recipe.tokens
    rows, wanted = (r.model.get_input_embeddings().rows for r in (ours, theirs))
    assert torch.equal(rows, wanted)


def test_the_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["combine", *map(str, pair), "--how", "svd", "--weights", "0.7,0.3", "--rank", "2", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    value = json.loads(told.out)
    assert value["rank"] == 2 and value["weights"] == [0.7, 0.3] and 0 < value["kinds"]["all"]["lost"] < 1
    assert "0.7 x" in told.err and "lost" in told.err and f"wrote {out}" in told.err
    assert main(words) == 1 and "holds something already" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "b"), "--weights", "a"]) == 1
    assert "legal are numbers with commas" in capsys.readouterr().err
    assert main(["report", str(out)]) == 1 and "combined from" in capsys.readouterr().err
    assert Recipe.load(out / "recipe.yaml", training=False).adapter.options["rank"] == 2
