"""QA-LoRA: the paper's equation, and that what it learns goes into the zero points of the packed weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs_helper
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qtune import cli
from qtune.adapters import Adapted, AdapterSpec, adapted_sites
from qtune.adapters.qalora import QALoRA
from qtune.adapters.sites import build
from qtune.errors import QtuneError
from qtune.model import load
from qtune.packed_merge import merge_packed
from qtune.quant import SCHEMES, QuantLinear
from qtune.runs import Run, open_run, quantize
from qtune.screen import Screen
from qtune.trainer import train

OUT = 40
SHAPES = [(64, 32), (76, 32), (200, 64), (128, 128), (20, 32)]  # inputs and group: whole groups, a short last one, one


def site(scheme: str, width: int, group: int, rank: int = 4, stirred: bool = True) -> Adapted:
    base = QuantLinear(width, OUT, SCHEMES[scheme](group=group), bias=True, dtype=torch.float32, name="q_proj")
    draw = torch.Generator().manual_seed(width)
    base.set_weight(torch.randn(OUT, width, generator=draw))
    base.bias.data.normal_(generator=draw)
    made = build({"q_proj": base}, AdapterSpec("qalora", (), {"rank": rank, "group": group}))[0]["q_proj"]
    made.adapter.reset(base)
    if stirred:
        made.adapter.B.data.normal_(generator=draw)
    return made


def update(one: Adapted, width: int, group: int) -> Tensor:
    """The paper's: alpha / rank times B A times the mean of each group, as a matrix [out, in] in float64."""
    adapter: Any = one.adapter
    starts = range(0, width, group)
    pool = torch.zeros(len(starts), width, dtype=torch.float64)
    for row, start in enumerate(starts):
        pool[row, start : start + group] = 1 / min(group, width - start)
    return 16.0 / adapter.A.shape[0] * (adapter.B.double() @ adapter.A.double()) @ pool


