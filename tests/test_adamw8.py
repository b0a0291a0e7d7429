"""AdamW with 8-bit states: equal to bitsandbytes' but for zero; stochastic rounding; the optimizers."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from cpu_kernels import cpu_kernels
from op_samples import same
from torch import Tensor, nn

from qtune import backend, ops, tables
from qtune.errors import QtuneError
from qtune.ops import optim as op_module
from qtune.optim import Optimizer
from qtune.optim.rules import SMALL

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
adamw8 = partial(Optimizer, rule="adamw8")
RATES = (1e-2, 0.9, 0.999, 1e-8, 0.1)  # lr, betas, eps, weight decay


def module() -> Any:
    return cpu_kernels("adamw8")


@pytest.fixture(params=("scalar", "avx2", "avx512", "neon"))
def simd(request: pytest.FixtureRequest) -> str:
    if request.param not in module().LIBRARY.simd_paths():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def fresh(n: int) -> list[Tensor]:
    """States before the first step."""
    blocks = -(n // -256)
    return [
        torch.zeros(n, dtype=torch.uint8),
        torch.zeros(blocks),
        torch.zeros(n, dtype=torch.uint8),
        torch.zeros(blocks),
    ]


# ---- the kernel and the reference


@pytest.mark.parametrize("seed", [0, 7, -(2**62) - 3])
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_kernel_is_the_reference_bit_for_bit(dtype, grad_dtype, seed, simd) -> None:  # type: ignore[no-untyped-def]
    k, reference = module(), ops.REFERENCES["adamw8_"]
    for n in (0, 1, 3, 7, 17, 255, 256, 257, 1000, 5003):
        start = torch.randn(n).to(dtype)
        ours, theirs = (start.clone(), *fresh(n)), (start.clone(), *fresh(n))
        for step in range(1, 5):
            grad = (torch.randn(n) ** 3 * 0.1).to(grad_dtype)
            grad[::5] = 0
            rest = (*RATES, step, seed and seed + step)
            k.adamw8_(ours[0], grad, *ours[1:], *rest, simd)
            reference(theirs[0], grad, *theirs[1:], *rest)
            assert all(same(a, b) for a, b in zip(ours, theirs, strict=True)), (n, step)


def test_values_around_every_midpoint_and_far_below(simd: str) -> None:
    """States with absmax 1 whose other values lie within three ulps of a midpoint, or are tiny: m = g with beta1 0."""
    k, reference = module(), ops.REFERENCES["adamw8_"]
    for values, unsigned in ((tables.dynamic8(CPU), False), (tables.unsigned8(CPU), True)):
        middle = (values[:-1] + values[1:]) / 2
        near = torch.cat([(middle.view(torch.int32) + d).view(torch.float32) for d in (-3, -2, -1, 0, 1, 2, 3)])
        near = torch.cat([near, torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e-30, 2.0**-24, 2.0**-30, 5.9e-8])])
        near = near.sqrt().nan_to_num() if unsigned else near
        near = torch.nn.functional.pad(near, (0, -near.numel() % 255)).view(-1, 255)
        grad = torch.cat([torch.ones(len(near), 1), near], 1).view(-1)
        for peak in (1.0, 0.37, 1e-30):
            ours, theirs = (
                (torch.zeros(grad.numel()), *fresh(grad.numel())),
                (torch.zeros(grad.numel()), *fresh(grad.numel())),
            )
            rest = (1e-2, 0.0, 0.0, 1e-8, 0.0, 1, 0)
            k.adamw8_(ours[0], grad * peak, *ours[1:], *rest, simd)
            reference(theirs[0], grad * peak, *theirs[1:], *rest)
            assert all(same(a, b) for a, b in zip(ours, theirs, strict=True)), peak
        # the nearest of all 256, by exhaustion
        state = (grad.double() ** 2 if unsigned else grad.double()).float()
        ours = (torch.zeros(grad.numel()), *fresh(grad.numel()))
        k.adamw8_(ours[0], grad, *ours[1:], 1e-2, 0.0, 0.0, 1e-8, 0.0, 1, 0, simd)
        found = values[ours[3 if unsigned else 1].long()].double()
        best = (state.double().unsqueeze(1) - values.double()).abs().min(1).values
        slack = 2e-7 * state.abs().double()  # the midpoints are rounded
        if unsigned:  # above 0 there is no code 0
            slack = torch.where((state > 0) & (state < values[1]), values[1].double(), slack)
        assert ((found - state.double()).abs() <= best + slack).all()


def test_blocks_of_zeros_and_what_is_not_finite(simd: str) -> None:
    k = module()
    param, states = torch.ones(600), fresh(600)
    k.adamw8_(param, torch.zeros(600), *states, *RATES[:4], 0.0, 1, 0, simd)
    assert torch.equal(param, torch.ones(600))
    assert states[1].eq(0).all() and states[3].eq(0).all() and states[2].eq(0).all()
    grad = torch.zeros(600)
    grad[300] = float("nan")
    k.adamw8_(param, grad, *states, *RATES[:4], 0.0, 2, 0, simd)
    assert states[1].isnan().tolist() == states[3].isnan().tolist() == [False, True, False]
    assert param.isnan().nonzero().view(-1).tolist() == [300]


def test_threads_views_and_guards(simd: str) -> None:
    k, before, found = module(), torch.get_num_threads(), []
    start, grads = torch.randn(300, 301).bfloat16(), [torch.randn(301, 300).t() for _ in range(3)]
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            around = torch.full((start.numel() + 128,), 7.0, dtype=torch.bfloat16)
            param, states = around[64:-64].view(300, 301), fresh(start.numel())
            param.copy_(start)
            for step, grad in enumerate(grads, 1):
                k.adamw8_(param, grad, *states, *RATES, step, 5, simd)
            assert around[:64].eq(7).all() and around[-64:].eq(7).all()
            found.append((param.clone(), *states))
    finally:
        torch.set_num_threads(before)
    assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    param, states = start.clone(), fresh(start.numel())
    for step, grad in enumerate(grads, 1):
        ops.REFERENCES["adamw8_"](param, grad, *states, *RATES, step, 5)
    assert all(same(a, b) for a, b in zip(found[0], (param, *states), strict=True))


def test_chunks_of_the_reference_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1 << 20, 512):
        monkeypatch.setattr(op_module, "CHUNK", chunk)
        torch.manual_seed(3)
        param, states = torch.randn(3000).bfloat16(), fresh(3000)
        for step in (1, 2):
            ops.REFERENCES["adamw8_"](param, torch.randn(3000), *states, *RATES, step, 9)
        found.append((param, *states))
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_what_does_not_fit_is_refused_all_at_once() -> None:
    k, states = module(), fresh(300)
    with pytest.raises(QtuneError, match=r"gradient \[299\].*v scales: 1 .*wanted 2.*step 0"):
        k.adamw8_(torch.zeros(300), torch.zeros(299), *states[:3], states[3][:1], *RATES, 0, 0)
    with pytest.raises(QtuneError, match="must be contiguous"):
        k.adamw8_(torch.zeros(30, 10).t(), torch.zeros(10, 30), *states, *RATES, 1, 0)
    with pytest.raises(QtuneError, match=r"parameter of torch.float64.*m codes"):
        k.adamw8_(torch.zeros(300).double(), torch.zeros(300), states[2][:5], *states[1:], *RATES, 1, 0)


# ---- bitsandbytes and torch


@pytest.fixture
def exact_rounding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bitsandbytes with its default backend's rounding, the nearest value, in place of its CPU library's 65536 bins."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    cpu = pytest.importorskip("bitsandbytes.backends.cpu.ops")

    def store(state: Tensor, code: Tensor, absmax_out: Tensor, out: Tensor, blocksize: int) -> None:
        rows = torch.nn.functional.pad(state.view(-1), (0, -state.numel() % blocksize)).view(-1, blocksize)
        absmax = rows.abs().amax(1)
        scaled = (rows * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1).view(-1)[: state.numel()]
        out.copy_(torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).view(out.shape))
        absmax_out.copy_(absmax)

    if not hasattr(cpu, "_quant_blockwise_fp32_direct"):
        pytest.skip("this bitsandbytes stores its states in another place")
    monkeypatch.setattr(cpu, "_quant_blockwise_fp32_direct", store)
    return bitsandbytes


@pytest.mark.parametrize("n", [1000, 4097, 30001])
def test_equals_bitsandbytes(n: int, exact_rounding: Any) -> None:
    """25 steps: equal codes but where the two orders of operations, an ulp apart, fall on two sides of a midpoint."""
    theirs, ours, states = nn.Parameter(torch.randn(n)), torch.empty(n), fresh(n)
    ours.copy_(theirs.detach())
    optimizer = exact_rounding.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.1, min_8bit_size=0)
    apart = 0
    for step in range(1, 26):
        theirs.grad = torch.randn(n) * 0.1
        torch.ops.qtune.adamw8_(ours, theirs.grad, *states, *RATES, step, 0)
        optimizer.step()
        state = optimizer.state[theirs]
        for mine, other in ((states[0], state["state1"]), (states[2], state["state2"])):
            differ = mine != other.view(-1)
            assert ((mine.int() - other.view(-1).int()).abs() <= 1).all()
            apart += int(differ.sum())
        assert torch.allclose(states[1], state["absmax1"], rtol=1e-2)
    assert apart <= 2e-4 * n * 50
    close = (ours - theirs.detach()).abs() <= 1e-5
    assert close.float().mean() > 0.999
    assert (ours - theirs.detach()).abs().max() < 1e-2


def test_no_second_moment_above_zero_is_stored_as_zero() -> None:
    """Gradients of very different sizes in one block: bitsandbytes' rounding to 0 sends parameters hundreds away."""
    n = 20000
    sizes, ours, states = torch.randn(n).exp(), torch.zeros(n), fresh(n)
    exact = nn.Parameter(torch.zeros(n))
    optimizer = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.0)
    for step in range(1, 61):
        exact.grad = torch.randn(n) ** 3 * sizes
        torch.ops.qtune.adamw8_(ours, exact.grad, *states, *RATES[:4], 0.0, step, 0)
        optimizer.step()
    assert (states[2] > 0).all()
    distance = (ours - exact.detach()).norm() / exact.detach().norm()
    assert distance < 0.15
    assert (ours - exact.detach()).abs().max() < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trains_a_toy_as_well_as_torch(dtype: torch.dtype) -> None:
    """200 steps on a two-layer regression end at nearly the same loss; bf16 has no master."""
    x = torch.randn(256, 64)
    y = torch.tanh(x @ torch.randn(64, 96)) @ torch.randn(96, 8) * 0.1
    starts = torch.randn(64, 128) * 0.1, torch.randn(128, 32) * 0.1, torch.randn(32, 8) * 0.1

    def train(kind: str) -> tuple[float, float]:
        named = [
            (f"w{i}", nn.Parameter(w.clone().to(dtype if kind == "ours" else torch.float32)))
            for i, w in enumerate(starts)
        ]
        weights = [w for _, w in named]
        optimizer: Any = (
            adamw8(named, lr=3e-3, seed=1) if kind == "ours" else torch.optim.AdamW(weights, lr=3e-3, weight_decay=0)
        )
        losses = []
        for _ in range(200):
            a, b, c = (w.float() for w in weights)
            loss = ((torch.tanh(torch.tanh(x @ a) @ b) @ c - y) ** 2).mean()
            loss.backward()
            losses.append(float(loss.detach()))
            if kind == "ours":
                optimizer.step(1.0)
            else:
                optimizer.step()
                optimizer.zero_grad()
        return losses[0], sum(losses[-10:]) / 10

    (first, theirs), (_, ours) = train("torch"), train("ours")
    assert theirs < 0.2 * first
    assert ours < 1.15 * theirs + 0.01 * first


