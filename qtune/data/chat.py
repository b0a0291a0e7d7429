"""Where the answers are in a conversation that a chat template rendered. What is found is, by character:

1. what follows the template's generation prompt, if that stands there once for each answer and is followed by the very
   content of that answer and by the end of a turn;
2. else what rendering messages[:i+1] adds to messages[:i] with the generation prompt;
3. else (the template rewrites earlier turns, as Qwen3's and Phi-3's do) the message's own text after that prompt;
4. else (it moves or rewrites what stands before, as Mistral's and DeepSeek-R1's do) what changes when two other texts
   are put in the answer's place;
5. else an error: nothing is guessed.
White space after an end-of-turn token is the template's, not the answer's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from ..errors import QtuneError
from .records import Record

Span = tuple[int, int]
PROBES = ("Aqtune1B", "Cqtune2D")  # two texts without a common beginning or end, and nothing that a template looks for


class Chat:
    """A tokenizer's chat template, or another one, with what it is made of."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.shortened = 0  # answers of which the template shows a part only
        self.unled = 0  # conversations whose system prompt it does not show
        self.counting = threading.Lock()

    # ---- what the template is

    @cached_property
    def text(self) -> str:
        """The template. Raises QtuneError where there is none."""
        text = self.template or self.tokenizer.chat_template
        if isinstance(text, dict):  # several named templates
            text = text.get("default") or next(iter(text.values()), None)
        if not text:
            raise QtuneError(
                "Q211",
                "the data holds messages, but the tokenizer has no chat template; "
                "set data.template, or give prompt/completion records",
            )
        return str(text)

    @cached_property
    def marks_answers(self) -> bool:
        """Does it say itself what an answer is?"""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None

    @cached_property
    def turn_end(self) -> str:
        """What the template writes after an answer that ends the conversation: `<|im_end|>\\n`, `</s>` ..."""
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": PROBES[0]})
        return self._render(_probe(messages), 2).rpartition(PROBES[0])[2]

    @cached_property
    def ends(self) -> list[str]:
        """`turn_end` in pieces: special tokens, and what stands between them."""
        added = {str(token) for token in self.tokenizer.get_added_vocab()} | set(self.tokenizer.all_special_tokens)
        names = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True) if token)
        return [piece for piece in (re.split(f"({names})", self.turn_end) if names else [self.turn_end]) if piece]

    @cached_property
    def prompt(self) -> str:
        """What the template adds where an answer is asked for, `<|im_start|>assistant\\n`; may be empty."""
        record = _probe(({"role": "user", "content": "a"},))
        asked = self._render(record, 1, prompt=True)
        return asked[shared(asked, self._render(record, 1)) :]

    # ---- rendering

    def render(self, records: Sequence[Record]) -> list[str]:
        """The conversations as text."""
        texts = self._renders([(record, len(record.messages)) for record in records])
        heads = [record.messages[0] for record in records]
        unled = sum(
            head["role"] == "system" and head["content"].strip() not in text
            for head, text in zip(heads, texts, strict=True)
        )
        with self.counting:
            self.unled += unled
        return texts

    def _renders(self, jobs: Sequence[tuple[Record, int]], *, prompt: bool = False) -> list[str]:
        """The first so many messages of each record, in few calls. Raises QtuneError naming the record at fault."""
        made: list[str] = []
        start = 0
        for end in range(1, len(jobs) + 1):
            if end < len(jobs) and jobs[end][0].tools == jobs[start][0].tools:
                continue
            try:
                made += self._apply(jobs[start:end], tokenize=False, add_generation_prompt=prompt)
            except QtuneError:  # which one is it?
                made += [self._render(record, count, prompt=prompt) for record, count in jobs[start:end]]
            start = end
        return made

    def _render(self, record: Record, count: int, *, prompt: bool = False) -> str:
        return str(self._apply([(record, count)], tokenize=False, add_generation_prompt=prompt)[0])

    def marked(self, record: Record) -> tuple[list[int], list[int]]:
        """Token ids and mask of a template that marks answers, with the end of turn where it left that outside."""
        try:
            out = self._apply(
                [(record, len(record.messages))], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except (ValueError, NotImplementedError) as error:
            raise QtuneError(
                "Q212", f"{record.where}: the tokenizer cannot give the template's {{% generation %}} mask: {error}"
            ) from error
        ids, trained = list(out["input_ids"][0]), list(out["assistant_masks"][0])
        mark = list(self.tokenizer(self.turn_end.rstrip(), add_special_tokens=False, verbose=False)["input_ids"])
        for end in [i for i in range(1, len(ids)) if trained[i - 1] and not trained[i]]:
            if mark and ids[end : end + len(mark)] == mark:
                trained[end : end + len(mark)] = [1] * len(mark)
        return ids, trained

    def _apply(self, jobs: Sequence[tuple[Record, int]], **options: Any) -> Any:
        assert self.text  # raises where there is none
        record = jobs[0][0]
        try:
            return self.tokenizer.apply_chat_template(
                [list(one.messages[:count]) for one, count in jobs],
                tools=list(record.tools) or None,
                chat_template=self.template,
                **options,
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise QtuneError(
                "Q212", f"{record.where}: the chat template{line} refuses the conversation: {error}"
            ) from error

    # ---- answers

    def answers(self, records: Sequence[Record], texts: Sequence[str], *, last: bool = False) -> list[list[Span]]:
        """The spans of the answers, or of the last ones, in the rendered `texts`, each with its end of turn."""
        spans: list[dict[int, Span]] = []
        slow: list[tuple[int, int]] = []  # (record, message) whose answer is not simply found
        for number, (record, text) in enumerate(zip(records, texts, strict=True)):
            wanted = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
            found = self._simple(record, text, wanted)
            wanted = wanted[-1:] if last else wanted
            spans.append({i: found[i] for i in wanted if i in found})
            slow += [(number, i) for i in wanted if i not in found]
        for number, i, span in self._exact(records, texts, slow):
            spans[number][i] = span
            whole = (records[number].messages[i].get("content") or "").strip() in texts[number][slice(*span)]
            with self.counting:
                self.shortened += not whole
        return [[found[i] for i in sorted(found)] for found in spans]

    def _simple(self, record: Record, text: str, wanted: Sequence[int]) -> dict[int, Span]:
        """The answers that stand plainly after the generation prompt."""
        found: dict[int, Span] = {}
        if not self.prompt.strip() or not self.turn_end.strip() or text.count(self.prompt) != len(wanted):
            return found
        at = 0
        for i in wanted:
            at = text.index(self.prompt, at) + len(self.prompt)
            content = record.messages[i].get("content") or ""
            for given in (content, content.strip()):
                stop = at + len(given)
                if given and text.startswith(given, at) and (end := self._ended(text, stop)) > stop:
                    found[i] = at, end
                    break
        return found

    def _ended(self, text: str, at: int) -> int:
        """The end of the end-of-turn tokens that stand at `at`; `at` itself where there are none."""
        end = at
        for piece in self.ends:
            if not text.startswith(piece, at):
                break
            at += len(piece)
            end = at - len(piece) + len(piece.rstrip()) if piece.strip() else end
        return end

    def _exact(
        self, records: Sequence[Record], texts: Sequence[str], slow: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, Span]]:
        """(record, message, span) of answers that take more renderings."""
        before = self._tried([(records[n], i) for n, i in slow], prompt=True)
        after = self._tried([(records[n], i + 1) for n, i in slow])
        for (number, i), asked, answered in zip(slow, before, after, strict=True):
            record, text = records[number], texts[number]
            span = None
            if asked is not None and text.startswith(asked):
                span = self._added(record.messages[i], text, asked, answered)
            yield number, i, span or self._replaced(record, text, i, asked or "", answered or "")

    def _tried(self, jobs: Sequence[tuple[Record, int]], *, prompt: bool = False) -> list[str | None]:
        """As `_renders`; None where a template refuses a conversation that stops there."""
        try:
            return list(self._renders(jobs, prompt=prompt))
        except QtuneError:
            made: list[str | None] = []
            for record, count in jobs:
                try:
                    made.append(self._render(record, count, prompt=prompt))
                except QtuneError:
                    made.append(None)
            return made

    def _added(self, message: dict[str, Any], text: str, asked: str, answered: str | None) -> Span | None:
        """Where what came before is as it was: 2. and 3."""
        start = len(asked)
        if answered is not None and text.startswith(answered) and answered.startswith(asked) and len(answered) > start:
            return start, len(answered.rstrip()) if self.turn_end.strip() else len(answered)
        content = message.get("content") or ""
        ends = []
        for given in (content, content.strip()):
            at = text.find(given, start) if given.strip() else -1
            if at >= 0 and not text[start:at].strip():
                ends.append(self._ended(text, at + len(given)))
        return (start, max(ends)) if ends else None

    def _replaced(self, record: Record, text: str, i: int, asked: str, answered: str) -> Span:
        """Where the template writes other things around this answer than at the end of a conversation: 4."""
        head, message, tail = record.messages[:i], record.messages[i], record.messages[i + 1 :]
        others = [replace(record, messages=(*head, _with(message, probe), *tail)) for probe in PROBES]
        one, two = self._renders([(other, len(other.messages)) for other in others])
        left, right = shared(one, two), shared(one[::-1], two[::-1])
        before, after = one[:left], one[len(one) - right :]
        start, end = self._start(text, before, head, asked), -1
        if one == before + PROBES[0] + after and two == before + PROBES[1] + after:  # it stands there once, unchanged
            if message.get("tool_calls"):
                end = _call_end(text, left, message["tool_calls"][0]["function"]["name"], answered)
            elif text.endswith(after):
                end = len(text) - len(after)
                start = shared(text[:end], before) if start < 0 else start
        if 0 <= start < end and start >= _said(before, head)[1]:
            shown, content = text[start:end].strip(), (message.get("content") or "").strip()
            if shown and (message.get("tool_calls") or content in shown or shown in content):
                return start, self._ended(text, end)
        raise QtuneError(
            "Q213",
            f"{record.where}: the chat template renders message {i + 1} (an answer) differently inside the "
            "conversation than at its end, so its tokens cannot be told from the rest; set data.loss_on: all, "
            "split the conversation so that this answer comes last, or give a data.template that marks "
            "answers with {% generation %}",
        )

    def _start(self, text: str, before: str, head: Sequence[dict[str, Any]], asked: str) -> int:
        """Where the answer after `before` starts: after what follows the last message when an answer is asked for; -1
        where something else follows it here."""
        (_, at), (_, end) = _said(before, head), _said(asked, head)
        start = at + len(asked) - end
        same = at and end and before.startswith(asked[end:], at) and text.startswith(before[:start])
        return start if same else -1


def _said(text: str, head: Sequence[dict[str, Any]]) -> Span:
    """Where the last message stands in a rendering that ends with it; (0, 0) where it has no text."""
    said = (head[-1].get("content") or "").strip() if head else ""
    at = text.rfind(said)
    return (at, at + len(said)) if said and at >= 0 else (0, 0)


def _with(message: dict[str, Any], probe: str) -> dict[str, Any]:
    """The message with another answer, or with another name of its first call."""
    if not (calls := message.get("tool_calls")):
        return {"role": "assistant", "content": probe}
    first = calls[0] | {"function": calls[0]["function"] | {"name": probe}}
    return message | {"tool_calls": [first, *calls[1:]]}


def _call_end(text: str, at: int, name: str, answered: str) -> int:
    """Where the calls end whose first name stands at `at`: they do as at the end of a conversation, `answered`."""
    place = answered.find(name)
    while place >= 0:
        rest = answered[place:].rstrip()
        if text.startswith(rest, at):
            return at + len(rest)
        place = answered.find(name, place + 1)
    return -1


def _probe(messages: tuple[dict[str, Any], ...]) -> Record:
    return Record("messages", "a probe of the chat template", messages=messages)


def read_template(value: str) -> str:
    """A chat template given as text, or as the name of a file that holds it."""
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QtuneError(
            "Q214", f"data.template {value!r} is neither a template (no '{{' in it) nor a readable file: {error}"
        ) from error


def shared(a: Sequence[object], b: Sequence[object]) -> int:
    """The length of the common beginning of two sequences."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # slices compare faster than items
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
