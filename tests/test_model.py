"""Loading against transformers itself: what we load has its logits, for every family, scheme and kind of file."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from qtune.errors import QtuneError
from qtune.model import dense_parameters, load, load_tokenizer, packed_sites, save_quantized
from qtune.model.loading import Packing
from qtune.quant import SCHEMES, Dense, QuantEmbedding, QuantLinear, Scheme
from qtune.quant.blockwise4 import FP4, NF4
from qtune.quant.int8 import INT8

F32 = torch.float32
QUANTIZED = [NF4(), NF4(128, double=False), FP4(), INT8()]


def dequantized(model: nn.Module, scheme: Scheme, tables: bool = False) -> nn.Module:
    """transformers' model with every linear weight (head aside, unless `tables`) and every expert's matrix packed and
    unpacked by hand; gpt-oss' experts stay as they are."""
    done = copy.deepcopy(model)
    head, table = done.get_output_embeddings(), done.get_input_embeddings()
    with torch.no_grad():
        for module in done.modules():
            if isinstance(module, Conv1D):
                w = module.weight.T.contiguous()
                module.weight.copy_(scheme.unpack(scheme.pack(w), tuple(w.shape), F32).T)
            elif (type(module) is nn.Linear and module is not head) or (tables and module in (head, table)):
                w = module.weight.detach().clone()
                if module is head and head.weight is table.weight:
                    continue
                module.weight.copy_(scheme.unpack(scheme.pack(w), tuple(w.shape), F32))
            elif type(module).__name__ != "GptOssExperts":
                for w in (w for p in module.parameters(recurse=False) if p.dim() == 3 for w in p):
                    w.copy_(scheme.unpack(scheme.pack(w.clone()), tuple(w.shape), F32))
    return done


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("family", tiny.DENSE)
def test_dense_logits_are_transformers_own(family: str, shard: str, tmp_path: Path) -> None:
    expected = tiny.logits(tiny.saved(family, tmp_path, shard=shard))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    ours = load(tmp_path, Dense("float32"), dtype=F32)
    assert packed_sites(ours)
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=1e-6, atol=1e-6)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, buffer in state.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name


@pytest.mark.parametrize("scheme", QUANTIZED, ids=str)
@pytest.mark.parametrize("family", tiny.DENSE)
def test_packed_logits_are_those_of_dequantized_weights(family: str, scheme: Scheme, tmp_path: Path) -> None:
    theirs = tiny.saved(family, tmp_path)
    ours = load(tmp_path, scheme, dtype=F32)
    expected = tiny.logits(dequantized(theirs, scheme))
    torch.testing.assert_close(tiny.logits(ours), expected, rtol=1e-5, atol=1e-5)
    assert (expected - tiny.logits(theirs)).abs().max() > 1e-3  # packing did change the weights
    linear = [
        n
        for n, m in theirs.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not theirs.get_output_embeddings()
    ]
    assert sorted(packed_sites(ours)) == sorted(linear)
    assert all(site.name == name for name, site in packed_sites(ours).items())


@pytest.mark.parametrize("scheme", [NF4(), INT8()], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gemma3", "gpt2", "opt"])
def test_packed_embeddings(family: str, scheme: Scheme, tmp_path: Path) -> None:
    changes = {"word_embed_proj_dim": 64} if family == "opt" else {}
    theirs = tiny.saved(family, tmp_path, **changes)
    ours = load(tmp_path, scheme, embeddings=scheme, dtype=F32)
    table, head = ours.get_input_embeddings(), ours.get_output_embeddings()
    assert isinstance(table, QuantEmbedding) and isinstance(head, QuantLinear)
    assert (head.packed is table.packed) == theirs.config.tie_word_embeddings
    torch.testing.assert_close(
        tiny.logits(ours), tiny.logits(dequantized(theirs, scheme, tables=True)), rtol=1e-5, atol=1e-5
    )
    ours.tie_weights()  # transformers calls it in many places
    assert (head.packed is table.packed) == theirs.config.tie_word_embeddings


def test_scaled_embedding_in_bf16_is_gemmas_own(tmp_path: Path) -> None:
    theirs = tiny.saved("gemma3", tmp_path, torch.bfloat16, hidden_size=96)  # sqrt(96) is no bf16 number
    ours = load(tmp_path, NF4(), embeddings=Dense("bfloat16"))
    assert torch.equal(ours.get_input_embeddings()(tiny.ids()), theirs.get_input_embeddings()(tiny.ids()))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tiny.saved("llama-tied", tmp_path)
    ours = load(tmp_path, NF4(), dtype=F32)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    names = dense_parameters(ours)
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_in_the_file(equal: bool, tmp_path: Path) -> None:
    theirs = tiny.saved("llama", tmp_path)
    if equal:
        theirs.lm_head.weight = theirs.model.embed_tokens.weight
        from safetensors.torch import load_file, save_file

        state = load_file(tmp_path / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _change_config(tmp_path, tie_word_embeddings=True)
    ours = load(tmp_path, Dense("float32"), dtype=F32)
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), rtol=1e-6, atol=1e-6)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == equal
    assert any("differ" in note for note in ours.qtune.notes) != equal


