"""Methods that write into the base from time to time, against dense float64 simulations that really write into W.

Each simulation is written from the paper, on dense weights, with torch's own AdamW; only random draws are ours. The
method runs in float64 too, so that what is compared is the equation: the weight that each site computes with, at every
step of several cycles.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_laws import IN, OUT, Case, in_float64, learned
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.adapters import METHODS, adapted_sites, carried
from qtune.errors import QtuneError
from qtune.optim import Optimizer

STEPS, LR = 13, 0.01
SITES = ("up_proj", "down_proj")


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(16, IN, generator=draw).double(), torch.randn(16, OUT, generator=draw).double()


class Ours:
    """A method in float64 over dense weights, step by step as TrainStep does it."""

    def __init__(self, method: str, tmp: Path, steps: int = STEPS, rule: str = "adamw", **options: Any) -> None:
        self.method, self.steps = METHODS[method], steps
        self.model = in_float64(Case(method, "dense", tmp).model(**options))
        self.sites = adapted_sites(self.model)
        self.adapters: dict[str, Any] = {name: site.adapter for name, site in self.sites.items()}
        self.optimizer = Optimizer(learned(self.model).items(), rule, lr=LR)

    def step(self, step: int) -> None:
        factor = self.method.warmth(self.adapters, step, self.steps)
        self.optimizer.follow(self.method.before_step(self.adapters, step, self.steps))
        x, y = batch(step)
        F.mse_loss(self.model(x), y).backward()
        self.method.see_gradients(self.adapters, step, self.steps)
        self.optimizer.step(factor)
        self.optimizer.follow(self.method.after_step(self.adapters, step, self.steps))

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """What each site multiplies with, by its forward alone."""
        found = {}
        for name, site in self.sites.items():
            eye = torch.eye(site.base.in_features, dtype=torch.float64)
            found[name] = (site(eye) - site(torch.zeros(1, len(eye), dtype=torch.float64))).T
        return found


class Dense:
    """Two dense layers W [out, in] in float64 that a method writes into."""

    def __init__(self, ours: Ours) -> None:
        self.W = {name: site.base.dequantize().double() for name, site in ours.sites.items()}
        self.bias = ours.sites["up_proj"].base.bias.detach().double()

    def loss(self, step: int, weight: Callable[[str], Tensor]) -> Tensor:
        x, y = batch(step)
        hidden = torch.tanh(x @ weight("up_proj").T + self.bias)
        return F.mse_loss(hidden @ weight("down_proj").T, y)


def leaf(value: Tensor) -> Tensor:
    return value.detach().clone().double().requires_grad_()


def factors(ours: Ours) -> dict[str, list[Tensor]]:
    """Leaves [A, B] of each site, as the method starts."""
    return {name: [leaf(one.A), leaf(one.B)] for name, one in ours.adapters.items()}


def same(ours: Ours, expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, weight in ours.weights().items():
        error = (weight - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


def rank_of(delta: Tensor) -> int:
    s = torch.linalg.svdvals(delta.double())
    return int((s > 1e-6 * s[0]).sum())


def deltas(ours: Ours) -> dict[str, Tensor]:
    return {name: weight - ours.sites[name].base.dequantize().double() for name, weight in ours.weights().items()}


# ---- ReLoRA


def smallest_to_zero(states: dict[str, Tensor], share: float) -> None:
    """The paper's partial reset: zeros in this share of the places, those of the smallest means."""
    order = states["exp_avg"].abs().flatten().argsort()
    for key in ("exp_avg", "exp_avg_sq"):
        states[key].view(-1)[order[: round(share * len(order))]] = 0


def relora_by_hand(ours: Ours, length: int, prune: float, rise: float) -> None:
    """W += s B A, A anew, B zero, the optimizer's states pruned; compared at every step."""
    dense, both = Dense(ours), factors(ours)
    optimizer = torch.optim.AdamW([leaf for pair in both.values() for leaf in pair], lr=LR, weight_decay=0.0)

    def weight(name: str) -> Tensor:
        A, B = both[name]
        return dense.W[name] + ours.adapters[name].scale * B @ A

    for step in range(1, ours.steps + 1):
        if step > 1 and (step - 1) % length == 0:
            with torch.no_grad():
                for name, (A, B) in both.items():
                    dense.W[name] = weight(name)
                    A.copy_(carried.kaiming(A.shape, 0, step, name))
                    B.zero_()
                    for parameter in (A, B):
                        if prune == 1:
                            del optimizer.state[parameter]
                        else:
                            smallest_to_zero(optimizer.state[parameter], prune)
        place = (step - 1) % length
        optimizer.param_groups[0]["lr"] = LR * (1 if step <= length or place + 1 >= rise else (place + 1) / rise)
        optimizer.zero_grad()
        dense.loss(step, weight).backward()
        optimizer.step()
        ours.step(step)
        with torch.no_grad():
            same(ours, {name: weight(name) for name in SITES})


