"""Adapters that start while the checkpoint streams in: what they see, what a run keeps, how it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import safetensors.torch
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import qtune
from qtune.adapter_export import export_peft
from qtune.adapters import AdapterSpec, Source, adapt, adapted_sites
from qtune.adapters.sites import distance
from qtune.errors import QtuneError
from qtune.export import merge
from qtune.model import load, save_quantized
from qtune.model.layerwise import windows_of
from qtune.quant import INT3, INT8, NF4, Dense, Mixed, QuantLinear, storage_from
from qtune.recipe import Recipe
from qtune.runs import open_run
from qtune.screen import Screen
from qtune.trainer import train

QUIET = Screen(quiet=True)
NF4_32 = NF4(block=32)
F32 = torch.float32
LOFTQ = AdapterSpec("loftq", ("all-linear",), {"rank": 4})
CLOQ = AdapterSpec("cloq", ("all-linear",), {"rank": 4})


def windows(samples: int = 12, length: int = 24) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (samples, length), generator=torch.Generator().manual_seed(3))


def begun(folder: Path, spec: AdapterSpec, scheme: Any = NF4_32, **options: Any) -> Any:
    return qtune.start(folder, scheme, spec, dtype=F32, **{"windows": windows()} | options)


def weights(folder: Path, sites: Any) -> dict[str, Tensor]:
    """Site -> weight [out, in] as transformers reads it from the checkpoint."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=F32)
    found = {name: theirs.get_parameter(f"{name}.weight").detach() for name in sites}
    return {name: w.T if sites[name].base.conv1d else w for name, w in found.items()}


# ---- streaming


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["loftq", "pissa", "lora"])
def test_a_start_on_the_way_in_is_the_start_of_the_loaded_model(method: str, family: str, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path)
    options = {} if method == "lora" else {"iterations": 2}
    spec = AdapterSpec(method, ("all-linear",), {"rank": 4, **options})
    streamed, loaded = begun(tmp_path, spec, seed=5), load(tmp_path, NF4_32, dtype=F32)
    known = weights(tmp_path, adapted_sites(streamed))
    adapt(loaded, spec, {name: Source(w) for name, w in known.items()}, seed=5)
    state, again = streamed.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert (
        {n for n, p in streamed.named_parameters() if p.requires_grad}
        == {n for n, p in loaded.named_parameters() if p.requires_grad}
        != set()
    )
    kept = {name for name, site in adapted_sites(streamed).items() if site.base.own}
    assert kept == (set() if method == "lora" else set(adapted_sites(streamed)))


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Source]:
    """What every site was told, while the real start goes on."""
    seen: dict[str, Source] = {}
    real = qtune.start.__globals__["begin"]

    def begin(name: str, site: Any, spec: Any, source: Source, seed: int) -> Any:
        assert source.gram is not None
        seen[name] = Source(source.weight.clone(), source.gram.clone())
        return real(name, site, spec, source, seed)

    monkeypatch.setitem(qtune.start.__globals__, "begin", begin)
    return seen


FAMILIES = ["llama", "llama-tied", "gemma2", "gpt2", "opt", "phi3", "qwen3-moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_second_moments_are_those_of_the_inputs_in_the_started_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first input of each layer is what the packed and adapted layers below hand up; it does not change later."""
    tiny.saved(family, tmp_path)
    seen = recorded(monkeypatch)
    inside = ("*layers.*.*",) if family == "opt" else CLOQ.targets  # opt has layers outside of its list
    model = begun(tmp_path, AdapterSpec("cloq", inside, {"rank": 4}))
    sites = adapted_sites(model)
    assert list(seen) == list(sites) or family == "qwen3-moe"
    inputs: dict[str, list[Tensor]] = {}
    for name, site in sites.items():
        site.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        for row in windows():
            model(row.unsqueeze(0), use_cache=False)
    known = weights(tmp_path, sites)
    checked = 0
    for name in sites:
        assert torch.equal(seen[name].weight, known[name])
        x = torch.cat(inputs[name])
        assert seen[name].gram.shape == (x.shape[1], x.shape[1])
        if name.endswith(("q_proj", "qkv_proj", "c_attn")):
            gram = (x.double().T @ x.double() / len(x)).float()
            assert (seen[name].gram - gram).norm() <= 1e-4 * gram.norm(), name
            checked += 1
    assert checked >= 2
    for name, site in sites.items():
        assert site.start is not None and site.start.weighted
        assert site.start.after == pytest.approx(distance(seen[name], site.merged()[0]))
        assert site.start.after < site.start.before


def test_inside_of_a_layer_inputs_are_those_of_its_dense_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.saved("llama", tmp_path)
    seen = recorded(monkeypatch)
    begun(tmp_path, CLOQ)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F32)
    caught: dict[str, Tensor] = {}
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"):
        theirs.model.layers[0].get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: caught.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        theirs(windows(), use_cache=False)
    for name, x in caught.items():
        gram = x.T @ x / len(x)
        assert (seen[f"model.layers.0.{name}"].gram - gram).norm() <= 1e-4 * gram.norm(), name


