"""Texts in batches: those of the prompts one by one, cut at stop words, in the order given, within a capacity."""

from __future__ import annotations

import random
from typing import Any

import data_kit
import pytest
import tiny
import torch

from qtune.batches import Capacity
from qtune.errors import QtuneError
from qtune.evaluate import generate
from qtune.evaluation.generation import Sampling, generate_many
from qtune.step import LanguageModel

NEW = 8


def printing(family: str) -> tuple[Any, Any]:
    """A model whose tokens are the printable characters, `~` ends a text."""
    tokenizer = data_kit.tokenizer(eos="~")
    end = tokenizer.eos_token_id
    return tiny.model(family, vocab_size=end + 1, eos_token_id=end, pad_token_id=end), tokenizer


def prompts(count: int = 7, low: int = 3, high: int = 90) -> list[list[int]]:
    """Of unequal length, the longest in the middle."""
    draw = random.Random(3)
    lengths = [1 + (5 * i) % 17 for i in range(count)]
    return [[draw.randint(low, high) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def letters() -> tuple[Any, Any]:
    return printing("llama")


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("opt", "gemma2", "mistral", "qwen3-moe", "deepseek-v3")),
    ],
)
def test_greedy_texts_are_those_of_the_prompts_one_by_one(family: str) -> None:
    model, tokenizer = printing(family)
    LanguageModel(model)  # with our twins
    asked = prompts()
    want = [generate(model, tokenizer, one, max_new_tokens=NEW) for one in asked]
    assert len(set(want)) > 1
    for capacity in (Capacity(len(asked)), Capacity(3), Capacity(40, by_tokens=True)):
        assert generate_many(model, tokenizer, asked, Sampling(NEW), capacity=capacity) == want


def test_batches_are_bounded_and_sorted_and_their_progress_told(
    letters: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = letters
    seen: list[tuple[int, ...]] = []
    done: list[int] = []
    real = type(model).generate

    def spy(self: Any, ids: torch.Tensor, **options: Any) -> Any:
        seen.append(tuple(ids.shape))
        return real(self, ids, **options)

    monkeypatch.setattr(type(model), "generate", spy)
    generate_many(
        model, tokenizer, prompts(), Sampling(NEW), capacity=Capacity(40, by_tokens=True), advance=done.append
    )
    assert len(seen) > 2 and all(rows * (longest + NEW) <= 40 for rows, longest in seen)
    assert [longest for _, longest in seen] == sorted(longest for _, longest in seen)
    assert done == [rows for rows, _ in seen] and sum(done) == 7


def test_a_stop_word_may_span_tokens_and_is_cut_off(letters: tuple[Any, Any]) -> None:
    model, tokenizer = letters
    asked = prompts(5)
    whole = generate_many(model, tokenizer, asked, Sampling(30), capacity=Capacity(5))
    stops = tuple(text[4:7] for text in whole[:2])
    assert all(len(stop) == 3 for stop in stops)
    for capacity in (Capacity(5), Capacity(1)):
        found = generate_many(model, tokenizer, asked, Sampling(30, stops), capacity=capacity)
        for text, full in zip(found, whole, strict=True):
            at = min((full.find(stop) for stop in stops if stop in full), default=len(full))
            assert text == full[:at]
    assert len(found[0]) <= 4 and len(found[1]) <= 4


def test_a_stop_word_ends_the_batch_once_all_rows_have_it(letters: tuple[Any, Any]) -> None:
    model, tokenizer = letters
    one = prompts(3)[2]
    text = generate_many(model, tokenizer, [one], Sampling(30), capacity=Capacity(1))[0]
    lengths: list[int] = []
    inner = model.forward

    def counted(*args: Any, **options: Any) -> Any:
        lengths.append(1)
        return inner(*args, **options)

    model.forward = counted
    try:
        generate_many(model, tokenizer, [one, one], Sampling(30, (text[3:5],)), capacity=Capacity(2))
    finally:
        del model.forward
    assert len(lengths) <= 6


def test_a_stop_word_of_the_prompt_stops_nothing(letters: tuple[Any, Any]) -> None:
    """It is the new text that is looked at: neither the prompt, nor the prompt's end with the text's beginning."""
    model, tokenizer = letters
    one = prompts(3)[2]
    text = generate_many(model, tokenizer, [one], Sampling(NEW), capacity=Capacity(1))[0]
    across = tokenizer.decode(one)[-1] + text[0]
    if across not in text:
        assert generate_many(model, tokenizer, [one], Sampling(NEW, (across,)), capacity=Capacity(1))[0] == text


def test_what_is_drawn_hangs_on_the_seed_alone(letters: tuple[Any, Any]) -> None:
    model, tokenizer = letters
    draw = lambda seed: generate_many(  # noqa: E731
        model, tokenizer, prompts(), Sampling(NEW, temperature=1.5, seed=seed), capacity=Capacity(4)
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers are used up"
    torch.manual_seed(6)
    assert draw(1) == first != draw(2)


def test_the_checkpoints_own_penalties_are_left_out(letters: tuple[Any, Any]) -> None:
    """They would count the padding."""
    model, tokenizer = letters
    asked, kept = prompts(), model.generation_config.repetition_penalty
    want = generate_many(model, tokenizer, asked, Sampling(NEW), capacity=Capacity(7))
    model.generation_config.repetition_penalty = 3.0
    try:
        assert generate_many(model, tokenizer, asked, Sampling(NEW), capacity=Capacity(7)) == want
    finally:
        model.generation_config.repetition_penalty = kept


def test_a_text_ends_with_the_models_own_stop_token(letters: tuple[Any, Any]) -> None:
    model, tokenizer = letters
    one = prompts(3)[2]
    kept = model.generation_config.eos_token_id
    text = generate_many(model, tokenizer, [one], Sampling(NEW), capacity=Capacity(1))[0]
    model.generation_config.eos_token_id = tokenizer(text, add_special_tokens=False)["input_ids"][2]
    try:
        found = generate_many(model, tokenizer, [one, prompts()[0]], Sampling(NEW), capacity=Capacity(2))[0]
    finally:
        model.generation_config.eos_token_id = kept
    assert found == text[: text.index(text[2])]


@pytest.mark.parametrize(
    ("how", "asked", "words"),
    [
        (Sampling(0), [[5]], "--max-new-tokens is 0; legal: 1 or more"),
        (Sampling(4, ("",)), [[5]], "--stop is empty"),
        (Sampling(4, temperature=-1.0), [[5]], "--temperature is -1"),
        (Sampling(4), [[5], []], "a prompt is empty"),
        (Sampling(60), [[5] * 10], "beyond the 64 positions of the model; legal here: --max-new-tokens up to 54"),
        (Sampling(1), [[5] * 64], "which leaves no room"),
    ],
)
def test_what_is_not_legal(letters: tuple[Any, Any], how: Sampling, asked: list[list[int]], words: str) -> None:
    with pytest.raises(QtuneError, match=words):
        generate_many(*letters, asked, how, capacity=Capacity(2))


def test_out_of_memory_is_told(letters: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(type(letters[0]), "generate", full)
    with pytest.raises(QtuneError, match=r"2.00 GiB: 4 prompts at a time of up to 9 tokens.*give a smaller --batch"):
        generate_many(*letters, prompts(), Sampling(NEW), capacity=Capacity(4))
