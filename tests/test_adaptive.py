"""Methods whose rank is not the same everywhere or always: what their papers say of it, on small layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_laws import IN, OUT, Case, inputs, learned
from test_peft import ATTENTION, adapted, base_of, ids
from torch import Tensor
from torch.nn import functional as F

from qtune.adapters import METHODS, AdapterSpec, adapt, adapted_sites
from qtune.adapters.adalora import SETTLED, AdaLoRA, allocate, budget
from qtune.errors import QtuneError
from qtune.optim import Optimizer
from qtune.peft import to_peft
from qtune.quant import Dense, QuantLinear

SITES = ("up_proj", "down_proj")


class Training:
    """A method step by step, as TrainStep does it; `loss` of the model and the step's number."""

    def __init__(
        self, model: Any, method: str, steps: int, loss: Callable[[Any, int], Tensor], lr: float = 0.02
    ) -> None:
        self.model, self.method, self.steps, self.loss = model, METHODS[method], steps, loss
        self.adapters: dict[str, Any] = {name: site.adapter for name, site in adapted_sites(model).items()}
        self.optimizer = Optimizer(learned(model).items(), lr=lr)
        self.done = 0
        self.losses: list[float] = []

    def run(self, until: int, *, skip: tuple[int, ...] = ()) -> None:
        for step in range(self.done + 1, until + 1):
            self.optimizer.follow(self.method.before_step(self.adapters, step, self.steps))
            loss = self.loss(self.model, step)
            terms = [term for one in self.adapters.values() if (term := one.penalty()) is not None]
            torch.stack([loss, *terms]).sum().backward()
            self.losses.append(loss.item())
            if step in skip:
                self.optimizer.drop_gradients()
                continue
            self.method.see_gradients(self.adapters, step, self.steps)
            self.optimizer.step(1.0)
            self.optimizer.follow(self.method.after_step(self.adapters, step, self.steps))
        self.done = until

    def ranks(self) -> dict[str, int]:
        return {name: one.sizes()["rank"] for name, one in self.adapters.items()}


def to_ones(model: Any, step: int) -> Tensor:
    x = inputs(shape=(16, IN)) + 0.1 * torch.randn(16, IN, generator=torch.Generator().manual_seed(step))
    return F.mse_loss(model(x), torch.ones(16, OUT))


# ---- AdaLoRA


def ada(tmp: Path, steps: int, loss: Callable[[Any, int], Tensor] = to_ones, **options: Any) -> Training:
    chosen = {"rank": 8, "target": 4.0, "t_init": 4.0, "t_final": 6.0, "interval": 2.0} | options
    return Training(Case("adalora", "nf4", tmp).model(**chosen), "adalora", steps, loss)


def test_the_budget_is_the_papers() -> None:
    """Equation 12, in rational numbers."""
    begin, end, start, target = 10, 90, 120, 64
    assert [budget(step, begin, end, start, target) for step in (1, 10)] == [start, start]
    for step in range(11, 90):
        left = (80 - (step - 10)) ** 3
        assert budget(step, begin, end, start, target) == (target * 80**3 + (start - target) * left) // 80**3
    assert [budget(step, begin, end, start, target) for step in (90, 91, 200)] == [target] * 3


@pytest.mark.parametrize("grow", [0.0, 0.25])
def test_the_total_rank_is_the_budget_at_each_step(tmp_path: Path, grow: float) -> None:
    run = ada(tmp_path, 24, grow=grow)
    expected = 16
    for step in range(1, 25):
        run.run(step)
        if 4 < step <= 18 and step % 2 == 0:
            expected = budget(step, 4, 18, 16, 8)
        assert sum(run.ranks().values()) == expected, step
        for name, one in run.adapters.items():
            rank = run.ranks()[name]
            assert one.P.shape[1] == len(one.sigma) == len(one.Q) == one.history.shape[1] == rank
    assert expected == 8


