"""Texts for many prompts at once: left-padded batches, the shortest prompts first, by transformers' own `generate`.

Padding is masked and positions count from the first token of each prompt (transformers takes them from the mask), so
that greedy texts are those of the prompts one by one. A stop word is looked for in the text, not in the tokens: it may
span several, or begin in the middle of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..batches import Capacity
from ..errors import QtuneError, is_out_of_memory
from ..evaluate import special_tokens
from ..memory.layers import device_of

PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}  # whatever the checkpoint asks for
AROUND = 16  # tokens that are looked at beyond those which a stop word can span: the first of them may decode otherwise


@dataclass(frozen=True)
class Sampling:
    """How texts are continued. temperature 0: the likeliest token. stop: texts end before the first of these words.
    seed: of what is drawn; the same prompts in the same batches give the same texts."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0

    def faults(self) -> list[str]:
        """What of it is not legal, as options of a command."""
        faults = []
        if self.max_new_tokens < 1:
            faults.append(f"--max-new-tokens is {self.max_new_tokens}; legal: 1 or more")
        if "" in self.stop:
            faults.append("--stop is empty, which stops every text before it begins; legal: some text")
        if self.temperature < 0:
            faults.append(f"--temperature is {self.temperature:g}; legal: 0 (the likeliest token) or more")
        return faults


def generate_many(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    *,
    capacity: Capacity,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """The new text of each prompt (token ids), in the order given. capacity: prompts at a time; by tokens, of prompts
    and what comes behind them together.

    Raises QtuneError for what is not legal, for a prompt that leaves too few positions, and where memory runs out.
    """
    check(model.config, prompts, how)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows_of = Capacity(capacity.limit, capacity.by_tokens)
    texts = [""] * len(prompts)
    device, mode = device_of(model), model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(how.seed)
            for rows in rows_of.fill(order, [len(prompt) + how.max_new_tokens for prompt in prompts]):
                made = _batch(model, tokenizer, [prompts[i] for i in rows], how, device)
                for row, text in zip(rows, made, strict=True):
                    texts[row] = text
                if advance:
                    advance(len(rows))
    finally:
        model.train(mode)
    return texts


def room(config: Any, prompts: Sequence[Sequence[int]]) -> int | None:
    """Positions that the longest prompt leaves in a model of this configuration; None where it does not say."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if most is None else most - max(map(len, prompts), default=0)


def check(config: Any, prompts: Sequence[Sequence[int]], how: Sampling) -> None:
    """Raises QtuneError for what a model of this configuration cannot be asked."""
    faults = how.faults()
    if not all(prompts):
        faults.append("a prompt is empty, and the tokenizer puts nothing before a text: there is nothing to continue")
    left, longest = room(config, prompts), max(map(len, prompts), default=0)
    if left is not None and how.max_new_tokens > left:
        legal = f"legal here: --max-new-tokens up to {left:,}" if left > 0 else "which leaves no room"
        faults.append(
            f"the longest prompt has {longest:,} tokens, and with --max-new-tokens {how.max_new_tokens:,} a text could "
            f"go beyond the {left + longest:,} positions of the model; {legal}"
        )
    if faults:
        raise QtuneError("Q102", "; ".join(faults))


@torch.no_grad()
def _batch(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], how: Sampling, device: torch.device
) -> list[str]:
    longest = max(map(len, prompts))
    options: dict[str, Any] = special_tokens(model, tokenizer) | PLAIN | {"max_new_tokens": how.max_new_tokens}
    ids = torch.full((len(prompts), longest), options["pad_token_id"] or 0, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    options["do_sample"] = how.temperature > 0
    if how.temperature > 0:
        options |= {"temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    if how.stop:
        options["stopping_criteria"] = StoppingCriteriaList([_StopWords(tokenizer, how.stop, longest)])
    try:
        out = model.generate(ids.to(device), attention_mask=mask.to(device), **options)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise QtuneError(
            "Q501",
            f"{reason}: {len(prompts):,} prompts at a time of up to {longest:,} tokens, and {how.max_new_tokens:,} new "
            "ones for each; give a smaller --batch or --max-new-tokens",
        ) from None
    return [_text(tokenizer, row, options["eos_token_id"], how.stop) for row in out[:, longest:].tolist()]


def _text(tokenizer: Any, ids: list[int], ends: Sequence[int], stop: Sequence[str]) -> str:
    """Up to the first token that ends a text, and to the first stop word."""
    end = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]


class _StopWords(StoppingCriteria):
    """Ends a row once its new text holds one of the words. (transformers' StopStringCriteria also finds a word that
    begins in the prompt, and goes through the whole vocabulary first.)"""

    def __init__(self, tokenizer: Any, words: Sequence[str], prompt: int) -> None:
        self.tokenizer, self.words, self.prompt = tokenizer, words, prompt
        self.tail = max(len(word.encode()) for word in words) + AROUND  # a token is at least one byte
        self.done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.done = self.done or [False] * len(input_ids)
        rows = input_ids[:, max(self.prompt, input_ids.shape[1] - self.tail) :].tolist()
        for at, ids in enumerate(rows):
            if not self.done[at]:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                self.done[at] = any(word in text for word in self.words)
        return torch.tensor(self.done, device=input_ids.device)
