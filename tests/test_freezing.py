"""What is trained for a while only: AFLoRA's matrices, by its paper's score and schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_adaptive import Training, to_ones
from test_laws import Case, inputs, saved
from test_peft import ATTENTION, adapted, base_of, ids
from torch import Tensor

from qtune.adapters import AdapterSpec, adapted_sites
from qtune.errors import QtuneError
from qtune.peft import to_peft

MATRICES = [(site, name) for site in ("up_proj", "down_proj") for name in ("A", "B")]


def aflora(tmp: Path, **options: Any) -> Training:
    chosen = {"rank": 4, "t_init": 4.0, "t_final": 6.0} | options
    return Training(Case("aflora", "nf4", tmp).model(**chosen), "aflora", 20, to_ones)


def frozen(run: Training) -> set[tuple[str, str]]:
    return {(site, name) for site, name in MATRICES if run.adapters[site].frozen(name)}


def test_matrices_of_least_score_are_frozen_as_the_schedule_says(tmp_path: Path) -> None:
    """Against the paper's equations, of every step's gradients in float64."""
    run = aflora(tmp_path, beta1=0.7, beta2=0.9)
    gradients: dict[tuple[str, str], list[Tensor]] = {key: [] for key in MATRICES}
    for site, name in MATRICES:
        parameter = run.adapters[site].get_parameter(name)
        parameter.register_hook(lambda grad, key=(site, name): gradients[key].append(grad.double()))
    gone: set[tuple[str, str]] = set()
    for step in range(1, 21):
        run.run(step)
        share = 0.0 if step <= 4 else 1.0 if step >= 14 else 1 - (1 - (step - 4) / 10) ** 3
        scores = {}
        for key, seen in gradients.items():
            mean, doubt = torch.zeros_like(seen[0]), torch.zeros_like(seen[0])
            for grad in seen:
                mean = 0.7 * mean + 0.3 * grad.abs()
                doubt = 0.9 * doubt + 0.1 * (grad.abs() - mean).abs()
            scores[key] = float((mean * doubt).mean())
        left = sorted((key for key in MATRICES if key not in gone), key=lambda key: scores[key])
        gone |= set(left[: int(share * 4) - len(gone)])
        assert frozen(run) == gone, step
    assert len(gone) == 4 and len({len(seen) for seen in gradients.values()}) > 2, "at different steps"


def test_matrices_start_as_the_authors_draw_them(tmp_path: Path) -> None:
    """Kaiming's bound for ReLU, sqrt(6 / inputs), as of VeRA's; LoRA's A has the bound sqrt(1 / inputs)."""
    for adapter in aflora(tmp_path, rank=16).adapters.values():
        for matrix in (adapter.A, adapter.B):
            bound = (6 / matrix.shape[1]) ** 0.5
            assert 0.95 * bound < float(matrix.abs().max()) <= 1.01 * bound  # bf16


def test_a_frozen_matrix_costs_nothing_more(tmp_path: Path) -> None:
    run = aflora(tmp_path)
    run.run(14)
    before = {key: run.adapters[key[0]].get_parameter(key[1]).clone() for key in MATRICES}
    vectors = run.adapters["up_proj"].b.clone()
    run.run(20)
    for (site, name), values in before.items():
        parameter = run.adapters[site].get_parameter(name)
        assert torch.equal(parameter, values) and parameter.grad is None
    assert not torch.equal(run.adapters["up_proj"].b, vectors), "the vectors learn to the end"
    kept = {name.rpartition("/")[0].rpartition(".")[2] for name in run.optimizer.state()}
    assert kept == {"b", "d"}
    site = adapted_sites(run.model)["up_proj"]
    x = inputs(shape=(64, 76)).requires_grad_()
    with saved() as tensors:
        site(x)
    assert not any(tensor.shape == x.shape for tensor in tensors), "x is kept for the gradient of A alone"


def test_a_run_too_short_to_freeze_is_refused(tmp_path: Path) -> None:
    run = aflora(tmp_path)
    with pytest.raises(QtuneError, match="leave none of 10 steps to freeze matrices in"):
        run.method.worst(run.adapters, 10)


@torch.no_grad()
def test_peft_takes_it_as_a_lora(tmp_path: Path) -> None:
    spec = AdapterSpec("aflora", ATTENTION["llama"], {"rank": 3})
    ours = adapted("llama", spec)
    for site in adapted_sites(ours).values():
        for p in site.adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    to_peft(ours, spec, tmp_path, "someone/tiny")
    theirs = peft.PeftModel.from_pretrained(base_of(ours, "llama"), tmp_path).eval()
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)
