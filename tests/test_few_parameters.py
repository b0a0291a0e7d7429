"""Methods with few trained values: each against its paper's equation in float64, its rank and its count; what sites
share and train is updated, saved, planned and streamed as what is a layer's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_adapters import decoder, linear, site, splitmix64
from test_laws import saved
from test_low_memory import adapted as low_memory
from test_low_memory import same, stepped, streamed, theirs
from test_optim import adapted as stepping
from test_optim import batch
from test_planner_trace import CPU, assert_same, refused
from test_planner_trace import made as planned
from torch import Tensor, nn

from qtune.adapters import METHODS, Adapted, AdapterSpec, Source, adapt, adapted_sites
from qtune.adapters.files import load_adapter, save_adapter
from qtune.adapters.loretta import TABLE, dimensions
from qtune.errors import QtuneError
from qtune.memory.boundaries import Boundaries
from qtune.optim import optimizer_of
from qtune.peft import to_peft
from qtune.planner.layers import Pattern
from qtune.planner.step_trace import MetaBatch, planned_trace, step_trace
from qtune.quant import QuantLinear, scheme_from
from qtune.sections import TrainKeys

SHARING = ("tied_lora", "vblora")
SMALL: dict[str, dict[str, Any]] = {
    "lora_xs": {"rank": 5, "alpha": 10.0, "svd": "full"},
    "vblora": {"rank": 3, "length": 8, "vectors": 14, "topk": 3},
    "nola": {"rank": 3, "basis": 7, "alpha": 6.0, "seed": 4},
    "tied_lora": {"rank": 3, "alpha": 6.0},
    "loretta": {"rank": 4, "tensor_rank": 3, "alpha": 8.0},
    "melora": {"rank": 2, "minis": 5, "alpha": 6.0},
    "aflora": {"rank": 3},
}
RANKS = {  # as the papers state them
    "lora_xs": 5, "vblora": 3, "nola": 3, "tied_lora": 3, "loretta": 4, "melora": 10, "aflora": 3,
}  # fmt: skip
OUT, IN = 33, 76


# ---- the equations, in float64, from the papers


def of_lora_xs(s: Any, base: QuantLinear) -> Tensor:
    u, values, vh = torch.linalg.svd(base.before.double())
    top = u[:, :5] * values[:5] @ vh[:5]
    torch.testing.assert_close(s["B"] @ s["A"], top, rtol=0, atol=1e-5)
    torch.testing.assert_close(s["A"] @ s["A"].T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
    return 2.0 * s["B"] @ s["R"] @ s["A"]


def of_vblora(s: Any, base: QuantLinear) -> Tensor:
    def piece(logits: Tensor) -> Tensor:
        best = sorted(range(14), key=lambda i: -float(logits[i]))[:3]
        weights = [float(logits[i].exp()) for i in best]
        return sum(w / sum(weights) * s["bank.vectors"][i] for w, i in zip(weights, best, strict=True))

    A = torch.stack([torch.cat([piece(logits) for logits in row])[:IN] for row in s["logits_A"]])
    columns = [torch.cat([piece(logits) for logits in column])[:OUT] for column in s["logits_B"].transpose(0, 1)]
    return torch.stack(columns, 1) @ A


def of_nola(s: Any, base: QuantLinear) -> Tensor:
    def basis(i: int, rows: int, columns: int, seed: int) -> Tensor:
        """Four numbers of 16 bits from each word of the published generator, the lowest first."""
        words = -(-rows * columns // 4)
        numbers = []
        for word in range(i * words + 1, (i + 1) * words + 1):
            bits = splitmix64((seed << 40) + word)
            for k in range(4):
                value = bits >> 16 * k & 0xFFFF
                numbers.append((value - (value >> 15 << 16) + 0.5) / 2**15)
        return torch.tensor(numbers[: rows * columns], dtype=torch.float64).view(rows, columns) / 7**0.5

    A = sum(s["a"][i] * basis(i, 3, IN, 8) for i in range(7))
    B = sum(s["b"][i] * basis(i, OUT, 3, 9) for i in range(7))
    return 2.0 * B @ A


def of_tied_lora(s: Any, base: QuantLinear) -> Tensor:
    return 2.0 * s["v"].diag() @ s["tied.B"] @ s["u"].diag() @ s["tied.A"]


def of_loretta(s: Any, base: QuantLinear) -> Tensor:
    def train(name: str, width: int) -> Tensor:
        cores = [s[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in s))]
        values = []
        for place in range(width * 4):
            product, rest = torch.ones(1, 1, dtype=torch.float64), width * 4
            for core in cores:
                rest //= core.shape[1]
                product = product @ core[:, place // rest % core.shape[1]]
            values.append(product[0, 0])
        return torch.stack(values).view(width, 4)

    return 2.0 * train("B", OUT) @ train("A", IN).T


def of_melora(s: Any, base: QuantLinear) -> Tensor:
    delta = torch.zeros(OUT, IN, dtype=torch.float64)
    widths = [[16, 15, 15, 15, 15], [7, 7, 7, 6, 6]]
    for i in range(5):
        columns, rows = (slice(sum(w[:i]), sum(w[: i + 1])) for w in widths)
        delta[rows, columns] = 3.0 * s["B"][rows] @ s["A"][:, columns]
    return delta


def of_aflora(s: Any, base: QuantLinear) -> Tensor:
    return s["b"].diag() @ s["B"] @ s["d"].diag() @ s["A"]


EQUATIONS: dict[str, Callable[[Any, QuantLinear], Tensor]] = {
    "lora_xs": of_lora_xs, "vblora": of_vblora, "nola": of_nola, "tied_lora": of_tied_lora, "loretta": of_loretta,
    "melora": of_melora, "aflora": of_aflora,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("method", EQUATIONS)
def test_the_update_is_the_papers_and_of_its_rank(method: str) -> None:
    torch.manual_seed(0)
    one = site(method, linear(OUT, IN, "up_proj", bias=True), **SMALL[method])
    state = {name: value.double() for name, value in one.adapter.state_dict().items()}
    delta = EQUATIONS[method](state, one.base)
    x = torch.randn(3, 5, IN)
    expected = x.double() @ (one.base.dequantize().double() + delta).T + one.base.bias.double()
    torch.testing.assert_close(one(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    values = torch.linalg.svdvals((one.merged()[0] - one.base.dequantize()).double())
    assert int((values > 1e-4 * values[0]).sum()) == RANKS[method]


@pytest.mark.parametrize("method", EQUATIONS)
def test_the_first_gradient_goes_where_it_should(method: str) -> None:
    """Also where the update begins as zero: something learns, and what multiplies a zero does not."""
    model = nn.Module()
    model.layer = base = linear(OUT, IN, "layer")
    options = SMALL[method] | ({"topk": 2} if method == "vblora" else {})  # v and -v are zero to the last bit
    adapt(model, AdapterSpec(method, ("layer",), options), {"layer": Source(base.before)})
    model.layer(torch.randn(4, IN)).square().sum().backward()
    moved = {name for name, p in model.layer.adapter.named_parameters() if p.grad is not None and p.grad.any()}
    first = {
        "lora_xs": {"R"}, "vblora": {"logits_B", "bank.vectors"}, "nola": {"b"}, "tied_lora": {"tied.B"},
        "loretta": {f"B.{len(dimensions(OUT, 4, 3)) - 1}"}, "melora": {"B"},
        "aflora": {"b"},
    }  # fmt: skip
    assert moved == first[method]


# ---- how many values


def count(adapter: nn.Module) -> int:
    return sum(p.numel() for p in adapter.parameters() if p.requires_grad)


def on_meta(out: int, width: int, method: str, **options: Any) -> nn.Module:
    base = QuantLinear(width, out, scheme_from("nf4"), bias=False, dtype=torch.bfloat16, device="meta")
    shared = METHODS[method].shared([base], **options)
    return METHODS[method](base, **options, **({} if shared is None else {"shared": shared}))


def test_counts_are_those_of_the_papers() -> None:
    assert count(on_meta(4096, 4096, "lora_xs", rank=64, alpha=64.0)) == 64**2
    assert count(on_meta(11008, 4096, "nola", basis=1000)) == 2000
    for out, width in ((4096, 4096), (11008, 4096), (1027, 771)):
        assert count(on_meta(out, width, "melora", rank=8, minis=8)) == count(on_meta(out, width, "lora", rank=8))
        assert count(on_meta(out, width, "tied_lora", rank=8)) == 8 * (out + width) + 8 + out
    # h vectors of length b, and for each piece of b values of A and B one logit a vector
    assert count(on_meta(4096, 1024, "vblora")) == 256 * 256 + 4 * (4096 + 1024) // 256 * 256
    # LoRETTA_rep: 1K where LoRA has 12K (figure 3); 0.51M on Llama 2 7B's q and v, with its 65 norms
    assert count(on_meta(768, 768, "loretta", rank=8, tensor_rank=5)) == 1160
    q_and_v = 64 * count(on_meta(4096, 4096, "loretta", rank=8, tensor_rank=8))
    assert q_and_v == 64 * 2 * 1952 and q_and_v + 65 * 4096 == 516_096


def test_what_is_shared_is_counted_once(tmp_path: Path) -> None:
    for method, expected in {
        # rank (in + out) for each size of layer; rank + out at each site
        "tied_lora": 3 * (16 + 16 + 16 + 8 + 8 + 16) + 3 * (3 * 3 + 16 + 8 + 16),
        # the bank; for each site the pieces of 8 that are in its sizes
        "vblora": 14 * 8 + 3 * 3 * 14 * (2 + 2 + 1 + 2 + 2 + 1),
    }.items():
        model = decoder()
        spec = AdapterSpec(method, (), SMALL[method])
        adapt(model, spec)
        assert count(model) == expected
        save_adapter(model, spec, tmp_path / method, {})
        assert json.loads((tmp_path / method / "adapter.json").read_text())["parameters"] == expected
        tensors = load_file(tmp_path / method / "adapter.safetensors")
        assert sum(value.numel() for value in tensors.values()) == expected
        other = decoder()
        load_adapter(other, tmp_path / method)
        assert count(other) == expected
        with torch.no_grad():
            next(other.adapter_shared.parameters()).add_(1.0)
        again = adapted_sites(other)["layers.2.q_proj"].adapter
        owned = {id(p) for p in again.parameters()} & {id(p) for p in other.adapter_shared.parameters()}
        assert owned, "after loading the sites hold what they share"


# ---- LoRETTA's shapes, NOLA's parts


def test_tensor_trains_fit_every_width_and_keep_the_rank() -> None:
    for (width, rank), shape in TABLE.items():
        assert torch.Size(shape).numel() == width * rank
    for width in (1, 2, 7, 33, 64, 97, 576, 1536, 4864, 11008, 14336):
        for rank, tensor_rank in ((1, 1), (3, 5), (8, 5), (8, 2), (16, 5), (13, 3)):
            shape = dimensions(width, rank, tensor_rank)
            assert torch.Size(shape).numel() == width * rank, (width, rank)
            assert shape[-1] // rank * tensor_rank >= min(rank, width) or (width, rank) in TABLE
    assert dimensions(4864, 8, 5) == (19, 16, 8, 16)


def test_the_ranks_that_shapes_allow() -> None:
    """The authors' cut some down: 768 and 8 lie in different cores of (8, 8, 12, 8), which share five ranks."""
    for width, rank, found in ((4096, 8, 8), (768, 8, 5), (768, 16, 10), (576, 8, 8), (1536, 32, 32), (97, 8, 8)):
        base = linear(8, width)
        adapter = METHODS["loretta"](base, rank=rank, tensor_rank=5)
        adapter.reset(base)
        A = adapter.factors(torch.float64)[0]
        assert torch.linalg.matrix_rank(A) == found, (width, rank)
        assert 0.5 < float(A.std() * (3 * width) ** 0.5) < 2, "as large as LoRA's"


