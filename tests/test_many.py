"""Many adapters on one base: each as alone, every mixture as the sum of what each adds, rows as one by one, against
PEFT's mixed batches, against models of their own, and every refusal."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import test_adapters
import torch
from test_laws import SHIPPED, SMALL, TARGETS, Tiny, sources
from torch import Tensor, nn

import qtune
from qtune.adapters import METHODS, AdapterSpec, adapt, adapted_sites
from qtune.adapters.files import load_adapter, save_adapter
from qtune.adapters.many import Adapters
from qtune.adapters.mixture import Mixed
from qtune.errors import QtuneError
from qtune.quant import QuantLinear, Scheme, scheme_from

NF4 = scheme_from("nf4")
MIXTURES: list[Any] = [
    "one", {"one": 0.7, "two": 0.3}, {"one": 1, "two": -0.5, "three": 2.0}, {"three": 0.25}, None,
]  # fmt: skip


def decoder(scheme: Scheme, layers: int = 3) -> nn.Module:
    """That of test_adapters, as if its codes were those of a checkpoint."""
    return as_loaded(test_adapters.decoder(scheme, layers=layers))


def as_loaded(model: nn.Module) -> nn.Module:
    """No code is a run's own."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.own = False
    return model


def stir(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)


def trained(folder: Path, spec: AdapterSpec, scheme: Scheme = NF4, seed: int = 0) -> Path:
    """A saved adapter, stirred, over the decoder of test_adapters."""
    model = decoder(scheme)
    adapt(model, spec, seed=seed)
    stir(model, seed)
    save_adapter(model, spec, folder, {"model": f"models/{seed}"})
    return folder


def alone(folder: Path) -> nn.Module:
    """A model of its own for one saved adapter."""
    model = decoder(NF4)
    load_adapter(model, folder)
    return model.eval()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Three plain adapters of other ranks, scales and sites."""
    specs = {
        "one": AdapterSpec("lora", ("q_proj", "v_proj"), {"rank": 4}),
        "two": AdapterSpec("lora", ("all-linear",), {"rank": 7, "alpha": 3.0}),
        "three": AdapterSpec("lora", ("down_proj", "layers.1.v_proj"), {"rank": 2, "rslora": True}),
    }
    return {name: trained(tmp_path / name, spec, seed=i) for i, (name, spec) in enumerate(specs.items())}


def x_of(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 5, 16, generator=torch.Generator().manual_seed(seed))


def expected(model: nn.Module, folders: dict[str, Path], which: Any, x: Tensor) -> Tensor:
    """The layers one by one, each site's sum written down: base + sum w (alone - base)."""
    weights = {} if which is None else {which: 1.0} if isinstance(which, str) else which
    own = {name: adapted_sites(alone(folders[name])) for name in weights}

    def site(base: QuantLinear, name: str, x: Tensor) -> Tensor:
        y = base(x)
        return y + sum(w * (own[one][name](x) - y) for one, w in weights.items() if name in own[one])

    for number, block in enumerate(decoder(NF4).layers):
        q, v, down = (f"layers.{number}.{leaf}" for leaf in ("q_proj", "v_proj", "down_proj"))
        x = site(block.q_proj, q, x) + site(block.down_proj, down, site(block.v_proj, v, x))
    return x


@torch.no_grad()
@pytest.mark.parametrize("which", MIXTURES, ids=str)
def test_a_mixture_is_the_sum_of_what_each_adds(folders: dict[str, Path], which: Any) -> None:
    model = decoder(NF4)
    adapters = qtune.load_adapters(model, folders)
    x = x_of()
    assert torch.equal(model.layers(x), decoder(NF4).layers(x)), "something is in use before it was asked for"
    adapters.use(which)
    for _ in range(3):  # from the second time on, sites share the product with A
        close(model.layers(x.clone()), expected(model, folders, which, x))
    if isinstance(which, str):
        assert torch.equal(model.layers(x), alone(folders[which]).layers(x)), "alone it is bit-equal"


@torch.no_grad()
def test_each_sample_has_its_own_adapters(folders: dict[str, Path]) -> None:
    model = decoder(NF4)
    adapters = qtune.load_adapters(model, folders)
    for rows in (
        ["one", "two", "three"], ["three", "one", "one"], ["two", None, {"one": 0.5, "three": 2.0}],
        [None, None, "two"], [None, None, None], ["two", "two", "two"], [{"one": 0.3, "two": 0.2}, "three", "one"],
    ):  # fmt: skip
        adapters.use(rows)
        x = x_of(len(rows), 1)
        for _ in range(3):
            y = _pass(model, x)
            for row, which in enumerate(rows):
                want = expected(model, folders, which, x[row : row + 1])
                close(y[row : row + 1], want)


