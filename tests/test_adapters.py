"""What is special about single methods, finding sites and starts. What holds for all methods is in test_laws."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from runs_helper import other_scheme
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.adapters import METHODS, Adapted, Adapter, AdapterSpec, Source, adapt, adapted_sites, find_sites
from qtune.adapters.base import recompute
from qtune.adapters.sites import build
from qtune.adapters.vera import hashed_uniform
from qtune.errors import QtuneError
from qtune.quant import Dense, QuantLinear, Scheme, scheme_from

FP32 = Dense("float32")


def linear(
    out: int, width: int, name: str = "", scheme: Scheme = FP32, bias: bool = False, **kwargs: Any
) -> QuantLinear:
    layer = QuantLinear(width, out, scheme, bias=bias, dtype=kwargs.pop("dtype", torch.float32), name=name, **kwargs)
    layer.before = torch.randn(out, width) / width**0.5
    layer.set_weight(layer.before)
    if layer.bias is not None:
        layer.bias.data.normal_()
    return layer


class Block(nn.Module):
    def __init__(self, at: str, scheme: Scheme = FP32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj = linear(16, 16, f"{at}.q_proj", scheme, bias=True, dtype=dtype)
        self.v_proj = linear(8, 16, f"{at}.v_proj", scheme, dtype=dtype)
        self.down_proj = linear(16, 8, f"{at}.down_proj", scheme, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.down_proj(self.v_proj(x))


def decoder(scheme: Scheme = FP32, seed: int = 0, layers: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Module()
    model.layers = nn.Sequential(*(Block(f"layers.{i}", scheme, dtype) for i in range(layers)))
    model.lm_head = linear(20, 16, "lm_head", scheme, dtype=dtype)
    return model


def site(method: str, base: QuantLinear, **options: Any) -> Adapted:
    """One adapter on one layer, stirred."""
    model = nn.Module()
    model.layer = base
    source = Source(base.before, torch.eye(base.in_features))
    adapted = adapt(model, AdapterSpec(method, ("layer",), options), {"layer": source})["layer"]
    with torch.no_grad():
        for p in adapted.adapter.parameters():
            p += 0.3 * torch.randn_like(p)
    return adapted


# ---- methods


def test_all_methods_of_the_first_issue_are_there() -> None:
    assert {"lora", "dora", "ia3", "vera", "hira", "hra"} <= set(METHODS)


def test_lora_scale_and_learning_rates() -> None:
    base = linear(6, 5)
    assert METHODS["lora"](base, rank=4, alpha=6.0).scale == 1.5
    assert METHODS["lora"](base, rank=4, alpha=6.0, rslora=True).scale == 3.0
    assert METHODS["lora"](base).lr_scale() == {}
    assert METHODS["lora"](base, plus=16.0).lr_scale() == {"B": 16.0}
    assert METHODS["dora"](base, plus=16.0).lr_scale() == {"B": 16.0}


def test_lora_dropout_acts_in_training_only() -> None:
    adapted = site("lora", linear(6, 5), dropout=0.5)
    x = torch.randn(3, 5)
    assert not torch.equal(adapted.train()(x), adapted(x))
    assert torch.equal(adapted.eval()(x), adapted(x))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_doras_norm_is_that_of_the_dense_sum(scheme: str) -> None:
    adapted = site("dora", linear(24, 40, scheme=scheme_from(scheme), bias=True), rank=4)
    adapter, base = adapted.adapter, adapted.base
    dense = base.dequantize() + adapter.scale * adapter.B @ adapter.A
    torch.testing.assert_close(adapter.norm(base, torch.float32), dense.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(adapter.norm(base, torch.bfloat16), dense.norm(dim=1), rtol=2e-2, atol=0)


def test_doras_gradient_counts_the_norm_as_constant() -> None:
    adapted = site("dora", linear(7, 9, bias=True), rank=2)
    adapter, base = adapted.adapter, adapted.base
    x, g = torch.randn(4, 9), torch.randn(4, 7)
    A, B, m = (p.detach().double().requires_grad_() for p in (adapter.A, adapter.B, adapter.magnitude))
    W = base.dequantize().double() + adapter.scale * B @ A
    y = F.linear(x.double(), (m / W.norm(dim=1).detach()).unsqueeze(1) * W, base.bias.double())
    expected = torch.autograd.grad((y * g).sum(), (A, B, m))
    ours = adapted(x)
    torch.testing.assert_close(ours.double(), y, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad((ours * g).sum(), (adapter.A, adapter.B, adapter.magnitude))
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-5)


def test_dora_survives_a_row_of_zeros() -> None:
    base = linear(4, 8)
    base.set_weight(base.dequantize().index_fill_(0, torch.tensor([2]), 0.0))
    model = nn.Module()
    model.layer = base
    adapted = adapt(model, AdapterSpec("dora", ("layer",)))["layer"]
    x = torch.randn(3, 8)
    assert torch.equal(adapted(x), base(x))
    adapted(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapted.adapter.parameters())


def test_values_near_one_stay_fp32_on_a_bf16_model() -> None:
    base = linear(6, 8, dtype=torch.bfloat16)
    assert METHODS["dora"](base).magnitude.dtype == METHODS["ia3"](base).scale.dtype == torch.float32
    assert METHODS["dora"](base).A.dtype == torch.bfloat16
    for method in ("dora", "ia3"):  # a change of 0.3 % is below half of bf16's step at 1, but reaches the output
        model = nn.Module()
        model.layer = linear(6, 8, dtype=torch.bfloat16)
        adapted = adapt(model, AdapterSpec(method, ("layer",)))["layer"]
        vector = adapted.adapter.magnitude if method == "dora" else adapted.adapter.scale
        x = torch.randn(2000, 8).bfloat16()
        before = adapted(x)
        vector.data *= 1.003
        after = adapted(x).double()
        assert 1.002 < after.abs().sum() / before.double().abs().sum() < 1.004, method


def test_ia3_scales_the_side_that_its_pattern_says() -> None:
    x = torch.randn(3, 8)
    for name, options, on_inputs in (
        ("a.k_proj", {}, False),
        ("a.down_proj", {}, True),
        ("h.0.mlp.c_proj", {}, True),
        ("h.0.attn.c_proj", {}, False),
        ("a.k_proj", {"feedforward": ("*.k_*",)}, True),
        ("a.down_proj", {"feedforward": ()}, False),
    ):
        base = linear(6, 8, name, bias=True)
        adapter = METHODS["ia3"](base, **options)
        adapter.scale.data.uniform_(0.5, 2)
        assert adapter.scale.shape == ((8,) if on_inputs else (6,)), name
        expected = base(x * adapter.scale) if on_inputs else base(x) * adapter.scale
        torch.testing.assert_close(adapter(x, base), expected)


def test_ia3_goes_where_the_paper_puts_it() -> None:
    model = decoder()
    for block in model.layers:
        block.k_proj = linear(8, 16)
    assert {n.rsplit(".")[-1] for n in adapt(model, AdapterSpec("ia3"))} == {"k_proj", "v_proj", "down_proj"}


def test_vera_shares_one_storage() -> None:
    model = decoder(dtype=torch.bfloat16)
    sites = adapt(model, AdapterSpec("vera", ("all-linear",), {"rank": 32}))
    model = copy.deepcopy(model).float()
    matrices = {
        (a.shared_state.A.data_ptr(), a.shared_state.B.data_ptr())
        for a in (s.adapter for s in adapted_sites(model).values())
    }
    assert len(matrices) == 1
    assert {tuple(s.adapter.projections(s.base, torch.float32)[0].shape) for s in sites.values()} == {(32, 16), (32, 8)}
    assert {tuple(s.adapter.projections(s.base, torch.float32)[1].shape) for s in sites.values()} == {(16, 32), (8, 32)}
    assert not [name for name in model.state_dict() if name.endswith((".A", ".B"))], "what a seed gives is not saved"
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        32 + s.base.out_features for s in sites.values()
    )


def splitmix64(state: int) -> int:
    """The published generator, in Python's integers."""
    mask = (1 << 64) - 1
    z = (state * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_veras_projections_are_the_same_everywhere() -> None:
    assert splitmix64(1) == 0xE220A8397B1DCDAF, "the first output for seed 0, as published"
    for seed in (0, 3):
        values = hashed_uniform((4, 5), seed, torch.device("cpu"))
        expected = [((splitmix64((seed << 40) + i) >> 40) - 2**23) / 2**23 for i in range(1, 21)]
        assert values.flatten().tolist() == expected
    values = hashed_uniform((200, 500), 1, torch.device("cpu"))
    assert abs(values.mean()) < 0.01
    assert abs(values.var() - 1 / 3) < 0.01
    assert values.unique().numel() > 99_000
    bound = (6 / 32) ** 0.5
    B = METHODS["vera"].shared([linear(300, 20)], rank=32).B
    assert 0.98 * bound < B.max() <= bound


def test_a_seed_of_any_size_gives_numbers() -> None:
    """The hash has 64 bits: what is beyond them wraps around."""
    one, other = (hashed_uniform((4, 5), 2 * seed, torch.device("cpu")) for seed in (2**22, 2**31 + 1))
    assert one.isfinite().all() and other.abs().max() < 1 and not torch.equal(one, other)


def test_veras_projections_depend_on_the_seed() -> None:
    bases = [linear(6, 8)]
    first, second, again = (METHODS["vera"].shared(bases, rank=4, seed=s) for s in (0, 1, 0))
    assert torch.equal(first.A, again.A)
    assert not torch.equal(first.A, second.A)
    assert not torch.equal(first.B, second.A.T[:6])


def test_hira_is_the_elementwise_product() -> None:
    adapted = site("hira", linear(12, 10, bias=True), rank=2)
    A, B, W = adapted.adapter.A, adapted.adapter.B, adapted.base.dequantize()
    x = torch.randn(4, 10)
    torch.testing.assert_close(adapted(x), F.linear(x, W * (1 + B @ A), adapted.base.bias))
    assert torch.linalg.matrix_rank(adapted.merged()[0] - W) > 2


def test_recompute_runs_again_in_the_backward_and_keeps_nothing() -> None:
    calls = []

    def square(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x.exp().square()

    x = torch.randn(3, requires_grad=True)
    y = recompute(square, x)
    assert len(calls) == 1
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert len(calls) == 2
    torch.testing.assert_close(grad, 2 * (2 * x).exp())


@pytest.mark.parametrize("rank", [2, 8, 24])
def test_hra_is_the_chain_of_reflections(rank: int) -> None:
    adapted = site("hra", linear(7, 11, bias=True), rank=rank)
    chain = torch.eye(11, dtype=torch.float64)
    for u in adapted.adapter.u.double():
        chain = chain @ (torch.eye(11) - 2 * torch.outer(u, u) / u.dot(u))
    x = torch.randn(5, 11)
    expected = F.linear(x.double(), adapted.base.dequantize().double() @ chain, adapted.base.bias.double())
    torch.testing.assert_close(adapted(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_hra_starts_in_equal_pairs() -> None:
    adapter = METHODS["hra"](linear(7, 11), rank=6)
    adapter.reset(linear(7, 11))
    assert torch.equal(adapter.u[::2], adapter.u[1::2])
    assert adapter.u[::2].unique(dim=0).shape[0] == 3


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {"rank": 0, "dropout": 1.0, "alpha": 0.0}, "rank must be at least 1.*dropout.*not 1.0.*alpha must"),
        ("lora", {"plus": -1.0}, "adapter.plus must be above 0, not -1.0"),
        ("lora", {"rank": 4.0}, "adapter.rank must be an int like 16, not 4.0"),
        ("lora", {"rank": True}, "adapter.rank must be an int like 16, not True"),
        ("hra", {"rank": 3}, r"rank of hra must be even \(2, 4, 6, .*not 3"),
        ("hra", {"rank": -1}, "rank must be at least 1, not -1"),
        ("vera", {"dropout": -0.1, "seed": -2}, "dropout must be at least 0.*seed must be at least 0, not -2"),
        ("ia3", {"feedforward": "down_proj"}, "feedforward must be a tuple like"),
        ("ia3", {"rank": 3}, "adapter method ia3 has no option 'rank'; legal: feedforward"),
        ("lore", {}, r"unknown adapter method 'lore' \(did you mean 'lora'\?\); legal: .*dora, "),
    ],
)  # fmt: skip
def test_wrong_options(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QtuneError, match=message):
        AdapterSpec(method, (), options).checked()


# ---- sites and starts


def test_find_sites() -> None:
    model = decoder()
    assert len(find_sites(model, ["all-linear"])) == 9, "the head is left out"
    assert list(find_sites(model, ["v_proj", "layers.0.*"])) == [
        "layers.0.q_proj", "layers.0.v_proj", "layers.0.down_proj", "layers.1.v_proj", "layers.2.v_proj",
    ]  # fmt: skip
    assert list(find_sites(model, ["layers.1.q_proj"])) == ["layers.1.q_proj"]
    assert list(find_sites(model, ["lm_head"])) == ["lm_head"]
    with pytest.raises(
        QtuneError, match="'proj', 'o_proj' match no packed.*legal: all-linear, down_proj, lm_head, q_proj, v_proj"
    ):
        find_sites(model, ["proj", "q_proj", "o_proj"])


def test_a_second_adapter_is_refused() -> None:
    model = decoder()
    adapt(model, AdapterSpec("lora"))
    with pytest.raises(QtuneError, match="already carries an adapter"):
        adapt(model, AdapterSpec("hra"))


def test_first_values_depend_on_seed_and_name_only() -> None:
    def values(targets: tuple[str, ...], seed: int, layers: int = 3) -> dict[str, Tensor]:
        sites = adapt(decoder(layers=layers), AdapterSpec("lora", targets), seed=seed)
        return {name: s.adapter.A.detach() for name, s in sites.items()}

    every, few, other = (
        values(("all-linear",), 0),
        values(("v_proj", "q_proj"), 0, layers=2),
        values(("all-linear",), 1),
    )
    assert all(torch.equal(every[name], value) for name, value in few.items())
    assert not torch.equal(every["layers.0.q_proj"], every["layers.1.q_proj"])
    assert not torch.equal(every["layers.0.q_proj"], other["layers.0.q_proj"])


def test_a_start_leaves_the_random_state() -> None:
    model = decoder()
    before = torch.get_rng_state()
    adapt(model, AdapterSpec("hra"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_start_leaves_the_generators_of_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seeded = decoder(), list[int]()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    adapt(model, AdapterSpec("lora"))
    assert not seeded


class _Draws(TorchDispatchMode):
    """The devices on which random numbers are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if torch.Tag.nondeterministic_seeded in func.tags:
            drawn = kwargs["device"] if kwargs and "device" in kwargs else args[0].device
            self.devices.append(drawn.type)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_start_is_drawn_on_the_cpu(method: str) -> None:
    """The model is on meta, which stands for any device: a seed must not mean other values on a GPU."""
    spec, scheme = AdapterSpec(method), scheme_from(other_scheme(method).get("scheme", "nf4"))
    base = QuantLinear(64, 96, scheme, bias=True, dtype=torch.float32, device="meta", name="up_proj")
    sites, _ = build({"up_proj": base}, spec)
    weight, gram = (torch.empty(shape, device="meta") for shape in ((96, 64), (64, 64)))
    with _Draws() as draws:
        sites["up_proj"].adapter.reset(base, Source(weight, gram))
    assert set(draws.devices) <= {"cpu"}
    if not spec.needs():  # a start from the weight may have nothing random in it
        real = linear(96, 64, "up_proj", scheme=scheme)
        one, other = (started(real, spec, seed) for seed in (0, 1))
        assert bool(draws.devices) == any(not torch.equal(one[name], other[name]) for name in one)


def started(base: QuantLinear, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
    """The first values of an adapter on one layer."""
    model = nn.Module()
    model.up_proj = base
    return adapt(model, AdapterSpec(spec.method, ("up_proj",)), seed=seed)["up_proj"].adapter.state_dict()


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].mergeable])
def test_a_merge_is_fp32_under_any_default_dtype(method: str) -> None:
    scheme = scheme_from(other_scheme(method).get("scheme", "nf4"))
    adapted = site(method, linear(48, 64, bias=True, scheme=scheme))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert adapted.merged()[0].dtype == torch.float32
        assert Adapter.merged(adapted.adapter, adapted.base)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_spec_survives_json() -> None:
    spec = AdapterSpec("ia3", ("v_proj", "down_proj"), {"feedforward": ("down_proj",)})
    assert AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert AdapterSpec.from_dict({"targets": "q_proj, v_proj", "rank": 4}) == AdapterSpec(
        "lora", ("q_proj", "v_proj"), {"rank": 4}
    )
