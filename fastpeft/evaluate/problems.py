"""Exact match on word problems: decode an answer to each, compare the numbers behind `####`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fastpeft.data import EncodedProblems, Problems
from fastpeft.data.answers import final_number
from fastpeft.data.calculator import evaluate
from fastpeft.evaluate.generate import DecodeOptions, decode, pass_at_k
from fastpeft.evaluate.score import Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """Samples drawn beside the greedy answer, for pass@k."""

    k: int
    num_samples: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class ProblemSet:
    """Problems, and their tokens: a row for each, of which only the prompt is read."""

    problems: Problems
    encoded: EncodedProblems

    def __len__(self) -> int:
        return len(self.problems)


@dataclass(frozen=True)
class Decoding:
    """How answers are written."""

    tokenizer: PreTrainedTokenizerBase
    eos_tokens: tuple[int, ...]
    max_new_tokens: int
    calculator: bool
    """Results of calculator notes are computed, and not the model's."""
    sampling: Sampling | None = None


def score_problems(
    model: nn.Module,
    problem_set: ProblemSet,
    decoding: Decoding,
    max_tokens: int,
    stop: Callable[[], bool] = lambda: False,
    shrink: Callable[[int, int], int] | None = None,
    loss: float = math.nan,
) -> Score | None:
    """Share of problems whose greedy answer ends in the reference's number; None if `stop` said so before the end.

    A problem whose prompt leaves no room for an answer counts as wrong. `more` holds shares of all problems: no_answer
    (no number behind `####`), cut (no end within max_new_tokens), and pass@k where samples are drawn.
    """
    answers = _texts(model, problem_set, decoding, DecodeOptions(decoding.max_new_tokens), max_tokens, stop, shrink)
    if answers is None:
        return None
    correct = np.array([is_right(texts[0], ref) for texts, ref in zip(answers.texts, problem_set.problems.answer)])
    count = len(problem_set)
    more = {
        "no_answer": sum(final_number(texts[0]) is None for texts in answers.texts) / count,
        "cut": answers.num_cut / count,
    }
    seconds, num_tokens = answers.seconds, answers.num_tokens
    sampling = decoding.sampling
    if sampling is not None:
        options = DecodeOptions(
            decoding.max_new_tokens, sampling.temperature, sampling.top_p, sampling.num_samples, sampling.seed
        )
        drawn = _texts(model, problem_set, decoding, options, max_tokens, stop, shrink)
        if drawn is None:
            return None
        right = [
            sum(is_right(text, ref) for text in texts) for texts, ref in zip(drawn.texts, problem_set.problems.answer)
        ]
        each = [pass_at_k(num_right, sampling.num_samples, sampling.k) for num_right in right]
        more[f"pass@{sampling.k}"] = sum(each) / count
        seconds, num_tokens = seconds + drawn.seconds, num_tokens + drawn.num_tokens
    return Score(float(correct.mean()), loss, count, more, decode_s=seconds, decode_tokens=num_tokens)


def is_right(answer: str, reference: str) -> bool:
    found = final_number(answer)
    return found is not None and found == final_number(reference)


@dataclass
class _Answers:
    texts: list[list[str]]
    num_cut: int
    seconds: float
    num_tokens: int


def _texts(
    model: nn.Module,
    problem_set: ProblemSet,
    decoding: Decoding,
    options: DecodeOptions,
    max_tokens: int,
    stop: Callable[[], bool],
    shrink: Callable[[int, int], int] | None,
) -> _Answers | None:
    """Each problem's answers; an empty one where the prompt leaves no room."""
    encoded, tokenizer = problem_set.encoded, decoding.tokenizer
    unusable = set(encoded.unusable.tolist())
    asked = [row for row in range(len(problem_set)) if row not in unusable]
    texts = [[""] * options.num_samples for _ in range(len(problem_set))]
    if not asked:
        return _Answers(texts, 0, 0.0, 0)
    decoded = decode(
        model,
        [encoded.prompt(row) for row in asked],
        options=options,
        eos_tokens=decoding.eos_tokens,
        pad_token=encoded.pad_token,
        max_tokens=max_tokens,
        stop=stop,
        shrink=shrink,
        complete=evaluate if decoding.calculator else None,
        tokenizer=tokenizer if decoding.calculator else None,
    )
    if decoded is None:
        return None
    for row, answers in zip(asked, decoded.answers):
        texts[row] = tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
    num_cut = sum(not answers[0].ended for answers in decoded.answers)
    return _Answers(texts, num_cut, decoded.seconds, decoded.num_tokens)


@torch.no_grad()
def expected_decode_s(model: nn.Module, problem_set: ProblemSet, decoding: Decoding, max_tokens: int) -> float:
    """Seconds that an evaluation takes at most, from a batch in which no answer ends before `max_new_tokens`."""
    encoded = problem_set.encoded
    room = max(1, max_tokens // (int(encoded.prompt_lengths.max()) + decoding.max_new_tokens))
    rows = np.linspace(0, len(encoded) - 1, min(room, len(encoded))).astype(int)
    few = max(2, decoding.max_new_tokens // 16)
    seconds = []
    for num_new in (1, few):
        found = decode(
            model,
            [encoded.prompt(row) for row in rows],
            options=DecodeOptions(num_new),
            eos_tokens=(-1,),
            pad_token=encoded.pad_token,
            max_tokens=max_tokens,
        )
        assert found is not None
        seconds.append(found.seconds)
    step_s = max(0.0, seconds[1] - seconds[0]) / (few - 1)
    batch_s = seconds[0] + step_s * (decoding.max_new_tokens - 1)
    return batch_s * math.ceil(len(encoded) / len(rows))
