"""Exact match on word problems: decode an answer to each, and compare the numbers after `####`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from fastpeft.data.predictions import Answer, AnsweredRows
from fastpeft.tasks.base import Score
from fastpeft.tasks.causal_lm.answering import Decoding, answer_prompts
from fastpeft.tasks.causal_lm.generate import DecodeOptions, pass_at_k
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts
from fastpeft.tasks.math_word_problems.answers import final_number, same_answer
from fastpeft.tasks.math_word_problems.reading import Problems, problem_rows


@dataclass(frozen=True)
class ProblemSet:
    """Problems, and their tokens: a row for each, of which only the prompt is read."""

    problems: Problems
    encoded: EncodedPrompts

    def __len__(self) -> int:
        return len(self.problems)


def score_problems(
    model: nn.Module,
    problem_set: ProblemSet,
    decoding: Decoding,
    max_tokens: int,
    stop: Callable[[], bool] = lambda: False,
    shrink: Callable[[int, int], int] | None = None,
    mean_loss: Callable[[], float | None] | None = None,
) -> Score | None:
    """Share of problems whose greedy answer ends in the reference's number; None if `stop` said so before the end.

    `mean_loss` is asked for the loss where the pass that reads the prompts cannot have it; without it the loss is NaN.

    `more` holds shares of all problems: no_answer (no number behind `####`), cut (no end within max_new_tokens), pass@k
    where samples are drawn, and, if there are any, no_room (prompts that leave no room for an answer: they count as
    wrong, without one).
    """
    references, count = problem_set.problems.answer, len(problem_set)
    options, with_loss = DecodeOptions(decoding.max_new_tokens), mean_loss is not None
    answers = answer_prompts(model, problem_set.encoded, decoding, options, max_tokens, stop, shrink, with_loss)
    loss: float | None = math.nan
    if answers is not None and mean_loss is not None:
        loss = mean_loss() if answers.loss is None else answers.loss
    if answers is None or loss is None:
        return None
    no_answer = sum(final_number(texts[0]) is None for texts in answers.texts)
    more = {"no_answer": no_answer / count, "cut": answers.num_cut / count}
    if len(problem_set.encoded.unusable):
        more["no_room"] = len(problem_set.encoded.unusable) / count
    seconds, num_tokens = answers.seconds, answers.num_tokens
    sampling = decoding.sampling
    if sampling is not None:
        options = DecodeOptions(
            decoding.max_new_tokens, sampling.temperature, sampling.top_p, sampling.num_samples, sampling.seed
        )
        drawn = answer_prompts(model, problem_set.encoded, decoding, options, max_tokens, stop, shrink)
        if drawn is None:
            return None
        each = [
            pass_at_k(num_right, sampling.num_samples, sampling.k) for num_right in _num_right(drawn.texts, references)
        ]
        more[f"pass@{sampling.k}"] = sum(each) / count
        seconds, num_tokens = seconds + drawn.seconds, num_tokens + drawn.num_tokens
    exact_match = sum(_num_right(answers.texts, references)) / count
    answered = partial(_answered, problem_set.problems, [own[0] for own in answers.texts])
    return Score(exact_match, loss, count, more, decode_s=seconds, decode_tokens=num_tokens, answered=answered)


def _answered(problems: Problems, texts: list[str]) -> AnsweredRows:
    """With the greedy answers."""
    for row, text in zip(problem_rows(problems), texts, strict=True):
        reference = row.wanted[0]
        yield row, Answer(reference, text, correct=same_answer(text, reference))


def _num_right(texts: list[list[str]], references: list[str]) -> list[int]:
    return [sum(same_answer(text, ref) for text in own) for own, ref in zip(texts, references, strict=True)]
