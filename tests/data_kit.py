"""For tests of data: a tokenizer of one token a character, so that a marked text such as `user: a⟦b</s>⟧` fixes the
mask of every token; and the records and files that they read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qtune.data import DataReport, Example, Record, tokenize

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|user|>"]
SPECIAL += ["<|assistant|>", "<|system|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "[TOOL_CALLS]"]
SPECIAL += ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]


def tokenizer(
    template: str | None = None,
    *,
    eos: str | None = "</s>",
    bos: str | None = None,
    merges: tuple[tuple[str, str], ...] = (),
) -> PreTrainedTokenizerFast:
    """One token a character, and one for each special token. With `bos`, texts are opened with it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos or "<s>", eos_token=eos, pad_token=eos)
    fast.chat_template = template
    return fast


def marked(example: Example, tok: PreTrainedTokenizerFast) -> str:
    """The example as text, token by token, trained runs between ⟦ and ⟧. (For ASCII text.)"""
    parts = []
    for trained, run in itertools.groupby(
        zip(example.input_ids, example.trained, strict=True), key=lambda pair: pair[1]
    ):
        text = "".join(tok.decode([i]) for i, _ in run)
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)


def chat(*turns: str, where: str = "t.jsonl, line 1") -> Record:
    """`"user: hi"` turns as a record."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return Record("messages", where, messages=tuple({"role": r, "content": c} for r, c in pairs))


def only(record: Record, tok: PreTrainedTokenizerFast, **options: Any) -> tuple[Example, DataReport]:
    examples, report = tokenize([record], tok, **{"max_length": 1000, **options})
    assert len(examples) == 1
    return examples[0], report


def lines(folder: Path, *rows: Any, name: str = "t.jsonl") -> Path:
    """A JSON lines file of values (strings are written as they are)."""
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path
