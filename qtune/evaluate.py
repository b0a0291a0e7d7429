"""What a model knows: loss and perplexity, accuracy by likelihood where the answers are few, and samples of its
text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import torch
from torch import Tensor

from .batches import Batch, Capacity, batches, collate
from .data import Example
from .errors import QtuneError
from .loss import IGNORED, chunked_losses
from .memory.layers import device_of
from .step import LanguageModel

MAX_CHOICES = 8  # more distinct answers than this are not a choice
Advance = Callable[[int], None]


@dataclass(frozen=True)
class EvalResult:
    """loss: mean negative log likelihood per trained token, in nats. accuracy, chance: None where the answers are not
    a choice."""

    loss: float
    tokens: int
    examples: int
    accuracy: float | None = None
    chance: float | None = None
    choices: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values for metrics and --json; null where one is not finite, which JSON cannot say."""
        out: dict[str, Any] = {
            "eval_loss": self.loss if math.isfinite(self.loss) else None,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "eval_tokens": self.tokens,
            "eval_examples": self.examples,
        }
        if self.accuracy is not None:
            out |= {"accuracy": self.accuracy, "chance": self.chance, "choices": self.choices}
        return out

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> EvalResult:
        """The inverse of `to_dict`."""
        loss = math.nan if row["eval_loss"] is None else float(row["eval_loss"])
        rest = row.get("accuracy"), row.get("chance"), row.get("choices", 0)
        return cls(loss, row["eval_tokens"], row["eval_examples"], *rest)

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f} over {self.tokens:,} trained tokens"
        if self.accuracy is not None and self.chance is not None:
            text += (
                f"; accuracy {self.accuracy:.1%} among {self.choices} answers (the most frequent: {self.chance:.1%})"
            )
        return text


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    examples: Sequence[Example],
    *,
    capacity: Capacity,
    advance: Advance | None = None,
    choice: bool | Sequence[tuple[int, ...]] = True,
) -> EvalResult:
    """Loss over all examples; where they all answer with one of a few token sequences, also how often the likeliest
    one is right (choice: False leaves that out; answers: these are the few). capacity: of a micro-batch; training's is
    enough, so that no evaluation takes more than training."""
    answers = choices_of(examples) if choice is True else choice or None
    device = device_of(model.model)
    mode = model.model.training
    model.model.eval()
    try:
        if answers is not None:
            return _evaluate_choice(model, examples, answers, capacity, device, advance)
        total, tokens = 0.0, 0
        for batch in batches(examples, capacity, seed=None):
            total += model.loss_sum(batch.to(device), plain=True).item()
            tokens += batch.trained
            if advance:
                advance(batch.examples)
        return EvalResult(total / max(1, tokens), tokens, len(examples))
    finally:
        model.model.train(mode)


def joined(results: Sequence[EvalResult], examples: Sequence[Example]) -> EvalResult:
    """The results of parts of the `examples` as that of all of them."""
    if len(results) == 1:
        return results[0]
    tokens, n = sum(result.tokens for result in results), sum(result.examples for result in results)
    loss = sum(result.loss * result.tokens for result in results) / max(1, tokens)
    if results[0].accuracy is None:
        return EvalResult(loss, tokens, n)
    right = sum((result.accuracy or 0.0) * result.examples for result in results)
    most = max(Counter(map(answer_of, examples)).values())
    return EvalResult(loss, tokens, n, right / n, most / n, results[0].choices)


def choices_of(examples: Sequence[Example]) -> list[tuple[int, ...]] | None:
    """The distinct answers, if every example ends in its only answer and there are 2 to MAX_CHOICES of them, each
    seen twice or more."""
    seen: Counter[tuple[int, ...]] = Counter()
    for example in examples:
        answer = answer_of(example)
        if answer is None:
            return None
        seen[answer] += 1
        if len(seen) > MAX_CHOICES:
            return None
    return sorted(seen) if len(seen) >= 2 and min(seen.values()) >= 2 else None


def answer_of(example: Example) -> tuple[int, ...] | None:
    """The trained tokens, if they are one run after a prompt (a template may write white space behind it)."""
    start, end = example.trained.find(1), example.trained.rfind(1) + 1
    return tuple(example.input_ids[start:end]) if start >= 1 and 0 not in example.trained[start:end] else None


