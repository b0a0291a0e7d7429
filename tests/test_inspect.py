"""`qtune inspect`: its numbers against formulas in float64 and against noise that is known, its page, refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import runs_helper
import tiny
import torch

from qtune.adapters import adapted_sites
from qtune.adapters.deltas import Delta, Factors, dense
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.inspection.look import look
from qtune.inspection.measures import BINS, EDGE, SHARES, overlap, spectrum, spread
from qtune.inspection.page import write_look
from qtune.quant import NF4
from qtune.runs import open_run
from qtune.screen import Screen
from qtune.trainer import train

QUIET = Screen(quiet=True)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(rank: int, seed: int = 0, out: int = 48, inputs: int = 64) -> Factors:
    return Factors(drawn(rank, inputs, seed=seed), drawn(out, rank, seed=seed + 100))


# ---- numbers of a layer


@pytest.mark.parametrize("whole", [True, False])
def test_spectrum_of_factors_and_of_a_matrix(whole: bool) -> None:
    delta = factors(5)
    found = spectrum(dense(delta) if whole else delta)
    values = torch.linalg.svdvals(dense(delta).double())[:5]
    assert len(found.values) == 5, "what is rounding is no singular value"
    torch.testing.assert_close(found.values.double(), values, rtol=1e-5, atol=1e-5)
    p = values / values.sum()
    assert found.effective == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-4)
    assert found.stable == pytest.approx(float((dense(delta).double().norm() / values[0]) ** 2), rel=1e-4)
    torch.testing.assert_close(found.u * found.values @ found.v.T, dense(delta), rtol=1e-4, atol=1e-4)


def test_ranks_of_known_matrices() -> None:
    turned = torch.linalg.qr(drawn(40, 6)).Q
    assert spectrum(turned @ turned.T).effective == pytest.approx(6, rel=1e-4)
    assert spectrum(turned @ turned.T).stable == pytest.approx(6, rel=1e-4)
    assert spectrum(factors(1)).effective == pytest.approx(1)
    zero = spectrum(Factors(drawn(3, 8), torch.zeros(5, 3)))
    assert (zero.effective, zero.stable, len(zero.values)) == (0, 0, 0)


def test_overlap() -> None:
    a, b = factors(4), factors(4, seed=7)

    def of(x: Delta, y: Delta) -> tuple[float, float, float]:
        found = overlap(x, y, spectrum(x), spectrum(y))
        assert found is not None
        return found.cosine, found.read, found.written

    assert of(a, a) == pytest.approx((1, 1, 1), abs=1e-4)
    assert of(a, a.times(-2)) == pytest.approx((-1, 1, 1), abs=1e-4)
    cosine = torch.nn.functional.cosine_similarity(dense(a).flatten(), dense(b).flatten(), dim=0)
    assert of(a, b)[0] == pytest.approx(float(cosine), abs=1e-5) == of(dense(a), b)[0]
    apart = Factors(torch.cat((drawn(2, 32), torch.zeros(2, 32)), 1), drawn(48, 2))
    other = Factors(torch.cat((torch.zeros(2, 32), drawn(2, 32, seed=3)), 1), apart.B)
    assert of(apart, other)[:2] == pytest.approx((0, 0), abs=1e-5) and of(apart, other)[2] == pytest.approx(1, abs=1e-4)
    pairs = [
        overlap(x, y, spectrum(x), spectrum(y)) for x, y in ((factors(4, s), factors(4, s + 50)) for s in range(30))
    ]
    for side, chance in (("read", 4 / 64), ("written", 4 / 48)):
        mean = sum(getattr(one, side) for one in pairs) / 30
        assert mean == pytest.approx(chance, rel=0.15)
    assert pairs[0] is not None and pairs[0].by_chance == (4 / 64, 4 / 48)
    nothing = Factors(a.A, torch.zeros_like(a.B))
    assert overlap(a, nothing, spectrum(a), spectrum(nothing)) is None


@pytest.mark.parametrize(("noise", "kurtosis", "largest"), [("uniform", 1.8, 0.0297), ("normal", 3.0, 0.0847)])
def test_spread_of_noise(noise: str, kurtosis: float, largest: float) -> None:
    e = drawn(600, 500)
    e = e if noise == "normal" else (torch.rand(e.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 0.01
    size = float(e.norm())
    found = spread(e.clone(), 2 * size)
    assert found is not None
    assert (found.size, found.relative) == pytest.approx((size, 0.5), rel=1e-5)
    assert found.kurtosis == pytest.approx(kurtosis, rel=0.02) and found.largest == pytest.approx(largest, rel=0.03)
    assert found.rows == pytest.approx(1, abs=0.2) and found.columns == pytest.approx(1, abs=0.2)
    assert sum(found.density) * EDGE / BINS == pytest.approx(1, abs=1e-3)
    assert found.shares[0] == 0 and found.shares[-1] == pytest.approx(1) and len(found.shares) == len(SHARES)


def test_spread_of_structure() -> None:
    e = drawn(300, 400)
    rows, columns = spread(e * torch.linspace(0.1, 2, 300)[:, None], 1), spread(e * torch.linspace(0.1, 2, 400), 1)
    assert rows is not None and columns is not None
    assert rows.rows > 20 > 2 > rows.columns and columns.columns > 20 > 2 > columns.rows
    spike = torch.zeros(100, 100)
    spike[0, 0] = 1
    found = spread(spike, 1)
    assert found is not None and found.largest == pytest.approx(1) and found.kurtosis == pytest.approx(10_000)
    flat = spread(torch.ones(8, 8), 8)
    assert flat is not None and flat.rows == 1 and flat.kurtosis == pytest.approx(1)
    assert spread(torch.zeros(4, 4), 1) is None


# ---- runs and models


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    for name, method, changes in (
        ("one", "lora", {}), ("two", "lora", {"data__train": str(runs_helper.write_task(root, seed=5))}),
        ("fixed", "loftq", {"adapter__iterations": 1}),
    ):  # fmt: skip
        given = {"train__steps": 3, "output": str(root / name), **changes}
        train(runs_helper.recipe(root, adapter__method=method, **given))
    return root


def test_runs_are_measured_as_the_model_has_them(root: Path) -> None:
    found = look([str(root / "one"), str(root / "two")], screen=QUIET)
    assert list(found.runs) == ["one", "two"] and list(found.pairs) == [("one", "two")]
    weights = tiny.model("llama").state_dict()
    sites = adapted_sites(open_run(root / "one", QUIET).model)
    assert [one.site for one in found.runs["one"]] == list(sites)
    for one in found.runs["one"]:
        base = sites[one.site].base.dequantize()
        delta = sites[one.site].merged()[0] - base
        assert one.size == pytest.approx(float(delta.norm()), rel=1e-3)
        assert one.relative == pytest.approx(float(delta.norm() / base.norm()), rel=1e-3)
        values = torch.linalg.svdvals(delta)
        assert one.cut is not None
        assert one.cut.relative == pytest.approx(float(values[2:4].norm() / values.norm()), rel=1e-2)
    scheme = NF4(block=32)
    assert len(found.packed) == 14
    for packed in found.packed:
        w = weights[f"{packed.site}.weight"]
        error = scheme.unpack(scheme.pack(w), w.shape, torch.float32) - w
        assert packed.error.relative == pytest.approx(float(error.norm() / w.norm()), rel=1e-4)
        assert packed.left is not None
        left = torch.linalg.svdvals(error.double())[16:].norm()
        assert packed.left.size == pytest.approx(float(left), rel=0.03)


def test_a_start_is_left_out(root: Path) -> None:
    found = look([str(root / "fixed")], screen=QUIET)
    run = open_run(root / "fixed", QUIET)
    site, layer = next(iter(adapted_sites(run.model).items()))
    whole = layer.merged()[0] - layer.base.dequantize()
    from qtune.adapters.files import load_first

    load_first(run.model, run.folder, run.adapter)
    learned = whole - (layer.merged()[0] - layer.base.dequantize())
    assert found.runs["fixed"][0].site == site
    assert found.runs["fixed"][0].size == pytest.approx(float(learned.norm()), rel=1e-3)
    assert "start of loftq is left out" in found.notes[0]


def test_a_model_and_its_packed_checkpoint(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, packed = str(root / "model"), str(tmp_path / "packed")
    rounded = runs_helper.write_model(tmp_path / "bf16", dtype=torch.bfloat16)
    assert main(["quantize", model, "--scheme", "int4", "--out", packed]) == 0
    fresh = look([model], scheme="int4", screen=QUIET)
    there = look([packed], original=model, screen=QUIET)
    assert [one.error for one in there.packed] == [one.error for one in fresh.packed]
    capsys.readouterr()
    for words, told in (
        ([packed], "give --original MODEL"),
        ([model, "--original", model], "is not packed"),
        ([packed, "--original", model, "--scheme", "nf4"], "is packed already"),
        ([str(rounded), "--scheme", "dense"], "packing loses nothing"),
        ([str(root / "one"), "--scheme", "nf4"], "--scheme and --original are of a MODEL"),
        ([str(root / "one"), model], "not a run"),
        ([str(root / "one"), str(root / "one")], "different ones"),
        ([str(root / "one"), "--out", "page.pdf"], "ends in .html"),
    ):
        assert main(["inspect", *words]) == 1
        assert told in " ".join(capsys.readouterr().err.split())


def test_other_bases_are_refused(root: Path) -> None:
    train(runs_helper.recipe(root, scheme={"name": "int8"}, train__steps=1, output=str(root / "int8")))
    with pytest.raises(QtuneError, match="was trained on int8") as caught:
        look([str(root / "one"), str(root / "int8")])
    assert caught.value.code == "Q419"


def test_the_command_and_its_page(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(root / "one"), str(root / "two"), "--out", str(page), "--json"]) == 0
    told = capsys.readouterr()
    value = json.loads(told.out)
    assert value["file"] == str(page) and set(value["runs"]) == {"one", "two"} and len(value["packed"]) == 14
    assert value["pairs"][0]["runs"] == ["one", "two"]
    for words in ("Learned by one (lora, rank 4)", "Overlap of one and two", "Error of packing in nf4", "uniform"):
        assert words in told.err
    text = page.read_text("utf-8")
    assert text.count("<svg") == 8 and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#|data:)', text), "the page needs something beside it"
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_page_of_one_run_has_a_line_for_each_kind(root: Path, tmp_path: Path) -> None:
    write_look(look([str(root / "one")], screen=QUIET), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "Overlap" not in text and all(f"</i>{kind}</span>" in text for kind in ("q_proj", "down_proj"))
