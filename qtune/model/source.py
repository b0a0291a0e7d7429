"""Where a model comes from: a folder, a hub id or a GGUF file; what is refused is refused here, before anything is
read.

No pickle (`.bin` can run code), no remote code (`auto_map` is never followed), no path outside of the folder.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from .. import bnb
from ..checkpoint import faults_error
from ..errors import QtuneError
from ..gguf import GGUF
from ..keys import shown
from ..quant import Storage, storage_from

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
]
HUB_LEFT_OUT = ["consolidated*", "original/*", "*/*"]
DEQUANTIZED = {"compressed-tensors": "CompressedTensorsConfig", "fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Methods whose configuration in transformers takes `dequantize`: their checkpoints load in bf16."""
FORMAT = 1  # of our own packed checkpoints


@dataclass
class Source:
    """A checkpoint that was found and whose configuration is legal.

    kind: safetensors, gguf, or qtune (packed: ours or bitsandbytes'). stem: first word of the weight files' names.
    """

    name: str
    path: Path
    kind: str
    config: Any
    stem: str = "model"
    gguf: GGUF | None = None
    packed: dict[str, Any] = field(default_factory=dict)  # the `qtune` entry of config.json
    notes: list[str] = field(default_factory=list)


def open_source(model: str | Path) -> Source:
    """Find `model` (folder, .gguf file or hub id) and read its configuration. Raises QtuneError with all faults
    found."""
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise QtuneError(
                "Q302",
                f"{path} is a file, but no .gguf; "
                "give a folder with config.json and safetensors files, a .gguf file or a hub id",
            )
        return read_gguf(path)
    if path.is_dir():
        return read_folder(path, str(model))
    return read_folder(fetched(str(model)), str(model))


def looks_like_hub_id(model: str) -> bool:
    """owner/name, and no path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith(".gguf")


def fetched(model: str, *, weights: bool = True) -> Path:
    """The folder in the hub's cache of a hub id, fetched as far as it is not there. Raises QtuneError where it cannot
    be reached."""
    from huggingface_hub import snapshot_download

    if not looks_like_hub_id(model):
        raise QtuneError("Q301", f"there is no file or folder {model!r}, and it is no hub id (owner/name)")
    try:
        left_out = HUB_LEFT_OUT if weights else [*HUB_LEFT_OUT, "*.safetensors"]
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=left_out))
    except Exception as error:  # the hub client raises dozens of types, of three libraries
        reason = " ".join(str(error).split())[:300]
        raise QtuneError(
            "Q301",
            f"there is no folder {model!r} here, and the hub id {model!r} could not be fetched "
            f"nor found in the local cache: {type(error).__name__}: {reason}",
        ) from error


def read_folder(folder: Path, name: str, *, weights: bool = True) -> Source:
    """The checkpoint in a folder; without `weights` its configuration is enough, and `stem` means nothing."""
    config = _json(folder / "config.json")
    faults = [
        f"{key} in its config.json is {shown(config[key])}; legal: a mapping"
        for key in ("qtune", "quantization_config") if not isinstance(config.get(key) or {}, dict)
    ]  # fmt: skip
    if faults:
        raise faults_error("Q305", f"cannot load {name}", faults)
    packed = config.get("qtune") or {}
    stem, faults = _weights(folder, packed) if weights else ("", [])
    faults += _config_faults(folder, config, packed)
    if faults:
        raise faults_error("Q305", f"cannot load {name}", faults)
    known = _known_config(folder, name)
    notes = []
    if config.get("auto_map"):
        notes.append("config.json names code of its own (auto_map); it was not run, transformers' own class serves")
    kind = "qtune" if packed or config.get("quantization_config") else "safetensors"
    for leftover in ("quantization_config", "qtune", "auto_map"):
        if hasattr(known, leftover):
            delattr(known, leftover)
    return Source(name, folder, kind, known, stem, packed=packed, notes=notes)


def _known_config(folder: Path, name: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what a value of the wrong kind raises differs from class to class
        raise QtuneError(
            "Q303",
            f"cannot load {name}: transformers {transformers.__version__} refuses its config.json: {reason_of(error)}",
        ) from error


def reason_of(error: Exception) -> str:
    """What an error of transformers says, in one line, without the names of Python's exceptions around it."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    text = f"it does not know {cause}" if isinstance(cause, KeyError) else str(cause) or type(cause).__name__
    return " ".join(text.split())[:300]