def _pass(model: nn.Module, x: Tensor) -> Tensor:
    """As a transformers model would call its body: through the model, which sees the batch."""
    model.forward = model.layers.forward
    try:
        return model(x)
    finally:
        del model.forward


def test_use_ends_with_its_block(folders: dict[str, Path]) -> None:
    model = decoder(NF4)
    adapters = qtune.load_adapters(model, {"one": folders["one"]})
    x = x_of()
    base = model.layers(x)
    with adapters.use("one") as same:
        assert same is adapters
        one = model.layers(x)
        with adapters.use(None):
            assert torch.equal(model.layers(x), base)
        assert torch.equal(model.layers(x), one)
    assert torch.equal(model.layers(x), base) and not torch.equal(one, base)
    assert qtune.load_adapters(model, {"two": folders["two"]}) is adapters
    assert adapters.names == ("one", "two") and adapters.specs["two"].options["rank"] == 7


def test_training_mode_leaves_loaded_adapters_as_they_are(tmp_path: Path) -> None:
    folder = trained(tmp_path, AdapterSpec("lora", ("q_proj",), {"rank": 4, "dropout": 0.9}))
    model = decoder(NF4)
    qtune.load_adapters(model, {"a": folder}).use("a")
    assert torch.equal(model.train().layers(x_of()), model.eval().layers(x_of()))
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_gradients_go_through_a_mixture(folders: dict[str, Path]) -> None:
    """Into what comes before it, as through the models apart."""
    model = decoder(NF4)
    adapters = qtune.load_adapters(model, folders)
    for which in ({"one": 0.7, "two": 0.3}, ["one", None, {"two": 0.5, "three": 1.0}]):
        adapters.use(which)
        x = x_of().requires_grad_()
        _pass(model, x).square().sum().backward()
        other = x_of().requires_grad_()
        rows = which if isinstance(which, list) else [which] * 3
        wanted = torch.cat([expected(model, folders, one, other[i : i + 1]) for i, one in enumerate(rows)])
        wanted.square().sum().backward()
        close(x.grad, other.grad)


# ---- every method


def law_case(method: str, tmp: Path, seed: int) -> tuple[Path, Tiny]:
    """A saved adapter of the method over the laws' model, and that model."""
    options = {name: value for name, value in SMALL.items() if name in METHODS[method].options()}
    spec = AdapterSpec(method, TARGETS, options)
    scheme = scheme_from("int4") if METHODS[method].refuses(NF4, spec.resolved()) else NF4
    model = Tiny(scheme)
    adapt(model, spec, sources(model, spec), seed=seed)
    stir(model, seed)
    folder = tmp / f"{method}{seed}"
    save_adapter(model, spec, folder, {})
    return folder, model.eval()


def bare(model: nn.Module) -> nn.Module:
    """The base of an adapted model, codes and all."""
    other = Tiny(model.up_proj.base.scheme)
    for name, site in adapted_sites(model).items():
        other.get_submodule(name).set_parts(site.base.parts)
        other.get_submodule(name).own = site.base.own
    return other


@torch.no_grad()
@pytest.mark.parametrize("method", SHIPPED)
def test_every_method_mixes_with_plain_lora(method: str, tmp_path: Path) -> None:
    """Against models of their own, each layer by itself: in a mixture, and in a batch of mixed samples."""
    torch.manual_seed(3)
    folder, own = law_case(method, tmp_path, 5)
    base = bare(own)
    spec = AdapterSpec("lora", TARGETS, {"rank": 3})
    plain = copy.deepcopy(base)
    adapt(plain, spec)
    stir(plain, 9)
    save_adapter(plain, spec, tmp_path / "plain", {})
    adapters = qtune.load_adapters(base, {"own": folder, "plain": tmp_path / "plain"})
    for name in TARGETS:
        site = base.get_submodule(name)
        assert isinstance(site, Mixed)
        x = torch.randn(4, 5, site.base.in_features)
        one, two, none = own.get_submodule(name)(x), plain.get_submodule(name)(x), site.base(x)
        adapters.use({"own": 0.6, "plain": -1.5})
        close(site(x), none + 0.6 * (one - none) - 1.5 * (two - none))
        adapters.use(["own", "plain", None, {"own": 0.5, "plain": 0.25}])
        assert adapters._mixture is not None
        adapters._mixture.shape = (4, 5)
        half = none[3] + 0.5 * (one[3] - none[3]) + 0.25 * (two[3] - none[3])
        wanted = torch.stack([one[0], two[1], none[2], half])
        close(site(x), wanted)
        close(site(x.flatten(0, 1)), wanted.flatten(0, 1))  # as OPT's MLP reads it
        adapters.use("own")
        assert torch.equal(site(x), one)


