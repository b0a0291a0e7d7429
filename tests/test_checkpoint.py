"""Files: safetensors written here and read by the safetensors library, damaged files, GGUF against the gguf package and
transformers."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtune import bnb, checkpoint
from qtune.checkpoint import Entry, Safetensors, write
from qtune.errors import QtuneError
from qtune.gguf import GGUF
from qtune.model import load
from qtune.quant import Dense
from qtune.quant.blockwise4 import FP4, NF4
from qtune.quant.int8 import INT8

gguf = pytest.importorskip("gguf")
TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).to(torch.bfloat16),
    "c": torch.arange(11, dtype=torch.uint8),
    "d": torch.tensor(2.5, dtype=torch.float64),
    "e": torch.randn(4, 6).T.to(torch.float16),  # not contiguous
    "f": torch.empty(0, 4, dtype=torch.int8),
    "g": torch.tensor([True, False, True]),
}


def entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    assert [p.name for p in write(tmp_path, entries(TENSORS))] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": torch.randn(64, 4) for i in range(7)}  # 1 KiB each
    paths = write(tmp_path, entries(tensors), "weights", limit=2500)
    assert [p.name for p in paths] == [f"weights-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    ours = Safetensors(tmp_path, "weights")
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "weights.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 1024 and set(index["weight_map"]) == set(tensors)


def test_one_tensor_larger_than_a_shard(tmp_path: Path) -> None:
    assert len(write(tmp_path, entries({"a": torch.zeros(100), "b": torch.zeros(1)}), limit=8)) == 2


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../other/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "..\\x"]
)
def test_an_index_cannot_leave_the_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": path, "b": "gone.safetensors"}})
    )
    with pytest.raises(QtuneError, match=r"(?s)outside of the folder.*gone\.safetensors is missing"):
        Safetensors(tmp_path)


def test_an_index_that_lies(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "2.safetensors")
    weights = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(QtuneError, match=r"(?s)a is in 2\.safetensors and in another.*expects c in 2\.safetensors"):
        Safetensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(QtuneError, match="index.json cannot be read"):
        Safetensors(tmp_path)


def _damage(data: bytes, how: str) -> bytes:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if how == "short":
        return data[:-4]
    if how == "tiny":
        return data[:5]
    if how == "huge header":
        return struct.pack("<Q", 1 << 60) + data[8:]
    if how == "no json":
        return data[:8] + b"!" * (len(data) - 8)
    entry = header["a"]
    entry |= {"dtype": {"dtype": "X9"}, "offsets": {"data_offsets": [0, 3]}, "shape": {"shape": ["x"]}}[how]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[-8:]


@pytest.mark.parametrize("how", ["short", "tiny", "huge header", "no json", "dtype", "offsets", "shape"])
def test_damaged_files(how: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    path.write_bytes(_damage(path.read_bytes(), how))
    with pytest.raises(QtuneError, match=r"model\.safetensors"):
        Safetensors(tmp_path)


@pytest.mark.parametrize("shape", [(64, 64), (3, 96), (1, 129), (130, 65)])
@pytest.mark.parametrize("scheme", [NF4(), FP4(), NF4(128, double=False), FP4(256)], ids=str)
def test_bnb_names_are_bitsandbytes_own(scheme: Any, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    codes, state = functional.quantize_4bit(
        w, blocksize=scheme.block, compress_statistics=scheme.double, quant_type=scheme.name
    )
    theirs = {f"w.{k}" if k else "w": v for k, v in {"": codes, **state.as_dict(packed=True)}.items()}
    ours = bnb.to_bnb("w", scheme.pack(w), scheme, shape, torch.bfloat16)
    assert ours.keys() == theirs.keys()
    for suffix, tensor in theirs.items():
        assert ours[suffix].dtype == tensor.dtype and torch.equal(ours[suffix], tensor), suffix
    found, size, offset = bnb.from_state("w", ours[f"w{bnb.STATE}{scheme.name}"])
    assert (found, size) == (scheme, shape)
    back = bnb.to_parts("w", {name[1:]: tensor for name, tensor in ours.items()}, found, offset)
    assert all(torch.equal(back[part], tensor) for part, tensor in scheme.pack(w).items())


# ---- GGUF ----

LLAMA = {"embedding_length": 64, "feed_forward_length": 96, "block_count": 2, "context_length": 64,
         "attention.head_count": 4,
         "attention.head_count_kv": 2, "rope.dimension_count": 16, "vocab_size": tiny.VOCAB}  # fmt: skip
QTYPES = gguf.GGMLQuantizationType
ARCHITECTURES: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "gemma2": ("gemma2", LLAMA | {"attention.key_length": 16, "attention.value_length": 16,
                                   "attention.sliding_window": 8}),
    "gpt2": ("gpt2", {"embedding_length": 64, "feed_forward_length": 256, "block_count": 2, "context_length": 64,
                      "attention.head_count": 4, "vocab_size": tiny.VOCAB}),
    "qwen3-moe": ("qwen3moe", LLAMA | {"attention.key_length": 16, "expert_count": 4, "expert_used_count": 2,
                                       "expert_feed_forward_length": 768}),
}  # fmt: skip


def write_gguf(path: Path, family: str, kinds: list[Any]) -> None:
    """A GGUF of a tiny model's tensors, in turn of the given types; 1-D tensors stay F32, as llama.cpp writes them."""
    arch, fields = ARCHITECTURES[family]
    changes = {
        "llama-tied": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "attention_bias": False},
        # transformers reads neither the width of the experts nor the number of positions, and takes its defaults
        "qwen3-moe": {"moe_intermediate_size": 768},
        "gpt2": {"n_positions": 1024},
    }.get(family, {})
    model = tiny.model(family, **changes)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        writer.add_uint32(f"{arch}.{key}", value)
    norm = "attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon"
    writer.add_float32(f"{arch}.{norm}", 1e-5)
    if arch != "gpt2":
        writer.add_float32(f"{arch}.rope.freq_base", 1e4)
    writer.add_token_list([f"w{i}" for i in range(tiny.VOCAB)])
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, 2)
    tied = model.config.tie_word_embeddings
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        for target, array in _gguf_tensors(names, name, tensor.numpy()):
            kind = QTYPES.F32 if array.ndim == 1 else kinds[i % len(kinds)]
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(names: Any, name: str, array: Any) -> list[tuple[str, Any]]:
    if name.endswith("experts.gate_up_proj"):
        block = name.split(".")[2]
        gate, up = array[:, : array.shape[1] // 2], array[:, array.shape[1] // 2 :]
        return [(f"blk.{block}.ffn_gate_exps.weight", gate.copy()), (f"blk.{block}.ffn_up_exps.weight", up.copy())]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", array)]
    stem, _, suffix = name.rpartition(".")
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return [(f"{names.get_name(stem)}.{suffix}", array.T.copy() if name.endswith(conv1d) else array)]


@pytest.mark.parametrize(
    "kinds", [[QTYPES.F32], [QTYPES.F16, QTYPES.Q8_0, QTYPES.Q4_1, QTYPES.BF16]], ids=["f32", "mixed"]
)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_gguf_equals_transformers_own_loader(family: str, kinds: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, family, kinds)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours = load(path, Dense("float32"), dtype=torch.float32)
    assert ours.qtune.kind == "gguf" and not hasattr(ours.config, "quantization_config")
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), rtol=1e-6, atol=1e-6)
    ours = load(path, INT8(), dtype=torch.float32)
    moved, size = (tiny.logits(ours) - tiny.logits(theirs)).abs(), tiny.logits(theirs).abs()
    if family == "qwen3-moe":  # a token may be sent to another expert
        moved, size = moved.median(), size.median()
    assert 0 < moved.max() < 0.1 * size.max()