@pytest.mark.parametrize("prune", [0.9, 1.0])
def test_relora_is_lora_that_writes_into_the_weight(prune: float, tmp_path: Path) -> None:
    ours = Ours("relora", tmp_path, period=4, rewarm=2.0, prune=prune)
    relora_by_hand(ours, 4, prune, 2)
    for name, delta in deltas(ours).items():
        assert rank_of(delta) == 4 * 4, "the rank of four cycles adds up"
        assert ours.adapters[name].sizes() == {"carried": 12}


def test_relora_prunes_at_random(tmp_path: Path) -> None:
    ours = Ours("relora", tmp_path, prune=0.75, prune_by="random")
    one = ours.adapters["up_proj"]
    changes = one.anew("up_proj", 5)
    first, again = (changes[one.A].moments(torch.ones(4, IN)) for _ in range(2))
    assert torch.equal(first, again), "both moments of a place stay or go together"
    assert 0.15 < first.mean() < 0.35
    assert not torch.equal(first, one.anew("up_proj", 9)[one.A].moments(torch.ones(4, IN)))


def test_what_is_carried_is_cut_where_that_loses_nothing_and_kept_where_it_would(tmp_path: Path) -> None:
    """Beyond its room a site keeps what it learned, trains on, and says so; it never takes more than is planned."""
    ours = Ours("relora", tmp_path, period=2, carry=9)
    told = []
    for step in range(1, STEPS + 1):
        before = ours.weights()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ours.optimizer.follow(ours.method.before_step(ours.adapters, step, STEPS))
            for name, weight in ours.weights().items():
                assert (weight - before[name]).norm() <= 0.005 * (before[name] - Dense(ours).W[name]).norm() + 1e-12
            ours.step(step)
        told += [str(one.message) for one in found]
        assert all(one.sizes()["carried"] <= 9 for one in ours.adapters.values())
    assert told and "up_proj (9)" in told[0] and "no new cycle begins there" in told[0]
    assert all(one.B.any() for one in ours.adapters.values())


def test_a_cut_keeps_what_has_the_rank() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(6, 20), torch.randn(11, 6)
    near = torch.cat((A, A + 1e-4 * torch.randn(6, 20))), torch.cat((B, B), 1)
    for many in (12, 7):
        cut_A, cut_B, lost = carried.cut(*near, min(many, 11))
        assert cut_A.shape == (min(many, 11), 20) and cut_B.shape == (11, min(many, 11))
        assert lost < 1e-3
        torch.testing.assert_close(cut_B @ cut_A, near[1] @ near[0], rtol=1e-3, atol=2e-3)
    random = torch.randn(12, 20), torch.randn(30, 12)
    best = torch.linalg.svdvals(random[1] @ random[0])
    lost = carried.cut(*random, 5)[2]
    assert abs(lost - best[5:].norm() / best.norm()) < 1e-5, "no rank-5 product is nearer"


def test_a_layer_narrower_than_its_cycles_carries_no_more_than_its_side(tmp_path: Path) -> None:
    ours = Ours("relora", tmp_path, steps=33, period=2)
    for step in range(1, 34):
        ours.step(step)
    assert ours.adapters["down_proj"].sizes() == {"carried": OUT}, "16 cycles of rank 4 in 33 rows"
    assert ours.adapters["up_proj"].sizes() == {"carried": 64}


