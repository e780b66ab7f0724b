"""A language model's first training row, with its trained tokens marked, and its answers to prompts over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.text import Text

from fastpeft.runs.events import Event
from fastpeft.tui.format import printable

READ, LEARNED, HEADING = "dim", "bold #009E73", "bold"
MOST_SETS = 64
"""Number of the newest answer sets that are kept."""
_LONGEST = 2000
"""Most characters shown of a text."""

Pieces = tuple[tuple[str, bool], ...]
"""(text, whether it is trained on)."""


class Answered(NamedTuple):
    prompt: str
    answer: str
    reference: str


class AnswerSet(NamedTuple):
    """Answers to the same few prompts at one evaluation."""

    step: int
    split: str
    answers: tuple[Answered, ...]


def read_example(event: Event) -> Pieces:
    """Parse an `example` event. Raises KeyError, TypeError or ValueError for a malformed one."""
    return tuple((_text(text), bool(is_learned)) for text, is_learned in event["pieces"])


def read_answers(event: Event) -> AnswerSet:
    """Parse a `samples` event. Raises KeyError, TypeError or ValueError for a malformed one."""
    answers = (Answered(*(_text(one[key]) for key in Answered._fields)) for one in event["samples"])
    return AnswerSet(int(event["step"]), _text(event["split"]), tuple(answers))


def answers_text(example: Pieces | None, sets: Sequence[AnswerSet]) -> Text:
    """The first training row, and below it each prompt with its answers, newest first."""
    text = Text()
    if example:
        text.append("the first training row: what is dim is read, what is bright is learned\n\n", HEADING)
        for part, is_learned in example:
            text.append(part, LEARNED if is_learned else READ)
        text.append("\n\n")
    latest = {one.split: one for one in sets}
    for split, last in latest.items():
        text.append(f"answers to prompts of the {split} split\n", HEADING)
        for place, asked in enumerate(last.answers):
            text.append(f"\n{asked.prompt}\n", READ)
            for one in reversed(sets):
                if one.split == split and place < len(one.answers):
                    text.append(f"{one.step:>9,} ", READ)
                    text.append(f"{one.answers[place].answer or '(nothing)'}\n", LEARNED if one is last else "")
            text.append(f"   wanted {asked.reference}\n", READ)
        text.append("\n")
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return printable(value[:_LONGEST])
