"""Exact match on word problems: decode an answer to each, compare the numbers behind `####`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fastpeft.data.predictions import Answer, AnsweredRows
from fastpeft.tasks.base import Score
from fastpeft.tasks.causal_lm.decode_batches import FASTEST, Caching, DecodeMethod, cache_columns
from fastpeft.tasks.causal_lm.generate import (
    CHECK_EVERY,
    Decoded,
    DecodeOptions,
    batches_of,
    decode,
    pass_at_k,
    reading_lengths,
)
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts
from fastpeft.tasks.math_word_problems.answers import final_number, same_answer
from fastpeft.tasks.math_word_problems.calculator import evaluate
from fastpeft.tasks.math_word_problems.reading import Problems, problem_rows

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
    encoded: EncodedPrompts

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
    method: DecodeMethod = FASTEST


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
    answers = _answers(model, problem_set, decoding, options, max_tokens, stop, shrink, with_loss)
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
        drawn = _answers(model, problem_set, decoding, options, max_tokens, stop, shrink)
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


@dataclass
class _Answers:
    texts: list[list[str]]
    num_cut: int
    seconds: float
    num_tokens: int
    loss: float | None = None
    """Nats a token of the references, where they were read."""


def _answers(
    model: nn.Module,
    problem_set: ProblemSet,
    decoding: Decoding,
    options: DecodeOptions,
    max_tokens: int,
    stop: Callable[[], bool],
    shrink: Callable[[int, int], int] | None,
    with_loss: bool = False,
) -> _Answers | None:
    """Each problem's answers; an empty one where the prompt leaves no room."""
    asked = _usable(problem_set.encoded)
    texts = [[""] * options.num_samples for _ in range(len(problem_set))]
    if not len(asked):
        return _Answers(texts, 0, 0.0, 0)
    decoded = _decode(model, problem_set, asked, decoding, options, max_tokens, stop, shrink, with_loss=with_loss)
    if decoded is None:
        return None
    num_labelled = int(problem_set.encoded.num_labelled.sum())
    loss = None if decoded.loss is None else decoded.loss / num_labelled
    for row, answers in zip(asked, decoded.answers, strict=True):
        tokens = [answer.tokens for answer in answers]
        texts[row] = decoding.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    num_cut = sum(not answers[0].ended for answers in decoded.answers)
    return _Answers(texts, num_cut, decoded.seconds, decoded.num_tokens, loss)


def _usable(encoded: EncodedPrompts) -> np.ndarray:
    return np.setdiff1d(np.arange(len(encoded)), encoded.unusable)


def _decode(
    model: nn.Module,
    problem_set: ProblemSet,
    rows: np.ndarray,
    decoding: Decoding,
    options: DecodeOptions,
    max_tokens: int,
    stop: Callable[[], bool],
    shrink: Callable[[int, int], int] | None = None,
    eos_tokens: tuple[int, ...] | None = None,
    with_loss: bool = False,
) -> Decoded | None:
    encoded = problem_set.encoded
    with_loss = with_loss and reads_references(problem_set, decoding)
    return decode(
        model,
        [encoded.prompt(row) for row in rows],
        options=options,
        eos_tokens=decoding.eos_tokens if eos_tokens is None else eos_tokens,
        pad_token=encoded.pad_token,
        max_tokens=max_tokens,
        stop=stop,
        shrink=shrink,
        method=decoding.method,
        complete=evaluate if decoding.calculator else None,
        tokenizer=decoding.tokenizer if decoding.calculator else None,
        references=[encoded.answer(row) for row in rows] if with_loss else (),
    )


def reads_references(problem_set: ProblemSet, decoding: Decoding) -> bool:
    """The pass that reads the prompts has the references' loss: every prompt is read, and directly."""
    return decoding.method.caching == Caching.DIRECT and not len(problem_set.encoded.unusable)


def largest_batch(problem_set: ProblemSet, decoding: Decoding, max_tokens: int) -> tuple[int, int]:
    """Rows and columns of the largest batch that is decoded."""
    rows, lengths, _ = _largest_batch(problem_set, decoding, max_tokens)
    return len(rows), int(cache_columns(lengths.max(), decoding.max_new_tokens))


def try_largest_batch(model: nn.Module, problem_set: ProblemSet, decoding: Decoding, max_tokens: int) -> None:
    """Decode the largest batch up to the first look at which rows have ended: its cache has all its columns by then."""
    rows, lengths, _ = _largest_batch(problem_set, decoding, max_tokens)
    options, looks = DecodeOptions(decoding.max_new_tokens), iter((False,))
    limit = len(rows) * int(cache_columns(lengths.max(), options.max_new_tokens))
    _decode(model, problem_set, rows, decoding, options, limit, lambda: next(looks, True), eos_tokens=(-1,))


def expected_decode_s(model: nn.Module, problem_set: ProblemSet, decoding: Decoding, max_tokens: int) -> float:
    """Seconds that decoding takes at most, from the first steps of the largest batch: as if all batches were like it,
    and no answer ended before `max_new_tokens`. RuntimeError where the memory is short.
    """
    rows, lengths, num_batches = _largest_batch(problem_set, decoding, max_tokens)
    options, device = DecodeOptions(decoding.max_new_tokens), next(model.parameters()).device

    def times() -> list[float]:
        """When it begins, before the batch, after each CHECK_EVERY steps up to two, and at the end."""
        noted = [time.perf_counter()]

        def note() -> bool:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            noted.append(time.perf_counter())
            return len(noted) > 3

        limit = len(rows) * int(cache_columns(lengths.max(), options.max_new_tokens))
        _decode(model, problem_set, rows, decoding, options, limit, note, eos_tokens=(-1,), with_loss=True)
        return [*noted, time.perf_counter()]

    times()  # the first pass builds kernels and buffers
    began, *noted, end = times()
    if len(noted) < 3:  # there are no more steps than these
        return end - began + (num_batches - 1) * (end - noted[0])
    step_s = (noted[2] - noted[1]) / CHECK_EVERY
    batch_s = noted[1] - noted[0] + step_s * (options.max_new_tokens - CHECK_EVERY)
    return noted[0] - began + num_batches * batch_s


def _largest_batch(problem_set: ProblemSet, decoding: Decoding, max_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(its problems, the lengths that they are put side by side by, how many batches there are)."""
    encoded = problem_set.encoded
    usable = _usable(encoded)
    read = encoded.num_labelled[usable] if reads_references(problem_set, decoding) else np.empty(0, np.int64)
    lengths = reading_lengths(encoded.prompt_lengths[usable], read, decoding.max_new_tokens)
    batches = batches_of(lengths, decoding.max_new_tokens, max_tokens, decoding.method)
    largest = max(batches, key=lambda rows: len(rows) * cache_columns(lengths[rows].max(), decoding.max_new_tokens))
    return usable[largest], lengths[largest], len(batches)