def factors_of(site: Any) -> tuple[Tensor, Tensor, float]:
    found: tuple[Tensor, Tensor, float] = site.adapter.low_rank(site.base)
    return found


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("method", SHIPPED)
def test_low_rank_is_what_the_method_adds(method: str, tmp_path: Path) -> None:
    model = law_case(method, tmp_path, 2)[1]
    found = 0
    for site in adapted_sites(model).values():
        if (low := site.adapter.low_rank(site.base)) is not None:
            A, B, scale = low
            found += 1
            weight = site.base.dequantize() + scale * B.float() @ A.float()
            close(weight, site.merged()[0])
    assert found in (0, len(TARGETS))
    if issubclass(METHODS[method], METHODS["lora"]) and method != "dora":
        assert found


def test_shared_parts_stay_apart(tmp_path: Path) -> None:
    """Two VB-LoRAs and a VeRA: each with its own bank and projections, in memory once."""
    spec = AdapterSpec("vblora", ("q_proj", "v_proj"), {"length": 8, "vectors": 12})
    folders = {name: trained(tmp_path / name, spec, seed=i) for i, name in enumerate("ab")}
    folders["c"] = trained(tmp_path / "c", AdapterSpec("vera", ("q_proj",), {"rank": 8, "seed": 3}), seed=4)
    model = decoder(NF4)
    adapters = qtune.load_adapters(model, folders)
    banks = {name: set[int]() for name in "ab"}
    for site in adapters.sites.values():
        for name, adapter in zip(site.names, site.adapters, strict=True):
            if name in banks:
                banks[name].add(id(adapter.bank))
    assert [len(one) for one in banks.values()] == [1, 1] and banks["a"] != banks["b"]
    with torch.no_grad():
        adapters.use({"a": 1.0, "b": 0.5, "c": 2.0})
        close(model.layers(x_of()), expected(model, folders, {"a": 1.0, "b": 0.5, "c": 2.0}, x_of()))


# ---- against PEFT


def test_mixed_batches_are_those_of_peft(tmp_path: Path) -> None:
    """The same three adapters in real PEFT on the dequantized base, with `adapter_names`."""
    import tiny

    from qtune.peft import to_peft

    tiny.saved("llama", tmp_path / "model")
    specs = {"law": AdapterSpec("lora", ("all-linear",), {"rank": 4}), "code": AdapterSpec("lora", ("q_proj",), {})}
    stock = None
    for seed, (name, spec) in enumerate(specs.items()):
        model = qtune.load(tmp_path / "model", NF4, dtype=torch.float32)
        adapt(model, spec, seed=seed)
        stir(model, seed)
        save_adapter(model, spec, tmp_path / name, {})
        to_peft(model, spec, tmp_path / f"peft-{name}", "model")
        if stock is None:
            dense = tiny.model("llama")
            for place, site in adapted_sites(model).items():
                dense.get_submodule(place).weight.data = site.base.dequantize()
            stock = peft.PeftModel.from_pretrained(dense, tmp_path / f"peft-{name}", adapter_name=name).eval()
        else:
            stock.load_adapter(tmp_path / f"peft-{name}", adapter_name=name)
    model = qtune.load(tmp_path / "model", NF4, dtype=torch.float32).eval()
    adapters = qtune.load_adapters(model, {name: tmp_path / name for name in specs})
    ids = torch.randint(3, tiny.VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for names in (["law", "code", None, "law"], ["code", "code", "code", "law"]):
            theirs = stock(ids, adapter_names=[name or "__base__" for name in names]).logits
            adapters.use(names)
            for _ in range(2):
                torch.testing.assert_close(model(ids, use_cache=False).logits, theirs, atol=1e-4, rtol=1e-5)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    for row, name in enumerate(names):
        with adapters.use(name):
            one = ids[row : row + 1]
            own = model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=4, do_sample=False)
        assert own[0].tolist() == said[row].tolist()[: own.shape[1]]


