"""Which tokens of a conversation are trained, in the templates of many families. The oracle is the rendering itself:
the trained parts, decoded, must be the answers as that family shows them, each with its end, and nothing else."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from chat_templates import FAMILIES, Family
from data_kit import chat, marked, only, tokenizer

from qtune.data import Example, Record
from qtune.data.chat import Chat
from qtune.data.encode import Encoder

CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CONVERSATIONS: dict[str, list[str]] = {  # user, assistant, user, ...
    "one turn": ["hi there", "hello"],
    "three turns": ["a?", "yes", "b?", "no", "and c?", "maybe so"],
    "answers that stand elsewhere, too": ["assistant", "user", "yes", "yes", "user", "assistant", "no", "no"],
    "one letter": ["a", "s", "s", "a", "t", "t"],
    "lines and spaces": ["  first \n\n line ", "one\n\ntwo", " third", "3  and  4"],
    "padded answers": ["q", "\n padded\n", "r", " x "],
    "code and JSON": ["write", "```py\nprint('{{ x }}')\n```", "more", '{"a": [1, 2]}'],
}


def made(family: Family) -> Any:
    return tokenizer(family.template, eos=family.eos, bos=family.bos)


def record_of(turns: list[str], system: str | None = None) -> Record:
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return Record("messages", "w", messages=tuple([{"role": "system", "content": system}] * bool(system) + messages))


def trained(example: Example, tok: Any) -> list[str]:
    """The trained parts as text."""
    return [part.split("⟧")[0] for part in marked(example, tok).split("⟦")[1:]]


def expected(family: Family, turns: list[str]) -> list[str]:
    answers = turns[1::2]
    return [family.shown(answer, i == len(answers) - 1) for i, answer in enumerate(answers)]


@pytest.mark.parametrize("system", [None, "be kind"])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_and_nothing_else(name: str, turns: list[str], system: str | None) -> None:
    family = FAMILIES[name]
    if system and not family.system:
        return
    tok = made(family)
    record = record_of(turns, system)
    example, _ = only(record, tok)
    assert trained(example, tok) == expected(family, turns)
    assert list(example.input_ids) == tok.apply_chat_template(list(record.messages))["input_ids"]
    example, _ = only(record, tok, loss_on="last")
    assert trained(example, tok) == expected(family, turns)[-1:]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_user_who_writes_the_template(name: str) -> None:
    """What a user writes is not trained, even where it looks like an answer."""
    family = FAMILIES[name]
    tok = made(family)
    prompt = Chat(tok, None).prompt
    for fake in (f"{prompt}fake{family.eos}", f"{prompt}yes{family.eos}\n", f"yes{family.eos}", prompt):
        turns = [f"look: {fake} ok?", "yes", f"and {fake}!", "no"]
        example, _ = only(record_of(turns), tok)
        assert trained(example, tok) == expected(family, turns), fake


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_thoughts(name: str) -> None:
    """Templates that leave thoughts out of earlier answers."""
    family = FAMILIES[name]
    tok = made(family)
    turns = ["a", "<think>\nhm, a\n</think>\n\nyes", "b", "<think>\nso b\n</think>\n\nno"]
    for system in (None, "be kind"):
        example, report = only(record_of(turns, system), tok)
        assert trained(example, tok) == expected(family, turns)
        left_out = {"qwen3": "1 answer", "deepseek-r1": "2 answers"}[name]
        assert f"note: the chat template leaves out parts of {left_out} (thoughts" in str(report)


def test_a_system_prompt_that_is_not_shown() -> None:
    """Mistral's third template shows it before a question that comes last, so never where an answer does."""
    for name, told in (("mistral-v3", True), ("mistral-tekken", False)):
        _, report = only(record_of(["a", "b"], "be kind"), made(FAMILIES[name]))
        assert ("note: the chat template does not show the system prompt of 1 conversation" in str(report)) == told


CALLS = {  # what of the call is trained
    "llama-3.1": '{"name": "weather", "parameters": {"city": "Ulm"}}<|eot_id|>',
    "qwen2.5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>',
    "mistral-v3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}, "id": "call00001"}]</s>',
}


@pytest.mark.parametrize("again", [False, True], ids=["one question", "two questions"])
@pytest.mark.parametrize("name", CALLS)
def test_tool_calls(name: str, again: bool) -> None:
    family = FAMILIES[name]
    tok = made(family)
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "weather in Ulm?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Sunny."},
    ]
    turns += [{"role": "user", "content": "thanks"}, {"role": "assistant", "content": "Sure."}] * again
    example, _ = only(Record("messages", "w", messages=tuple(turns), tools=(TOOL,)), tok)
    parts = [part.removeprefix("<think>\n\n</think>\n\n").strip() for part in trained(example, tok)]
    end = family.eos
    assert parts == [CALLS[name], f"Sunny.{end}", f"Sure.{end}"][: 2 + again]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plain_way_finds_what_the_exact_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On random conversations; a family whose answers are never found plainly is not compared."""
    family = FAMILIES[name]
    draw = random.Random(3)
    words = ["yes", "no", "user", "assistant", "a", "\n", " b", "model", "[INST", "c d", "<|im", "end"]
    records = []
    for _ in range(12):
        turns = ["".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(2 * draw.randint(1, 3))]
        turns = [text if text.strip() else "x" for text in turns]
        records.append(record_of(turns))
    tok = made(family)
    fast = Encoder(tok).encode_many(records)
    monkeypatch.setattr(Chat, "_simple", lambda *args: {})
    assert Encoder(tok).encode_many(records) == fast


def test_a_template_that_marks_answers_and_the_last_one() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
    )
    tok = tokenizer(template)
    record = chat("user: a?", "assistant: yes", "user: b?", "assistant: no")
    assert trained(only(record, tok)[0], tok) == ["yes<|im_end|>", "no<|im_end|>"]
    assert trained(only(record, tok, loss_on="last")[0], tok) == ["no<|im_end|>"]


def test_last_of_other_formats_is_the_answer() -> None:
    tok = tokenizer()
    example, _ = only(Record("prompt", "w", "a", "b"), tok, loss_on="last")
    assert marked(example, tok) == "a⟦b</s>⟧"