def _evaluate_choice(
    model: LanguageModel,
    examples: Sequence[Example],
    answers: Sequence[tuple[int, ...]],
    capacity: Capacity,
    device: torch.device,
    advance: Advance | None,
) -> EvalResult:
    """Every answer's log likelihood after every prompt: the likeliest is the prediction, the right one's gives the
    loss. Each answer after a prompt is a row of its own, so the rows of one prompt may lie in several micro-batches."""
    examples = sorted(examples, key=lambda e: len(e.input_ids))
    candidates = [with_answer(example, answer) for example in examples for answer in answers]
    done = 0

    def scored(rows: int) -> None:
        nonlocal done
        now = rows // len(answers)
        if advance and now > done:
            advance(now - done)
        done = now

    scores = _log_likelihoods(model, candidates, capacity, device, scored)
    scores = scores.view(len(examples), len(answers))
    labels = [answers.index(answer_of(e) or ()) for e in examples]
    predicted = scores.argmax(dim=1).tolist()
    right = sum(p == label for p, label in zip(predicted, labels, strict=True))
    total = -sum(scores[i, label].item() for i, label in enumerate(labels))
    tokens = sum(len(answers[label]) for label in labels)
    n, most = len(examples), max(Counter(labels).values())
    return EvalResult(total / tokens, tokens, n, right / n, most / n, len(answers))


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, candidates: Sequence[Example], *, capacity: Capacity, advance: Advance | None = None
) -> Tensor:
    """Summed log likelihood of the trained tokens of each candidate, fp32 [candidates] on the CPU."""
    order = sorted(range(len(candidates)), key=lambda i: len(candidates[i].input_ids))
    mode, done = model.model.training, 0

    def scored(rows: int) -> None:
        nonlocal done
        if advance:
            advance(rows - done)
        done = rows

    model.model.eval()
    try:
        found = _log_likelihoods(model, [candidates[i] for i in order], capacity, device_of(model.model), scored)
    finally:
        model.model.train(mode)
    return torch.empty_like(found).scatter_(0, torch.tensor(order), found)


def _log_likelihoods(
    model: LanguageModel,
    candidates: Sequence[Example],
    capacity: Capacity,
    device: torch.device,
    scored: Callable[[int], None],
) -> Tensor:
    """Of each candidate, in their order. scored: gets the number of those that are done."""
    scores = torch.empty(len(candidates))
    rows_apart = replace(capacity, packed=False)
    for rows in rows_apart.fill(range(len(candidates)), [len(one.input_ids) for one in candidates]):
        batch = collate([candidates[i] for i in rows])
        scores[rows] = _log_likelihood(model, batch.to(device)).cpu()
        scored(rows[-1] + 1)
    return scores


def with_answer(example: Example, answer: tuple[int, ...]) -> Example:
    """The example with another answer behind its prompt."""
    start = example.trained.find(1)
    ids = example.input_ids[:start]
    ids.extend(answer)
    return Example(ids, bytes(start) + b"\x01" * len(answer), example.where)


def _log_likelihood(model: LanguageModel, batch: Batch) -> Tensor:
    """Summed log likelihood of the trained positions of each row, fp32 [batch]."""
    hidden = model.hidden(batch.input_ids, batch.attention_mask)[:, :-1]
    target = batch.labels[:, 1:]
    row, place = torch.nonzero(target != IGNORED, as_tuple=True)
    hidden, target = hidden[row, place], target[row, place]
    out = torch.zeros(len(batch.labels), device=hidden.device)
    chunk = model.loss.rows(model.config.get_text_config().vocab_size)
    losses = chunked_losses(hidden, target, model.head, model.transform, chunk, model.loss.plain())
    for start, loss in zip(range(0, len(row), chunk), losses, strict=True):
        out.index_add_(0, row[start : start + chunk], -loss.float())
    return out


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    max_seconds: float | None = None,
    stream: IO[str] | None = None,
) -> str:
    """Continue a prompt; greedy at temperature 0. Stops at the tokenizer's EOS or the model's own stop tokens.
    Returns the new text only.

    max_seconds: stop after the word at hand; None: never. stream: also print it there, word by word.
    """
    if not prompt_ids:
        raise QtuneError(
            "Q807", "the prompt is empty, and the tokenizer puts nothing before a text: there is nothing to continue"
        )
    device = device_of(model)
    ids = torch.tensor([list(prompt_ids)], device=device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if max_seconds is not None:
        options["max_time"] = max_seconds
    if stream is not None:
        options["streamer"] = _streamer(tokenizer, stream)
    options |= special_tokens(model, tokenizer)
    mode = model.training
    model.eval()
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    finally:
        model.train(mode)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def special_tokens(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What ends a text, the tokenizer's EOS and the model's own stop tokens, and what pads: options of transformers'
    `generate`."""
    stops = {tokenizer.eos_token_id, *_as_list(getattr(model.generation_config, "eos_token_id", None))} - {None}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return {"eos_token_id": sorted(stops), "pad_token_id": pad}


def _streamer(tokenizer: Any, stream: IO[str]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # transformers' own prints on stdout only
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", file=stream, flush=True)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
