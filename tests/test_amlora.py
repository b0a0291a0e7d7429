"""AM-LoRA: attention over the LoRAs of tasks that were learned one after another, against its equations in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs_helper
import torch
from safetensors.torch import load_file
from test_laws import IN, Case, in_float64, stir
from torch import Tensor

from qtune.adapters import METHODS, adapted_sites
from qtune.adapters.amlora import AttentionalLoRA
from qtune.adapters.files import TENSORS
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.runs import open_run
from qtune.screen import Screen
from qtune.trainer import train

AMLORA, QUIET = METHODS["amlora"], Screen(quiet=True)


def chain(tmp: Path, tasks: int, **options: Any) -> Any:
    """A model in float64 behind some tasks, each of which left random values."""
    model = Case("amlora", "dense", tmp).model(stirred=True, **options)
    for _ in range(tasks - 1):
        AMLORA.taken_over(adapters(model))
        stir(model)
    return in_float64(model)


def adapters(model: Any) -> dict[str, Any]:
    return {name: site.adapter for name, site in adapted_sites(model).items()}


def attention(one: AttentionalLoRA, x: Tensor) -> tuple[Tensor, Tensor]:
    """g [tokens, 1 + tasks] and h [1 + tasks, tokens, out], task by task."""
    rank, s = len(one.A), one.scale
    A = torch.cat((one.carried_A, one.A)).split(rank)
    B = torch.cat((one.carried_B, one.B), 1).split(rank, 1)
    h = [x.new_zeros(len(x), len(one.B)), *(s * (x @ a.T) @ b.T for a, b in zip(A, B, strict=True))]
    w = [one.w.new_zeros(len(one.B)), *one.w]
    scores = torch.stack([torch.tanh(hk @ wk + ck) for hk, wk, ck in zip(h, w, one.c, strict=True)], 1)
    return scores.softmax(1), torch.stack(h)


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_forward_pass_is_the_equation(tasks: int, tmp_path: Path) -> None:
    model = chain(tmp_path, tasks)
    site = adapted_sites(model)["up_proj"]
    x = torch.randn(2, 7, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g, h = attention(site.adapter, x.flatten(0, 1))
    wanted = site.base(x) + torch.einsum("nk,kno->no", g, h).unflatten(0, (2, 7))
    torch.testing.assert_close(site(x), wanted)
    assert g.shape == (14, tasks + 1) and float(g.detach().std()) > 0.01, "attention is even, and tells nothing"


def test_the_next_task_begins_beside_the_last_ones(tmp_path: Path) -> None:
    model = chain(tmp_path, 2)
    before = {n: {k: v.clone() for k, v in one.state_dict().items()} for n, one in adapters(model).items()}
    AMLORA.taken_over(adapters(model))
    for name, one in adapters(model).items():
        old = before[name]
        assert torch.equal(one.carried_A, torch.cat((old["carried_A"], old["A"])))
        assert torch.equal(one.carried_B, torch.cat((old["carried_B"], old["B"]), 1))
        assert torch.equal(one.w[:-1], old["w"]) and torch.equal(one.c[:-1], old["c"])
        assert not one.w[-1].any() and not one.c[-1].any() and not one.B.any()
        assert not torch.equal(one.A, old["A"]) and one.A.any()
    model(torch.randn(3, IN, dtype=torch.float64)).square().sum().backward()
    names = {name for name, p in adapters(model)["up_proj"].named_parameters() if p.grad is not None}
    assert names == {"A", "B", "w", "c"}, "earlier tasks are frozen"


def test_what_makes_attention_sparse_teaches_attention_alone(tmp_path: Path) -> None:
    """The gradient is that of the loss and of the term, worked out by autograd."""
    x = torch.randn(9, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = {}
    for sparse in (0.0, 0.25):
        site = adapted_sites(chain(tmp_path / str(sparse), 2, sparse=sparse))["up_proj"]
        one, own = site.adapter, x.clone().requires_grad_()
        site(own).square().mean().backward()
        grads[sparse] = {"x": own.grad, **{name: p.grad for name, p in one.named_parameters()}}
    term = 0.25 * attention(one, x)[0][:, 1:].sum(1).mean()
    added = dict(zip("wc", torch.autograd.grad(term, (one.w, one.c)), strict=True))
    for name, plain in grads[0.0].items():
        wanted = plain + added.get(name, 0)
        torch.testing.assert_close(grads[0.25][name], wanted)
        assert (name in added) != torch.equal(grads[0.25][name], plain)
    site.eval()
    one.zero_grad()
    site(x).square().mean().backward()
    torch.testing.assert_close(one.w.grad, grads[0.0]["w"])


def test_a_chain_that_is_full_is_refused(tmp_path: Path) -> None:
    model = Case("amlora", "nf4", tmp_path).model(stirred=True, carry=4)  # of rank 4
    AMLORA.taken_over(adapters(model))
    with pytest.raises(QtuneError, match="carry does not hold one more task without loss at up_proj") as caught:
        AMLORA.taken_over(adapters(model))
    assert caught.value.code == "Q416" and len(adapters(model)["up_proj"].w) == 2
    assert AMLORA.check({"carry": 3, "rank": 4, "sparse": -1.0, "dropout": 1.0, "alpha": 0.0, "seed": 0}) == [
        "adapter.carry must be at least adapter.rank, 4, not 3",
        "adapter.dropout must be at least 0 and below 1, not 1.0", "adapter.alpha must be above 0, not 0.0",
        "adapter.sparse must be at least 0, not -1.0",
    ]  # fmt: skip


def test_a_chain_of_runs_is_used_and_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys: dict[str, Any] = {"adapter": "amlora", "adapter__rank": 4, "train__steps": 3}
    first = train(runs_helper.recipe(tmp_path, **keys))
    second = train(runs_helper.recipe(tmp_path, **keys, output=str(tmp_path / "two")), start_from=first.folder)
    held, began = load_file(second.folder / TENSORS), load_file(first.folder / TENSORS)
    for name, value in began.items():
        if name.endswith(".A"):
            assert torch.equal(held[name.removesuffix("A") + "carried_A"], value)
            assert held[name.removesuffix("A") + "w"].shape[0] == 2
    run = open_run(second.folder, QUIET)
    assert all(len(site.adapter.carried_A) == 4 for site in adapted_sites(run.model).values())
    one, two = str(first.folder), str(second.folder)
    assert main(["eval", two]) == 0
    assert main(["train", str(second.folder / "recipe.yaml"), "--overwrite", "--from", one]) == 0
    assert f"next:  qtune eval {two}   qtune chat {two}" in capsys.readouterr().out
    for words in (["merge", two], ["combine", one, two, "--how", "svd", "--out", str(tmp_path / "both")],
                  ["export", two, "--as", "lora", "--out", str(tmp_path / "lora")], ["inspect", two]):  # fmt: skip
        capsys.readouterr()
        assert main(words) == 1, words
        assert "no weight does the same" in capsys.readouterr().err, words