@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_it_is_the_papers_equation_and_of_its_rank(width: int, group: int) -> None:
    one = site("int3", width, group)
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(3))
    change = update(one, width, group)
    want = x.double() @ (one.base.dequantize().double() + change).T + one.base.bias.double()
    torch.testing.assert_close(one(x).double(), want, rtol=1e-5, atol=1e-4)
    learned = one.merged()[0].double() - one.base.dequantize().double()
    groups = -(width // -group)
    assert torch.linalg.matrix_rank(learned, rtol=1e-4) == min(4, groups) == torch.linalg.matrix_rank(change)
    assert sum(p.numel() for p in one.adapter.parameters()) == 4 * (groups + OUT)


@pytest.mark.parametrize("scheme", ["int2", "int3", "int4"])
@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_it_merges_into_the_zero_points(scheme: str, width: int, group: int) -> None:
    """Of the parts only zero points change; a weight is off by no more than half a step of fp16 times its scale."""
    one = site(scheme, width, group)
    want, before = one.merged()[0].double(), {name: part.clone() for name, part in one.base.parts.items()}
    assert one.adapter.merge_into(one.base) and one.base.own
    after = one.base.parts
    assert all(torch.equal(before[name], after[name]) for name in ("codes", "scale"))
    zero, scale = (after[name].double() for name in ("zero", "scale"))
    step = torch.exp2(torch.floor(torch.log2(zero.abs().clamp(min=2**-14))) - 10)
    bound = (scale * step / 2).repeat_interleave(group, 1)[:, :width] * 1.001 + 1e-6
    assert bool(((one.base.dequantize().double() - want).abs() <= bound).all())
    x = torch.randn(5, width)
    rounding = (bound.square() @ x.double().square().T).sqrt().max()
    torch.testing.assert_close(one.base(x).double(), (x.double() @ want.T + one.base.bias.double()), rtol=0,
                               atol=float(8 * rounding))  # fmt: skip


def test_a_group_of_zeros_takes_what_was_learned() -> None:
    one = site("int4", 96, 32)
    weight = one.base.dequantize()
    weight[:, 32:64] = 0
    one.base.set_weight(weight)
    assert not one.base.parts["scale"][:, 1].any()
    want = one.merged()[0]
    one.adapter.merge_into(one.base)
    torch.testing.assert_close(one.base.dequantize(), want, rtol=5e-3, atol=5e-3)
    assert one.base.dequantize()[:, 32:64].abs().max() > 0.01


def test_it_keeps_means_and_not_inputs() -> None:
    one, kept = site("int3", 128, 64), []
    x = torch.randn(50, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        one(x)
    assert not [t for t in kept if t.shape[-1] == 128], "nothing as wide as the inputs"


@pytest.mark.parametrize(
    ("scheme", "options", "why"),
    [
        ("nf4", {}, "qalora merges into zero points, and nf4 has none; legal: int2, int3, int4"),
        ("int4", {"group": 32}, "adapter.group must be 64, the group of int4"),
        ("int4", {"alpha": 0.0}, "adapter.alpha must be above 0"),
        ("int4", {"group": 0}, "adapter.group must be at least 1"),
        ("int4", {"dropout": 1.0}, "adapter.dropout must be"),
    ],
)
def test_what_it_refuses(scheme: str, options: dict[str, Any], why: str) -> None:
    base = QuantLinear(64, 8, SCHEMES[scheme](), bias=False, dtype=torch.float32, device="meta", name="q_proj")
    with pytest.raises(QtuneError, match=why):
        build({"q_proj": base}, AdapterSpec("qalora", (), options).checked())


# ---- qtune merge --keep, exact


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run on 4-bit integers."""
    adapter = {"method": "qalora", "rank": 4, "group": 32, "alpha": 8.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtune.runs.load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
        root, scheme = tmp_path_factory.mktemp("qalora"), {"name": "int4", "group": 32}
        recipe = runs_helper.recipe(root, scheme=scheme, adapter=adapter, train__lr=0.1, train__steps=4)
        yield train(recipe, overwrite=True).folder


@pytest.fixture
def run(trained: Path) -> Run:
    """It, opened."""
    return open_run(trained, Screen(quiet=True))


def test_a_packed_checkpoint_computes_what_was_trained(run: Run, tmp_path: Path) -> None:
    trained = tiny.logits(run.model)
    for one in adapted_sites(run.model).values():
        one.enabled = False
    moved = float((tiny.logits(run.model) - trained).abs().max())
    for one in adapted_sites(run.model).values():
        one.enabled = True
    layers = len(adapted_sites(run.model))
    report = merge_packed(run, tmp_path / "merged", "int4")
    assert report.verification.passed and report.verification.layers == layers > 0
    assert not adapted_sites(run.model)
    merged = load(tmp_path / "merged", None, dtype=torch.float32)
    assert isinstance(merged.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)
    assert float((tiny.logits(merged) - trained).abs().max()) < 0.05 * moved
    assert report.nbytes == quantize(run.recipe, tmp_path / "plain"), "as large as the base"
    assert (tmp_path / "merged" / "LICENSE").is_file() and not list(tmp_path.glob("*.unverified"))
    assert "whose scheme it keeps" in (tmp_path / "merged" / "README.md").read_text()


def test_what_is_lost_does_not_pass(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QALoRA, "merge_into", lambda self, base: True)
    with pytest.raises(QtuneError, match="failed its verification"):
        merge_packed(run, tmp_path / "merged", "int4")
    assert not (tmp_path / "merged").exists()


def test_the_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["merge", str(run.folder), "--keep", "int4", "--out", str(tmp_path / "out")]
    assert cli.main([*given, "--dtype", "float32"]) == 1
    assert "--dtype and --keep do not go together" in capsys.readouterr().err
    assert cli.main(given) == 0
    assert "computes what was trained" in capsys.readouterr().out
    assert (tmp_path / "out" / "qtune.safetensors").is_file()
    assert cli.main(given) == 1 and "already holds a checkpoint" in capsys.readouterr().err
