"""Spans of the assistant's turns in a rendered conversation, found by rendering the conversation up to each answer.

At inference a model reads what the template renders before an answer, with the words that open the assistant's turn,
and writes the rest up to the token that ends the turn. So an answer is learned behind exactly that text. Where the
rendering of a whole conversation has every answer behind its own, it is one row. Where the template writes earlier
turns otherwise once others follow, as those do that drop earlier reasoning, each answer is a row of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from fastpeft.tasks.chat.conversations import Conversation, Role, RowFault, Turn
from fastpeft.tasks.chat.templates import ChatTemplate, Rendering

TrainOn = Literal["assistant", "last", "all"]
Tools = Sequence[dict[str, Any]]

_SENTINEL = "qzxanswerxzq"
_SPACE = re.compile(r"\s+")
_THOUGHT = "</think>"
_SHOWN = 40


class Rendered(NamedTuple):
    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters to predict, from and to, in order."""


@dataclass(frozen=True)
class RenderedConversation:
    rows: tuple[Rendered, ...]
    """One; or one an answer, where the template writes earlier turns otherwise later."""
    lead: str
    """What the template has the assistant write before the last answer, such as an empty thought."""
    trimmed: bool
    """It took white space from the ends of an answer."""
    stripped: bool
    """The tokenizer will take some."""


class _Opening(NamedTuple):
    answered: Rendering
    """Of the turns up to an answer, with it."""
    prompt: Rendering
    """Of those before it, for the assistant to go on from."""


class _Answer(NamedTuple):
    prompt: str
    text: str
    lead: str
    trimmed: bool