def test_an_allocation_that_was_skipped_is_made_up_for(tmp_path: Path) -> None:
    run = ada(tmp_path, 24)
    run.run(24, skip=(16, 18, 19))
    assert sum(run.ranks().values()) == 8
    assert all((one.history[-1] == SETTLED).all() for one in run.adapters.values())


def test_the_importance_is_the_papers(tmp_path: Path) -> None:
    """A site's scores from the gradients of five steps, in float64."""
    run = ada(tmp_path, 24)
    one = run.adapters["up_proj"]
    seen: list[list[Tensor]] = []
    look = AdaLoRA.look

    def noted(self: AdaLoRA) -> None:
        if self is one:
            values = ((w.detach().double(), w.grad.double()) for w in (self.sigma, self.P, self.Q))
            sigma, P, Q = ((w * g).abs() for w, g in values)
            seen.append([sigma, P.mean(0), Q.mean(1)])
        look(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaLoRA, "look", noted)
        run.run(5)
    scores = torch.zeros(8, dtype=torch.float64)
    for part in range(3):
        mean = doubt = torch.zeros(8, dtype=torch.float64)
        for step in seen:
            mean = 0.85 * mean + 0.15 * step[part]
            doubt = 0.85 * doubt + 0.15 * (step[part] - mean).abs()
        scores += mean * doubt / (1 - 0.85**5) ** 2
    torch.testing.assert_close(torch.tensor(one.scores()).double(), scores, rtol=1e-5, atol=1e-12)


def test_the_penalty_is_the_distance_from_orthogonality(tmp_path: Path) -> None:
    run = ada(tmp_path, 24, penalty=0.3)
    run.run(1)
    terms = []
    for one in run.adapters.values():
        eye = torch.eye(8, dtype=torch.float64)
        P, Q = one.P.detach().double(), one.Q.detach().double()
        terms += [(P.T @ P - eye).norm(), (Q @ Q.T - eye).norm()]
    total = sum(one.penalty().item() for one in run.adapters.values())
    assert math.isclose(total, 0.3 * float(torch.stack(terms).mean()), rel_tol=1e-5)
    assert ada(tmp_path, 24, penalty=0.0).adapters["up_proj"].penalty() is None


def test_an_allocation_drops_the_least_important_and_adds_nothing_to_the_output(tmp_path: Path) -> None:
    """The loss behind it is the one with the dropped sigmas at zero, as the authors mask them: growth is no jump."""
    run = ada(tmp_path, 40, grow=0.4, t_final=2.0)
    follow, x, grown = run.optimizer.follow, inputs(), []

    def checked(changes: Any) -> None:
        for one in run.adapters.values() if changes else ():
            if one.sigma in changes:
                gone = torch.ones_like(one.sigma, dtype=torch.bool)
                gone[changes[one.sigma].values.where] = False
                one.sigma.data[gone] = 0
                grown.append(len(changes[one.sigma].values.values))
        masked = run.model(x).detach()
        follow(changes)
        torch.testing.assert_close(run.model(x), masked, rtol=1e-5, atol=1e-6)

    run.optimizer.follow = checked  # type: ignore[method-assign]
    run.run(40)
    assert sum(grown) > 3, "nothing grew"


