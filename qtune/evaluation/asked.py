"""What a model is asked, and what it should say: held-out examples, questions with choices, prompts with the expected
answer. The prompt is, token by token, what stood before the answer in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data import DataReport, Example, Question, load_held_out, load_questions
from ..errors import QtuneError
from ..screen import Screen
from ..sections import DataKeys

NO_ANSWERS = ("text", "plain text")  # formats that are learned throughout


@dataclass(frozen=True)
class Asked:
    """A prompt as token ids and as text, and the answer that is expected behind it, without special tokens."""

    where: str
    ids: tuple[int, ...]
    prompt: str
    expected: str
    tokens: int  # of the expected answer, with those that end it


@dataclass(frozen=True)
class Held:
    """Held-out data. examples: of questions, those with the right choice. told: what became of the data, in words."""

    examples: list[Example]
    questions: list[Question]
    asked: list[Asked]
    told: str

    def prompts(self, tokenizer: Any) -> list[str]:
        """The prompts of the questions as text."""
        return [asked_of(question.candidates[question.right], tokenizer).prompt for question in self.questions]


def held_out(
    keys: DataKeys, tokenizer: Any, *, seed: int, screen: Screen, texts: bool, limit: int | None = None
) -> Held | None:
    """What the keys of a recipe hold out; None where they hold out nothing. texts: also as prompts and answers, of a
    conversation its last answer. limit: the first so many. Raises QtuneError for data without answers."""
    loaded = load_questions(keys.eval, tokenizer, keys) if keys.eval is not None else None
    if loaded is not None:
        questions, told = loaded[0][:limit], loaded[1]
        examples = [question.candidates[question.right] for question in questions]
        asked = [
            replace(asked_of(example, tokenizer), expected=question.texts[question.right])
            for example, question in zip(examples, questions, strict=True)
        ]
        return Held(examples, questions, asked, told)
    examples, report = load_held_out(keys, tokenizer, seed=seed, screen=screen)
    if report is None:
        return None
    asked, more = _asked(keys, tokenizer, seed, screen, (examples, report), limit) if texts else ([], "")
    return Held(examples[:limit], [], asked, f"{report}{more}")


def _asked(
    keys: DataKeys,
    tokenizer: Any,
    seed: int,
    screen: Screen,
    loaded: tuple[list[Example], DataReport],
    limit: int | None,
) -> tuple[list[Asked], str]:
    examples, report = loaded
    if set(report.format.split(", ")) & set(NO_ANSWERS):
        raise QtuneError(
            "Q809",
            f"{report.path} holds {report.format} records, in which there is no prompt and no answer; legal for texts: "
            "records with answers (messages, prompt and completion ...), or --metric perplexity",
        )
    if keys.loss_on == "all":  # the mask does not tell where the answers are
        if keys.eval is None:
            raise QtuneError(
                "Q809",
                "the recipe learns all tokens (data.loss_on all) and holds out by data.split, so that nothing tells "
                "answers from prompts; give --data FILE",
            )
        examples, made = load_held_out(replace(keys, loss_on="last"), tokenizer, seed=seed, screen=screen)
        report = made or report
    whole = [one for one in examples if not (report.truncated and len(one.input_ids) >= keys.max_length)]
    cut = len(examples) - len(whole)
    if not whole:
        raise QtuneError(
            "Q216", f"{report.path}: all {cut:,} examples are cut at data.max_length = {keys.max_length:,}"
        )
    told = f"\nnote: {cut:,} examples that were cut at {keys.max_length:,} tokens are not asked" if cut else ""
    return [asked_of(example, tokenizer) for example in whole[:limit]], told


def asked_of(example: Example, tokenizer: Any) -> Asked:
    """The last trained run of an example as the answer, all before it as the prompt."""
    end = example.trained.rfind(1) + 1
    start = example.trained.rfind(0, 0, end) + 1
    ids = list(example.input_ids)
    prompt, expected = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[start:end]))
    return Asked(example.where, tuple(ids[:start]), prompt, expected, end - start)


def longest(asked: Sequence[Asked]) -> int:
    """Tokens of the longest expected answer, without those that end it."""
    return max(one.tokens for one in asked) - 1
