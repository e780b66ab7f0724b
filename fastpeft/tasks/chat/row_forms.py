"""The forms of rows of conversations and instructions, recognised by their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.config.schema import ColumnsConfig
from fastpeft.data.rows import DataError, Row, configured_columns
from fastpeft.tasks.chat.conversations import (
    Conversation,
    Role,
    RowFault,
    Turn,
    check_text,
    read_tools,
    read_turns,
)

_LISTS = {"messages": "messages", "conversations": "ShareGPT conversations"}
"""Column of a list of messages -> the form's name."""
_PAIRS = (
    ("prompt and completion", "prompt", "completion", None),
    ("Alpaca instructions", "instruction", "output", "input"),
    ("dolly instructions", "instruction", "response", "context"),
    ("questions and answers", "question", "answer", None),
    ("problems and solutions", "problem", "solution", None),
)
"""Form, what is asked, what is answered, and what it is about."""
_ONLY_IF_ASKED = ("question", "problem")
"""Such rows are word problems and much else: conversations only where dataset.task says so."""
_TOOLS, _SYSTEM = "tools", "system"


@dataclass(frozen=True)
class Form:
    name: str
    text: str
    """Column of the messages, or of what is asked."""
    answer: str | None = None
    """Column of what is answered; None where `text` holds all."""
    aside: str | None = None
    """Column of what an instruction is about."""
    tools: str | None = None
    system: str | None = None

    @property
    def columns(self) -> list[str]:
        return [name for name in (self.text, self.answer, self.aside, self.tools, self.system) if name is not None]

    def __str__(self) -> str:
        *first, last = [repr(name) for name in self.columns]
        return f"{self.name}, from the columns {', '.join(first)} and {last}" if first else f"{self.name}, from {last}"

    def read(self, row: Row) -> Conversation:
        """Raises RowFault."""
        if row.fault:
            raise RowFault(row.fault)
        values = row.values
        turns, num_context = self._turns(values)
        system = values.get(self.system) if self.system else None
        if system and turns and turns[0].role == Role.SYSTEM:
            if turns[0].text != system:
                raise RowFault("turn 1 is of the system, and says something else than the column 'system'")
        elif system:
            turns, num_context = [Turn(Role.SYSTEM, check_text(system, "column 'system'")), *turns], num_context + 1
        tools = read_tools(values.get(self.tools)) if self.tools else ()
        found = Conversation(tuple(turns), row.line, tools, num_context)
        if not found.answers:
            raise RowFault("has no turn of the assistant's, so that there is nothing to learn")
        return found

    def _turns(self, values: Mapping[str, Any]) -> tuple[list[Turn], int]:
        asked = values.get(self.text)
        if self.answer is None:
            return read_turns(asked, self.text), 0
        answer = values.get(self.answer)
        if isinstance(asked, (list, tuple)):
            context = read_turns(asked, self.text)
            said = [Turn(Role.ASSISTANT, answer)] if isinstance(answer, str) else read_turns(answer, self.answer)
            return [*context, *said], len(context)
        text, about = check_text(asked, f"column {self.text!r}"), values.get(self.aside) if self.aside else None
        if not text.strip():
            raise RowFault(f"column {self.text!r} is empty")
        parts = None
        if about is not None and check_text(about, f"column {self.aside!r}").strip():
            parts = text, about
            text = f"{text}\n\n{about}"
        return [
            Turn(Role.USER, text, parts=parts),
            Turn(Role.ASSISTANT, check_text(answer, f"column {self.answer!r}")),
        ], 0


def find_form(have: Sequence[str], asked: bool = True) -> Form | None:
    """By the usual names; None where there are none.

    Args:
        asked: dataset.task says that these are conversations.
    """
    found = next((Form(name, column) for column, name in _LISTS.items() if column in have), None)
    for name, text, answer, aside in () if found else _PAIRS:
        if {text, answer} <= set(have) and (asked or text not in _ONLY_IF_ASKED):
            found = Form(name, text, answer, aside if aside in have else None)
            break
    return None if found is None else _with_more(found, have)


def choose_form(source: str, have: Sequence[str], config: ColumnsConfig, known: Mapping[str, str]) -> Form:
    """As dataset.columns says, else as is known of the dataset, else by the usual names.

    Raises:
        DataError: a column that is not there; columns that tell nothing.
    """
    given = {key: column for key, column in known.items() if column in have}
    given |= configured_columns(source, have, config)
    usual = find_form(have)
    text = given.get("text", usual.text if usual else None)
    if text is None:
        lists, pairs = " or ".join(_LISTS), "; ".join(f"{text} and {answer}" for _, text, answer, _ in _PAIRS)
        raise DataError(
            f"{source}: where are the conversations? The columns are {', '.join(have)}; known are {lists}; {pairs}. "
            "Set dataset.columns.text to the column of the messages; or to that of the prompt, and "
            "dataset.columns.label to that of the answer"
        )
    is_usual = usual is not None and text == usual.text
    if "text" in given and "label" not in given and not (is_usual and usual is not None and usual.answer):
        return _with_more(Form(_LISTS.get(text, "messages"), text), have)
    answer = given.get("label", usual.answer if is_usual and usual is not None else None)
    aside = given.get("text_pair", usual.aside if is_usual and usual is not None else None)
    name = usual.name if usual is not None and (text, answer) == (usual.text, usual.answer) else "prompts and answers"
    return _with_more(Form(name, text, answer, aside), have)


def _with_more(form: Form, have: Sequence[str]) -> Form:
    tools, system = (name if name in have and name not in form.columns else None for name in (_TOOLS, _SYSTEM))
    return Form(form.name, form.text, form.answer, form.aside, tools, system)
