"""`qtune merge --keep SCHEME`: what packing leaves of what was learned is told truly, and too little is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import torch
import transformers

from qtune import packed_merge
from qtune.adapters import adapted_sites
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.model import load, save_quantized
from qtune.model.loading import packed_sites
from qtune.packed_merge import _refuse_little, merge_packed, rounded_down
from qtune.quant import NF4
from qtune.repacking import Repacked, Shares, Way
from qtune.runs import Run, open_run
from qtune.screen import Screen
from qtune.trainer import train

QUIET = Screen(quiet=True)


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen3-moe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keep")
    changes: dict[str, Any] = {
        "llama": {"adapter__targets": "all-linear,lm_head", "scheme__embeddings": "int8"},
        "llama-tied": {"adapter__targets": "all-linear,lm_head", "scheme__embeddings": "int8"},
        "qwen3-moe": {"adapter__targets": "all-linear,*.experts.*"},
    }.get(request.param, {})
    recipe = runs_helper.recipe(
        root, request.param, train__steps=4, calibrate__samples=10, calibrate__length=16, **changes
    )
    return train(recipe, overwrite=True).folder


@pytest.fixture
def run(trained: Path) -> Run:
    return open_run(trained, QUIET)


@pytest.mark.parametrize(("keep", "codes"), [("nf4", "nearest"), ("int8", "nearest"), ("nf4", "gptq")])
def test_what_is_left_is_told_truly(keep: str, codes: str, run: Run, tmp_path: Path) -> None:
    sites = adapted_sites(run.model)
    before = {name: site.base.dequantize() for name, site in sites.items()}
    change = {name: site.merged()[0] - before[name] for name, site in sites.items()}
    report = merge_packed(run, tmp_path / "out", keep, codes=codes, least=-1.0, screen=QUIET)
    assert report.verification.passed and report.kept is not None and not adapted_sites(run.model)
    again = load(tmp_path / "out", None, dtype=torch.float32)
    layers = packed_sites(again)
    for name, d in change.items():
        kept = (((layers[name].dequantize() - before[name]) * d).sum() / d.square().sum()).item()
        assert kept == pytest.approx(report.kept["layers"][name], abs=2e-3), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of what was learned; least in" in card and "computes what was packed" in card
    assert {layer.scheme.name for name, layer in layers.items() if name != "lm_head"} <= {keep, "dense"}
    if keep == "int8":
        assert 0.5 < report.kept["share"] < 1.5 and report.kept["kl"] < report.kept["kl_base"]


def test_a_file_of_other_codes_is_no_merge(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: Any, *rest: Any) -> None:
        site = packed_sites(model)["model.layers.1.self_attn.o_proj"]
        kept = site.parts["codes"][0].clone()
        site.parts["codes"][0] ^= 1
        save_quantized(model, *rest)
        site.parts["codes"][0] = kept

    monkeypatch.setattr(packed_merge, "save_quantized", spoiled)
    with pytest.raises(QtuneError, match=r"NOT what was packed \(model\.layers\.1\.self_attn\.o_proj\)"):
        merge_packed(run, tmp_path / "out", "nf4", least=-10.0, screen=QUIET)


def test_too_little_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(QtuneError, match=r"of what was learned is left, less than 100%.*--least-kept") as told:
        merge_packed(run, tmp_path / "out", "nf4", least=0.9999, screen=QUIET)
    assert told.value.code == "Q814" and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("share", "least", "told"), [
    (0.5, 0.5, None), (1.49, 0.5, None), (0.49, 0.5, "49.0% of what was learned is left, less than 50%"),
    (1.6, 0.5, "rounding makes 160.0% of what was learned out of it, more than 150%"), (1.6, 0.399, None),
    (3.0, -1.0, None),
])  # fmt: skip
def test_a_share_far_beyond_all_of_it_is_no_better(share: float, least: float, told: str | None) -> None:
    shares = Shares({"up_proj": share}, along=share, size=1.0)
    for way, made in (Way(NF4()), Repacked(packed=shares)), (Way(NF4(), rank=2), Repacked(both=shares)):
        if told is None:
            _refuse_little(way, made, least)
            continue
        with pytest.raises(QtuneError, match=re.escape(told)) as found:
            _refuse_little(way, made, least)
        _refuse_little(way, made, float(str(found.value).rpartition(" ")[2]))


@pytest.mark.parametrize("share", [0.00147, 0.1996, 0.25, 0.0, -0.0004])
def test_the_share_that_is_advised_is_enough(share: float) -> None:
    assert share - 0.001 < float(rounded_down(share)) <= share


def test_transformers_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = runs_helper.recipe(tmp_path, train__steps=2, scheme={"name": "nf4", "block": 64})
    run = open_run(train(recipe, overwrite=True).folder, QUIET)
    assert main(["merge", str(run.folder), "--keep", "nf4", "--out", str(tmp_path / "out"), "--least-kept", "-1"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.train()  # in eval mode bitsandbytes' CPU code needs rows of whole blocks
    ours = load(tmp_path / "out", None, dtype=theirs.dtype)
    assert theirs.is_loaded_in_4bit
    site = packed_sites(ours)["model.layers.0.mlp.up_proj"]
    assert torch.equal(site.parts["codes"], theirs.model.layers[0].mlp.up_proj.weight.data.view(-1))


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs_helper.recipe(tmp_path, train__steps=1)
    folder = str(train(recipe, overwrite=True).folder)
    for options, words in (
        (["--keep", "dense"], "keeps nothing packed"),
        (["--keep", "nf5"], "unknown scheme"),
        (["--keep", "nf4", "--codes", "best"], "unknown --codes"),
        (["--keep", "nf4", "--dtype", "float16"], "--dtype and --keep do not go together"),
        (["--least-kept", "0"], "--least-kept and a merge without --keep do not go together"),
        (["--codes", "gptq"], "--codes and a merge without --keep"),
    ):
        assert main(["merge", folder, *options, "--out", str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