def no_tokenizer(folder: Path) -> str:
    """What to do where a folder has none of the files that a tokenizer is read from; empty where it has one."""
    names = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json", "tokenizer.gguf")
    if any(True for name in names for _ in folder.glob(name)):
        return ""
    return "the folder has none (tokenizer.json, tokenizer.model or vocab.json); copy the model's files of it into it"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QtuneError("Q302", f"{path.parent} has no {path.name}, so it is no checkpoint folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise QtuneError("Q302", f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise QtuneError("Q302", f"{path} holds no JSON object")
    return value


def _weights(folder: Path, packed: dict[str, Any]) -> tuple[str, list[str]]:
    """The stem of the weight files, and why there is none."""
    stems = ["qtune", "model"] if packed else ["model"]
    for stem in stems:
        if any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json")):
            return stem, []
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        code = "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T"
        code += "".join(f"; {c}.from_pretrained({str(folder)!r}).save_pretrained('converted')" for c in "MT")
        return "", [
            f"its weights are pickle files ({', '.join(pickles)}), which can run code when they are opened "
            f'and are never read here; if you trust where they come from, convert them: python -c "{code}"'
        ]
    if found := sorted(p.name for p in folder.glob("*.gguf")):
        return "", [f"the folder holds GGUF files; give one of them: {', '.join(str(folder / name) for name in found)}"]
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    return "", [
        "no model.safetensors and no model.safetensors.index.json "
        f"(safetensors files found: {', '.join(found) or 'none'})"
    ]


def _config_faults(folder: Path, config: dict[str, Any], packed: dict[str, Any]) -> list[str]:
    kind, faults = str(config.get("model_type")), []
    if kind not in transformers.CONFIG_MAPPING:
        why = " and its own code (auto_map) is never run" if config.get("auto_map") else ""
        faults.append(
            f"unknown architecture: model_type {kind!r} is not in transformers {transformers.__version__}{why}"
        )
    elif transformers.CONFIG_MAPPING[kind] not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        faults.append(f"architecture {kind!r} has no causal language model in transformers {transformers.__version__}")
    quantized = config.get("quantization_config")
    if quantized and not bnb.readable(quantized):
        faults.append(_foreign(folder, quantized.get("quant_method")))
    if packed and packed.get("format") != FORMAT:
        faults.append(f"it is a packed checkpoint of format {packed.get('format')!r}; this qtune reads format {FORMAT}")
    return faults


def _foreign(folder: Path, method: Any) -> str:
    """What to do with a checkpoint that another tool has quantized."""
    told = f"it is quantized already, by {method!r}; readable: bitsandbytes in 4 or 8 bits, GGUF, and qtune's own"
    if method not in DEQUANTIZED:
        return f"{told}. Give the model that it was made of, which qtune packs while it loads"
    kind = DEQUANTIZED[method]
    code = f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T, {kind} as C; f = {str(folder)!r}; "
    code += "M.from_pretrained(f, quantization_config=C(dequantize=True)).save_pretrained('plain'); "
    code += "T.from_pretrained(f).save_pretrained('plain')"
    return f'{told}. Give the model that it was made of, or write its weights out: python -c "{code}"'


def read_gguf(path: Path) -> Source:
    """The model that a GGUF file describes; no tensor is read."""
    file = GGUF(path)
    with tempfile.TemporaryDirectory() as folder:
        file.write_header(Path(folder) / "header.gguf")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, gguf_file="header.gguf", trust_remote_code=False)
        except Exception as error:  # as with config.json
            raise QtuneError(
                "Q303",
                f"cannot load {path}: transformers {transformers.__version__} cannot read "
                f"GGUF architecture {file.architecture!r} ({reason_of(error)})",
            ) from error
    if (
        "token_embd.weight" in file.tensors
    ):  # transformers reads the size of some vocabularies from the tokens, of others not at all
        config.vocab_size = file.tensors["token_embd.weight"].shape[0]
    if hasattr(config, "quantization_config"):  # transformers leaves one behind: the weights are dequantized
        del config.quantization_config
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise QtuneError(
            "Q303",
            f"cannot load {path}: architecture {file.architecture!r} has no causal language model in transformers",
        )
    return Source(str(path), path, "gguf", config, gguf=file)


def stored_scheme(packed: dict[str, Any], key: str) -> Storage | None:
    """The scheme that a packed checkpoint of ours names under `key` (scheme, embeddings)."""
    return None if packed.get(key) is None else storage_from(packed[key])
