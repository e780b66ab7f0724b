"""Scores on held-out conversations: token accuracy, and the decoded answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from fastpeft.data.fingerprint import ReadRow
from fastpeft.data.predictions import Answer
from fastpeft.tasks.base import Sample
from fastpeft.tasks.causal_lm.loss import TokenScores
from fastpeft.tasks.chat.boxed import MathVerifier, last_boxed
from fastpeft.tasks.chat.chat_rows import ChatRows
from fastpeft.tasks.chat.reading import Conversations, conversation_rows, last_asked
from fastpeft.tasks.math_word_problems.answers import final_number, same_answer

Reading = Literal["boxed", "number"]
"""How an answer is read."""

_MOSTLY = 0.9
"""Share of the references that have an answer to read."""


def token_answers(chats: Conversations, encoded: ChatRows, scores: TokenScores) -> Iterator[tuple[ReadRow, Answer]]:
    """Of each conversation that was scored, how many of its labelled tokens are right."""
    correct, labelled = (
        np.bincount(encoded.sources, weights=each, minlength=len(chats)).astype(int)
        for each in (scores.correct, scores.labelled)
    )
    for i, row in enumerate(conversation_rows(chats)):
        right, count = int(correct[i]), int(labelled[i])
        yield row, Answer(count, right, counts=(right, count, count))


# ---- answers ---------------------------------------------------------------------------------


def reading_of(setting: str, references: Sequence[str]) -> tuple[Reading | None, list[str]]:
    """How answers are read, and what to tell the user.

    Raises:
        UserError: boxed answers are to be compared, and math-verify is not there.
    """
    if setting == "off" or not references:
        return None, []
    shares = {
        "boxed": sum(last_boxed(text) is not None for text in references) / len(references),
        "number": sum(final_number(text) is not None for text in references) / len(references),
    }
    if setting != "auto":
        reading: Reading = "boxed" if setting == "boxed" else "number"
        if reading == "boxed":
            MathVerifier.require()
        return reading, [
            f"answers are compared by {_WORDS[reading]}, which {shares[reading]:.0%} of the references have"
        ]
    found = next((name for name, share in shares.items() if share >= _MOSTLY), None)
    if found is None:
        return None, []
    if found == "boxed" and not MathVerifier.is_installed():
        return None, [
            "the references have boxed answers, but the package math-verify, which compares them, is not installed: no "
            "exact match. pip install 'fastpeft[math]'"
        ]
    reading = "boxed" if found == "boxed" else "number"
    return reading, [f"answers are decoded, and compared by {_WORDS[reading]}"]


_WORDS = {"boxed": "their last \\boxed", "number": "the number behind ####"}


def judge(answers: Sequence[str], references: Sequence[str], reading: Reading) -> tuple[list[bool], dict[str, float]]:
    """(which are right; the shares of all that hold no answer, and of those that took too long to compare, if any)."""
    pairs = list(zip(answers, references, strict=True))
    if reading == "number":
        lacking = sum(final_number(answer) is None for answer in answers)
        return [same_answer(answer, reference) for answer, reference in pairs], {"no_answer": lacking / len(pairs)}
    found = [(last_boxed(answer), last_boxed(reference)) for answer, reference in pairs]
    with MathVerifier() as verifier:
        right = [verifier.same(answer, reference) for answer, reference in found]
        late = verifier.num_late
    shares = {"no_answer": sum(answer is None for answer, _ in found) / len(pairs)}
    return right, shares | ({"late": late / len(pairs)} if late else {})


def samples_of(chats: Conversations, answers: Sequence[str], references: Sequence[str]) -> tuple[Sample, ...]:
    return tuple(
        Sample(last_asked(row), answer, reference) for row, answer, reference in zip(chats.rows, answers, references)
    )