def test_a_matrix_that_needs_rank_grows_beyond_its_start() -> None:
    """One of four layers has a target of rank 16 and the others of rank 1: it gets more than all began with."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(
        QuantLinear(32, 40, Dense("float32"), bias=False, dtype=torch.float32, name=f"{i}") for i in range(4)
    )
    targets = []
    for i, layer in enumerate(layers):
        layer.set_weight(torch.randn(40, 32) / 6)
        rank = 16 if i == 2 else 1
        targets.append(layer.dequantize() + torch.randn(40, rank) @ torch.randn(rank, 32) / 8)
    options = {"rank": 6, "target": 5.0, "t_init": 20.0, "t_final": 60.0, "interval": 10.0, "grow": 0.2}
    adapt(layers, AdapterSpec("adalora", ("*",), options))

    def loss(model: Any, step: int) -> Tensor:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        return torch.stack([F.mse_loss(m(x), x @ t.T) for m, t in zip(model, targets, strict=True)]).sum()

    run = Training(layers, "adalora", 220, loss)
    run.run(220)
    ranks = run.ranks()
    assert sum(ranks.values()) == 20
    assert ranks["2"] >= 12, ranks
    without = [1 for name, one in run.adapters.items() if name != "2" and one.sizes()["rank"] > 4]
    assert not without, ranks


def test_allocation_by_hand() -> None:
    """a lost nothing and is important: it gets what is free; the young triplet of b is safe; c keeps its best."""
    found = {"a": [(0.0, 9.0), (0.0, 8.0)], "b": [(0.0, 5.0), (1.0, 0.0), (0.0, 0.1)], "c": [(0.0, 0.2), (0.0, 0.3)]}
    assert allocate(found, {"a": 9, "b": 9, "c": 9}, 6, 1) == {"a": ([0, 1], 1), "b": ([0, 1], 0), "c": ([1], 0)}
    full = allocate(found, {"a": 2, "b": 9, "c": 9}, 6, 1)
    assert full == {"a": ([0, 1], 0), "b": ([0, 1], 0), "c": ([0, 1], 0)}, "a is full, so the next best stays"
    assert allocate(found, {"a": 9, "b": 9, "c": 9}, 3, 2) == {"a": ([0], 0), "b": ([0], 0), "c": ([1], 0)}


def test_what_is_left_is_balanced(tmp_path: Path) -> None:
    plain, balanced = (ada(tmp_path, 24, balance=value) for value in (False, True))
    for run in (plain, balanced):
        run.run(18)
    for name, one in balanced.adapters.items():
        other = plain.adapters[name]
        assert (one.sigma == 1).all() and not (other.sigma == 1).any()
        delta = ((other.P * other.sigma) @ other.Q).detach()
        torch.testing.assert_close(one.P @ one.Q, delta, rtol=1e-4, atol=1e-5 * float(delta.abs().max()))
        torch.testing.assert_close(one.P.T @ one.P, one.Q @ one.Q.T, rtol=1e-3, atol=1e-4)
    balanced.run(19)
    assert balanced.adapters["up_proj"].penalty() is None
    assert plain.adapters["up_proj"].penalty() is not None


@torch.no_grad()
def test_peft_takes_ranks_that_differ(tmp_path: Path) -> None:
    spec = AdapterSpec("adalora", ATTENTION["llama"], {"rank": 4, "alpha": 12.0})
    ours = adapted("llama", spec)
    for place, site in enumerate(adapted_sites(ours).values()):
        site.adapter.resize({"rank": 1 + place})
        for p in site.adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    to_peft(ours, spec, tmp_path, "someone/tiny")
    theirs = peft.PeftModel.from_pretrained(base_of(ours, "llama"), tmp_path).eval()
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)
    ranks = {m.lora_E["default"].shape[0] for m in theirs.modules() if hasattr(m, "lora_E")}
    assert ranks == set(range(1, 7))


def test_a_run_without_steps_to_allocate_in_is_refused(tmp_path: Path) -> None:
    run = ada(tmp_path, 10)
    with pytest.raises(QtuneError, match=r"t_init 4.0 and adapter.t_final 6.0 leave none of 10 steps"):
        run.run(1)
    with pytest.raises(QtuneError, match="leave none of 10 steps"):
        AdaLoRA.worst(run.adapters, 10)


def test_adalora_names_every_fault() -> None:
    options = {"rank": 4, "target": 5.0, "most": 3, "grow": 1.0, "interval": 0.0, "beta1": 1.0, "penalty": -1.0}
    faults = "; ".join(AdapterSpec("adalora", (), options).faults())
    for name in ("target", "most", "grow", "interval", "beta1", "penalty"):
        assert f"adapter.{name} " in faults, name


# ---- PRILoRA and SoRA


def test_the_rank_rises_with_the_layer() -> None:
    names = [f"model.layers.{layer}.{kind}" for layer in range(5) for kind in ("q_proj", "up_proj")]
    found = METHODS["prilora"].varied(names, {"rank": 8, "alpha": 32.0, "spread": 0.5})
    assert [found[name]["rank"] for name in names] == [4, 4, 6, 6, 8, 8, 10, 10, 12, 12]
    assert {found[name]["alpha"] / found[name]["rank"] for name in names} == {4.0}
    assert METHODS["prilora"].varied(names[:2], {"rank": 8, "alpha": 32.0, "spread": 0.5}) == {}


def test_layers_have_the_risen_rank(tmp_path: Path) -> None:
    model = Case("prilora", "nf4", tmp_path).model(rank=8)
    assert [len(site.adapter.A) for site in adapted_sites(model).values()] == [4, 12]
    with pytest.raises(QtuneError, match=r"adapter\.spread must be at least 0 and below 1, not 1.0"):
        AdapterSpec("prilora", (), {"spread": 1.0}).checked()


def prila(tmp_path: Path, **options: Any) -> Training:
    return Training(Case("prilora", "nf4", tmp_path).model(rank=8, **options), "prilora", 10, to_ones)


def test_the_least_important_entries_are_pruned(tmp_path: Path) -> None:
    """By |A| and the running mean of the inputs' norms, written out; at the steps that the period says."""
    run, free = (prila(tmp_path, prune=prune, period=3, decay=0.8) for prune in (0.25, 0.0))
    given: dict[str, list[Tensor]] = {name: [] for name in run.adapters}
    for name, site in adapted_sites(run.model).items():
        site.register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0].detach().double()))
    run.run(3)
    free.run(3)
    for name, one in run.adapters.items():
        norms = torch.zeros(one.A.shape[1], dtype=torch.float64)
        for x in given[name]:
            norms = 0.8 * norms + 0.2 * x.square().sum(0).sqrt()
        torch.testing.assert_close(one.seen.double(), norms, rtol=1e-5, atol=1e-7)
        whole = free.adapters[name].A.detach()
        count = whole.shape[1] // 4
        importance = whole.double().abs() * norms
        expected = torch.where(importance > importance.sort(1).values[:, count - 1 : count], whole, 0.0)
        assert torch.equal(one.A, expected) and (one.A == 0).sum(1).eq(count).all()
    for step, pruned in ((4, False), (6, True), (9, True), (10, False)):
        run.run(step)
        assert all(bool((one.A == 0).any()) == pruned for one in run.adapters.values()), step
    assert run.losses[-1] < run.losses[0]