def test_gguf_rows_and_numbers_are_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.gguf.CHUNK", 64 * 5)  # several blocks of rows a tensor
    write_gguf(tmp_path / "tiny.gguf", "llama", [QTYPES.Q4_1, QTYPES.Q8_0, QTYPES.F16])
    ours = GGUF(tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert ours.architecture == "llama" and len(ours.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.read(tensor.name), expected), tensor.name


def test_damaged_gguf_files(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", [QTYPES.Q8_0])
    data = path.read_bytes()
    cases = {
        "is truncated or damaged": [data[:-64], data[:3000], data[:30], data[:8] + b"\xff" * 8 + data[16:]],
        "no GGUF file": [b"PK" + data[2:]],
        "GGUF version 9": [data[:4] + struct.pack("<I", 9) + data[8:]],
        "cannot read": [b""],
    }
    for match, damaged in cases.items():
        for content in damaged:
            path.write_bytes(content)
            with pytest.raises(QtuneError, match=match):
                load(path, NF4())


def test_gguf_faults_are_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", [QTYPES.F32])
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"blk.1.attn_q.weight", b"blk.7.attn_q.weight").replace(
            b"blk.0.ffn_up.weight", b"blk.0.ffn_zz.weight"
        )
    )
    with pytest.raises(QtuneError) as caught:
        load(path, NF4())
    text = str(caught.value)
    assert "2 missing tensors: model.layers.0.mlp.up_proj.weight, model.layers.1.self_attn.q_proj.weight" in text
    assert "2 extra tensors" in text and "blk.7.attn_q.weight" in text and "blk.0.ffn_zz.weight" in text
    writer = gguf.GGUFWriter(path, "gptj")
    writer.add_uint32("gptj.block_count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QtuneError, match="GGUF architecture 'gptj'"):
        load(path, NF4())


# ---- memory ----

CHILD = """
import sys, threading, time
import gguf, torch, transformers
import transformers.modeling_gguf_pytorch_utils
from qtune.model import load
from qtune.quant.blockwise4 import NF4
from transformers import LlamaForCausalLM

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

load(sys.argv[1], NF4())  # what is imported and cached once
base, peak, stop = anonymous(), 0, False

def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch, daemon=True)
thread.start()
model = load(sys.argv[2], NF4())
stop = True
thread.join()
held = sum(p.numel() * p.element_size() for p in model.parameters())
print(peak - base, held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["safetensors", pytest.param("gguf", marks=pytest.mark.slow)])
def test_peak_memory_is_the_packed_model_and_two_tensors(kind: str, tmp_path: Path) -> None:
    big = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 8000}
    if kind == "safetensors":
        tiny.saved("llama", tmp_path / "small", torch.bfloat16)
        tiny.saved("llama", tmp_path / "big", torch.bfloat16, **big)
        small, large, item = tmp_path / "small", tmp_path / "big", 2
    else:
        small, large, item = tmp_path / "small.gguf", tmp_path / "big.gguf", 4  # a dequantized tensor is fp32
        write_gguf(small, "llama", [QTYPES.Q8_0])
        _big_gguf(large)
    done = subprocess.run([sys.executable, "-c", CHILD, small, large], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, held = map(int, done.stdout.split())
    assert held < peak < held + 2 * item * 8000 * 768 + 10e6


def _big_gguf(path: Path) -> None:
    original, fields = tiny.FAMILIES["llama"], ARCHITECTURES["llama"]
    tiny.FAMILIES["llama"] = (
        "LlamaConfig",
        original[1] | {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 8000},
    )
    ARCHITECTURES["llama"] = ("llama", LLAMA | {"embedding_length": 768, "feed_forward_length": 3072,
                                                "vocab_size": 8000,
                                                "rope.dimension_count": 192})  # fmt: skip
    try:
        write_gguf(path, "llama", [QTYPES.Q8_0])
    finally:
        tiny.FAMILIES["llama"], ARCHITECTURES["llama"] = original, fields


def test_dtypes_of_the_format() -> None:
    assert all(checkpoint.DTYPES[name] == dtype for dtype, name in checkpoint.NAMES.items())