def test_nola_keeps_no_basis_and_makes_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one = site("nola", linear(OUT, IN), rank=4, basis=64)
    x = torch.randn(3, IN, requires_grad=True)
    found = []
    for part in (1 << 20, 1000):
        monkeypatch.setattr("qtune.adapters.nola.PART", part)
        with saved() as tensors:
            y = one(x)
        assert max(t.numel() for t in tensors) <= one.base.packed.numel()
        assert sum(t.numel() for t in tensors) < one.base.packed.numel() + 64 * 4 + 20 * (OUT + IN)
        found.append([y, *torch.autograd.grad(y.square().sum(), [one.adapter.a, one.adapter.b])])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5 * float(first.abs().max()))
    assert METHODS["nola"](linear(20, 12), seed=1).factors(torch.float32)[0].shape == (8, 12)


def test_vblora_starts_in_groups_that_sum_to_zero() -> None:
    for topk in (2, 3):
        base = linear(40, 24)
        bank = METHODS["vblora"].shared([base], vectors=20, length=8, topk=topk, seed=1)
        values = bank.vectors[: 20 // topk * topk].view(-1, topk, 8)
        assert values.sum(1).abs().max() < 1e-8
        assert 0.008 < values.std() < 0.016, "U(-0.02, 0.02) has 0.0115"
        adapter = METHODS["vblora"](base, shared=bank, vectors=20, length=8, topk=topk, seed=1)
        adapter.reset(base)
        places = adapter.logits_B.topk(topk, dim=-1).indices
        assert (places // topk == places[..., :1] // topk).all(), "one group"
        assert places[..., 0].unique().numel() > 1, "not the same everywhere"
        again = METHODS["vblora"].shared([base], vectors=20, length=8, topk=topk, seed=1)
        other = METHODS["vblora"].shared([base], vectors=20, length=8, topk=topk, seed=2)
        assert torch.equal(bank.vectors, again.vectors) and not torch.equal(bank.vectors, other.vectors)


# ---- what is refused


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora_xs", {"rank": 34, "alpha": 1.0}, "adapter.rank 34 is beyond a layer of 33 x 76; legal: 1 to 33"),
        ("lora_xs", {"svd": "slow"}, "adapter.svd"),
        ("vblora", {"topk": 1}, "adapter.topk must be 2 to adapter.vectors .256., not 1"),
        ("vblora", {"length": 0, "logit_rate": 0.0}, "adapter.length must be at least 1.*logit_rate must be above 0"),
        ("nola", {"basis": 0, "dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0.*basis must be at"),
        ("nola", {"seed": 1 << 22}, "adapter.seed must be 0 to 4194303, not 4194304"),
        ("tied_lora", {"alpha": 0.0}, "adapter.alpha must be above 0"),
        ("loretta", {"tensor_rank": 0}, "adapter.tensor_rank must be at least 1"),
        ("melora", {"rank": 2, "minis": 17}, "adapter.minis 17 is beyond a layer of 33 x 76; legal: 1 to 16"),
        ("melora", {"rank": 34}, "adapter.minis 4 is beyond a layer of 33 x 76; there is no legal one"),
    ],
)
def test_faults_are_told(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QtuneError, match=message):
        site(method, linear(OUT, IN), **options)


def test_a_length_that_divides_no_size_has_no_form_in_peft(tmp_path: Path) -> None:
    model = decoder()
    spec = AdapterSpec("vblora", ("layers.1.v_proj",), {"length": 6})
    adapt(model, spec)
    with pytest.raises(QtuneError, match="adapter.length divides, and 6 does not divide 8 x 16: merge instead"):
        to_peft(model, spec, tmp_path, "base")


# ---- what sites share, in a step


@pytest.mark.parametrize("method", SHARING)
def test_the_gradient_of_what_is_shared_is_the_sum_over_sites(method: str) -> None:
    model = decoder()
    adapt(model, AdapterSpec(method, ("q_proj",), SMALL[method]))
    sites: list[Adapted] = list(adapted_sites(model).values())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    shared = list(model.adapter_shared.parameters())
    x = torch.randn(4, 16)
    apart = [torch.autograd.grad(one(x).square().sum(), shared) for one in sites]
    together = torch.autograd.grad(torch.stack([one(x).square().sum() for one in sites]).sum(), shared)
    for parts, whole in zip(zip(*apart, strict=True), together, strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-4, atol=1e-4)


def test_the_logits_learn_faster_than_the_bank() -> None:
    model = decoder()
    adapt(model, AdapterSpec("vblora", (), SMALL["vblora"]))
    optimizer = optimizer_of(model, TrainKeys())
    scales = {
        optimizer.names[parameter].rpartition(".")[2]: group["scale"]
        for bucket in optimizer.buckets.values()
        for inner in bucket.inner
        for group in inner.param_groups
        for parameter in group["params"]
    }
    assert scales == {"vectors": 1.0, "logits_A": 10.0, "logits_B": 10.0}


@pytest.mark.parametrize("method", SHARING)
def test_an_update_in_the_backward_waits_for_what_is_shared(method: str, tmp_path: Path) -> None:
    results = []
    for early in (False, True):
        keys = TrainKeys(clip=None, checkpointing=True, update_in_backward=early, lr=1e-3)
        step = stepping(tmp_path / "m", keys, method, torch.float32)
        assert len(step.optimizer.buckets) == (3 if early else 1), "two layers, and what they share"
        done = [step([batch()], n, 3, 1.0) for n in (1, 2, 3)]
        results.append((done, [p.detach() for p in step.optimizer.parameters]))
    (plain, stay), (early_, moved) = results
    assert [r.loss for r in plain] == [r.loss for r in early_]
    assert all(torch.equal(a, b) for a, b in zip(stay, moved, strict=True))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("method", SHARING)
def test_recomputed_and_streamed_layers_give_the_shared_the_same_bits(method: str, tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)

    def stirred(model: Any) -> Any:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += (0.1 * torch.randn(parameter.shape, generator=draw)).to(parameter)
        return model

    want = stepped(stirred(low_memory(tmp_path, method=method)), theirs)
    names = [name for name in want[1] if "tied." in name or "bank." in name]
    assert names and all(want[1][name].dtype == torch.float32 for name in names)
    recomputed = stepped(stirred(low_memory(tmp_path, method=method)), lambda one: one.checkpointing(Boundaries()))
    assert recomputed[0] == want[0]
    for name, value in want[1].items():  # summed over layers in another order
        torch.testing.assert_close(recomputed[1][name], value, rtol=0, atol=1e-5 * float(value.abs().max()))
    model = stirred(streamed(tmp_path, "slots from host", method))
    assert same(stepped(model, lambda one: one.checkpointing(Boundaries())), recomputed)


MODES = [
    {"checkpointing": False},
    {"accumulate": 2},
    {"clip": None, "update_in_backward": True},
    {"optimizer": "adamw8", "checkpointing": False, "accumulate": 2},
]


def train_in_parts(keys: dict[str, Any]) -> bool:
    """Is what one layer does with a shared gradient undone by a layer far away?"""
    return "update_in_backward" in keys or ("accumulate" in keys and "checkpointing" in keys)


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        (m, keys) if not i else pytest.param(m, keys, marks=pytest.mark.slow)
        for i, keys in enumerate(MODES)
        for m in SHARING
    ],
)
def test_few_layers_that_share_are_planned_as_all(
    method: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not train_in_parts(keys):  # else all layers are traced, which is exact and takes longer
        monkeypatch.setattr(Pattern, "whole", refused)
    one, train = MetaBatch.of(1, 48), TrainKeys(**keys)
    got, whole = planned_trace(lambda: planned(layers=6, method=method), train, one, CPU)
    want, _ = step_trace(planned(layers=6, method=method), train, [one] * train.accumulate, CPU)
    assert_same(got, want)
    if train.update_in_backward:
        return
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert {got.names[b] for b, kind in enumerate(got.kinds) if kind == "gradients"} == trained
