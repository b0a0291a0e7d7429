"""The catalogue against the publishers' counts of parameters; every way a name becomes a configuration or an error."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_checkpoint import write_gguf

from qtune.errors import QtuneError
from qtune.model.skeleton import empty
from qtune.planner.models import catalogue, find_model, known_models

NAMES = known_models()
FAMILIES = ["llama-2", "llama-3.1", "llama-3.2", "mistral", "mixtral", "qwen2.5", "qwen3", "gemma-2", "gemma-3"]
FAMILIES += ["phi-3", "phi-4", "smollm2", "tinyllama", "gpt2"]


def stored(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(catalogue()[name].read_text("utf-8"))
    return value


# ---- the files


def test_every_family_is_there() -> None:
    assert len(NAMES) >= 28
    assert not [family for family in FAMILIES if not any(name.startswith(family) for name in NAMES)]


@pytest.mark.parametrize("name", NAMES)
def test_built_model_has_the_publishers_count(name: str) -> None:
    found = find_model(name)
    model = empty(found.config, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == found.parameters == stored(name)["qtune"]["parameters"]
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == stored(name)[
        "tie_word_embeddings"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_file_says_where_it_comes_from(name: str) -> None:
    about = stored(name)["qtune"]
    assert name == name.lower()
    assert about["source"] == f"https://huggingface.co/{about['hub']} (config.json)"
    assert set(about) - {"variants", "text_only"} == {"source", "hub", "parameters", "parameters_source"}
    assert len(about["parameters_source"]) > 20
    for hub, changes in about.get("variants", {}).items():
        assert hub.count("/") == 1 and set(changes) <= set(stored(name)), hub


# what transformers keeps under another name, or reads without declaring it
RENAMED = {"rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window", "sliding_window_pattern"}
UNDECLARED = {("qwen3_moe", "head_dim")}


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_every_key(name: str) -> None:
    """A misspelt key would silently leave a default in place."""
    raw, config = stored(name), find_model(name).config
    defaults = type(config)()
    for key in set(raw) - RENAMED - {"qtune", "dtype"}:
        assert hasattr(defaults, key) or (raw["model_type"], key) in UNDECLARED, key
        assert getattr(config, key) == raw[key], key
    assert config.dtype == getattr(torch, raw["dtype"])
    if "rope_theta" in raw:
        rope = config.rope_parameters
        full = rope.get("full_attention", rope)
        assert (
            full.items()
            >= {"rope_theta": raw["rope_theta"], **raw.get("rope_scaling", {"rope_type": "default"})}.items()
        )
        if "sliding_attention" in rope:
            assert rope["sliding_attention"]["rope_theta"] == raw["rope_local_base_freq"]


@pytest.mark.parametrize(
    ("name", "window", "windowed"),
    [("mistral-7b-v0.1", 4096, 32), ("mistral-7b-v0.3", None, 0), ("gemma-2-2b", 4096, 13), ("gemma-3-1b", 512, 22),
     ("gemma-3-4b", 1024, 29), ("gemma-3-27b", 1024, 52), ("phi-3-mini", 2047, 32), ("phi-4", None, 0),
     ("qwen2.5-7b", None, 0), ("ministral-8b", 32768, 36)],
)  # fmt: skip
def test_windows(name: str, window: int | None, windowed: int) -> None:
    config = find_model(name).config
    kinds = getattr(config, "layer_types", None) or (
        ["sliding_attention" if config.sliding_window else "full_attention"] * config.num_hidden_layers
    )
    assert (config.sliding_window, sum(kind == "sliding_attention" for kind in kinds)) == (window, windowed)


# ---- lookups


@pytest.mark.parametrize(
    ("given", "name"),
    [("llama-3.1-8b", "llama-3.1-8b"), ("Llama-3.1-8B", "llama-3.1-8b"), ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
     ("meta-llama/llama-3.1-8b-INSTRUCT", "llama-3.1-8b"), ("Llama-3.1-8B-Instruct", "llama-3.1-8b"),
     ("llama-2-7b-hf", "llama-2-7b"), ("google/gemma-3-1b-it", "gemma-3-1b"), ("openai-community/gpt2", "gpt2")],
)  # fmt: skip
def test_names_of_the_catalogue(given: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # a call would be an error
    found = find_model(given)
    assert found.name == name and found.source.startswith(f"configs/models/{name}.json")
    assert found.parameters == stored(name)["qtune"]["parameters"]


def test_a_variant_has_its_own_keys() -> None:
    base, chat = find_model("qwen2.5-14b"), find_model("Qwen/Qwen2.5-14B-Instruct")
    assert (base.config.max_position_embeddings, base.config.rms_norm_eps) == (131072, 1e-5)
    assert (chat.config.max_position_embeddings, chat.config.rms_norm_eps) == (32768, 1e-6)
    assert (base.source, chat.source) == (
        "configs/models/qwen2.5-14b.json",
        "configs/models/qwen2.5-14b.json, as Qwen/Qwen2.5-14B-Instruct",
    )
    long = find_model("Qwen/Qwen3-4B-Instruct-2507").config
    assert (long.max_position_embeddings, long.rope_parameters["rope_theta"]) == (262144, 5e6)


def test_no_two_entries_share_a_name() -> None:
    ids = [
        hub.lower()
        for name in NAMES
        for hub in (stored(name)["qtune"]["hub"], *stored(name)["qtune"].get("variants", ()))
    ]
    tails = [hub.partition("/")[2] for hub in ids]
    assert len(set(ids)) == len(ids) and len(set(tails)) == len(tails)
    owner = {tail: name for name in NAMES for tail in [stored(name)["qtune"]["hub"].lower().partition("/")[2]]}
    assert not [tail for tail, name in owner.items() if tail in NAMES and tail != name]


def test_a_text_model_does_not_stand_for_the_whole_checkpoint() -> None:
    assert find_model("gemma-3-4b").source == "configs/models/gemma-3-4b.json, without the vision tower"
    for hub in ("google/gemma-3-4b-pt", "google/gemma-3-4b-it"):
        with pytest.raises(QtuneError, match=f"{hub}.*did you mean 'gemma-3-4b' of the catalogue"):
            find_model(hub)


def config_folder(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    raw = {key: value for key, value in stored("smollm2-135m").items() if key != "qtune"} | changes
    (path / "config.json").write_text(json.dumps(raw), "utf-8")
    return path


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    found = find_model(str(config_folder(tmp_path / "mine", num_hidden_layers=3)))
    assert type(found.config) is transformers.LlamaConfig and found.config.num_hidden_layers == 3
    assert (found.name, found.source, found.parameters) == (str(tmp_path / "mine"), str(tmp_path / "mine"), None)


def test_a_folder_goes_before_the_catalogue_if_it_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert find_model("gpt2").source == "configs/models/gpt2.json"
    config_folder(tmp_path / "gpt2")
    assert find_model("gpt2").source == "gpt2" and find_model("gpt2").config.model_type == "llama"


def test_a_multimodal_folder_is_what_loading_makes_of_it(tmp_path: Path) -> None:
    text = {key: value for key, value in stored("gemma-3-4b").items() if key not in ("qtune", "architectures")}
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(raw), "utf-8")
    model = empty(find_model(str(tmp_path)).config, torch.bfloat16)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"


def test_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf import GGMLQuantizationType

    path = tmp_path / "Model.gguf"
    write_gguf(path, "llama", [GGMLQuantizationType.F32])
    found = find_model(str(path))
    assert found.config.model_type == "llama" and (found.source, found.parameters) == (str(path), None)


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        return str(config_folder(tmp_path / "cache") / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: asked.append((url, "")))
    found = find_model("someone/Some-Model")
    assert asked[0][0].endswith("/someone/Some-Model/resolve/main/config.json")
    assert asked[1:] == [("someone/Some-Model", "config.json")]
    assert (found.name, found.source) == ("someone/Some-Model", "hub id someone/Some-Model (config.json only)")


def test_hub_id_from_the_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = str(config_folder(tmp_path / "cache") / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: cached)
    assert find_model("someone/Some-Model").config.hidden_size == 576


def test_no_network_is_told_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, file: str) -> str:
        raise AssertionError("asked twice")

    def metadata(url: str) -> None:
        raise OSError("Name or service not known.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    assert "in the local cache: OSError: Name or service not known; legal: a folder" in refused("someone/Some-Model")


# ---- errors


def refused(name: object) -> str:
    with pytest.raises(QtuneError) as caught:
        find_model(str(name))
    text = str(caught.value)
    assert "\n\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("given", "meant"), [("llama-3.1-8c", "llama-3.1-8b"), ("lama-2-7b", "llama-2-7b"), ("qwen25-7b", "qwen2.5-7b")]
)
def test_a_typo_gets_its_near_match(given: str, meant: str) -> None:
    text = refused(given)
    assert f"unknown model '{given}' (did you mean '{meant}'?); legal: " in text
    assert all(name in text for name in NAMES)
    assert "a folder with config.json, a .gguf file or a hub id (owner/name)" in text


def test_the_beginning_of_one_name_is_enough() -> None:
    assert find_model("Mixtral").name == "mixtral-8x7b" and find_model("qwen3-30b").name == "qwen3-30b-a3b"
    several = "llama-3.1-405b, llama-3.1-70b, llama-3.1-8b"
    assert refused("llama-3.1") == f"model 'llama-3.1' begins the names of several; say which: {several}"


@pytest.mark.parametrize("given", ["./nothing/here", "nothing.gguf", "a/b/c", "", "~no-such-user/x", "x" * 999])
def test_what_is_neither_name_nor_id(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"unknown model '{given}'" in refused(given)


def test_offline_hub_id_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    text = refused("meta-llama/Llama-3.1-9B")
    assert time.monotonic() - start < 5
    assert "config.json of the hub id 'meta-llama/Llama-3.1-9B' could not be fetched" in text
    assert "did you mean 'llama-3.1-8b' of the catalogue?" in text and "legal: a folder with config.json" in text


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",', "utf-8")
    assert "cannot read" in refused(tmp_path) and "config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[1]", "utf-8")
    assert "holds no JSON object" in refused(tmp_path)
    shutil.rmtree(tmp_path)
    config_folder(tmp_path, model_type="lama", auto_map={"AutoConfig": "x.Y"})
    assert "unknown architecture: model_type 'lama'" in refused(tmp_path)
    config_folder(tmp_path, quantization_config={"quant_method": "gptq"})
    assert "quantized already, by 'gptq'" in refused(tmp_path)
    config_folder(tmp_path, hidden_size="wide")
    assert "refuses its config.json" in refused(tmp_path) and "hidden_size" in refused(tmp_path)


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    assert "is a file, but no .gguf; legal: " in refused(path)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert str(path) in refused(path)
