"""Records -> token ids with a mask of the trained positions.

Only the answer is learned by default, with the tokens that end it: a model that never sees its EOS never stops.
How the answers are found in a conversation:
1. a chat template with `{% generation %}` says so itself;
2. else it renders messages[:i] with the generation prompt, then messages[:i+1]: what the second adds is the answer;
3. else (a template that rewrites earlier turns, as Qwen3's does) the text after that prompt must be the message itself;
4. else an error. Nothing is guessed, and ids are always those of the tokenizer's own apply_chat_template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from .errors import QtuneError, one_of
from .records import Record

LOSS_ON = ("answer", "all")


class Encoder:
    """Turns records into ids and masks with one transformers tokenizer and one chat template."""

    def __init__(self, tokenizer: Any, *, loss_on: str = "answer", template: str | None = None) -> None:
        if loss_on not in LOSS_ON:
            raise one_of("data.loss_on", loss_on, LOSS_ON)
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.template = read_template(template) if template else None

    def encode(self, record: Record) -> tuple[list[int], list[int]]:
        """(input_ids, trained) of the whole record, uncut; equal lengths. Raises QtuneError naming the record."""
        ids, trained = self._conversation(record) if record.messages else self._continuation(record)
        if self.loss_on == "all":
            trained = [1] * len(ids)
        trained[:1] = [0] * len(ids[:1])
        return ids, trained

    def windows(self, record: Record, length: int) -> Iterator[tuple[list[int], list[int]]]:
        """A plain text in windows of at most `length` tokens, each with the opening tokens; EOS ends the last."""
        step = max(1, length - len(self.opening))
        ids = [*self.ids(record.answer), self.eos]
        for start in range(0, len(ids), step):
            window = [*self.opening, *ids[start : start + step]]
            yield window, [0, *[1] * (len(window) - 1)]

    def ids(self, text: str) -> list[int]:
        """The ids of `text` without any special token added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise QtuneError(
                "the tokenizer has no EOS token, so the model could not learn to stop; "
                "set eos_token in tokenizer_config.json of the model's folder"
            )
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def opening(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text: its BOS, or nothing."""
        inner = self.ids("a")
        outer = list(self.tokenizer("a", verbose=False)["input_ids"])
        for start in range(len(outer) - len(inner) + 1):
            if outer[start : start + len(inner)] == inner:
                return outer[:start]
        raise QtuneError(
            f"the tokenizer encodes 'a' as {inner}, but with special tokens as {outer}: cannot tell its opening tokens"
        )

    def _continuation(self, record: Record) -> tuple[list[int], list[int]]:
        """Prompt and answer as they stand, then EOS. The prompt's ids are those that generation will be given."""
        prompt = self.ids(record.prompt) if record.prompt else []
        whole = self.ids(record.prompt + record.answer)
        # where a token would straddle the boundary, the two parts are tokenized apart
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self.ids(record.answer)
        if answer[-1:] != [self.eos]:
            answer.append(self.eos)
        has_bos = prompt[: len(self.opening)] == self.opening
        context = prompt if has_bos else self.opening + prompt
        return context + answer, [0] * len(context) + [1] * len(answer)

    def _conversation(self, record: Record) -> tuple[list[int], list[int]]:
        text = self._render(record, len(record.messages))
        if self.loss_on == "all":
            ids = self.ids(text)
            return ids, [1] * len(ids)
        if self.marks_answers:
            return self._marked(record)
        ids = self.ids(text)
        trained = [0] * len(ids)
        known = (0, 0)
        for start, end in self._spans(record, text):
            first, known = self._count(text, start, ids, known)
            last, known = self._count(text, end, ids, known)
            trained[first:last] = [1] * (last - first)
        return ids, trained

    def _count(self, text: str, end: int, ids: list[int], known: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """How many of `ids` lie wholly in text[:end], and the boundary known for the next call.

        known: (characters, tokens) of an earlier boundary: only what follows it is encoded.
        """
        at, tokens = known
        piece = self.ids(text[at:end])
        count = tokens + len(piece)
        if ids[tokens:count] == piece:
            return count, (end, count)
        return shared(self.ids(text[:end]), ids), known

    def _spans(self, record: Record, text: str) -> Iterator[tuple[int, int]]:
        """The character spans of the answers in the rendered conversation `text`, each with its end of turn."""
        for i, message in enumerate(record.messages):
            if message["role"] != "assistant":
                continue
            before, after = self._render(record, i, prompt=True), self._render(record, i + 1)
            content = (message.get("content") or "").strip()
            if text.startswith(after) and after.startswith(before) and len(after) > len(before):
                # white space after an end-of-turn token is the template's, not the model's
                yield len(before), len(after.rstrip()) if self.turn_end.strip() else len(after)
            elif text.startswith(before) and content and text[len(before) :].lstrip().startswith(content):
                end = text.index(content, len(before)) + len(content)
                mark = self.turn_end.rstrip()
                yield len(before), end + (len(mark) if text.startswith(mark, end) else 0)
            else:
                raise QtuneError(
                    f"{record.where}: the chat template renders message {i + 1} (an answer) differently inside the "
                    "conversation than at its end, so its tokens cannot be told from the rest; set data.loss_on: all, "
                    "split the conversation so that this answer comes last, or give a data.template that marks "
                    "answers with {% generation %}"
                )

    def _marked(self, record: Record) -> tuple[list[int], list[int]]:
        """The template's own {% generation %} mask, with the end of turn where the template left that outside."""
        try:
            out = self._apply(
                record, len(record.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except (ValueError, NotImplementedError) as error:
            raise QtuneError(
                f"{record.where}: the tokenizer cannot give the template's {{% generation %}} mask: {error}"
            ) from error
        ids, trained = list(out["input_ids"]), list(out["assistant_masks"])
        mark = self.ids(self.turn_end.rstrip())
        for end in [i for i in range(1, len(ids)) if trained[i - 1] and not trained[i]]:
            if mark and ids[end : end + len(mark)] == mark:
                trained[end : end + len(mark)] = [1] * len(mark)
        return ids, trained

    @cached_property
    def marks_answers(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.template_text) is not None

    @cached_property
    def template_text(self) -> str:
        text = self.template or self.tokenizer.chat_template
        if isinstance(text, dict):  # several named templates
            text = text.get("default") or next(iter(text.values()), None)
        if not text:
            raise QtuneError(
                "the data holds messages, but the tokenizer has no chat template; "
                "set data.template, or give prompt/completion records"
            )
        return str(text)

    @cached_property
    def turn_end(self) -> str:
        """What the template writes after an answer that ends the conversation: `<|im_end|>\\n`, `</s>` ..."""
        probe = "qtuneprobe"
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": probe})
        return self._render(Record("messages", "a probe of the chat template", messages=messages), 2).rpartition(probe)[
            2
        ]

    def _render(self, record: Record, count: int, *, prompt: bool = False) -> str:
        return str(self._apply(record, count, tokenize=False, add_generation_prompt=prompt))

    def _apply(self, record: Record, count: int, **options: Any) -> Any:
        assert self.template_text  # raises where there is none
        try:
            return self.tokenizer.apply_chat_template(
                list(record.messages[:count]), tools=list(record.tools) or None, chat_template=self.template, **options
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise QtuneError(f"{record.where}: the chat template{line} refuses the conversation: {error}") from error


def read_template(value: str) -> str:
    """A chat template given as text, or as the name of a file that holds it."""
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QtuneError(
            f"data.template {value!r} is neither a template (no '{{' in it) nor a readable file: {error}"
        ) from error


def shared(a: Sequence[object], b: Sequence[object]) -> int:
    """The length of the common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