# ---- stochastic rounding


def test_an_update_of_a_thousandth_of_an_ulp_is_right_in_expectation() -> None:
    n, steps = 1 << 16, 64
    ulp = 2.0**-7
    param, states = torch.full((n,), 1.5, dtype=torch.bfloat16), fresh(n)
    for step in range(1, steps + 1):  # constant gradient: every update is lr
        torch.ops.qtune.adamw8_(param, torch.full((n,), -1.0), *states, ulp / 1000, 0.9, 0.999, 1e-8, 0.0, step, step)
    moved = (param.float() - 1.5) / ulp
    assert set(moved.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    expected = steps * round(65536 / 1000) / 65536  # fp32 carries 16 bits below bf16's
    assert abs(float(moved.mean()) - expected) < 5 * (expected / n) ** 0.5
    still = torch.full((n,), 1.5, dtype=torch.bfloat16)
    torch.ops.qtune.adamw8_(still, torch.full((n,), -1.0), *fresh(n), ulp / 1000, 0.9, 0.999, 1e-8, 0.0, 1, 0)
    assert still.eq(1.5).all()


def test_rounding_is_unbiased_for_both_signs_and_its_bits_are_random() -> None:
    n = 1 << 18
    bits = op_module.random_bits(5, 0, n, CPU)
    for bit in range(32):
        assert abs(float(((bits >> bit) & 1).float().mean()) - 0.5) < 5 * 0.5 / n**0.5
    low = (bits & 0xFFFF).float() / 65536 - 0.5
    for lag in (1, 2, 16, 256, 257):
        assert abs(float((low[lag:] * low[:-lag]).mean()) * 12) < 5 / n**0.5
    other = (op_module.random_bits(6, 0, n, CPU) & 0xFFFF).float() / 65536 - 0.5
    assert abs(float((low * other).mean()) * 12) < 5 / n**0.5
    assert torch.equal(op_module.random_bits(5, 512, 1000, CPU), bits[512:1512])
    for value in (1.2345678, -3.3e-5, 1e-39):
        x = torch.full((n,), value)
        up = op_module.round_stochastically(x, bits).double()
        spread = float(up.max() - up.min())
        assert abs(float((up - x.double()).mean())) < 5 * 0.5 * spread / n**0.5 + 1e-3 * spread
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    assert same(op_module.round_stochastically(odd, bits[:5]), odd.bfloat16())


# ---- the optimizers


def model(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    shapes = {"a": (16, 300), "b": (300, 16), "small": (16, 16), "vector": (5000,)}
    return [(name, nn.Parameter(torch.randn(shape).to(dtype))) for name, shape in shapes.items()]


def gradients(named: list[tuple[str, nn.Parameter]]) -> None:
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)


def test_the_optimizer_takes_scales_decay_and_factors_as_adamw_does() -> None:
    torch.manual_seed(4)
    ours = model()
    torch.manual_seed(4)
    theirs = model()
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3, "scales": {"b": 4.0}}
    mine, plain = adamw8(ours, **options), Optimizer(theirs, **options)
    assert mine.parameters == [p for _, p in ours]
    for factor in (1.0, 0.5, 0.1):
        gradients(ours)
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
        mine.step(factor)
        plain.step(factor)
        assert all(p.grad is None for p in mine.parameters)
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        if name == "small":
            assert torch.equal(a, b)  # served by AdamW itself
        assert (a - b).abs().max() < 0.25 * 1e-2 * (4 if name == "b" else 1)
        assert (a - b).norm() < 2e-2 * 1e-2 * (4 if name == "b" else 1) * a.numel() ** 0.5
    large, small = mine.buckets["0"].inner
    assert len(large.state) == 3 and all(state["m"].dtype == torch.uint8 for state in large.state.values())
    assert [tuple(p.shape) for p in small.state] == [(16, 16)]


