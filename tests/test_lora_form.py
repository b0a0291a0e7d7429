"""Adapters of any method leave as a LoRA, and as the file that llama.cpp reads: against a float64 SVD, PEFT, gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import runs_helper
import tiny
import torch
from peft_kit import base_of, ids, packed
from peft_kit import tiny as tiny_model
from torch import Tensor

from qtune.adapter_export import export_gguf, export_lora
from qtune.adapters import METHODS, AdapterSpec, Source, adapt, adapted_sites
from qtune.adapters.files import load_first
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.lora_form import to_lora
from qtune.model.gguf_names import gguf_places
from qtune.peft import to_peft
from qtune.quant import QuantLinear, scheme_from
from qtune.runs import open_run
from qtune.screen import Screen

QUIET = Screen(quiet=True)
TARGETS = ("q_proj", "v_proj", "down_proj")


def adapted(method: str, **options: Any) -> Any:
    """A packed model with an adapter far from its start."""
    model, before = packed(tiny_model("llama"), scheme_from("int4")), dict(tiny_model("llama").named_parameters())
    sources = {
        name: Source(before[f"{name}.weight"].detach(), torch.eye(module.in_features))
        for name, module in model.named_modules() if isinstance(module, QuantLinear)
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # how near a start must be is not what is tested here
        patch.setattr(METHODS[method], "bound", None)
        adapt(model, AdapterSpec(method, TARGETS, options), sources)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model.eval()


def deltas(model: Any) -> dict[str, Tensor]:
    return {name: (site.merged()[0] - site.base.dequantize()).double() for name, site in adapted_sites(model).items()}


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_leaves_as_the_best_lora_of_a_rank(method: str) -> None:
    model = adapted(method)
    if not METHODS[method].mergeable:
        with pytest.raises(QtuneError, match="no weight does the same"):
            to_lora(model, TARGETS, 8, None, int)
        return
    want = deltas(model)
    biases = {name: site.merged()[1] for name, site in adapted_sites(model).items()}
    if any(not torch.equal(bias, adapted_sites(model)[n].base.bias) for n, bias in biases.items() if bias is not None):
        with pytest.raises(QtuneError, match="changes the layer's bias"):
            to_lora(model, TARGETS, 8, None, int)
        assert all(type(site.adapter) is METHODS[method] for site in adapted_sites(model).values())
        return
    _, cuts = to_lora(model, TARGETS, 8, None, int)
    for cut in cuts:
        s = torch.linalg.svdvals(want[cut.site])
        best = s[8:].norm() / s.norm()
        assert cut.norm == pytest.approx(float(s.norm()), rel=1e-4)
        got = deltas(model)[cut.site]
        lost = (got - want[cut.site]).norm() / s.norm()
        assert cut.lost == pytest.approx(float(lost), abs=1e-4), "what is told is what was lost"
        assert best - 1e-5 <= lost <= best * 1.02 + 1e-4, cut.site


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "relora", "deltalora", "adalora", "vera", "hra", "tied_lora", "hdpissa"])
def test_what_has_factors_leaves_whole(method: str) -> None:
    model = adapted(method)
    want, logits = deltas(model), model(ids()).logits
    _, cuts = to_lora(model, TARGETS, None, None, int)
    assert {cut.lost for cut in cuts} == {0.0}
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta, want[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(ids()).logits, logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("method", "error"), [("bhra", 0.3), ("qwha", 0.2), ("lora", 0.5), ("mora", 0.05)])
def test_a_share_takes_the_smallest_rank_that_keeps_it(method: str, error: float) -> None:
    model = adapted(method)
    want = deltas(model)
    spec, cuts = to_lora(model, TARGETS, None, error, int)
    for cut in cuts:
        s = torch.linalg.svdvals(want[cut.site])
        lost = [float(s[r:].norm() / s.norm()) for r in range(len(s) + 1)]
        assert cut.lost <= error * 1.001
        assert lost[cut.rank - 1] > error * 0.97, "a smaller rank would have done"
    assert spec.options["rank"] == max(cut.rank for cut in cuts)


@torch.no_grad()
def test_peft_reads_ranks_that_differ(tmp_path: Path) -> None:
    model = adapted("bhra")
    spec, cuts = to_lora(model, TARGETS, None, 0.3, int)
    assert len({cut.rank for cut in cuts}) > 1
    to_peft(model, spec, tmp_path, "someone/tiny")
    theirs = peft.PeftModel.from_pretrained(base_of(model, "llama"), tmp_path).eval()
    torch.testing.assert_close(model(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)


def test_options_that_contradict() -> None:
    for rank, error, words in ((4, 0.1, "give one"), (0, None, "--rank"), (None, 1.5, "--error"), (None, 0.0, "share")):
        with pytest.raises(QtuneError, match=words):
            to_lora(adapted("lora"), TARGETS, rank, error, int)


# ---- of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Method -> folder of a run of eight steps."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            root = tmp_path_factory.mktemp(method)
            keys = {"adapter": {"method": method}, "train__lr": 0.1}
            (root / "recipe.yaml").write_text(runs_helper.recipe(root, **keys).to_yaml())
            assert main(["train", str(root / "recipe.yaml"), "--json"]) == 0
            made[method] = root / "run"
        return made[method]

    return run


def test_the_error_and_the_divergence_are_told(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", str(finished("hira")), "--out"]
    assert main([*argv, str(tmp_path / "low"), "--as", "lora", "--rank", "2"]) == 0
    text = capsys.readouterr().out
    assert "a LoRA of rank 2 in 14 layers; of what was learned it lost" in text and "KL(trained || exported) is" in text
    kl = [export_lora(open_run(finished("hira"), QUIET), tmp_path / str(r), QUIET, rank=r).kl for r in (1, 64)]
    assert kl[1] < 1e-6 and kl[1] < kl[0]
    assert main([*argv, str(tmp_path / "x"), "--as", "safetensors"]) == 1
    assert main([*argv, str(tmp_path / "x"), "--rank", "2"]) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("method", ["lora", "pissa", "dora"])
def test_llama_cpp_gets_what_was_learned(method: str, finished: Any, tmp_path: Path) -> None:
    """Read back by gguf's own reader; the rows of q and k undone by the formula of llama.cpp's converter, which writes
    them as [head, 2, half] swapped to [head, half, 2] (conversion of LlamaForCausalLM, `permute`)."""
    run, file = open_run(finished(method), QUIET), tmp_path / "adapter.gguf"
    if method == "pissa":
        left = export_gguf(run, file, QUIET, "original")
        first = open_run(finished(method), QUIET)
        load_first(first.model, first.folder, first.adapter)
        begun = deltas(first.model)
        want = {name: delta - begun[name] for name, delta in _changes(finished(method)).items()}
    else:
        want = _changes(finished(method))
        left = export_gguf(run, file, QUIET, error=1e-3 if method == "dora" else None)
    reader = gguf.GGUFReader(file)
    said = {name: reader.fields[name].contents() for name in (
        "general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")}  # fmt: skip
    alpha = said.pop("adapter.lora.alpha")
    assert said == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)).double() for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    config = run.model.config
    for site, delta in want.items():
        name = names.get_name(site)
        A, B = tensors.pop(f"{name}.weight.lora_a"), tensors.pop(f"{name}.weight.lora_b")
        got = alpha / len(A) * B @ A
        counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if (heads := counts.get(site.rsplit(".", 1)[-1])) is not None:
            delta = delta.view(heads, 2, -1, delta.shape[1]).transpose(1, 2).reshape(delta.shape)
        torch.testing.assert_close(got, delta, rtol=0, atol=2e-3 * float(delta.norm()) + 1e-7)
    assert not tensors and left.kl < 1
    assert main(["export", str(finished(method)), "--out", str(file), "--as", "gguf"]) == 1, "it is there already"


def _changes(folder: Path) -> dict[str, Tensor]:
    return deltas(open_run(folder, QUIET).model)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3", "phi3", "gpt2"]
)
def test_rows_go_where_transformers_takes_them_from(family: str) -> None:
    """What our file holds in the place of a weight, transformers' own loader turns into that weight."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    from qtune.model.gguf_names import gguf_architecture

    model = tiny.model(family)
    model = packed(model)
    adapt(model, AdapterSpec("lora", ("all-linear",), {"rank": 2}))
    places = gguf_places(model, list(adapted_sites(model)))
    kind = TENSOR_PROCESSORS.get(gguf_architecture(model.config), TensorProcessor)
    blocks = gguf.TensorNameMap(getattr(gguf.MODEL_ARCH, gguf_architecture(model.config).upper()), 2)
    for name, site in adapted_sites(model).items():
        weight = site.base.dequantize()
        result = kind(config=model.config.to_dict()).process(
            weights=places[name].rows(weight).numpy(),
            name=places[name].name,
            tensor_key_mapping={},
            parsed_parameters={},
        )
        assert torch.equal(torch.from_numpy(np.array(result.weights)), weight.T if site.base.conv1d else weight)
        assert places[name].name == f"{blocks.get_name(name)}.weight"


def test_what_llama_cpp_has_no_adapter_for_is_refused(finished: Any, tmp_path: Path) -> None:
    model = packed(tiny.model("opt"))
    adapt(model, AdapterSpec("lora", ("q_proj",), {"rank": 2}))
    with pytest.raises(QtuneError, match=r"model of type 'opt' is not known here; known: llama.*--as lora"):
        gguf_places(model, list(adapted_sites(model)))