def test_nothing_is_upcast(tmp_path: Path) -> None:
    theirs = tiny.saved("gemma3", tmp_path)
    ours = load(tmp_path, NF4())
    assert {p.dtype for p in dense_parameters(ours).values()} == {torch.bfloat16}
    half = theirs.bfloat16()
    for name, parameter in dense_parameters(ours).items():
        assert torch.equal(parameter, half.get_parameter(name)), name
    w = tiny.model("gemma3").model.layers[0].mlp.up_proj.weight  # packed from the file's own fp32
    assert torch.equal(ours.model.layers[0].mlp.up_proj.parts["codes"], NF4().pack(w.detach())["codes"])


def test_a_folder_without_a_tokenizer_says_what_it_lacks(tmp_path: Path) -> None:
    tiny.model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(QtuneError, match=r"the folder has none \(tokenizer.json, .*copy the model's files") as error:
        load_tokenizer(tmp_path)
    assert error.value.code == "Q308"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(QtuneError, match="cannot read a tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "has none" not in str(error.value)


def test_packing_is_given_each_weight_before_it_is_packed(tmp_path: Path) -> None:
    theirs = tiny.saved("gpt2", tmp_path)
    seen = {}

    class Keep(Packing):
        def weight(self, layer: QuantLinear, weight: torch.Tensor) -> None:
            assert layer.packed.is_meta
            seen[layer.name] = weight.clone()
            super().weight(layer, weight)
            assert not layer.own and not layer.packed.is_meta

    steps: list[tuple[str, int, int]] = []
    ours = load(tmp_path, NF4(), dtype=F32, packing=Keep(), progress=lambda *step: steps.append(step))
    assert list(seen) == list(packed_sites(ours))
    for name, weight in seen.items():
        assert torch.equal(weight, theirs.get_parameter(f"{name}.weight").T)
    assert [done for _, done, _ in steps] == list(range(len(steps))) and steps[-1][1] == steps[-1][2]


# ---- packed checkpoints ----


@pytest.mark.parametrize("scheme", [*QUANTIZED, Dense("float32")], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3"])
def test_a_packed_checkpoint_loads_without_the_original(family: str, scheme: Scheme, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path / "original")
    tiny.words(tmp_path / "original")
    first = load(tmp_path / "original", scheme, dtype=F32)
    save_quantized(first, load_tokenizer(tmp_path / "original"), tmp_path / "packed", shard_bytes=60_000)
    again = load(tmp_path / "packed", scheme, dtype=F32)
    assert again.qtune.scheme == scheme
    for name, site in packed_sites(first).items():
        assert torch.equal(packed_sites(again)[name].packed, site.packed), name
    assert torch.equal(tiny.logits(again), tiny.logits(first))
    assert load_tokenizer(tmp_path / "packed").chat_template == load_tokenizer(tmp_path / "original").chat_template


@pytest.mark.parametrize("embeddings", [INT8(), NF4()], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_a_packed_checkpoint_with_packed_embeddings(family: str, embeddings: Scheme, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path / "original")
    first = load(tmp_path / "original", NF4(), embeddings=embeddings, dtype=F32)
    save_quantized(first, None, tmp_path / "packed")
    again = load(tmp_path / "packed", None, dtype=F32)
    assert (again.qtune.scheme, again.qtune.embeddings) == (NF4(), embeddings)
    assert torch.equal(tiny.logits(again), tiny.logits(first))
    with pytest.raises(QtuneError, match="embeddings are packed as"):
        load(tmp_path / "packed", NF4(), dtype=F32)
    with pytest.raises(OSError, match=r"model.safetensors"):  # transformers must not misread it
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


# with a bias, bitsandbytes rounds once where we round twice, so bf16 is compared where there is none
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", F32), ("llama", torch.bfloat16), ("qwen2", F32), ("gpt2", F32)], ids=str
)
@pytest.mark.parametrize("scheme", [NF4(), FP4(), NF4(double=False), NF4(128)], ids=str)
def test_transformers_loads_our_packed_checkpoint(
    family: str, scheme: Scheme, dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    # bitsandbytes' CPU code is wrong where the last dimension is no multiple of the block
    changes = {"n_embd": 128} if family == "gpt2" else {"hidden_size": 128, "intermediate_size": 256}
    tiny.saved(family, tmp_path / "original", dtype, **changes)
    ours = load(tmp_path / "original", scheme, dtype=dtype)
    save_quantized(ours, None, tmp_path / "packed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert theirs.is_loaded_in_4bit and theirs.dtype == dtype
    layer = theirs.model.layers[1].mlp.up_proj if family != "gpt2" else theirs.transformer.h[1].mlp.c_fc
    assert type(layer).__name__ == "Linear4bit"
    theirs.train()  # in eval mode bitsandbytes packs the weights anew for AVX512, with other products
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if family == "gpt2":
        theirs.eval()
        for module in theirs.modules():
            if type(module).__name__ == "Linear4bit":
                module.train()
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), rtol=0, atol=1e-5 if dtype == F32 else 0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_we_load_what_transformers_packed(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.saved("llama", tmp_path / "original", torch.bfloat16, hidden_size=128, intermediate_size=256)
    asked = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=asked, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "packed")
    scheme = {"nf4": NF4(), "fp4": FP4()}[kind]
    ours = load(tmp_path / "packed", scheme)
    for name, site in packed_sites(ours).items():
        weight = theirs.get_parameter(f"{name}.weight")
        assert torch.equal(site.parts["codes"], weight.view(-1)), name
        assert torch.equal(site.parts["absmax"], weight.quant_state.absmax)
        assert torch.equal(site.parts["nested_offset"][0], weight.quant_state.offset)
    again = load(tmp_path / "original", scheme)
    assert all(site.digest() == packed_sites(again)[name].digest() for name, site in packed_sites(ours).items())
    with pytest.raises(QtuneError, match=r"packed as .*double=True.* cannot become int8"):
        load(tmp_path / "packed", INT8())
    files = lambda folder: {  # noqa: E731
        name: (tensor["dtype"], tensor["shape"])
        for name, tensor in _header(folder / "model.safetensors").items()
        if name != "__metadata__"
    }
    save_quantized(ours, None, tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "packed")  # the same names, dtypes and shapes as theirs


def test_a_folder_that_holds_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    with pytest.raises(QtuneError, match="already holds a checkpoint"):
        save_quantized(load(tmp_path, NF4()), None, tmp_path)


# ---- faults ----


def _header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_all_faults_of_the_tensors_are_in_one_error(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)

    def spoil(state: dict) -> None:
        del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
        state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        state["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(3, 64)
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # old checkpoints have it: ignored

    _rewrite(tmp_path, spoil)
    with pytest.raises(QtuneError) as caught:
        load(tmp_path, NF4())
    text = str(caught.value)
    assert "2 missing tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight" in text
    assert "1 extra tensors: model.layers.7.mlp.up_proj.weight" in text and "inv_freq" not in text
    assert "model.layers.0.self_attn.k_proj.weight is (3, 64), expected (32, 64)" in text


def test_weights_that_are_not_finite_are_all_named(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)

    def spoil(state: dict) -> None:
        state["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
        state["model.layers.1.mlp.gate_proj.weight"][0, 0] = float("inf")

    _rewrite(tmp_path, spoil)
    with pytest.raises(QtuneError, match=r"(?s)layers\.0\.mlp\.up_proj has 1 NaN.*layers\.1\.mlp\.gate_proj has 1 NaN"):
        load(tmp_path, NF4())


def test_unknown_architectures_and_foreign_code(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    _change_config(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert any("auto_map" in note for note in load(tmp_path, NF4()).qtune.notes)
    _change_config(tmp_path, model_type="grandllama")
    with pytest.raises(QtuneError, match=r"unknown architecture: model_type 'grandllama'.*never run"):
        load(tmp_path, NF4())
    _change_config(tmp_path, model_type="vit", quantization_config={"quant_method": "gptq"})
    with pytest.raises(QtuneError, match=r"(?s)'vit' has no causal language model.*quantized already, by 'gptq'"):
        load(tmp_path, NF4())


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    model = tiny.saved("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(QtuneError, match=r"pytorch_model.bin.*save_pretrained"):
        load(tmp_path, NF4())


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QtuneError, match="no file or folder 'no-such-folder'"):
        load("no-such-folder", NF4())
    with pytest.raises(
        QtuneError, match="no folder 'nobody/nothing' here, and the hub id 'nobody/nothing' could not be fetched"
    ):
        load("nobody/nothing", NF4())
    with pytest.raises(QtuneError, match=r"no config\.json"):
        load(tmp_path, NF4())
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(QtuneError, match=r"no \.gguf"):
        load(tmp_path / "x.txt", NF4())


def test_embeddings_of_their_own_class_are_refused_by_name(tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)

    class OddEmbedding(nn.Embedding):
        pass

    from qtune.model import skeleton

    made = skeleton.empty(transformers.AutoConfig.from_pretrained(tmp_path), F32)
    made.model.embed_tokens = OddEmbedding(tiny.VOCAB, 64, device="meta")
    with pytest.raises(QtuneError, match="is OddEmbedding, which cannot be packed"):
        skeleton.replace(made, lambda site: NF4(), NF4(), F32)


def test_every_registered_scheme_is_covered() -> None:
    assert {name for name in SCHEMES if not name.startswith("_")} >= {"dense", "nf4", "fp4", "int8"}