@pytest.mark.parametrize(
    ("method", "count"),
    [("relora", 4 * 172), ("cola", 4 * 172), ("xgblora", 4 * 172), ("flora", 4 * 96), ("deltalora", 4 * 172),
     ("hdpissa", 2 * 4 * 172), ("losia", 12 * 9)],
)  # fmt: skip
def test_what_is_trained(method: str, count: int, tmp_path: Path) -> None:
    """At a layer of 96 x 76, whatever has been carried; nothing else asks for a gradient."""
    model = Case(method, "nf4", tmp_path).model()
    adapter = model.up_proj.adapter
    METHODS[method].worst({name: site.adapter for name, site in adapted_sites(model).items()}, 1000)
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == count
    assert not any(buffer.requires_grad for buffer in adapter.buffers())


def test_cycles() -> None:
    assert [carried.in_steps(*given) for given in ((0.25, 12), (0.1, 30), (0.3, 10), (7, 3), (0.01, 5))] == [
        3, 3, 3, 7, 1,
    ]  # fmt: skip
    assert [step for step in range(1, 13) if carried.begins(step, 4)] == [5, 9]
    assert carried.most_restarts(0.25, None) == 3 and carried.most_restarts(50, None) is None
    for period in (0.25, 0.3, 0.05):
        assert all(carried.most_restarts(period, n) <= carried.most_restarts(period, None) for n in range(1, 200))
    assert carried.layer_of("model.layers.3.mlp.up_proj") == "model.layers.3" and carried.layer_of("up") == "up"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"period": 2.5}, "adapter.period must be a share of the run above 0 and below 1, or whole steps, not 2.5"),
        ({"period": 0.0}, "adapter.period"),
        ({"carry": 8}, "adapter.carry must be at least adapter.rank, 16"),
        ({"rewarm": -1.0, "prune": 2.0}, "adapter.rewarm must be at least 0, not -1.0; adapter.prune must be 0 to 1"),
        ({"prune_by": "size"}, "adapter.prune_by must be magnitude or random, not 'size'"),
        ({"seed": -1}, "adapter.seed"),
    ],
)
def test_wrong_options_of_relora(options: dict[str, Any], fault: str, tmp_path: Path) -> None:
    case = Case("relora", "nf4", tmp_path)
    case.options = {}
    with pytest.raises(QtuneError, match=fault.replace(".", r"\.")):
        case.spec(**options).checked()


# ---- COLA, XGBLoRA, FLORA