# ---- sites that read the same tensor


def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of A each product with A had, as they come."""
    from qtune.adapters import mixture

    seen: list[int] = []
    for kind in (mixture.Summed, mixture.ByRow):
        plain = kind.inner

        def inner(self: Any, x: Tensor, A: Tensor, plain: Any = plain) -> Tensor:
            seen.append(A.shape[-2])
            return plain(self, x, A)

        monkeypatch.setattr(kind, "inner", inner)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("which", [{"one": 0.5, "two": 0.5}, ["one", "two", "one"]], ids=str)
def test_sites_that_read_one_tensor_share_its_product(
    folders: dict[str, Path], which: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(NF4, layers=1)
    names = {name: folders[name] for name in ("one", "two")}
    big = {name: trained(folders[name], AdapterSpec("lora", ("layers.0.q_proj", "layers.0.v_proj"), {"rank": r}))
           for (name, r) in zip(names, (4, 6), strict=True)}  # fmt: skip
    adapters = qtune.load_adapters(model, big)
    adapters.use(which)
    seen = counted(model, monkeypatch)
    first = _pass(model, x_of())
    rank = 12 if isinstance(which, list) else 20
    assert len(seen) == 2 and sum(seen) == rank, "at first each site has a product of its own"
    seen.clear()
    assert torch.allclose(_pass(model, x_of()), first, atol=1e-6)
    assert seen == [rank], "then one for both"
    x = x_of()
    y = model.layers[0].q_proj
    before = y(x)
    x.mul_(2)  # the same tensor with other values: nothing old may be taken
    model.layers[0].v_proj(x)
    torch.testing.assert_close(model.layers[0].q_proj(x), y(x.clone()))
    assert not torch.allclose(before, y(x))


# ---- rank-one parts


@torch.no_grad()
def test_selection_keeps_the_parts_of_largest_reach(folders: dict[str, Path]) -> None:
    """Against a loop over tokens and dense rank-one matrices, in float64."""
    model = decoder(NF4)
    adapters = qtune.load_adapters(model, folders)
    site = model.layers[0].q_proj
    weights = {"one": 0.7, "two": -0.4}
    deltas = []
    for name, weight in weights.items():
        A, B, scale = factors_of(adapted_sites(alone(folders[name]))["layers.0.q_proj"])
        u, d, vh = torch.linalg.svd((scale * weight * B @ A).double())
        deltas += [(d[i] * u[:, i], vh[i]) for i in range(len(A))]
    x = x_of()
    for count in (1, 3, 5, None):
        adapters.select(weights, count)
        y = site(x)
        for row, token in zip(y.flatten(0, 1), x.flatten(0, 1).double(), strict=True):
            reach = sorted(deltas, key=lambda part: -float((part[1] @ token).abs() * part[0].norm()))
            want = sum(part[0] * (part[1] @ token) for part in reach[: count or (4 + 7) // 2])
            close(row.double(), site.base(token.float()).double() + want)
    adapters.select(weights, 99)
    whole = model.layers(x)
    adapters.use(weights)
    close(model.layers(x), whole)


@torch.no_grad()
def test_a_fixed_selection_is_a_plain_lora(folders: dict[str, Path]) -> None:
    model = decoder(NF4, layers=1)
    model.forward = model.layers.forward
    adapters = (
        qtune.load_adapters(model, {n: folders[n] for n in ("one",)} | {"two": folders["one"]}) if False else None
    )
    del adapters
    lone = {name: trained(folders[name], AdapterSpec("lora", ("layers.0.q_proj",), {"rank": r}), seed=r)
            for name, r in (("one", 4), ("two", 6))}  # fmt: skip
    adapters = qtune.load_adapters(model, lone)
    sample = [x_of(seed=seed) for seed in range(3)]
    with adapters.select({"one": 1.0, "two": 1.0}, 3, sample):
        site = model.layers[0].q_proj
        x = x_of(seed=9)
        y = site(x)
        from qtune.adapters import parts

        low = [factors_of(adapted_sites(_decoder_with(folder))["layers.0.q_proj"]) for folder in lone.values()]
        whole = parts.join([parts.split(*one) for one in low])
        kept = parts.strongest(whole, parts.mean_reach(whole, torch.cat(sample)), 3)
        A, B = kept.factors()
        close(y, site.base(x) + x @ A.T @ B.T)
        with adapters.use("one"):
            assert not torch.allclose(site(x), y)
        assert torch.equal(site(x), y), "what was fixed is still there"
    assert torch.equal(site(x), site.base(x))


def _decoder_with(folder: Path) -> nn.Module:
    model = decoder(NF4, layers=1)
    load_adapter(model, folder)
    return model


# ---- what is refused


def fails(code: str, words: str, call: Any) -> None:
    with pytest.raises(QtuneError, match=words) as caught:
        call()
    assert caught.value.code == code


def test_names_and_weights(folders: dict[str, Path]) -> None:
    model = decoder(NF4)
    adapters = qtune.load_adapters(model, folders)
    fails("Q101", r"unknown adapter 'on' \(did you mean 'one'\?\); legal: one, three, two", lambda: adapters.use("on"))
    fails("Q101", "unknown adapter 'law'", lambda: adapters.use(["one", {"law": 1.0}]))
    fails("Q102", "the weight of adapter 'one' is nan", lambda: adapters.use({"one": float("nan")}))
    fails("Q102", "the list of adapters is empty", lambda: adapters.use([]))
    fails("Q102", "number of parts is 0", lambda: adapters.select("one", 0))
    fails("Q103", "an adapter of the name 'one' is loaded", lambda: qtune.load_adapters(model, folders))
    fails("Q102", "there is no adapter to load", lambda: qtune.load_adapters(model, {}))
    fails("Q405", "already carries an adapter", lambda: adapt(model, AdapterSpec("lora", ("q_proj",))))
    fails("Q405", "already carries an adapter", lambda: load_adapter(model, folders["one"]))
    fails("Q405", "carries an adapter", lambda: qtune.load_adapters(alone(folders["one"]), folders))


def test_a_batch_of_another_size(folders: dict[str, Path]) -> None:
    model = decoder(NF4)
    adapters = qtune.load_adapters(model, folders)
    adapters.use(["one", "two"])
    fails("Q420", "in use for 2 samples, and the batch has 3", lambda: _pass(model, x_of(3)))
    _pass(model, x_of(2))
    fails("Q420", r"layers\.0\.q_proj reads 7 x 16 values", lambda: model.layers[0].q_proj(torch.zeros(7, 16)))
    model.layers[0].q_proj.base.routed = True
    fails("Q420", r"layers\.0\.q_proj is an expert", lambda: adapters.use(["one", "two"]))
    adapters.use("one")


def test_another_base_is_refused_by_layer(folders: dict[str, Path], tmp_path: Path) -> None:
    model = decoder(NF4)
    model.layers[1].v_proj = test_adapters.linear(8, 16, "layers.1.v_proj", NF4)
    before = {name: id(module) for name, module in model.named_modules()}
    fails(
        "Q404",
        r"adapter 'two': .*does not fit this model:\n  layers\.1\.v_proj: trained on other weights \(digest \w{12}, "
        r"here \w{12}\)\n  it was trained on models/1$",
        lambda: qtune.load_adapters(model, {"two": folders["two"]}),
    )
    fails(
        "Q404",
        r"layers\.0\.q_proj: trained on nf4.*, here the layer is int8",
        lambda: qtune.load_adapters(decoder(scheme_from("int8")), {"two": folders["two"]}),
    )
    assert {name: id(module) for name, module in model.named_modules()} == before
    own = decoder(NF4)
    spec = AdapterSpec("lora", ("q_proj",), {})
    own.layers[0].q_proj.set_weight(torch.randn(16, 16))
    adapt(own, spec)
    save_adapter(own, spec, tmp_path / "own", {"model": "m"})
    fails(
        "Q404",
        r"layers\.0\.q_proj: trained on other weights.*\n  it was trained on m, \d+ of whose layers its run gave codes",
        lambda: qtune.load_adapters(decoder(NF4), {"own": tmp_path / "own"}),
    )


def test_parts_need_two_factors(tmp_path: Path) -> None:
    folder = trained(tmp_path, AdapterSpec("ia3", ("q_proj",)))
    adapters: Adapters = qtune.load_adapters(decoder(NF4), {"scale": folder})
    fails("Q420", r"'scale' \(ia3\) is no product of two factors at layers", lambda: adapters.select("scale"))
