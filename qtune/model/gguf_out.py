"""What a GGUF file says of a model beside its weights, and under which names: the header from a configuration and a
tokenizer, or carried over from the file that the model was read from.

Keys and tensors as llama.cpp's convert_hf_to_gguf.py writes them (github.com/ggml-org/llama.cpp): q and k of the llama
family with each head's rows in pairs, one tensor for all experts of a layer, llama3's scaling of rope as factors
(`rope_freqs.weight`). What cannot be said is refused by name. Left out: SentencePiece tokenizers, rope scalings but
llama3's, sliding windows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Entry
from ..errors import QtuneError
from ..gguf import Field, Made, names_of
from .gguf_names import ARCHITECTURES, UNREAD_GGUF
from .source import Source

WRITTEN = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")  # types of models whose header is known here
KINDS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # type of the matrices -> general.file_type (gguf's LlamaFileType)
UINT, INT, FLOAT, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # types of values in the file
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # types of tokens
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {GPT2: "gpt-2", LATER % "{1,3}": "llama-bpe", LATER % "": "qwen2"}
"""How words are cut before merges -> `tokenizer.ggml.pre`, whose patterns are in llama.cpp's src/llama-vocab.cpp."""
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
ELSE = "write a plain checkpoint (`qtune merge RUN`) and give it to llama.cpp's convert_hf_to_gguf.py"


