"""Held-out prompts for a model to answer: each conversation up to its last answer, rendered as for inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastpeft.data.rows import NUM_NAMED
from fastpeft.data.tokenise import Ragged
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts
from fastpeft.tasks.chat.answer_spans import Renderer
from fastpeft.tasks.chat.answer_tokens import token_rows
from fastpeft.tasks.chat.conversations import Conversation, Role, RowFault, Turn
from fastpeft.tasks.chat.reading import Conversations
from fastpeft.tasks.chat.templates import ChatTemplate


@dataclass(frozen=True)
class PromptSet:
    """Parallel, one a conversation."""

    chats: Conversations
    encoded: EncodedPrompts
    ends: tuple[int, ...]
    """Tokens that end an answer."""

    def __len__(self) -> int:
        return len(self.chats)

    @property
    def references(self) -> list[str]:
        return [row.turns[row.answers[-1]].text for row in self.chats.rows]


def encode_chat_prompts(
    chats: Conversations, template: ChatTemplate, max_length: int, max_prompt: int, pad_token: int
) -> PromptSet:
    """Conversations that the template does not take are left out, as they are of what is scored otherwise.

    Args:
        max_length: most tokens of a prompt and its reference; what is longer is cut.
        max_prompt: a longer one leaves no room for an answer.
    """
    renderer, kept, rows, lengths, ends = Renderer(template, "last"), [], [], [], set()
    for i, row in enumerate(chats.rows):
        try:
            tokens, labelled = token_rows([renderer.render(row).rows[-1]], template)[0][-1]
        except RowFault:
            continue
        kept.append(i)
        rows.append(tokens[:max_length])
        lengths.append(labelled.index(True))
        ends.add(tokens[-1])
    flat, found = Ragged.of(rows), chats.pick(kept)
    prompt_lengths = np.array(lengths, dtype=np.int64)
    unusable = np.flatnonzero(prompt_lengths > min(max_prompt, max_length - 1))
    names = ", ".join(f"{found.name_row(i)} ({lengths[i]:,} tokens)" for i in unusable[:NUM_NAMED])
    note = f"{len(unusable):,} prompts leave no room for an answer and count as wrong: {names}"
    return PromptSet(
        found,
        EncodedPrompts(
            tokens=flat.flat,
            offsets=flat.offsets,
            pad_token=pad_token,
            max_length=max_length,
            prompt_lengths=np.minimum(prompt_lengths, flat.lengths),
            rows=np.arange(len(kept)),
            unusable=unusable,
            notes=(note,) if len(unusable) else (),
        ),
        tuple(sorted(ends)),
    )


def prompt_tokens(messages: Sequence[Mapping[str, str]], template: ChatTemplate) -> list[int]:
    """What a model is given to answer the last of the messages.

    Raises:
        RowFault: messages that the template does not take.
    """
    text, _ = template.render([dict(message) for message in messages], prompt=True)
    return template.tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def ending_token(template: ChatTemplate) -> int | None:
    """The token that ends an answer; None where the template does not take a question and an answer."""
    plain = Conversation((Turn(Role.USER, "a"), Turn(Role.ASSISTANT, "b")), 1)
    try:
        return token_rows([Renderer(template, "last").render(plain).rows[-1]], template)[0][-1].tokens[-1]
    except RowFault:
        return None
