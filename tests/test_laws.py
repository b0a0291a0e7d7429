"""The laws that every method keeps on every scheme, generated from the registries: a new file is tested by existing.

Each law is a function of a Case. test_laws_can_fail runs every law on an adapter that breaks it: none is empty.
Not slow: every method on a packed and on a dense base, every scheme under a method that multiplies with the base and
under one that unpacks it. Everything else of the product of laws, methods and schemes is slow.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qtune.adapters import METHODS, Adapted, Adapter, AdapterSpec, Source, adapt, adapted_sites, enable_adapters
from qtune.adapters.files import load_adapter, save_adapter
from qtune.adapters.sites import SHARED
from qtune.errors import QtuneError
from qtune.quant import SCHEMES, Dense, QuantLinear, Scheme

SHIPPED = sorted(METHODS)  # read before this file adds its broken ones
IN, MIDDLE, OUT = 76, 96, 33  # there are Hadamard matrices of 76 and 96; no block of 64 and no group of 32 divides 76
TOKENS = 5
SAMPLES = 4 * MIDDLE  # calibration inputs: enough for second moments of full rank
SMALL = {"rank": 4, "slices": 2}  # options that such narrow layers have room for
TARGETS = ("up_proj", "down_proj")  # ia3 scales the outputs of one and the inputs of the other


class Tiny(nn.Module):
    """x [..., 76] -> up [96], with bias -> tanh, times a gain -> down [33], without."""

    def __init__(self, scheme: Scheme, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.up_proj = QuantLinear(IN, MIDDLE, scheme, bias=True, name="up_proj", **like)
        self.down_proj = QuantLinear(MIDDLE, OUT, scheme, bias=False, name="down_proj", **like)
        self.gain = nn.Parameter(torch.ones(MIDDLE, **like))
        self.weights: dict[str, Tensor] = {}  # before packing, as a checkpoint in `dtype` has them
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for name, layer in (("up_proj", self.up_proj), ("down_proj", self.down_proj)):
                self.weights[name] = (torch.randn(layer.shape) / layer.in_features**0.5).to(**like)
            if device != "meta":
                self.up_proj.bias.data.normal_()
        for name, weight in self.weights.items():
            layer = self.get_submodule(name)
            layer.set_weight(weight)
            layer.own = False

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)) * self.gain.to(x.dtype))


@dataclass
class Case:
    """One cell: a method with small options on a scheme."""

    method: str
    scheme: str
    tmp: Path
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        legal = METHODS[self.method].options()
        self.options = {name: value for name, value in SMALL.items() if name in legal}

    def refused(self) -> str:
        """Why the method makes no sense on the scheme, or nothing."""
        return METHODS[self.method].refuses(self.packing(), self.spec().resolved())

    def packing(self) -> Scheme:
        return Dense("float32") if self.scheme == "dense" else SCHEMES[self.scheme]()

    def spec(self, **options: Any) -> AdapterSpec:
        return AdapterSpec(self.method, TARGETS, {**self.options, **options})

    def model(
        self, stirred: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
    ) -> Tiny:
        """An adapted model; stirred: as if trained, far from its start."""
        model = Tiny(self.packing(), dtype, device)
        spec = self.spec(**options)
        adapt(model, spec, sources(model, spec))
        if stirred:
            stir(model)
        return model

    def dropout(self) -> dict[str, float]:
        return {"dropout": 0.4} if "dropout" in METHODS[self.method].options() else {}


def sources(model: Tiny, spec: AdapterSpec) -> dict[str, Source]:
    """The weights before packing, and the second moments of correlated inputs if the method asks for them."""
    data = "gram" in spec.needs()
    return {name: Source(w, moments(w.shape[1]).to(w.device) if data else None) for name, w in model.weights.items()}


def moments(width: int) -> Tensor:
    """Mean of x x^T over inputs whose channels are mixed and of unequal size: [width, width] fp32."""
    draw = torch.Generator().manual_seed(width)
    mix = torch.randn(width, width, generator=draw) / width**0.5 + torch.diag(torch.linspace(0.2, 3, width))
    x = torch.randn(SAMPLES, width, generator=draw) @ mix
    return x.T @ x / SAMPLES


def plain(case: Case, adapted: Tiny | None = None) -> Tiny:
    """The model without an adapter; with `adapted`, on the bases that its start made for itself."""
    model = Tiny(case.packing(), torch.float32 if adapted is None else adapted.gain.dtype)
    for name, site in adapted_sites(adapted).items() if adapted is not None else ():
        if site.base.own:
            model.get_submodule(name).set_parts(site.base.parts)
    return model


def in_float64(model: nn.Module) -> Any:
    """A copy that computes in float64, over the same dense weights."""
    exact = copy.deepcopy(model).double()
    for name, site in adapted_sites(exact).items():
        packed = adapted_sites(model)[name].base
        site.base.scheme = Dense("float32")
        site.base.packed = nn.Parameter(packed.dequantize().view(-1).view(torch.uint8), requires_grad=False)
    return exact


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stir(model: nn.Module) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for p in learned(model).values():
            p += 0.1 * torch.randn(p.shape).to(p)


def inputs(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (TOKENS, IN)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def gradients(
    model: nn.Module, forward: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every learned parameter, of a fixed loss."""
    x = inputs(dtype).requires_grad_()
    parameters = learned(model)
    torch.manual_seed(4)
    y = forward(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    found = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()])
    return {"y": y.detach(), "x": found[0], **dict(zip(parameters, found[1:], strict=True))}


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """The largest difference, relative to b's largest value."""
    error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def train(model: nn.Module, target: Tensor, steps: int, lr: float = 0.02) -> list[float]:
    optimizer = torch.optim.AdamW(learned(model).values(), lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(inputs(shape=(64, IN))), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- the laws


def starts_as_it_says(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = case.model(dtype=dtype)
        if METHODS[case.method].bound is None:
            for site in adapted_sites(model).values():
                starts_as_identity(site, dtype)
        else:
            starts_near_the_weight(case, model)


def starts_as_identity(site: Adapted, dtype: torch.dtype) -> None:
    x = inputs(dtype, (TOKENS, site.base.in_features))
    error = (site(x).double() - site.base(x).double()).abs().max()
    size = x.double().norm(dim=-1).max() * site.base.dequantize().double().norm(dim=1).max()
    assert error <= torch.finfo(dtype).eps * size, f"{dtype}: differs from its base by {error:.2e}"


def starts_near_the_weight(case: Case, model: Tiny) -> None:
    """In float64, by what the forward does to the rows of the identity."""
    known = sources(model, case.spec())
    exact, before = in_float64(model).eval(), plain(case)
    for name, site in adapted_sites(exact).items():
        width = site.base.in_features
        bias = site(torch.zeros(1, width, dtype=torch.float64))
        effective = (site(torch.eye(width, dtype=torch.float64)) - bias).T
        gram = torch.eye(width) if known[name].gram is None else known[name].gram
        layer, weight = before.get_submodule(name), known[name].weight.double()
        layer.set_weight(known[name].weight)

        def norm(m: Tensor, gram: Tensor = gram) -> float:
            return float(((m @ gram.double()) * m).sum().detach().sqrt())

        size = norm(weight)
        base, start = norm(weight - layer.dequantize().double()) / size, norm(weight - effective) / size
        rounding = torch.finfo(torch.float32).eps if case.scheme == "dense" else 1e-5 * base  # sums in fp32
        bound = METHODS[case.method].bound
        assert start <= base * bound + rounding, f"{name}: starts at {start:.6g}, its base is at {base:.6g}"
        told = adapted_sites(model)[name].start
        assert told is not None and told.weighted == (known[name].gram is not None)
        for what, found, true in (("before", told.before, base), ("after", told.after, start)):
            assert abs(found - true) <= 1e-3 * true + 1e-6, f"{name}: {what} is {true:.6g}, told as {found:.6g}"


def merge_equals_forward(case: Case) -> None:
    for site in adapted_sites(case.model(stirred=True)).values():
        if not site.adapter.mergeable:
            with pytest.raises(QtuneError, match="no weight does the same"):
                site.merged()
            continue
        x = inputs(shape=(TOKENS, site.base.in_features))
        site.eval()
        for name, (weight, bias) in {
            "override": site.merged(),
            "probe": Adapter.merged(site.adapter, site.base),
        }.items():
            assert weight.dtype == torch.float32, name
            assert (bias is None) == (site.base.bias is None), name
            merged = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            close(merged, site(x), 2e-6)
            assert (merged - site.base(x)).abs().max() > 1e-3, "stirring moved nothing"


def mergeable_tells_the_truth(case: Case) -> None:
    for site in adapted_sites(case.model(stirred=True)).values():
        site.eval()
        a, b = inputs(shape=(2, TOKENS, site.base.in_features)).unbind()
        mixed = 2.5 * site(a).double() - 1.5 * site(b).double()
        error = (site((2.5 * a.double() - 1.5 * b.double()).float()) - mixed).abs().max() / mixed.abs().max()
        assert (error < 1e-5) == site.adapter.mergeable, f"affine to {error:.1e}, mergeable is {site.adapter.mergeable}"


def only_the_adapter_gets_gradients(case: Case) -> None:
    model = case.model(stirred=True)
    x = inputs().requires_grad_()
    model(x).square().sum().backward()
    assert learned(model)
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith((*(f"{target}.adapter." for target in TARGETS), SHARED)), name
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, f"{name}: gradient {p.grad}"
    assert x.grad.any()


def base_is_untouched_by_training(case: Case) -> None:
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    train(model, torch.zeros(64, OUT), 3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved, "nothing was trained"
    assert not {name for name in moved if not name.startswith(SHARED) and ".adapter." not in name}


def saves_and_loads_bit_exactly(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = case.model(stirred=True, dtype=dtype)
        folder = case.tmp / str(dtype)
        save_adapter(model, case.spec(), folder, {"model": "tiny"})
        other = plain(case, model)
        load_adapter(other, folder)
        state, again = model.state_dict(), other.state_dict()
        assert state.keys() == again.keys()
        for name, value in state.items():
            assert value.dtype == again[name].dtype, name
            assert torch.equal(value, again[name]), name
        assert torch.equal(model(inputs(dtype)), other(inputs(dtype)))
        assert learned(model).keys() == learned(other).keys()


def keeps_dtype_and_shape(case: Case) -> None:
    model = case.model(stirred=True)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((IN,), (3, IN), (2, 3, IN)):
            y = model(inputs(dtype, shape))
            assert y.dtype == dtype
            assert y.shape == (*shape[:-1], OUT)


class Allocations(TorchDispatchMode):
    """Every storage that an operation makes, without keeping it alive; views of `known` are not news."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and not same(value, self.known):
                storage = value.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> list[int]:
        return [nbytes for ref, nbytes in self.made.values() if not ref.expired()]


def keeps_no_dense_tensor(case: Case) -> None:
    model = case.model(stirred=True)
    for name, site in adapted_sites(model).items():
        out, width = site.base.out_features, site.base.in_features
        x = inputs(shape=(3, width)).requires_grad_()  # few: what a method makes of x may be twice as wide
        with saved() as tensors, Allocations(site.base.packed) as allocations:
            y = site(x)
        assert y.grad_fn is not None
        dense = [tuple(t.shape) for t in tensors if t.numel() >= out * width and not same(t, site.base.packed)]
        assert not dense, f"{name} keeps {dense} for the backward"
        held = [nbytes for nbytes in allocations.alive() if nbytes >= out * width]
        assert not held, f"{name} holds {held} bytes after the forward"


def same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    """Every tensor that autograd keeps for the backward."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def checkpointing_gives_the_same_bits(case: Case) -> None:
    model = case.model(stirred=True, **case.dropout())
    plain = gradients(model, model)
    again = gradients(model, lambda x: checkpoint(model, x, use_reentrant=False))
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


def compiles_to_the_same(case: Case) -> None:
    torch._dynamo.reset()
    model = case.model(stirred=True)
    compiled_is_the_same(adapted_sites(model)["up_proj"])


def compiled_is_the_same(model: nn.Module) -> None:
    eager = gradients(model, model)
    compiled = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    for name, value in eager.items():
        close(compiled[name], value, 1e-5)


def meta_bytes_equal_real_bytes(case: Case) -> None:
    kept = []
    for device in ("cpu", "meta"):
        model = case.model(device=device)
        with saved() as tensors:
            y = model(inputs().to(device).requires_grad_())
        assert y.shape == (TOKENS, OUT)
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        kept.append((sorted(storages.values()), {n: (p.shape, p.dtype) for n, p in model.named_parameters()}))
    assert kept[0] == kept[1]
    before = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    try:  # as the planner does
        for name, site in adapted_sites(model).items():
            site.adapter.reset(site.base, sources(model, case.spec())[name])
    except (RuntimeError, NotImplementedError) as error:
        pytest.fail(f"its start asks for values: {error}")
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == before
    assert all(t.is_meta for t in model.state_dict().values())


def wrong_options_are_named_with_the_legal_ones(case: Case) -> None:
    legal = METHODS[case.method].options()
    with pytest.raises(QtuneError) as error:
        case.spec(nonsense=1).checked()
    assert "'nonsense'" in str(error.value)
    assert all(name in str(error.value) for name in [case.method, *legal])
    for name in legal:
        kind = type(legal[name].default).__name__
        with pytest.raises(QtuneError, match=rf"adapter\.{name} must be an? {kind} .*not None"):
            case.spec(**{name: None}).checked()
    if "rank" in legal:
        with pytest.raises(QtuneError, match=r"adapter\.rank.*0"):
            case.spec(rank=0).checked()


def learns(case: Case) -> None:
    target = case.model(stirred=True)(inputs(shape=(64, IN))).detach()
    losses = train(case.model(), target, 20)
    assert losses[-1] < 0.7 * losses[0], f"loss {losses[0]:.2e} -> {losses[-1]:.2e}"


def casting_leaves_the_packed_weight(case: Case) -> None:
    model = case.model(stirred=True)
    before = {name: site.base.packed.clone() for name, site in adapted_sites(model).items()}
    copies = {torch.float32: copy.deepcopy(model)}
    copies |= {dtype: copy.deepcopy(model).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
    for dtype, other in copies.items():
        for name, site in adapted_sites(other).items():
            assert torch.equal(site.base.packed, before[name]), f"{name} after .to({dtype})"
            assert site.base.packed.data_ptr() != before[name].data_ptr()
        if dtype != torch.float64:  # kernels need not serve it
            close(other(inputs(dtype)), model(inputs()), 30 * torch.finfo(dtype).eps)


def switched_off_is_the_base(case: Case) -> None:
    model = case.model(stirred=True)
    base = plain(case, model)
    for name, site in adapted_sites(model).items():
        packed = base.get_submodule(name).packed
        assert METHODS[case.method].bound is not None or not site.base.own, f"{name}: repacked by an identity"
        assert torch.equal(site.base.packed, packed), f"{name}: repacked, and does not say so"
    on = model(inputs())
    enable_adapters(model, False)
    assert torch.equal(model(inputs()), base(inputs()))
    assert not torch.equal(on, base(inputs()))
    enable_adapters(model, True)
    assert torch.equal(model(inputs()), on)


def gradient_is_the_true_one(case: Case) -> None:
    """fp32 over the packed base against float64 over the same dense weight; on dense also finite differences."""
    model = case.model(stirred=True)
    exact = in_float64(model)
    found, expected = gradients(model, model), gradients(exact, exact, torch.float64)
    for name, value in expected.items():
        close(found[name], value, 2e-5)
    if case.scheme != "dense":
        return
    x = inputs(torch.float64, (1, IN)).requires_grad_()
    assert torch.autograd.gradcheck(exact, x, fast_mode=True, raise_exception=False), "not the gradient of x"
    site = adapted_sites(exact)["up_proj"]
    names, values = zip(*learned(site).items(), strict=True)

    def of_parameters(*values: Tensor) -> Tensor:
        return torch.func.functional_call(site, dict(zip(names, values, strict=True)), (x.detach(),))

    true = torch.autograd.gradcheck(of_parameters, values, fast_mode=True, raise_exception=False)
    assert true == site.adapter.exact_gradient, (
        f"exact_gradient is {site.adapter.exact_gradient}, the gradient says {true}"
    )


LAWS = {
    law.__name__: law
    for law in (
        starts_as_it_says,
        merge_equals_forward,
        mergeable_tells_the_truth,
        only_the_adapter_gets_gradients,
        base_is_untouched_by_training,
        saves_and_loads_bit_exactly,
        keeps_dtype_and_shape,
        keeps_no_dense_tensor,
        checkpointing_gives_the_same_bits,
        compiles_to_the_same,
        meta_bytes_equal_real_bytes,
        wrong_options_are_named_with_the_legal_ones,
        learns,
        casting_leaves_the_packed_weight,
        switched_off_is_the_base,
        gradient_is_the_true_one,
    )
}


SLOWEST = ("compiles_to_the_same", "gradient_is_the_true_one")


def slow(law: str, method: str, scheme: str) -> bool:
    """Is the cell left to the slow tests?"""
    if method == "lora" or scheme == "nf4":
        return False
    possible = [name for name in ("nf4", "dense", "int8", "int3") if not Case(method, name, Path()).refused()]
    if law == "compiles_to_the_same":
        return scheme != possible[0]
    return scheme not in possible[:2] and (method != "hira" or law == "gradient_is_the_true_one")


def cells() -> Iterator[Any]:
    """Every law, method and scheme that make sense together."""
    for method in SHIPPED:
        for scheme in sorted(SCHEMES):
            if not Case(method, scheme, Path()).refused():
                for law in LAWS:
                    marks = [pytest.mark.slow] if slow(law, method, scheme) else []
                    yield pytest.param(law, method, scheme, marks=marks, id=f"{law}-{method}-{scheme}")


CELLS = list(cells())


@pytest.mark.parametrize(("law", "method", "scheme"), CELLS)
def test_law(law: str, method: str, scheme: str, tmp_path: Path) -> None:
    LAWS[law](Case(method, scheme, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method", SHIPPED)
def test_a_whole_model_compiles_to_the_same(method: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    cases = [Case(method, scheme, tmp_path) for scheme in ("nf4", "int3")]
    compiled_is_the_same(next(case for case in cases if not case.refused()).model(stirred=True))


def test_every_method_and_every_scheme_is_under_each_law() -> None:
    """Also where nothing slow runs."""
    for law in LAWS:
        fast = [cell.values for cell in CELLS if cell.values[0] == law and not cell.marks]
        assert {method for _, method, _ in fast} == set(SHIPPED)
        assert {scheme for _, _, scheme in fast} == set(SCHEMES)


@pytest.mark.parametrize("method", SHIPPED)
def test_what_makes_no_sense_is_refused_by_name(method: str, tmp_path: Path) -> None:
    for scheme in SCHEMES:
        case = Case(method, scheme, tmp_path)
        if why := case.refused():
            model = Tiny(case.packing())
            with pytest.raises(QtuneError, match=re.escape(why)):
                adapt(model, case.spec(), sources(model, case.spec()))
            assert not adapted_sites(model)
            assert all(p.requires_grad == (name == "gain") for name, p in model.named_parameters())