def architecture_of(config: Any) -> str:
    """GGUF's name of the architecture. Raises QtuneError for one that cannot be written, and what of a configuration
    no key says."""
    kind = config.model_type
    if kind not in WRITTEN:
        raise QtuneError(
            "Q813", f"architecture {kind!r} cannot be written as GGUF; legal: {', '.join(WRITTEN)}; {ELSE}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    faults = [f"{key}: true" for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        faults.append(f"sliding_window: {config.sliding_window}")
    if rope not in ("default", "llama3"):
        faults.append(f"rope_type: {rope}")
    if faults:
        raise QtuneError("Q813", f"a GGUF file of {kind!r} cannot say {', '.join(faults)} of this model; {ELSE}")
    return ARCHITECTURES[kind]


def header(model: Any, source: Source, tokenizer: Any, name: str, kind: str) -> dict[str, Field]:
    """The header of `model` as it is merged: from `source` where that is a GGUF file, else from configuration and
    tokenizer. name: general.name. kind: one of KINDS."""
    config, table = model.config, model.get_input_embeddings()
    rows = (table.shape if hasattr(table, "shape") else table.weight.shape)[0]
    arch = architecture_of(config)
    told = {
        "general.architecture": Field(arch, STRING), "general.name": Field(name, STRING),
        "general.file_type": Field(KINDS[kind], UINT), "general.quantization_version": Field(2, UINT),
        f"{arch}.vocab_size": Field(rows, UINT),
    }  # fmt: skip
    if source.gguf is not None:
        return {**source.gguf.header(), **told}  # a recipe on a GGUF file adds no tokens
    return {**told, "general.type": Field("model", STRING), **_sizes(config, arch), **_tokenizer(tokenizer, rows)}


def _sizes(config: Any, arch: str) -> dict[str, Field]:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    whole = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width, "attention.value_length": width, "rope.dimension_count": width,
    }  # fmt: skip
    if arch == "qwen3moe":
        whole |= {
            "expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }  # fmt: skip
    parts = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    made = {key: Field(int(value), UINT) for key, value in whole.items()}
    made |= {key: Field(float(value), FLOAT) for key, value in parts.items()}
    return {f"{arch}.{key}": field for key, field in made.items()}


# ---- tokenizer


def _tokenizer(tokenizer: Any, rows: int) -> dict[str, Field]:
    """A byte-level BPE tokenizer; `rows` of the table, those beyond the vocabulary unused."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _split_of(told)
    tokens, kinds = _tokens(tokenizer, range(rows))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in told["model"]["merges"]]
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    found = {
        "model": Field("gpt2", STRING), "pre": Field(pre, STRING), "tokens": Field(tokens, ARRAY, STRING),
        "token_type": Field(kinds, ARRAY, INT), "merges": Field(merges, ARRAY, STRING),
        "add_bos_token": Field(begins, BOOL),
    }  # fmt: skip
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None and number < rows:  # transformers gives some a token that the model has no row for
            found[f"{key}_token_id"] = Field(number, UINT)
    made = {f"tokenizer.ggml.{key}": field for key, field in found.items()}
    if isinstance(tokenizer.chat_template, str):
        made["tokenizer.chat_template"] = Field(tokenizer.chat_template, STRING)
    return made


def _tokens(tokenizer: Any, ids: Iterable[int]) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in ids:
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        own = CONTROL if number in added and added[number].special else USER
        kinds.append(UNUSED if number not in by_id else own if number in added else NORMAL)
    return tokens, kinds


def _split_of(told: dict[str, Any]) -> str:
    """The name that llama.cpp has for how a tokenizer.json cuts text into words."""
    if told["model"].get("type") != "BPE" or told["model"].get("byte_fallback"):
        raise QtuneError(
            "Q813", f"a {told['model'].get('type')} tokenizer that is no byte-level BPE cannot be written; {ELSE}"
        )
    outer = told.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    pattern = next((step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"), GPT2)
    name = SPLITS.get(pattern)
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if name is None or kinds not in ([["ByteLevel"]] if name == "gpt-2" else [["Split", "ByteLevel"]]):
        raise QtuneError("Q813", f"how this tokenizer cuts words ({kinds}) is none that is known here; {ELSE}")
    return name


# ---- tensors


def tensors(model: Any, source: Source, entries: Iterable[Entry]) -> Iterator[Made]:
    """The entries of a plain checkpoint, fp32, as a GGUF file names and orders them."""
    config = model.config
    arch = architecture_of(config)
    name_of = names_of(arch, config.num_hidden_layers)
    stacks: dict[str, list[Entry]] = {}
    for entry in entries:
        expert = EXPERT.fullmatch(entry.name)
        stacks.setdefault(entry.name if expert is None else f"{expert[1]}.{expert[3]}.weight", []).append(entry)
    for published, members in stacks.items():
        name = name_of(published)
        if name is None:
            raise QtuneError("Q813", f"{published} has no name in a GGUF file of {arch}; {ELSE}")
        heads = (
            {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads} if arch == "llama" else {}
        )
        count = next((count for part, count in heads.items() if part in name), 0)
        numbered = len(members) > 1 or EXPERT.fullmatch(members[0].name) is not None
        shape = (len(members), *members[0].shape) if numbered else members[0].shape
        yield Made(name, shape, partial(_blocks, members, count, numbered))
    if source.gguf is not None:
        for name in set(UNREAD_GGUF) & set(source.gguf.tensors):
            yield Made(name, source.gguf.tensors[name].shape, partial(_whole, partial(source.gguf.read, name)))
    elif (factors := rope_factors(model)) is not None:
        yield Made("rope_freqs.weight", tuple(factors.shape), partial(_whole, factors.clone))


def _blocks(members: list[Entry], heads: int, numbered: bool) -> Iterator[Tensor]:
    for entry in members:
        tensor = entry.tensor().detach().float().cpu()
        if heads:  # rotated as pairs beside one another, where transformers has the halves of a head
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        yield tensor.unsqueeze(0) if numbered else tensor


def _whole(read: Callable[[], Tensor]) -> Iterator[Tensor]:
    yield read()


def rope_factors(model: Any) -> Tensor | None:
    """What llama.cpp divides each frequency of rope by, fp32 [head_dim / 2]; None where none is scaled."""
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    scaled = next(b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq")).float().cpu()
    places = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    return (float(rope["rope_theta"]) ** -places / scaled).float()
