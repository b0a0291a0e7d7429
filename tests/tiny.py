"""Tiny random models of real architectures, saved as transformers itself saves them: hidden sizes 64 and 96,
vocabularies that are no multiple."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from qtune.adapters import AdapterSpec
from qtune.quant import Scheme
from qtune.starting import start, wants

VOCAB = 131
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = COMMON | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
WIDE = LLAMA | {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 6}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}

# family -> class of its configuration, what to change in it
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA | {"tie_word_embeddings": False, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }}),
    "llama-tied": ("LlamaConfig", WIDE | {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("MistralConfig", WIDE | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", WIDE | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", LLAMA | SLIDING),
    "gemma3": ("Gemma3TextConfig", LLAMA | SLIDING),
    "phi3": ("Phi3Config", WIDE),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 64, "n_layer": 2,
                           "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTConfig", COMMON | {"hidden_size": 64, "word_embed_proj_dim": 96, "ffn_dim": 96, "num_hidden_layers": 2,
                                   "num_attention_heads": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", LLAMA | {
        "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }),
    "mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", LLAMA | {"num_experts": 6, "num_experts_per_tok": 3}),
    "granitemoe": ("GraniteMoeConfig", LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "deepseek-v3": ("DeepseekV3Config", LLAMA | {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2,
        "first_k_dense_replace": 1, "topk_group": 1,
    }),
    "gpt-oss": ("GptOssConfig", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
}  # fmt: skip
ROUTED = ["qwen3-moe", "mixtral", "olmoe", "granitemoe", "deepseek-v3"]  # experts that are packed
DENSE = [family for family in FAMILIES if family not in (*ROUTED, "gpt-oss")]


def model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of `family` with random weights (large enough for logits that differ), from seed 0."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**options | {"initializer_range": 0.1} | changes)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms are constant after initialisation
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def saved(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any
) -> PreTrainedModel:
    """The same, also written to `folder` by transformers (shard: the largest file, for several of them)."""
    made = model(family, dtype, **changes)
    made.save_pretrained(folder, max_shard_size=shard)
    return made


def started(folder: Path, spec: AdapterSpec, scheme: Scheme) -> PreTrainedModel:
    """The bf16 model at `folder` with adapters that start as in training, on random words as calibration text."""
    text = torch.randint(3, VOCAB, (16, 64), generator=torch.Generator().manual_seed(2))
    return start(folder, scheme, spec, windows=text if wants(spec, "nearest") else None)


def ids(length: int = 24) -> torch.Tensor:
    """Two rows of token ids [2, length]."""
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [2, length, vocabulary] in fp32."""
    return model(ids() if tokens is None else tokens, use_cache=False).logits.float()


def words(folder: Path) -> Any:
    """A tokenizer of VOCAB one-word tokens with a chat template, also written to `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 4))])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer
