"""The metrics of `qtune eval` on a loaded model: told, as values for a program, and as rows for a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batches import Capacity
from ..evaluate import choices_of, evaluate, joined
from ..recipe import Recipe
from ..routing import prompt_of
from ..screen import Screen
from ..step import LanguageModel
from .asked import Held
from .choice import ChoiceResult, choose
from .generation import Sampling, generate_many
from .harness import Tasks
from .metrics import TextMetric
from .subjects import Prompts, Routed, Subject, in_order, shares

WRONG_SHOWN, SHOWN_CHARACTERS = 3, 100


@dataclass(frozen=True)
class Job:
    """All that is asked, before the model is there. names: of metrics; none: the default ones."""

    recipe: Recipe
    folders: dict[str, Path]
    uses: list[dict[str, float]]
    is_run: bool
    stored: bool
    names: tuple[str, ...]
    metrics: list[TextMetric]
    how: Sampling
    tasks: Tasks | None
    held: Held | None


def measure(
    job: Job,
    subject: Subject,
    language: LanguageModel,
    tokenizer: Any,
    capacity: Capacity,
    by_hand: bool,
    screen: Screen,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All metrics on a subject; told, as values, and as rows."""
    assert job.held is not None
    held, name, found, rows = job.held, subject.name, dict[str, Any](), list[dict[str, Any]]()
    prompts = [prompt_of(example) for example in held.examples]
    if isinstance(subject, Routed):
        asked = [one.ids for one in held.asked] or prompts
        found["routed"] = shares(subject.chosen(asked), subject.router.names)
        told_shares = ", ".join(f"{own} {count:,}" for own, count in found["routed"].items())
        screen.line(f"{name:8} prompts by adapter: {told_shares}")
    if not job.names or "perplexity" in job.names:
        few = None if job.names or held.questions else choices_of(held.examples)
        with screen.bar(f"evaluating {name}", len(held.examples)) as advance:
            result = joined([
                evaluate(
                    language, [held.examples[i] for i in turn], capacity=capacity, advance=advance, choice=few or False
                )
                for turn in subject.turns(prompts)
            ], held.examples)  # fmt: skip
        screen.line(f"{name:8} {result}")
        found |= result.to_dict()
    if held.questions:
        more, some = _choices(held, subject, prompts, language, tokenizer, capacity, screen)
        found, rows = found | more, rows + some
    if job.metrics:
        more, some = _texts(job, subject, language.model, tokenizer, capacity, by_hand, screen)
        found, rows = found | more, rows + some
    return found, rows


def _choices(
    held: Held,
    subject: Subject,
    prompts: Prompts,
    language: LanguageModel,
    tokenizer: Any,
    capacity: Capacity,
    screen: Screen,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metric of questions with choices."""
    questions = held.questions
    count = sum(len(question.candidates) for question in questions)
    with screen.bar(f"choosing, {subject.name}", count) as advance:
        turns = [
            (turn, choose(language, [questions[i] for i in turn], capacity=capacity, advance=advance))
            for turn in subject.turns(prompts)
        ]
    each = (in_order((turn, getattr(one, key)) for turn, one in turns) for key in ("scores", "picked", "picked_norm"))
    chosen = ChoiceResult(questions, *each)
    screen.line(f"{subject.name:8} {chosen}")
    rows = [
        {
            "metric": "choice", "where": question.where, "prompt": asked, "answer": question.texts[picked],
            "expected": question.texts[question.right], "score": float(picked == question.right),
        }
        for question, asked, picked in zip(questions, held.prompts(tokenizer), chosen.picked, strict=True)
    ]  # fmt: skip
    return chosen.to_dict(), subject.marked(rows, prompts)


def _texts(
    job: Job, subject: Subject, model: Any, tokenizer: Any, capacity: Capacity, by_hand: bool, screen: Screen
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of generated answers. Where no --batch was given, as many tokens at a time as in training."""
    assert job.held is not None
    asked, longest, name = job.held.asked, job.recipe.data.max_length, subject.name
    if not by_hand and not capacity.by_tokens:
        capacity = Capacity(capacity.limit * longest, by_tokens=True)
    with screen.bar(f"answering, {name}", len(asked)) as advance:
        prompts = [one.ids for one in asked]
        answers = in_order([
            (turn, generate_many(
                model, tokenizer, [prompts[i] for i in turn], job.how, capacity=capacity, advance=advance
            ))
            for turn in subject.turns(prompts)
        ])  # fmt: skip
    found, rows = dict[str, Any](), list[dict[str, Any]]()
    for metric in job.metrics:
        scores = [metric.score(one, answer) for one, answer in zip(asked, answers, strict=True)]
        mean = sum(scores) / len(scores)
        found[metric.name] = mean
        rows += [
            {
                "metric": metric.name, "where": one.where, "prompt": one.prompt, "answer": answer,
                "expected": one.expected, "score": score,
            }
            for one, answer, score in zip(asked, answers, scores, strict=True)
        ]  # fmt: skip
        if metric.name != "exact-match":
            screen.line(f"{name:8} {metric.name} {mean:.4f}, the mean over {len(scores):,} answers")
            continue
        right = int(sum(scores))
        screen.line(
            f"{name:8} exact match {mean:.1%} ({right:,} of {len(scores):,}), white space around the answers left out"
        )
        wrong = [(one, answer) for one, answer, score in zip(asked, answers, scores, strict=True) if not score]
        for one, answer in wrong[:WRONG_SHOWN]:
            screen.line(f"         wrong: {_short(answer)} in place of {_short(one.expected)}  ({one.where})", "dim")
    return found | {"answers": len(answers)}, subject.marked(rows, prompts * len(job.metrics))


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "...")
