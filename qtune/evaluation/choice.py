"""Multiple choice by likelihood: the choice that the model finds likeliest is its answer.

Of each choice the log likelihoods of its tokens and of those that end it are summed, as they were learned; that sum
decides for `accuracy`. For `accuracy_norm` it is divided by the characters of the choice, as lm-eval's acc_norm does,
so that long choices are not at a disadvantage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..batches import Capacity
from ..data import Example, Question
from ..evaluate import answer_of, choices_of, log_likelihoods, with_answer
from ..step import LanguageModel


@dataclass(frozen=True)
class ChoiceResult:
    """picked, picked_norm: the index of the likeliest choice of each question, by the sum and by the sum a character.
    scores: log likelihoods of each question's choices."""

    questions: list[Question]
    scores: list[list[float]]
    picked: list[int]
    picked_norm: list[int]

    @property
    def accuracy(self) -> float:
        return self._right(self.picked)

    @property
    def accuracy_norm(self) -> float:
        return self._right(self.picked_norm)

    @property
    def chance(self) -> float:
        """Of a model that always takes the place which is right most often."""
        return max(Counter(question.right for question in self.questions).values()) / len(self.questions)

    def _right(self, picked: Sequence[int]) -> float:
        return sum(i == q.right for i, q in zip(picked, self.questions, strict=True)) / len(self.questions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "accuracy": self.accuracy, "accuracy_norm": self.accuracy_norm, "chance": self.chance,
            "questions": len(self.questions),
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.1%} by likelihood, {self.accuracy_norm:.1%} by likelihood a character, over "
            f"{len(self.questions):,} questions (the most frequent place: {self.chance:.1%})"
        )


def questions_of(examples: Sequence[Example], tokenizer: Any) -> list[Question]:
    """Examples as questions whose choices are all their answers; none where the answers are not a choice."""
    answers = choices_of(examples) or []
    texts = tuple(tokenizer.decode(answer, skip_special_tokens=True) for answer in answers)
    return [
        Question(
            example.where, tuple(with_answer(example, answer) for answer in answers), texts,
            answers.index(answer_of(example) or ()),
        )
        for example in examples if answers
    ]  # fmt: skip


def choose(
    model: LanguageModel,
    questions: Sequence[Question],
    *,
    capacity: Capacity,
    advance: Callable[[int], None] | None = None,
) -> ChoiceResult:
    """Ask every question. capacity: candidates at a time; advance: gets those that are done."""
    candidates = [candidate for question in questions for candidate in question.candidates]
    found: Tensor = log_likelihoods(model, candidates, capacity=capacity, advance=advance)
    each = iter(found.tolist())
    scores = [[next(each) for _ in question.candidates] for question in questions]
    per_character = [
        [score / max(1, len(text)) for score, text in zip(row, question.texts, strict=True)]
        for row, question in zip(scores, questions, strict=True)
    ]
    picked, norm = ([max(range(len(row)), key=row.__getitem__) for row in rows] for rows in (scores, per_character))
    return ChoiceResult(list(questions), scores, picked, norm)