def test_a_skipped_step_counts_for_no_pruning(tmp_path: Path) -> None:
    run, other = (prila(tmp_path, period=3) for _ in range(2))
    run.run(2, skip=(2,))
    other.run(1)
    assert all(torch.equal(one.seen, other.adapters[name].seen) for name, one in run.adapters.items())


def test_prilora_names_every_fault() -> None:
    faults = "; ".join(AdapterSpec("prilora", (), {"prune": 1.0, "decay": -0.1, "period": 0}).faults())
    assert all(f"adapter.{name} " in faults for name in ("prune", "decay", "period"))


def test_gates_take_the_proximal_step(tmp_path: Path) -> None:
    run = Training(Case("sora", "nf4", tmp_path).model(rank=8, threshold=0.05), "sora", 40, to_ones)
    free = Training(Case("sora", "nf4", tmp_path).model(rank=8, threshold=0.0), "sora", 40, to_ones)
    run.run(1)
    free.run(1)
    for name, one in run.adapters.items():
        g = free.adapters[name].g
        torch.testing.assert_close(one.g, g.sign() * (g.abs() - 0.05).clamp(min=0))
        assert torch.equal(one.A, free.adapters[name].A)


def test_gates_at_zero_are_dropped_at_the_end(tmp_path: Path) -> None:
    model = Case("sora", "nf4", tmp_path).model(rank=8, threshold=0.06, settle=0.25)
    run = Training(model, "sora", 40, to_ones, lr=0.005)
    run.run(30)
    left = {name: int(one.g.count_nonzero()) for name, one in run.adapters.items()}
    assert run.ranks() == {"up_proj": 8, "down_proj": 8}
    assert min(left.values()) < 8
    before = run.model(inputs()).detach()
    run.optimizer.follow(METHODS["sora"].before_step(run.adapters, 31, 40))
    torch.testing.assert_close(run.model(inputs()), before, rtol=1e-5, atol=1e-6)
    run.run(40)
    assert run.ranks() == {name: max(1, count) for name, count in left.items()}