def test_parameters_without_a_gradient_stay_and_drop_gradients_drops() -> None:
    named = model()
    optimizer = adamw8(named, lr=1e-2, weight_decay=0.5)
    before = [p.detach().clone() for _, p in named]
    named[0][1].grad = torch.ones_like(named[0][1])
    version = named[0][1]._version
    optimizer.step(1.0)
    assert [torch.equal(a, p) for a, (_, p) in zip(before, named, strict=True)] == [False, True, True, True]
    assert named[0][1]._version > version  # a graph that saved it would notice
    gradients(named)
    optimizer.drop_gradients()
    assert all(p.grad is None for _, p in named)
    assert SMALL == 4096
    adamw8(model()[:2], lr=1e-3).step(1.0)  # no small ones
    adamw8(model()[2:3], lr=1e-3).step(1.0)  # no large ones


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_keep_small_updates(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(64, 128, dtype=dtype))
    optimizer = adamw8([("w", weight)], lr=1e-4)
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1.0)
    assert float((1 - weight.detach().float()).mean()) == pytest.approx(0.004, rel=0.1)


def test_runs_are_repeatable_and_seeds_differ() -> None:
    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(1)
        named = model(torch.bfloat16)
        optimizer = adamw8(named, lr=1e-4, seed=seed)
        for _ in range(3):
            gradients(named)
            optimizer.step(1.0)
        return [p.detach() for _, p in named]

    first, again, other = run(1), run(1), run(2)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], other[0])


def test_the_reference_serves_where_no_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for kernel, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16)):
        if not kernel:
            monkeypatch.setattr(backend, "kernel", lambda name, device: None)
        torch.manual_seed(2)
        named = model(dtype)
        optimizer = adamw8(named, lr=1e-3)
        gradients(named)
        optimizer.step(1.0)
        results.append([p.detach() for _, p in named])
    for a, b in ((results[0], results[2]), (results[1], results[3])):
        assert all(same(x, y) for x, y in zip(a, b, strict=True))


def test_adamw_is_fused_where_torch_has_that() -> None:
    for device in ("cpu", "meta"):
        weight = nn.Parameter(torch.empty(8, 8, device=device))
        assert Optimizer([("w", weight)], lr=1e-3).buckets["0"].inner[0].param_groups[0]["fused"]
