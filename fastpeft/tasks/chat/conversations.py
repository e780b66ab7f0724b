"""Conversion of a row of any supported form to a conversation for a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from fastpeft.data.rows import HALF_PAIR, is_unicode


class RowFault(ValueError):
    """What is wrong with a row, in words."""


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


CALL = "function_call"
"""Of ShareGPT: a turn of the assistant's that is nothing but calls of tools."""
ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), Role.SYSTEM),
    **dict.fromkeys(("user", "human", "prompter"), Role.USER),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", CALL, "tool_call"), Role.ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response", "ipython"), Role.TOOL),
}
"""What data call those who speak -> what templates call them."""


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str
    reasoning: str = ""
    """What was thought before the text was said, where the row holds it by itself."""
    calls: tuple[dict[str, Any], ...] = ()
    """Of tools, as templates take them."""
    parts: tuple[str, str] | None = None
    """Of an instruction: it, and what it is about. The text is both."""
    result_of: tuple[tuple[str, str], ...] = ()
    """Of a tool's result: which tool's and which call's, as `name` and `tool_call_id`."""

    @property
    def is_answer(self) -> bool:
        """Something that a model can be trained to say. Calls of tools are context."""
        return self.role == Role.ASSISTANT and not self.calls

    @cached_property
    def message(self) -> dict[str, Any]:
        found: dict[str, Any] = {"role": str(self.role), "content": self.text}
        found |= {"reasoning_content": self.reasoning} if self.reasoning else {}
        found |= {"tool_calls": list(self.calls)} if self.calls else {}
        found |= dict(self.result_of)
        return found | (dict(zip(("instruction", "input"), self.parts)) if self.parts else {})


@dataclass(frozen=True)
class Conversation:
    turns: tuple[Turn, ...]
    line: int
    """Of the row."""
    tools: tuple[dict[str, Any], ...] = ()
    """That the assistant may call."""
    num_context: int = 0
    """So many turns are read and never learned."""

    @cached_property
    def answers(self) -> list[int]:
        """Which turns may be learned."""
        return [i for i, turn in enumerate(self.turns) if turn.is_answer and i >= self.num_context]

    def messages(self, end: int | None = None) -> list[dict[str, Any]]:
        """The turns before `end`."""
        return [turn.message for turn in self.turns[:end]]

    @cached_property
    def key(self) -> str:
        """All that is rendered, as one text."""
        return json.dumps([self.messages(), list(self.tools), self.num_context], ensure_ascii=True, sort_keys=True)


def read_turns(items: Any, column: str) -> list[Turn]:
    """Of a list of messages: role and content, or ShareGPT's from and value.

    Raises:
        RowFault: what is no list of messages, a role that is not known, content that is no text.
    """
    if isinstance(items, str):
        items = _parsed(items, f"column {column!r}")
    if not isinstance(items, (list, tuple)):
        raise RowFault(f"column {column!r} holds {items!r:.60}, expected a list of messages")
    return [_turn(item, i) for i, item in enumerate(items, 1)]


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """A list of tools, or JSON of one; each is wrapped as templates expect it."""
    if isinstance(value, str):
        value = _parsed(value, "column 'tools'") if value.strip() else None
    if not value:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault(f"column 'tools' holds {value!r:.60}, expected a list of tools")
    tools = [without_gaps(tool) for tool in value]
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def check_text(text: Any, what: str) -> str:
    """`text`, where it can be used. Raises RowFault."""
    if not isinstance(text, str):
        raise RowFault(f"{what} is {text!r:.60}, expected text")
    if not is_unicode(text):
        raise RowFault(f"{what} {HALF_PAIR}")
    return text


def without_gaps(value: Any) -> Any:
    """Parquet fills the keys that other rows have with None."""
    if isinstance(value, dict):
        return {key: without_gaps(held) for key, held in value.items() if held is not None}
    return [without_gaps(held) for held in value] if isinstance(value, (list, tuple)) else value


def _turn(item: Any, number: int) -> Turn:
    if not isinstance(item, dict):
        raise RowFault(f"turn {number} is {item!r:.60}, expected an object with role and content")
    name = item.get("role", item.get("from"))
    if not isinstance(name, str) or name.lower() not in ROLES:
        known = ", ".join(ROLES)
        raise RowFault(f"turn {number} has the role {name!r:.40}, which is none of {known}")
    role, content = ROLES[name.lower()], item.get("content", item.get("value"))
    old = item.get("function_call")
    calls: Any = item.get("tool_calls") or ([old] if old else ())
    if not isinstance(calls, (list, tuple)):
        raise RowFault(f"turn {number} has the tool calls {calls!r:.60}, expected a list")
    if name.lower() in (CALL, "tool_call"):
        parsed = _parsed(content, f"turn {number}, a call of a tool,")
        calls, content = parsed if isinstance(parsed, list) else [parsed], ""
    text = _text(content if content is not None or not calls else "", number)
    reasoning = next((item[key] for key in ("reasoning_content", "thinking", "reasoning") if item.get(key)), "")
    return Turn(
        role,
        text,
        check_text(reasoning, f"the reasoning of turn {number}"),
        tuple(_call(call, number) for call in calls),
        result_of=tuple(_result_of(item)) if role == Role.TOOL else (),
    )


def _result_of(item: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("name", "tool_call_id"):
        if isinstance(item.get(key), str) and is_unicode(item[key]):
            yield key, item[key]


def _text(content: Any, number: int) -> str:
    """Of a text, or of a list of parts that are texts."""
    if isinstance(content, (list, tuple)):
        return "".join(_parts(content, number))
    return check_text(content, f"turn {number}'s content")


def _parts(content: Sequence[Any], number: int) -> Iterator[str]:
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise RowFault(f"turn {number} has a part of the type {kind!r:.40}; only texts can be trained on")
        yield check_text(part.get("text") if isinstance(part, dict) else part, f"a part of turn {number}")


def _call(call: Any, number: int) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowFault(f"turn {number} calls a tool by {call!r:.60}, expected its name and arguments")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"the arguments of turn {number}'s call")
    given = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return given | {"type": "function", "function": {"name": inner["name"], "arguments": without_gaps(arguments)}}


def _parsed(text: Any, what: str) -> Any:
    try:
        return json.loads(check_text(text, what))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RowFault):
            raise
        raise RowFault(f"{what} is no JSON ({error})") from None