class Renderer:
    """Of many conversations in one template."""

    def __init__(self, template: ChatTemplate, train_on: TrainOn) -> None:
        self.template, self.train_on = template, train_on
        self._frames: dict[tuple[str, str], None] = {}
        """(what stands before an answer, what stands behind it), as seen until now."""
        self._ends: dict[str, int] = {}
        """By what stands behind an answer, where in it the answer's last token ends: some models have thousands."""

    def render_all(self, rows: Sequence[Conversation]) -> list[RenderedConversation | RowFault]:
        """`render` of each, or why not. Most of it is done for all of them in two calls of the template."""
        asked = [(row, i) for row in rows if not row.tools for i in self._learned(row)]
        ahead: dict[tuple[int, int], _Opening] = {}
        with suppress(RowFault):  # of one of them: then each is rendered by itself
            texts = self.template.render_all([row.messages(i + 1) for row, i in asked])
            prompts = self.template.render_all([row.messages(i) for row, i in asked], prompt=True)
            ahead = {(id(row), i): _Opening(*found) for (row, i), *found in zip(asked, texts, prompts, strict=True)}
        return [self._or_fault(row, ahead) for row in rows]

    def _or_fault(
        self, row: Conversation, ahead: Mapping[tuple[int, int], _Opening]
    ) -> RenderedConversation | RowFault:
        try:
            return self.render(row, ahead)
        except RowFault as fault:
            return fault

    def render(
        self, row: Conversation, ahead: Mapping[tuple[int, int], _Opening] = MappingProxyType({})
    ) -> RenderedConversation:
        """
        Args:
            ahead: what is rendered already, by the row's identity and the turn.

        Raises:
            RowFault: a row that the template does not write as it stands, with the turn.
        """
        learned = self._learned(row)
        self._check_control_tokens(row)
        answers = [self._answer(row, i, ahead.get((id(row), i))) for i in learned]
        last = answers[-1]
        whole = last.prompt + last.text
        told = (
            last.lead,
            any(answer.trimmed for answer in answers),
            any(self.template.takes_space(answer.prompt, answer.text) for answer in answers),
        )
        if self.train_on == "all" and learned[-1] < len(row.turns) - 1:
            whole = self.template.render(row.messages(), row.tools)[0]
            self._check_context(row, row.turns, whole)
        else:
            self._check_context(row, row.turns[: learned[-1]], last.prompt)
        if self.train_on == "all":
            return RenderedConversation((Rendered(whole, ((0, len(whole)),)),), *told)
        if all(whole.startswith(answer.prompt + answer.text) for answer in answers):
            return RenderedConversation((Rendered(whole, tuple(map(_span, answers))),), *told)
        return RenderedConversation(tuple(Rendered(a.prompt + a.text, (_span(a),)) for a in answers), *told)

    def _learned(self, row: Conversation) -> list[int]:
        return row.answers[-1:] if self.train_on == "last" else row.answers

    # ---- one answer ------------------------------------------------------------------------

    def _answer(self, row: Conversation, i: int, opening: _Opening | None) -> _Answer:
        """Turn i, behind what is rendered before it, with its end."""
        turn, before, tools = row.turns[i], row.messages(i), row.tools
        with _place(i):
            text, start = self._opened(opening or self._opening(turn.message, before, tools))
            prompt, said = text[:start], text[start:]
            lead, tail, trimmed = self._frame(turn, before, tools, said)
            end = self._end(tail)
        return _Answer(prompt, said[: len(said) - len(tail) + end], lead, trimmed)

    def _opening(self, message: dict[str, Any], before: list[dict[str, Any]], tools: Tools) -> _Opening:
        return _Opening(
            self.template.render([*before, message], tools), self.template.render(before, tools, prompt=True)
        )

    def _opened(self, opening: _Opening) -> tuple[str, int]:
        """(the text with the answer, where the assistant begins to write it).

        That is where the template marks what is generated; without marks, where the rendering for a prompt ends.
        """
        (text, marks), (prompt, _) = opening
        if not prompt:
            raise RowFault(
                f"{self.template} writes nothing before it, so that a model would have nothing to go on from"
            )
        if text.startswith(prompt):
            own = [start for start, end in marks if end > len(prompt)]
            return text, max(len(prompt), min(own, default=0))
        if marks:
            return text, marks[-1][0]
        at = next(k for k, (a, b) in enumerate(zip(f"{text}\0", f"{prompt}\1")) if a != b)
        raise RowFault(
            f"{self.template} opens an answer with {prompt[at:][:_SHOWN]!r}, and writes {text[at:][:_SHOWN]!r} in its "
            "place once it is given: no row would be what the model reads"
        )

    def _frame(self, turn: Turn, before: list[dict[str, Any]], tools: Tools, said: str) -> tuple[str, str, bool]:
        """(what stands before the answer, what behind it, whether the template trimmed it)."""
        found = self._known_frame(turn, said)
        if found is None:
            self._learn_frame(before, tools)
            found = self._known_frame(turn, said)
        if found is None:
            raise RowFault(f"{self.template} writes it as {said[:_SHOWN]!r}, which is not what it says")
        return found

    def _known_frame(self, turn: Turn, said: str) -> tuple[str, str, bool] | None:
        text = turn.text
        for trimmed, own in enumerate(dict.fromkeys((text, text.strip()))):
            if turn.reasoning:
                break
            for lead, tail in self._frames:
                if said == lead + own + tail:
                    return lead, tail, bool(trimmed)
        if not turn.reasoning and _THOUGHT not in text:
            return None
        thought = _squeezed(turn.reasoning)
        for _, tail in self._frames:  # templates take a thought apart, and set the space round it themselves
            inner = _squeezed(said.removesuffix(tail))
            if not said.endswith(tail):
                continue
            if not thought and inner == _squeezed(text):
                return "", tail, False
            if thought and inner.endswith(_squeezed(text)) and thought in inner.removesuffix(_squeezed(text)):
                return "", tail, False
        return None

    def _learn_frame(self, before: list[dict[str, Any]], tools: Tools) -> None:
        """What the template puts round an answer here."""
        message = Turn(Role.ASSISTANT, _SENTINEL).message
        text, start = self._opened(self._opening(message, before, tools))
        lead, there, tail = text[start:].partition(_SENTINEL)
        if there:
            self._frames |= {(lead, tail): None, ("", tail): None}

    def _end(self, tail: str) -> int:
        """Where in the tail the token ends that ends the answer."""
        if tail not in self._ends:
            found = [(tail.index(token), -len(token)) for token in self.template.ends if token in tail]
            if not found:
                raise RowFault(
                    f"{self.template} puts no token behind an answer that ends it, so that a model trained on it would "
                    "never stop; take another dataset.template"
                )
            at, negative = min(found)
            self._ends[tail] = at - negative
        return self._ends[tail]

    # ---- the rest --------------------------------------------------------------------------

    def _check_control_tokens(self, row: Conversation) -> None:
        for i, turn in enumerate(row.turns):
            token = self.template.first_end(turn.text) or self.template.first_end(turn.reasoning)
            if token is not None:
                raise RowFault(f"turn {i + 1} holds {token!r}, which the tokenizer takes for the end of something")

    def _check_context(self, row: Conversation, turns: Sequence[Turn], text: str) -> None:
        """The template has left nothing out, as it does with roles and tools that it does not know."""
        squeezed: str | None = None
        for i, turn in enumerate(turns):
            told = turn.text.rpartition(_THOUGHT)[2].strip() if turn.role == Role.ASSISTANT else turn.text.strip()
            if told in text or (turn.parts is not None and all(part.strip() in text for part in turn.parts)):
                continue
            squeezed = squeezed or _squeezed(text)
            if not any(_squeezed(form) in squeezed for form in (told, json.dumps(told)[1:-1], *_unicode_form(told))):
                raise RowFault(f"{self.template} leaves turn {i + 1}, of the role {turn.role}, out{_FIX}")
        for i in (i for i, turn in enumerate(turns) if turn.calls):
            without = {key: value for key, value in turns[i].message.items() if key != "tool_calls"}
            before, name = row.messages(i), turns[i].calls[0]["function"]["name"]
            if self._same([*before, turns[i].message], row.tools, [*before, without], row.tools):
                raise RowFault(f"{self.template} leaves the call of {name!r} in turn {i + 1} out{_FIX}")
        messages = row.messages(len(turns))
        if row.tools and self._same(messages, row.tools, messages, ()):
            raise RowFault(f"{self.template} leaves the tools out{_FIX}")

    def _same(self, one: list[dict[str, Any]], tools: Tools, other: list[dict[str, Any]], other_tools: Tools) -> bool:
        return self.template.render(one, tools)[0] == self.template.render(other, other_tools)[0]


_FIX = "; take a template that writes it, such as dataset.template=chatml"


@contextmanager
def _place(i: int) -> Iterator[None]:
    """Names the turn in a fault."""
    try:
        yield
    except RowFault as fault:
        raise RowFault(f"turn {i + 1}: {fault}") from fault.__cause__


def _span(answer: _Answer) -> tuple[int, int]:
    return len(answer.prompt), len(answer.prompt) + len(answer.text)


def _squeezed(text: str) -> str:
    return _SPACE.sub("", text)


def _unicode_form(text: str) -> Iterator[str]:
    """As JSON writes it without escapes."""
    yield json.dumps(text, ensure_ascii=False)[1:-1]
