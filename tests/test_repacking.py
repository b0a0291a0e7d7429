"""What stands in the place of adapters after `merge --keep`: the remainder is the best of its rank, text passes each
layer twice, and feedback keeps what was learned."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch
from torch import Tensor, nn

from qtune.adapters import Adapted, AdapterSpec, adapt, adapted_sites
from qtune.adapters.many import Adapters
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.model import load
from qtune.model.layerwise import Layerwise
from qtune.packed_merge import merge_packed
from qtune.quant import NF4, Dense, QuantLinear, scheme_from
from qtune.quant.calibrate import choose
from qtune.repacking import Way, _with_remainder, repack
from qtune.runs import load_adapters, open_run
from qtune.screen import Screen
from qtune.trainer import train

QUIET = Screen(quiet=True)


# ---- the remainder of a layer


def lost(shape: tuple[int, int]) -> tuple[QuantLinear, Tensor, Tensor]:
    """A packed layer, a weight that it should have had, and second moments of inputs of very unequal size."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    made = QuantLinear(shape[1], shape[0], NF4(block=32), bias=False, dtype=torch.float32, name="layer")
    made.set_weight(weight)
    x = torch.randn(400, shape[1]) * torch.logspace(0, -1, shape[1]) @ torch.randn(shape[1], shape[1])
    return made, weight + 0.05 * torch.randn(shape[0], 3) @ torch.randn(3, shape[1]), x.T @ x / len(x)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_remainder_is_the_best_of_its_rank(shape: tuple[int, int], weighted: bool) -> None:
    """Against the SVD in float64: of R, and with second moments G = L L^T of R L."""
    made, weight, gram = lost(shape)
    site = _with_remainder(made, "layer", weight, gram if weighted else None, 4)
    low = torch.linalg.cholesky(gram.double()) if weighted else torch.eye(shape[1], dtype=torch.float64)
    rest = (weight - made.dequantize()).double()
    left = ((weight - site.merged()[0]).double() @ low).norm()
    best = torch.linalg.svdvals(rest @ low)[4:].norm()
    assert best * (1 - 1e-6) <= left <= best * (1.01 if weighted else 1 + 1e-5)  # cloq's damping costs a little
    if weighted:
        plain = _with_remainder(made, "layer", weight, None, 4)
        assert left < 0.9 * ((weight - plain.merged()[0]).double() @ low).norm()


# ---- text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_helper.write_model(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=4)


def learned(folder: Path, targets: tuple[str, ...] = ("all-linear",)) -> Any:
    """A model with adapters that have learned something."""
    model = load(folder, NF4(block=32), embeddings=NF4(block=32), dtype=torch.float32)
    torch.manual_seed(1)
    for site in adapt(model, AdapterSpec("lora", targets, {"rank": 4})).values():
        nn.init.normal_(site.adapter.B, std=0.005)
    return model