@pytest.mark.parametrize("codes", ["gptq", "magr-gptq"])
def test_codes_from_data_lower_the_error_of_outputs_on_any_method(
    codes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.saved("llama", tmp_path)
    seen = recorded(monkeypatch)
    begun(tmp_path, CLOQ)
    lora = AdapterSpec("lora", ("q_proj",), {"rank": 4})
    chosen = begun(tmp_path, lora, codes=codes)
    plain = load(tmp_path, NF4_32, dtype=F32)
    layers = {m.name: m for m in chosen.modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14 and all(layer.own for layer in layers.values())
    first = [name for name in layers if "layers.0." in name]
    errors = {
        name: [distance(seen[name], m.dequantize()) for m in (layers[name], plain.get_submodule(name))]
        for name in first
    }
    mean = [sum(pair[i] for pair in errors.values()) for i in (0, 1)]
    assert mean[0] < 0.95 * mean[1]


def test_codes_are_chosen_where_a_mixture_has_codes(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    mixed = storage_from({"default": "nf4", "*.down_proj": {"name": "dense", "dtype": "float32"}})
    model = begun(tmp_path, AdapterSpec("lora", ("q_proj",), {"rank": 4}), mixed, codes="gptq")
    own = {m.name: m.own for m in model.modules() if isinstance(m, QuantLinear)}
    assert all(chosen != name.endswith("down_proj") for name, chosen in own.items())


def test_what_a_start_packs_gets_the_same_choice_of_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PiSSA's residual by GPTQ: nearer in the outputs than the same residual rounded."""
    tiny.saved("llama", tmp_path)
    seen = recorded(monkeypatch)
    begun(tmp_path, CLOQ)
    monkeypatch.undo()
    spec = AdapterSpec("pissa", ("all-linear",), {"rank": 4})
    sites = [adapted_sites(begun(tmp_path, spec, codes=codes)) for codes in ("nearest", "gptq")]
    first = [name for name in sites[0] if "layers.0." in name]
    nearest, gptq = (sum(distance(seen[name], found[name].merged()[0]) for name in first) for found in sites)
    assert gptq < 0.95 * nearest
    start = sites[1][first[0]].start
    assert start is not None and not start.weighted and sites[1][first[0]].base.pack is None


def test_a_packed_checkpoint_with_chosen_codes(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path / "model")
    tiny.words(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 40}" for i in range(400)))
    calibrate = {"codes": "gptq", "data": str(tmp_path / "text.txt"), "length": 16}
    tree = {"model": str(tmp_path / "model"), "scheme": "int3", "dtype": "float32", "calibrate": calibrate}
    qtune.quantize(Recipe.load(tree, training=False), tmp_path / "packed")
    chosen, plain = (
        load(tmp_path / "packed", None, dtype=F32),
        load(tmp_path / "model", INT3(), dtype=F32),
    )
    same = [
        torch.equal(chosen.get_submodule(n).packed, m.packed)
        for n, m in plain.named_modules()
        if isinstance(m, QuantLinear)
    ]
    assert len(same) == 14 and not any(same)
    tree["calibrate"] = {"codes": "gptq"}
    with pytest.raises(QtuneError, match="calibrate.data is missing"):
        qtune.quantize(Recipe.load(tree, training=False), tmp_path / "other")
    with pytest.raises(QtuneError, match="dense.*no codes"):
        qtune.quantize(
            Recipe.load(tree | {"calibrate": calibrate, "scheme": "dense"}, training=False), tmp_path / "other"
        )
    assert not (tmp_path / "other").exists()


# ---- refusals, before anything is read


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("qtune.model.loading.Fill.piece", read)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (AdapterSpec("loftq", (), {"rank": 65}), {}, r"rank.*65.*"),
        (LOFTQ, {"scheme": Dense("float32")}, "dense"),
        (CLOQ, {"windows": None}, "calibration text"),
        (CLOQ, {"windows": windows(1, 24)}, r"24 tokens.*96.*calibrate\.samples"),
        (AdapterSpec("cloq", ("project_in",)), {}, "no packed linear layer"),
        (CLOQ, {"windows": windows() + 999}, "the model has tokens 0 to 130"),
        (LOFTQ, {"codes": "best"}, "gptq, magr-gptq, nearest"),
        (LOFTQ, {"scheme": storage_from({"default": "nf4", "*.down": "int8"})}, r"'\*\.down'.*down_proj"),
    ],
    ids=["rank", "dense", "no text", "little text", "target", "tokens", "codes", "pattern"],
)
def test_what_cannot_be_is_told_before_anything_is_read(
    spec: AdapterSpec, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.saved("llama", tmp_path)
    nothing_is_read(monkeypatch)
    with pytest.raises(QtuneError, match=message):
        begun(tmp_path, spec, **options)


def test_a_site_outside_of_the_layers_has_no_inputs_to_learn_from(tmp_path: Path) -> None:
    tiny.saved("opt", tmp_path)
    with pytest.raises(QtuneError, match=r"project_out.*cloq.*inside of the decoder's layers.*adapter\.targets"):
        begun(tmp_path, CLOQ)


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_a_tied_head_has_no_start(method: str, tmp_path: Path) -> None:
    """It got no adapter, silently."""
    tiny.saved("llama-tied", tmp_path)
    spec = AdapterSpec(method, ("lm_head", "q_proj"), {"rank": 4})
    with pytest.raises(QtuneError, match=rf"lm_head: its weight is the input table's, too, so that method {method}"):
        begun(tmp_path, spec, embeddings=INT8())


def test_packed_weights_have_no_start(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path / "model")
    save_quantized(load(tmp_path / "model", NF4_32), None, tmp_path / "packed")
    with pytest.raises(QtuneError, match=r"packed already.*loftq.*original model"):
        qtune.start(tmp_path / "packed", NF4_32, LOFTQ)
    with pytest.raises(QtuneError, match=r"packed already.*codes gptq"):
        qtune.start(tmp_path / "packed", NF4_32, AdapterSpec("lora"), windows=windows(), codes="gptq")
    qtune.start(tmp_path / "packed", NF4_32, AdapterSpec("lora"))


def test_a_method_that_needs_the_weight_says_so_on_a_loaded_model(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    with pytest.raises(QtuneError, match=r"loftq starts from the weight.*qtune\.start"):
        adapt(load(tmp_path, NF4_32), LOFTQ)


def test_text_is_cut_in_windows_spread_over_it() -> None:
    cut = windows_of([list(range(7)), list(range(7, 20))], 2, 5)
    assert cut.tolist() == [[0, 1, 2, 3, 4], [15, 16, 17, 18, 19]]
    assert windows_of([[1, 2, 3]], 9, 2).tolist() == [[1, 2]]
    with pytest.raises(QtuneError, match=r"3 tokens.*calibrate\.length = 5"):
        windows_of([[1, 2, 3]], 9, 5)


# ---- runs


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers picks a family's own tokenizer class by the config, which cannot read our one-word vocabulary."""
    monkeypatch.setattr("qtune.runs.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of short runs, trained once: pissa and loftq (own codes), cloq on gptq codes, loftq (the plain base)."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            method, _, more = name.partition("+")
            changes: dict[str, Any] = {"adapter": {"method": method, "rank": 4}, "train__steps": 2, "train__lr": 3e-3}
            if more == "twice":
                changes["adapter"]["iterations"] = 2
            if more == "gptq":
                changes |= {"calibrate__codes": "gptq", "calibrate__length": 8, "calibrate__samples": 12}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qtune.runs.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
                made[name] = train(runs_helper.recipe(root, **changes)).folder
        return made[name]

    return folder


NAMES = ["pissa+twice", "loftq", "cloq+gptq"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_opens_on_the_very_codes_that_it_was_trained_on(name: str, runs: Callable[[str], Path]) -> None:
    folder = runs(name)
    info = json.loads((folder / "adapter.json").read_text())
    own = name != "loftq"
    assert (folder / "base.safetensors").is_file() == own and info["kept"] == (14 if own else 0)
    for site in info["sites"].values():
        assert 0 < site["start"]["after"] < site["start"]["before"] and site["start"]["weighted"] == ("cloq" in name)
    run = open_run(folder, QUIET)  # refuses other codes by their digests
    sites = adapted_sites(run.model)
    assert all(site.start is not None and site.base.own == own for site in sites.values())
    plain = load(run.recipe.model, run.recipe.scheme, dtype=F32)
    packed = [torch.equal(site.base.packed, plain.get_submodule(n).packed) for n, site in sites.items()]
    assert not any(packed) if own else all(packed)


def test_a_run_without_its_codes_says_so(runs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = runs("pissa+twice")
    hidden = (folder / "base.safetensors").rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(QtuneError, match=r"lacks base\.safetensors with the codes of 14 layers"):
            open_run(folder, QUIET)
        cut = hidden.read_bytes()[:-100]
        (folder / "base.safetensors").write_bytes(cut)
        with pytest.raises(QtuneError, match=r"base\.safetensors is truncated"):
            open_run(folder, QUIET)
    finally:
        hidden.replace(folder / "base.safetensors")


def test_any_other_bit_of_the_codes_is_refused(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """Scales too: they are stored, so that all their bits are known, unlike those of a base that is packed anew."""
    folder = tmp_path / "run"
    shutil.copytree(runs("pissa+twice"), folder)
    tensors = safetensors.torch.load_file(folder / "base.safetensors")
    for part in sorted({name.rpartition(".")[2] for name in tensors}):
        name = next(name for name in tensors if name.endswith("." + part))
        wrong = tensors[name].clone()
        wrong.view(-1).view(torch.uint8)[0] ^= 1
        safetensors.torch.save_file(tensors | {name: wrong}, folder / "base.safetensors")
        with pytest.raises(QtuneError, match="trained on other weights"):
            open_run(folder, QUIET)


def test_without_its_first_values_no_adapter_goes_onto_the_original(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """What started as a part of the weight would be added to the whole weight."""
    folder = tmp_path / "run"
    shutil.copytree(runs("pissa+twice"), folder)
    (folder / "start.safetensors").unlink()
    for leave in (merge, export_peft):
        with pytest.raises(QtuneError, match=r"cannot read .*start\.safetensors"):
            leave(open_run(folder, QUIET), tmp_path / "out", keep_base="original", screen=QUIET)


def test_first_values_of_another_run_are_refused(runs: Callable[[str], Path], tmp_path: Path) -> None:
    folder, other = (Path(shutil.copytree(runs(name), tmp_path / name[:4])) for name in ("pissa+twice", "loftq"))
    shutil.copyfile(other / "start.safetensors", folder / "start.safetensors")
    with pytest.raises(QtuneError, match=r"start\.safetensors is not the file that adapter\.json was written for"):
        merge(open_run(folder, QUIET), tmp_path / "out", keep_base="original")


def test_a_run_starts_from_another_on_its_codes(runs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = runs("pissa+twice")
    recipe = Recipe.load(folder / "recipe.yaml", {"output": str(tmp_path / "next"), "train.steps": 1})
    train(recipe, start_from=folder)
    for name in ("base.safetensors", "start.safetensors"):
        assert (tmp_path / "next" / name).read_bytes() == (folder / name).read_bytes()
    open_run(tmp_path / "next", QUIET)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_base", ["trained", "original"])
def test_merged_onto_either_base(name: str, keep_base: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = open_run(runs(name), QUIET)
    report = merge(run, tmp_path / "out", dtype="float32", keep_base=keep_base)
    assert report.verification.passed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=F32)
    original = AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=F32)
    first = {k: v.float() for k, v in qtune_tensors(runs(name) / "start.safetensors").items()}
    now = {k: v.float() for k, v in qtune_tensors(runs(name) / "adapter.safetensors").items()}
    for site, module in adapted_sites(open_run(runs(name), QUIET).model).items():
        trained, start = (t[f"{site}.B"] @ t[f"{site}.A"] * module.adapter.scale for t in (now, first))
        want = module.base.dequantize() + trained
        if keep_base == "original":
            want = original.get_parameter(f"{site}.weight") + trained - start
        assert (merged.get_parameter(f"{site}.weight") - want).abs().max() <= 1e-5, site
        assert (trained - start).abs().max() > 1e-4


def qtune_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_learned_leaves_for_the_original_weights(
    name: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """The exact difference as a LoRA of twice the rank: real PEFT on the original computes what the merge does."""
    from peft import PeftModel

    run = open_run(runs(name), QUIET)
    kl = export_peft(run, tmp_path / "lora", QUIET, "original")
    assert kl is not None and 0 < kl < 1
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 8
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=F32), str(tmp_path / "lora")
    )
    merge(open_run(runs(name), QUIET), tmp_path / "out", dtype="float32", keep_base="original")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=F32)
    assert (tiny.logits(theirs) - tiny.logits(ours)).abs().max() <= 1e-4


def test_the_adapter_itself_leaves_for_a_base_that_others_have(runs: Callable[[str], Path], tmp_path: Path) -> None:
    assert export_peft(open_run(runs("loftq"), QUIET), tmp_path / "same", QUIET) is None
    assert json.loads((tmp_path / "same" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(QtuneError, match=r"its own.*--keep-base original"):
        export_peft(open_run(runs("pissa+twice"), QUIET), tmp_path / "no", QUIET, "trained")
    with pytest.raises(QtuneError, match="original, trained"):
        export_peft(open_run(runs("loftq"), QUIET), tmp_path / "no", QUIET, "packed")


# ---- several schemes


def test_the_first_pattern_that_matches_decides() -> None:
    mixed = storage_from({"default": "nf4", "*.0.*.down_proj": "int8", "down_proj": {"name": "nf4", "block": 128}})
    assert isinstance(mixed, Mixed)
    assert mixed.of("model.layers.0.mlp.down_proj") == INT8()
    assert mixed.of("model.layers.1.mlp.down_proj") == NF4(block=128)
    assert mixed.of("model.layers.1.mlp.up_proj") == NF4()
    assert storage_from(mixed.to_dict()) == mixed


@pytest.mark.parametrize(("bits", "first"), [(4, 32), (3, 16), (2.5, 8), (2.25, 4), (2, 0)])
def test_an_average_is_loftqs_mixture(bits: float, first: int) -> None:
    sizes = {f"model.layers.{i}.{kind}": size for i in range(32) for kind, size in (("a", 7), ("b", 13))}
    mixed = storage_from({"bits": bits, "high": "int4", "low": "int2"}).resolve(sizes)
    wide = [site for site in sizes if mixed.of(site).name == "int4"]
    assert wide == [site for site in sizes if int(site.split(".")[2]) < first]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"bits": 5, "high": "int4", "low": "int2"}, "average of 5 bits.*2.0 to 4.0"),
        ({"bits": 3, "high": "int2", "low": "int4"}, "with `high` the larger one"),
        ({"bits": "3", "high": "int4", "low": "int2"}, "bits must be a number"),
        ({"bits": 3, "high": "int4"}, "with bits go high and low"),
        ({"default": "int9", "a": "nf4"}, r"default: unknown scheme 'int9'"),
    ],
)
def test_wrong_mixtures_are_named(value: dict[str, Any], message: str) -> None:
    with pytest.raises(QtuneError, match=message):
        storage_from(value)


@pytest.mark.parametrize(
    "scheme", [{"default": "nf4", "*.down_proj": "int8"}, {"bits": 3, "high": "int4", "low": "nf2"}]
)
def test_a_mixed_model_loads_packs_and_comes_back(scheme: dict[str, Any], tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path / "model")
    model = load(tmp_path / "model", storage_from(scheme), dtype=F32)
    names = {m.name: m.scheme.name for m in model.modules() if isinstance(m, QuantLinear)}
    assert len(set(names.values())) == 2
    assert all((kind == "int8") == name.endswith("down_proj") for name, kind in names.items()) or "bits" in scheme
    save_quantized(model, None, tmp_path / "packed")
    for asked in (None, storage_from(scheme)):
        again = load(tmp_path / "packed", asked, dtype=F32)
        assert {m.name: m.scheme.name for m in again.modules() if isinstance(m, QuantLinear)} == names
        assert torch.equal(tiny.logits(again), tiny.logits(model))
    recipe = Recipe.load({"model": "x", "scheme": scheme, "adapter": "lora"}, training=False)
    assert Recipe.load(recipe.to_yaml(), training=False) == recipe
