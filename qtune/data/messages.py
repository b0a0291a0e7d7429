"""Conversations of many spellings -> the messages and tools that chat templates of transformers read.

Roles: user or human; assistant, gpt, model ...; system; tool, function, observation; function_call. A call is
{"type": "function", "function": {"name", "arguments"}} in `tool_calls` of an assistant message, its arguments an
object (OpenAI's files have them as JSON text; templates would quote that a second time).
Glaive's function calling files are text with USER:, ASSISTANT: and FUNCTION RESPONSE: in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import one_of
from .records import Fault, found, parsed, short, text_of

CALL = "call"  # a turn that is nothing but a call
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
    "function_call": CALL, "tool_call": CALL,
}  # fmt: skip
_GLAIVE_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ?")
_GLAIVE_CALL = re.compile(r"<functioncall>\s*(.*)", re.DOTALL)
_GLAIVE_ARGUMENTS = re.compile(r"(\"arguments\":\s*)'(.*)'(\s*\})\s*$", re.DOTALL)


def conversation(value: Any, key: str, system: Any, columns: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    """The messages of a list under `key`, with the text of `system` first. Raises Fault.

    columns: what `role` and `content` are called in this file, where it is neither that nor from and value.
    """
    if not isinstance(value, list) or not value:
        raise Fault(f"{key!r} must be a list of {{role, content}} objects; found {found(value)}")
    turns = _Turns(columns)
    for number, message in enumerate(value, 1):
        try:
            turns.add(message)
        except Fault as fault:
            raise Fault(f"message {number}: {fault}") from None
    messages = turns.messages
    if system:
        if messages[0]["role"] in ("system", "developer"):
            raise Fault("has a system prompt of its own and a system message; legal: one of the two")
        messages = [{"role": "system", "content": text_of({"system": system}, "system")}, *messages]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Fault(f"has no assistant message, so there is nothing to learn; roles found: {', '.join(roles)}")
    if roles[0] == "assistant":
        raise Fault("begins with the assistant; a conversation must begin with a system or user message")
    return tuple(messages)


class _Turns:
    """Messages as they are read, one after the other; calls without an id get one, so that answers can name it."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.role_keys = (columns["role"],) if "role" in columns else ("role", "from")
        self.content_keys = (columns["content"],) if "content" in columns else ("content", "value")
        self.open: list[dict[str, Any]] = []  # calls that no tool has answered yet
        self.calls = 0

    def add(self, message: Any) -> None:
        key = next((k for k in self.role_keys if isinstance(message, dict) and k in message), None)
        if key is None:
            names = f"{self.role_keys[0]!r} and {self.content_keys[0]!r}"
            raise Fault(f"must be an object with {names}; found {found(message)}")
        if not isinstance(message[key], str) or message[key] not in ROLES:
            raise Fault(str(one_of("role", message[key], ROLES)))
        role = ROLES[message[key]]
        inner = next((k for k in self.content_keys if k in message), None)
        rest = {k: v for k, v in message.items() if v is not None and k not in (key, inner)}
        if "function_call" in rest:  # OpenAI's first spelling
            rest["tool_calls"] = [rest.pop("function_call")]
        made: dict[str, Any] = {"role": "assistant" if role == CALL else role}
        if role == CALL:
            made |= {"content": "", "tool_calls": self._calls(_call_text(message, inner))}
        elif role == "assistant" and rest.get("tool_calls"):
            rest["tool_calls"] = self._calls(rest["tool_calls"])
            if inner is not None:
                made["content"] = None if message[inner] is None else self._content(message, inner, empty=True)
        elif inner is None:
            raise Fault(f"has no {self.content_keys[0]!r}; found {found(message)}")
        else:
            made["content"] = self._content(message, inner, empty=role != "assistant")
        if role == "tool" and self.open:
            call = self.open.pop(0)
            if call.get("id", "").startswith("call0"):  # an id of ours, which the file does not have
                rest = {"tool_call_id": call["id"], "name": call["function"]["name"]} | rest
        self.messages.append(made | rest)

    def _content(self, message: dict[str, Any], key: str, *, empty: bool) -> str:
        return text_of({self.content_keys[0]: message[key]}, self.content_keys[0], empty=empty)

    def _calls(self, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not value:
            raise Fault(f"'tool_calls' must be a list of calls; found {found(value)}")
        made = [self._call(call) for call in value]
        self.open += made
        return made

    def _call(self, value: Any) -> dict[str, Any]:
        inner = value.get("function", value) if isinstance(value, dict) else value
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Fault(f"a tool call must be an object with 'name' and 'arguments'; found {found(value)}")
        arguments = inner.get("arguments", inner.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = parsed(arguments or "{}")
        if not isinstance(arguments, dict):
            shown = arguments if isinstance(arguments, Fault) else found(arguments)
            raise Fault(f"the arguments of the call of {inner['name']!r} must be a JSON object; found {shown}")
        outer = {k: v for k, v in value.items() if k in ("id", "type")} if "function" in value else {}
        self.calls += 1  # nine letters and digits, as Mistral's templates ask for
        own = {"type": "function", "id": f"call{self.calls:05d}"}
        return own | outer | {"function": {"name": inner["name"], "arguments": arguments}}


def _call_text(message: dict[str, Any], key: str | None) -> list[Any]:
    """The calls that a turn of ShareGPT's `function_call` holds as JSON text: one, or a list."""
    value = message[key] if key is not None else None
    if isinstance(value, str):
        value = parsed(value)
    if isinstance(value, Fault):
        raise Fault(f"a function_call must hold {{name, arguments}} as JSON; {value}")
    return value if isinstance(value, list) else [value]


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools of a record, given as a list or as its JSON text; bare functions are put as templates read them."""
    if isinstance(value, str) and value.strip():
        value = parsed(value)
        if isinstance(value, Fault):
            raise Fault(f"'tools' is text, but {value}")
    if value is None or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Fault(f"'tools' must be a list of objects; found {found(value)}")
    return tuple({"type": "function", "function": t} if "name" in t and "parameters" in t else t for t in value)


def glaive(system: str, chat: str) -> tuple[list[dict[str, Any]], tuple[dict[str, Any], ...]]:
    """(turns, tools) of Glaive's two texts: `conversation` reads the turns. Raises Fault."""
    head, brace, _ = system.partition("{")
    tools = tuple(_objects(system[len(head) :])) if brace else ()
    head = re.sub(r"^\s*SYSTEM:\s*", "", head).rstrip(" \n-")
    turns: list[dict[str, Any]] = [{"role": "system", "content": head}] if head else []
    parts = _GLAIVE_TURN.split(chat)
    if parts[0].strip() or len(parts) < 3:
        raise Fault(f"'chat' must begin with USER: or ASSISTANT:; found {short(chat)}")
    for speaker, text in zip(parts[1::2], parts[2::2], strict=True):
        content = text.replace("<|endoftext|>", "").strip()
        if speaker != "ASSISTANT":
            turns.append({"role": "user" if speaker == "USER" else "tool", "content": content})
        elif call := _GLAIVE_CALL.search(content):
            said = content[: call.start()].strip()
            turns.append({"role": "assistant", "content": said, "tool_calls": [_glaive_call(call[1])]})
        else:
            turns.append({"role": "assistant", "content": content})
    return turns, tools_of(list(tools))


def _glaive_call(text: str) -> Any:
    """{"name": ..., "arguments": '{...}'}: JSON but for the single quotes around the arguments."""
    plain = _GLAIVE_ARGUMENTS.sub(lambda m: m[1] + m[2].replace("\\'", "'") + m[3], text.strip())
    value = parsed(plain)
    if isinstance(value, Fault):
        raise Fault(f"a <functioncall> is {value}")
    return value


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as error:
            raise Fault(f"'system' lists functions, but that is not JSON ({error}): {short(text[at:])}") from None
        yield value
        at = end + len(text[end:]) - len(text[end:].lstrip(" \n,"))