WINDOWS = torch.randint(3, tiny.VOCAB, (8, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def by_whole_passes(model: Any) -> dict[str, Tensor]:
    """Weights that GPTQ makes where the whole model runs anew for each decoder layer, and for the head."""
    groups = [f"model.layers.{number}." for number in range(4)] + ["lm_head"]
    for group in groups:
        sites = {name: site for name, site in adapted_sites(model).items() if name.startswith(group)}
        sums = {name: torch.zeros(site.base.in_features, site.base.in_features) for name, site in sites.items()}

        def see(name: str, _: object, given: tuple[Tensor], sums: dict[str, Tensor] = sums) -> None:
            rows = given[0].flatten(0, 1)
            sums[name].addmm_(rows.T, rows)

        hooks = [site.register_forward_pre_hook(partial(see, name)) for name, site in sites.items()]
        for window in WINDOWS:
            model(input_ids=window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, site in sites.items():
            base = site.base
            parts = choose(NF4(block=32), site.merged()[0], sums[name] / WINDOWS.numel(), "gptq")
            dense = QuantLinear(base.in_features, base.out_features, Dense("float32"), bias=False, dtype=torch.float32)
            dense.set_parts({"weight": NF4(block=32).unpack(parts, base.shape, torch.float32)})
            model.set_submodule(name, dense)
    return {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def test_text_passes_each_layer_twice(folder: Path) -> None:
    """Not once for each layer; and codes are those of whole passes."""
    targets = ("all-linear", "lm_head")
    wanted, model = by_whole_passes(learned(folder, targets)), learned(folder, targets)
    calls = [0] * 4

    def count(number: int, *_: object) -> None:
        calls[number] += 1

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(partial(count, number))
    repack(model, Way(NF4(block=32), "gptq"), WINDOWS, QUIET)
    assert calls == [24, 24, 24, 16]  # once more than twice for the head; what the last layer says is not waited for
    for name, weight in wanted.items():
        same = (model.get_submodule(name).dequantize() == weight).float().mean()
        assert same > 0.999, name  # a sum that is rounded otherwise may flip a code


def test_without_a_head_twice_is_enough(folder: Path) -> None:
    model, calls = learned(folder, ("q_proj",)), []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    repack(model, Way(NF4(block=32), "gptq"), WINDOWS, QUIET)
    assert [calls.count(number) for number in range(4)] == [16, 16, 16, 8]  # nothing reads what the last one says


def test_layers_that_are_streamed_stay_so(folder: Path) -> None:
    """A forward that something else put before a layer's is there again behind a pass."""
    model = learned(folder)
    own = partial(type(model.model.layers[0]).forward, model.model.layers[0])
    model.model.layers[0].forward = own
    Layerwise(model, WINDOWS, torch.device("cpu")).pass_through(1, advance=False)
    assert model.model.layers[0].forward is own and "forward" not in vars(model.model.layers[1])


# ---- feedback


@pytest.mark.parametrize("keep", ["nf4", "int4"])
def test_feedback_keeps_what_was_learned(keep: str, folder: Path) -> None:
    """E d^T, the errors in what d reads, is far below that of the nearest codes; so the share of each layer is 1."""
    errors, shares = {}, {}
    for codes in ("nearest", "feedback"):
        model = learned(folder)
        wanted = {name: site.merged()[0] for name, site in adapted_sites(model).items()}
        changes = {name: wanted[name] - site.base.dequantize() for name, site in adapted_sites(model).items()}
        shares[codes] = repack(model, Way(scheme_from(keep), codes), None, QUIET).packed.layers
        left = {name: model.get_submodule(name).dequantize() - w for name, w in wanted.items()}
        errors[codes] = sum(float((left[name] @ d.T).norm()) for name, d in changes.items())
    assert errors["feedback"] < errors["nearest"] / 5
    assert all(abs(share - 1) < 0.02 for share in shares["feedback"].values())
    assert min(shares["nearest"].values()) < 0.95


# ---- the whole way


@pytest.fixture(scope="module", params=["llama", "qwen3-moe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remainder")
    changes = {"adapter__targets": "all-linear,*.experts.*"} if request.param == "qwen3-moe" else {}
    recipe = runs_helper.recipe(
        root, request.param, train__steps=6, train__lr=2e-4, calibrate__samples=10, calibrate__length=16, **changes
    )
    return train(recipe, overwrite=True).folder


def logits(model: Any) -> Tensor:
    return tiny.logits(model)


@pytest.mark.parametrize("options", [[], ["--codes", "gptq"]], ids=["plain", "by text"])
def test_a_remainder_is_a_run(
    options: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, wanted = tmp_path / "packed", logits(open_run(trained, QUIET).model)
    command = ["merge", str(trained), "--keep", "nf4", "--remainder", "16", "--out", str(out), "--json", *options]
    assert main([*command, "--least-kept", "0.9"]) == 0  # of the two
    told = json.loads(capsys.readouterr().out)["kept"]
    assert main([*command, "--overwrite"]) == 0  # in the place of the first
    capsys.readouterr()
    packed = load(out, None, dtype=torch.float32)
    alone = (logits(packed) - wanted).norm()
    rest = told["remainder"]
    adapters: Adapters = load_adapters(packed, {"rest": out / "remainder"})
    adapters.use({"rest": 1.0})
    beside = logits(packed)
    assert (beside - wanted).norm() < alone / 4
    assert rest["kl"] < 0.6 * told["kl"] and abs(rest["share"] - 1) < abs(told["share"] - 1)
    run = open_run(out / "remainder", QUIET)
    assert torch.allclose(logits(run.model), beside, atol=1e-4)
    assert rest["nbytes"] == (out / "remainder" / "adapter.safetensors").stat().st_size
    assert main(["merge", str(out / "remainder"), "--dtype", "float32", "--out", str(tmp_path / "merged")]) == 0
    assert main(["eval", str(out / "remainder")]) == 0
    apart = any(".experts." in name for name in told["layers"])  # PEFT has no adapter for one expert
    assert main(["export", str(out / "remainder"), "--out", str(tmp_path / "peft")]) == int(apart)
    assert "the remainder of rank 16, a run of its own" in (out / "README.md").read_text()


def test_the_packed_base_stays_the_same_without(trained: Path, tmp_path: Path) -> None:
    """The checkpoint's codes are not moved by what stands beside it; on the base's own scheme nothing is lost."""
    for remainder in (None, 4):
        run = open_run(trained, QUIET)
        report = merge_packed(run, tmp_path / f"out{remainder}", "nf4", least=-9.0, remainder=remainder, screen=QUIET)
    files = [next((tmp_path / f"out{remainder}").glob("*.safetensors")) for remainder in (None, 4)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert report.kept is not None and report.kept["remainder"]["share"] == pytest.approx(1.0, abs=0.1)
    assert all(isinstance(site, Adapted) for site in adapted_sites(run.model).values())


def test_what_cannot_remain(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = runs_helper.recipe(tmp_path, train__steps=1, adapter__method="qalora", scheme="int4", adapter__group=64)
    qalora = train(exact, overwrite=True).folder
    for run, options, words in (
        (trained, ["--keep", "nf4", "--remainder", "0"], "--remainder must be at least 1, not 0"),
        (trained, ["--keep", "nf4", "--remainder", "9999"], "self_attn.q_proj is 64 x 64"),
        (trained, ["--remainder", "4"], "--remainder and a merge without --keep do not go together"),
        (qalora, ["--keep", "int4", "--remainder", "4"], "goes into int4"),
        (trained, ["--keep", "int4", "--remainder", "1", "--least-kept", "1e9"], "and a remainder of rank 1"),
    ):
        assert main(["merge", str(run), *options, "--out", str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("inside", ["remainder", "remainder/merged"])
def test_a_folder_of_another_kind_is_not_replaced(inside: str, trained: Path, tmp_path: Path) -> None:
    """Only what a merge wrote may go: no other run of this name, nothing that was made of the remainder since."""
    out = tmp_path / "out"
    (out / inside).mkdir(parents=True)
    (out / "config.json").write_text("{}")
    if "/" in inside:
        (out / "remainder" / "combined.json").write_text("{}")
    with pytest.raises(QtuneError, match="is not a checkpoint"):
        merge_packed(open_run(trained, QUIET), out, "nf4", overwrite=True, screen=QUIET)