def cycles_by_hand(ours: Ours, length: int, chosen: Callable[[int], tuple[str, ...]]) -> None:
    """W += s B A of the sites that were trained, then new factors and a new optimizer; compared at every step."""
    dense, both = Dense(ours), factors(ours)
    trained: tuple[str, ...] = ()

    def weight(name: str) -> Tensor:
        A, B = both[name]
        return dense.W[name] + ours.adapters[name].scale * B @ A

    optimizers: dict[str, Any] = {}
    for step in range(1, ours.steps + 1):
        if (step - 1) % length == 0:
            for name in trained:
                dense.W[name] = weight(name).detach()
                both[name] = [leaf(carried.kaiming(both[name][0].shape, 0, step, name)), leaf(both[name][1] * 0)]
            trained = chosen((step - 1) // length)
            optimizers = {name: torch.optim.AdamW(both[name], lr=LR, weight_decay=0.0) for name in trained}
        for pair in both.values():
            for one in pair:
                one.grad = None
        dense.loss(step, weight).backward()
        for name in trained:
            optimizers[name].step()
        ours.step(step)
        with torch.no_grad():
            same(ours, {name: weight(name) for name in SITES})


def test_cola_is_a_chain_of_loras(tmp_path: Path) -> None:
    ours = Ours("cola", tmp_path, chain=4)
    cycles_by_hand(ours, 4, lambda number: SITES)
    assert all(rank_of(delta) == 4 * 4 for delta in deltas(ours).values())
    with pytest.raises(QtuneError, match=r"adapter\.chain must be at least 2 links, not 1"):
        Case("cola", "nf4", tmp_path).spec(chain=1).checked()


def test_xgblora_boosts_layers_at_random(tmp_path: Path) -> None:
    ours = Ours("xgblora", tmp_path, steps=25, rank=1, period=3, layers=0.5)
    order: list[tuple[str, ...]] = []

    def chosen(number: int) -> tuple[str, ...]:
        order.append(tuple(ours.method.choose(ours.adapters, 3 * number + 1, 25)))  # type: ignore[attr-defined]
        return order[-1]

    cycles_by_hand(ours, 3, chosen)
    assert set(order) == {("up_proj",), ("down_proj",)}, "one of two layers, not always the same"
    for name, delta in deltas(ours).items():
        assert rank_of(delta) == order.count((name,)), "a rank for each booster that the layer got"


def test_xgblora_takes_whole_layers(tmp_path: Path) -> None:
    one = Ours("xgblora", tmp_path, rank=1, layers=0.34).adapters["up_proj"]
    names = [f"model.layers.{layer}.mlp.{part}" for layer in range(32) for part in ("up_proj", "down_proj")]
    first, again, other = (METHODS["xgblora"].choose(dict.fromkeys(names, one), step, 100) for step in (1, 5, 6))  # type: ignore[attr-defined]
    assert len(first) == 11 and first == again != other
    with pytest.raises(QtuneError, match=r"adapter\.layers must be a share"):
        Case("xgblora", "nf4", tmp_path).spec(layers=0.0).checked()


def test_flora_projects_the_gradient_and_moves_its_mean(tmp_path: Path) -> None:
    """Against steps of W itself: W -= lr Adam(G A^T) A, which is the paper's with Adam for its Adafactor."""
    ours = Ours("flora", tmp_path, period=4)
    dense = Dense(ours)
    A = {name: one.A.clone() for name, one in ours.adapters.items()}
    mean = {name: torch.zeros(len(W), 4).double() for name, W in dense.W.items()}
    square = {name: torch.zeros(len(W), 4).double() for name, W in dense.W.items()}
    for step in range(1, STEPS + 1):
        if step in (5, 9, 13):
            for name, old in A.items():
                draw = carried.generator(0, step, name)
                A[name] = (torch.randn(old.shape, generator=draw) / 2).double()  # variance 1/rank
                moved = mean[name] @ old @ A[name].T
                mean[name] = moved * mean[name].norm() / moved.norm()
                square[name] = square[name].mean(1, keepdim=True).repeat(1, 4)
        W = {name: leaf(value) for name, value in dense.W.items()}
        dense.loss(step, W.__getitem__).backward()
        for name, value in W.items():
            g = value.grad @ A[name].T
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            update = mean[name] / (1 - 0.9**step) / ((square[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            dense.W[name] = value.detach() - LR * update @ A[name]
        ours.step(step)
        same(ours, dense.W, 1e-6)  # A is what float32 holds of it
    assert all(rank_of(delta) == 4 * 4 for delta in deltas(ours).values())
    assert [name.rpartition(".")[2] for name in learned(ours.model)] == ["B", "B"]


def test_the_projection_of_flora_is_the_identity_on_average(tmp_path: Path) -> None:
    A = Ours("flora", tmp_path, rank=64).adapters["up_proj"].A
    assert abs((A.T @ A).diagonal().mean() - 1) < 0.05
    assert Case("flora", "nf4", tmp_path).model().up_proj.adapter.scale == 1  # type: ignore[union-attr]


# ---- Delta-LoRA


@pytest.mark.parametrize("begin", [0, 5])
def test_deltalora_changes_the_weight_by_the_change_of_the_product(begin: int, tmp_path: Path) -> None:
    """W += ratio s (B A - B' A') after each step from `begin` on, really written into a dense W."""
    ours = Ours("deltalora", tmp_path, ratio=1.5, begin=float(begin))
    dense, both = Dense(ours), factors(ours)
    scale = ours.adapters["up_proj"].scale
    optimizer = torch.optim.AdamW([leaf for pair in both.values() for leaf in pair], lr=LR, weight_decay=0.0)

    def product(name: str) -> Tensor:
        A, B = both[name]
        return scale * B @ A

    for step in range(1, STEPS + 1):
        before = {name: product(name).detach() for name in SITES}
        optimizer.zero_grad()
        dense.loss(step, lambda name: dense.W[name] + product(name)).backward()
        optimizer.step()
        ours.step(step)
        with torch.no_grad():
            for name in SITES:
                if step > begin:
                    dense.W[name] = dense.W[name] + 1.5 * (product(name) - before[name])
            if step != begin:  # what begins is noted before the next step
                same(ours, {name: dense.W[name] + product(name) for name in SITES})
    assert all(rank_of(delta) == (8 if begin else 4) for delta in deltas(ours).values())
    assert ours.adapters["up_proj"].sizes() == {"begun": 4 if begin else 0}


# ---- HD-PiSSA


def test_hdpissa_is_the_sum_of_the_slices_steps(tmp_path: Path) -> None:
    """The authors' loop: A_i and B_i stay, and W -= dB_i A_i + B_i dA_i - dB_i dA_i for each of K slices. What is left
    out is the last term: of second order in the learning rate."""
    for lr in (1e-3, 1e-5):
        ours = Ours("hdpissa", tmp_path, rank=3, slices=4, svd="full")
        for bucket in ours.optimizer.buckets.values():
            bucket.rates = type(bucket.rates)(**{**vars(bucket.rates), "lr": lr})
        dense = Dense(ours)
        first, slices, states, second = dict(dense.W), {}, {}, {}
        for name, one in ours.adapters.items():
            u, s, vh = torch.linalg.svd(dense.W[name], full_matrices=False)
            cut = [slice(3 * i, 3 * i + 3) for i in range(4)]
            slices[name] = [(s[c].sqrt()[:, None] * vh[c], u[:, c] * s[c].sqrt()) for c in cut]
            exact = sum(B @ A for A, B in slices[name])
            assert (one.B @ one.A - exact).norm() < 1e-3 * exact.norm(), "the slices of the SVD"
            slices[name] = [(one.A[c], one.B[:, c]) for c in cut]  # as ours has them, signs and rounding too
            states[name] = [[torch.zeros(2, *part.shape).double() for part in pair] for pair in slices[name]]
            second[name] = torch.zeros_like(dense.W[name])
        for step in range(1, 9):
            W = {name: leaf(value) for name, value in dense.W.items()}
            dense.loss(step, W.__getitem__).backward()
            for name, value in W.items():
                for (A, B), pair in zip(slices[name], states[name], strict=True):
                    grads = B.T @ value.grad, value.grad @ A.T
                    dA, dB = (adam(state, grad, step, lr) for state, grad in zip(pair, grads, strict=True))
                    dense.W[name] = dense.W[name] - dB @ A - B @ dA + dB @ dA
                    second[name] += dB @ dA
            ours.step(step)
        for name, weight in ours.weights().items():
            moved = (dense.W[name] - first[name]).norm()
            error = (weight - dense.W[name]).norm()
            assert error < 1.5 * second[name].norm() and error < 100 * lr * moved, f"{error / moved:.1e}"
            assert rank_of(weight - first[name]) == 2 * 4 * 3, "2 K r"


def adam(state: Tensor, grad: Tensor, step: int, lr: float) -> Tensor:
    state[0].mul_(0.9).add_(0.1 * grad)
    state[1].mul_(0.999).add_(0.001 * grad**2)
    return lr * state[0] / (1 - 0.9**step) / ((state[1] / (1 - 0.999**step)).sqrt() + 1e-8)


def test_hdpissa_refuses_more_than_the_layer_has(tmp_path: Path) -> None:
    with pytest.raises(QtuneError, match=r"adapter\.rank 5 in adapter\.slices 8 is beyond .*33 x 96; legal: 1 to 4"):
        Case("hdpissa", "nf4", tmp_path).model(rank=5, slices=8)


# ---- LoSiA


def losia_by_hand(ours: Ours, length: int, carry: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """W[rows, cols] is trained in place; the layers take turns, the last first. Returns the subnets of each."""
    dense = Dense(ours)
    subnets = {name: [(one.rows.clone(), one.cols.clone())] for name, one in ours.adapters.items()}
    states = {name: [torch.zeros(2, *one.S.shape).double(), 0] for name, one in ours.adapters.items()}
    averages: dict[str, Any] = dict.fromkeys(SITES)
    turns = ("down_proj", "up_proj")
    for step in range(1, ours.steps + 1):
        if step > 1 and (step - 1) % length == 0:
            name = turns[(step - 2) // length % 2]
            if len(subnets[name]) <= carry:
                many, wide = ours.adapters[name].S.shape
                rows, cols = ((mean * doubt).argsort(descending=True) for mean, doubt in averages[name])
                subnets[name].append((rows[:many].sort().values, cols[:wide].sort().values))
                states[name] = [torch.zeros_like(states[name][0]), 0]
                averages[name] = None
        W = {name: leaf(value) for name, value in dense.W.items()}
        dense.loss(step, W.__getitem__).backward()
        name = turns[(step - 1) // length % 2]
        if len(subnets[name]) <= carry:
            q = W[name].detach() * W[name].grad
            q = (q - q**2 / 2).abs()
            averages[name] = averages[name] or [[torch.zeros(size).double() for _ in range(2)] for size in q.shape]
            for (mean, doubt), found in zip(averages[name], (q.sum(1), q.sum(0)), strict=True):
                mean.mul_(0.85).add_(0.15 * found)
                doubt.mul_(0.85).add_(0.15 * (found - mean).abs())
        for name, value in W.items():
            rows, cols = subnets[name][-1]
            states[name][1] += 1
            new = value.detach().clone()
            new[rows[:, None], cols] -= adam(states[name][0], value.grad[rows[:, None], cols], states[name][1], LR)
            dense.W[name] = new
        ours.step(step)
        same(ours, dense.W, 1e-7)
    return subnets


def test_losia_trains_a_subnet_and_chooses_it_anew(tmp_path: Path) -> None:
    ours = Ours("losia", tmp_path, steps=20, period=3, carry=2)
    subnets = losia_by_hand(ours, 3, 2)
    for name, one in ours.adapters.items():
        assert one.S.shape == tuple(size // 8 for size in one.whole(ours.sites[name].base).shape)
        assert one.sizes() == {"done": 2} and not one.watched
        assert [tuple(map(torch.equal, pair, (one.rows, one.cols))) for pair in subnets[name][-1:]] == [(True, True)]
        assert not torch.equal(subnets[name][0][0], subnets[name][1][0])
        assert rank_of(deltas(ours)[name]) > min(one.S.shape), "of several blocks"


def test_the_importance_of_losia_is_of_second_order(tmp_path: Path) -> None:
    """|w g - (w g)^2 / 2| of the weight as it computes now, summed by rows and by columns."""
    one = Ours("losia", tmp_path)
    adapter, base = one.adapters["up_proj"], one.sites["up_proj"].base
    with torch.no_grad():
        adapter.S += 0.3
    x, dy = torch.randn(8, IN).double(), torch.randn(8, 96).double()
    adapter.look(x, dy, base)
    wg = one.weights()["up_proj"] * (dy.T @ x)
    q = (wg - wg**2 / 2).abs()
    torch.testing.assert_close((adapter.row_now, adapter.col_now), (q.sum(1), q.sum(0)), rtol=1e-5, atol=0)


def test_losia_sees_the_same_in_two_micro_batches_of_one_sign(tmp_path: Path) -> None:
    """Sums are of |q| of each micro-batch: equal to those of the whole where the halves agree."""
    one = Ours("losia", tmp_path)
    adapter, base = one.adapters["up_proj"], one.sites["up_proj"].base
    x, dy = torch.rand(8, IN).double() * 1e-3, torch.rand(8, 96).double() * 1e-3
    adapter.look(x.repeat(2, 1), dy.repeat(2, 1), base)
    whole = adapter.row_now.clone(), adapter.col_now.clone()
    for sums in (adapter.row_now, adapter.col_now):
        assert sums.any()
        sums.zero_()
    adapter.look(x, dy, base)
    adapter.look(x, dy, base)
    torch.testing.assert_close((adapter.row_now, adapter.col_now), whole, rtol=1e-4, atol=1e-12)


class Largest(TorchDispatchMode):
    """Counts products that are as large as a layer's weight."""

    dense = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.dense += func is torch.ops.aten.mm.default and result.shape in ((96, IN), (OUT, 96))
        return result


def test_the_plan_of_losia_holds_the_dense_gradient(tmp_path: Path) -> None:
    model = Case("losia", "nf4", tmp_path).model(device="meta")
    adapters: dict[str, Any] = {name: site.adapter for name, site in adapted_sites(model).items()}
    METHODS["losia"].worst(adapters, None)
    assert adapters["down_proj"].watched and not adapters["up_proj"].watched, "one layer at a time, the last first"
    METHODS["losia"].before_step(adapters, 1, 100)
    assert adapters["down_proj"].watched
    with Largest() as largest:
        model(torch.randn(5, IN, device="meta")).sum().backward()
    assert largest.dense == 1, "the gradient of one layer"
    assert adapters["down_proj"].done_S.shape == (2, OUT // 8, 12)
