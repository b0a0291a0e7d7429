"""bitsandbytes' checkpoints, both ways, against the real bitsandbytes and transformers; what other tools quantize is
refused by name."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from qtune.errors import QtuneError
from qtune.model import load, save_quantized
from qtune.model.loading import packed_sites
from qtune.quant import Scheme
from qtune.quant.blockwise4 import FP4, NF4
from qtune.quant.int8 import INT8

bitsandbytes = pytest.importorskip("bitsandbytes")
WIDE = {"hidden_size": 128, "intermediate_size": 256}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def theirs(folder: Path, family: str = "llama", dtype: torch.dtype = BF16, **options: Any) -> Any:
    """A tiny model that transformers packs and writes to `folder`/packed."""
    tiny.saved(family, folder / "plain", dtype, **({"n_embd": 128} if family == "gpt2" else WIDE))
    asked = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=asked, device_map="cpu", dtype=dtype
    )
    model.save_pretrained(folder / "packed")
    return model


def near(ours: Any, other: Any) -> None:
    """Equal but for the inputs of each product, which LLM.int8 rounds to 8 bits as well."""
    want = tiny.logits(other)
    assert (tiny.logits(ours) - want).norm() < 0.06 * want.norm()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("double", "storage", "dtype"),
    [(False, "uint8", BF16), (True, "bfloat16", BF16), (True, "float32", F32), (False, "float16", F16)],
    ids=str,
)
def test_reads_4_bits(kind: str, double: bool, storage: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": dtype}
    model = theirs(tmp_path, dtype=dtype, load_in_4bit=True, bnb_4bit_quant_storage=storage, **options)
    ours = load(tmp_path / "packed", None, dtype=dtype)
    assert ours.qtune.scheme == {"nf4": NF4, "fp4": FP4}[kind](64, double)
    packed = {n: s for n, s in packed_sites(ours).items() if s.scheme == ours.qtune.scheme}
    assert len(packed) == 14
    for name, site in packed.items():
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal(site.parts["codes"], weight.data.view(torch.uint8).view(-1)), name
        assert torch.equal(site.parts["absmax"], weight.quant_state.absmax), name
        want = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(site.dequantize(dtype), want.to(dtype)), name


def packed_by_hand(folder: Path, block: int, double: bool) -> dict[str, Any]:
    """A checkpoint of blocks that transformers has no option for, as bitsandbytes itself packs and names them."""
    theirs(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    tensors, states = load_file(folder / "packed" / "model.safetensors"), {}
    plain = load_file(folder / "plain" / "model.safetensors")
    for weight in [name.partition(".quant_state")[0] for name in tensors if ".quant_state" in name]:
        for name in [name for name in tensors if name.startswith(weight)]:
            del tensors[name]
        codes, state = bitsandbytes.functional.quantize_4bit(
            plain[weight], blocksize=block, compress_statistics=double, quant_type="nf4"
        )
        tensors |= {weight: codes} | {f"{weight}.{k}": v for k, v in state.as_dict(packed=True).items()}
        states[weight] = codes, state
    save_file(tensors, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    return states


@pytest.mark.parametrize(("block", "double"), [(32, True), (128, False), (4096, True)])
def test_reads_blocks_of_any_size(block: int, double: bool, tmp_path: Path) -> None:
    states = packed_by_hand(tmp_path, block, double)
    ours = load(tmp_path / "packed", None)
    assert ours.qtune.scheme == NF4(block, double)
    for weight, (codes, state) in states.items():
        site = packed_sites(ours)[weight.removesuffix(".weight")]
        assert torch.equal(site.parts["codes"], codes.view(-1)) and torch.equal(site.parts["absmax"], state.absmax)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_reads_8_bits(family: str, tmp_path: Path) -> None:
    model = theirs(tmp_path, family, F16, load_in_8bit=True)
    kept = load_file(tmp_path / "packed" / "model.safetensors")
    ours = load(tmp_path / "packed", None, dtype=F16)
    assert ours.qtune.scheme == INT8()
    packed = {n: s for n, s in packed_sites(ours).items() if s.scheme == INT8()}
    assert packed
    for name, site in packed.items():
        assert torch.equal(site.parts["codes"], kept[f"{name}.weight"]), name
        assert torch.equal(site.parts["absmax"], kept[f"{name}.SCB"]), name
    near(ours, model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_transformers_reads_our_8_bits(family: str, tmp_path: Path) -> None:
    tiny.saved(family, tmp_path / "plain", F16, **({"n_embd": 128} if family == "gpt2" else WIDE))
    ours = load(tmp_path / "plain", INT8(), dtype=F16)
    save_quantized(ours, None, tmp_path / "packed")
    other, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert other.is_loaded_in_8bit and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    again = load(tmp_path / "packed", None, dtype=F16)
    assert again.qtune.scheme == INT8() and torch.equal(tiny.logits(again), tiny.logits(ours))
    for name, site in packed_sites(ours).items():
        if site.scheme == INT8() and not torch.equal(site.parts["codes"], other.get_parameter(f"{name}.weight").data):
            pytest.fail(name)
    near(ours, other)


@pytest.mark.parametrize(
    "config", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=["4", "8"]
)
def test_a_tied_head_and_skipped_layers(config: dict[str, Any], tmp_path: Path) -> None:
    skip = ["lm_head", "model.layers.0.mlp.up_proj"]
    theirs(tmp_path, "qwen2", llm_int8_skip_modules=skip, **config)
    ours = load(tmp_path / "packed", None)
    assert packed_sites(ours)["model.layers.0.mlp.up_proj"].scheme.name == "dense"
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    save_quantized(ours, None, tmp_path / "again")
    mine, want = (load_file(tmp_path / kind / "model.safetensors") for kind in ("again", "packed"))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in mine.items() if "quant_state" not in n} == {
        n: (t.dtype, tuple(t.shape)) for n, t in want.items() if "quant_state" not in n
    }


# ---- what is broken, and what is not ours to read

Break = Callable[[dict[str, torch.Tensor]], None]
UP = "model.layers.0.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Break:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        found = json.loads(bytes(tensors[STATE].tolist())) | changes
        text = json.dumps({k: v for k, v in found.items() if v is not None}).encode()
        tensors[STATE] = torch.tensor(list(text), dtype=torch.uint8)

    return change


def without(name: str) -> Break:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    return lambda tensors: tensors.update({name: make(tensors[name])})


FOUR: dict[str, tuple[Break, str]] = {
    "codes of another size": (put(f"{UP}.weight", lambda t: t[:-64]), "up_proj.weight is"),
    "no absmax": (without(f"{UP}.weight.absmax"), "up_proj.weight.absmax is missing"),
    "absmax of another size": (put(f"{UP}.weight.absmax", lambda t: t[1:]), "up_proj.weight.absmax is"),
    "absmax of another dtype": (put(f"{UP}.weight.absmax", lambda t: t.view(torch.int8)), "absmax is torch.int8"),
    "no nested absmax": (without(f"{UP}.weight.nested_absmax"), "nested_absmax is missing"),
    "no nested map": (without(f"{UP}.weight.nested_quant_map"), "nested_quant_map is missing"),
    "no code table": (without(f"{UP}.weight.quant_map"), "quant_map is missing"),
    "a code table of its own": (put(f"{UP}.weight.quant_map", lambda t: t * 2), "not bitsandbytes' standard table"),
    "no quant_state": (without(STATE), "extra tensors"),
    "a quant_state of noise": (put(STATE, lambda t: t.flip(0).contiguous()), "quant_state is damaged"),
    "no nested offset": (state(nested_offset=None), "up_proj.weight.absmax is"),
    "nested blocks of 128": (state(nested_blocksize=128), "nested blocks of 128"),
    "blocks of 65": (state(blocksize=65), "block must be one of"),
    "blocks of another size": (state(blocksize=128), "up_proj.weight.absmax is"),
    "a shape of three": (state(shape=[2, 8, 8]), "quant_state is damaged"),
    "a negative shape": (state(shape=[-256, -128]), "quant_state is damaged"),
    "another type": (state(quant_type="int2"), "quant_state is damaged"),
}
EIGHT: dict[str, tuple[Break, str]] = {
    "no scales": (without(f"{UP}.SCB"), "up_proj.weight"),
    "no codes": (without(f"{UP}.weight"), "up_proj.weight is missing"),
    "scales of another size": (put(f"{UP}.SCB", lambda t: t[1:].clone()), "up_proj.SCB is"),
    "scales of another dtype": (put(f"{UP}.SCB", lambda t: t.half()), "up_proj.SCB is torch.float16"),
    "codes of another dtype": (put(f"{UP}.weight", lambda t: t.view(torch.uint8)), "up_proj.weight is torch.uint8"),
    "codes of another size": (put(f"{UP}.weight", lambda t: t[:, :64].clone()), "up_proj.weight is (256, 64)"),
    "another order": (put(f"{UP}.weight_format", lambda t: t + 2), "weight_format is 2"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {bits: tmp_path_factory.mktemp(bits) for bits in ("four", "eight")}
    theirs(folders["four"], load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs(folders["eight"], load_in_8bit=True)
    return {bits: folder / "packed" for bits, folder in folders.items()}


@pytest.mark.parametrize("case", [*(f"four: {name}" for name in FOUR), *(f"eight: {name}" for name in EIGHT)])
def test_broken(case: str, whole: dict[str, Path], tmp_path: Path) -> None:
    bits, _, name = case.partition(": ")
    damage, words = (FOUR if bits == "four" else EIGHT)[name]
    folder = shutil.copytree(whole[bits], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QtuneError) as told:
        load(folder, None)
    assert words in str(told.value), told.value


@pytest.mark.parametrize("scheme", [NF4(128), INT8()], ids=str)
def test_other_codes_are_not_made_of_packed_ones(scheme: Scheme, whole: dict[str, Path]) -> None:
    with pytest.raises(QtuneError, match=r"are packed as nf4\(block=64, double=True\) and cannot become"):
        load(whole["four"], scheme)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "hqq", "aqlm", "torchao", "quanto", "new-one"]
)
def test_formats_of_others_are_refused_by_name(method: str, tmp_path: Path) -> None:
    tiny.saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtuneError, match=f"quantized already, by '{method}'; readable: bitsandbytes") as told:
        load(tmp_path, NF4())
    plain = "dequantize=True" in str(told.value)
    assert plain == (method in ("compressed-tensors", "fp8", "mxfp4")) and "model that it was made of" in str(
        told.value
    )
    if plain:  # the configuration that is named takes the option
        kind = str(told.value).partition(" as T, ")[2].partition(" as C")[0]
        assert "dequantize" in inspect.signature(getattr(transformers, kind)).parameters