@torch.no_grad()
@pytest.mark.parametrize("method", ["sora", "prilora"])
def test_peft_takes_a_lora_whose_ranks_differ(method: str, tmp_path: Path) -> None:
    spec = AdapterSpec(method, ATTENTION["llama"], {"rank": 4, "alpha": 12.0})
    ours = adapted("llama", spec)
    for place, site in enumerate(adapted_sites(ours).values()):
        if method == "sora":
            site.adapter.resize({"rank": 1 + place})
            for p in site.adapter.parameters():
                p.copy_(0.3 * torch.randn(p.shape))
    to_peft(ours, spec, tmp_path, "someone/tiny")
    theirs = peft.PeftModel.from_pretrained(base_of(ours, "llama"), tmp_path).eval()
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)


# ---- DyLoRA


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_trains_the_rank_that_it_drew(tmp_path: Path, frozen: bool) -> None:
    model = Case("dylora", "nf4", tmp_path).model(stirred=True, rank=6, least=2, frozen=frozen)
    run = Training(model, "dylora", 60, to_ones)
    drawn = set()
    for step in range(1, 61):
        run.method.before_step(run.adapters, step, 60)
        (rank,) = {one.now for one in run.adapters.values()}
        drawn.add(rank)
        to_ones(model, step).backward()
        for one in run.adapters.values():
            learns = [i for i in range(6) if one.A.grad[i].any() and one.B.grad[:, i].any()]
            assert learns == ([rank - 1] if frozen else list(range(rank)))
        run.optimizer.drop_gradients()
    assert drawn == {2, 3, 4, 5, 6}


def test_each_rank_is_a_lora_at_use(tmp_path: Path) -> None:
    """Against the equation in float64: the delta of each rank, which is that rank."""
    model = Case("dylora", "nf4", tmp_path).model(stirred=True, rank=6, alpha=12.0).eval()
    for site in adapted_sites(model).values():
        for rank in range(1, 7):
            site.adapter.at = rank
            A, B = site.adapter.A[:rank].detach().double(), site.adapter.B[:, :rank].detach().double()
            delta = site.merged()[0].double() - site.base.dequantize().double()
            torch.testing.assert_close(delta, 12 / rank * B @ A, rtol=1e-4, atol=1e-5)
            assert torch.linalg.matrix_rank(delta, atol=1e-4) == rank


@torch.no_grad()
def test_peft_gets_the_rank_at_use(tmp_path: Path) -> None:
    spec = AdapterSpec("dylora", ATTENTION["llama"], {"rank": 6, "alpha": 12.0, "at": 2})
    ours = adapted("llama", spec)
    to_peft(ours, spec, tmp_path, "someone/tiny")
    theirs = peft.PeftModel.from_pretrained(base_of(ours, "llama"), tmp_path).eval()
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)
    with pytest.raises(QtuneError, match=r"adapter\.at must be 0 to adapter\.rank, 6, not 7"):
        AdapterSpec("dylora", (), {"rank": 6, "at": 7}).checked()
