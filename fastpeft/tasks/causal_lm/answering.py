"""Answers to the prompts of a set, decoded in batches: the texts, the memory and the time of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fastpeft.tasks.causal_lm.decode_batches import FASTEST, Caching, DecodeMethod, cache_columns
from fastpeft.tasks.causal_lm.generate import (
    CHECK_EVERY,
    Decoded,
    DecodeOptions,
    batches_of,
    decode,
    reading_lengths,
)
from fastpeft.tasks.causal_lm.prompts import EncodedPrompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """Settings of the samples for pass@k, which are drawn in addition to the greedy answer."""

    k: int
    num_samples: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding."""

    tokenizer: PreTrainedTokenizerBase
    eos_tokens: tuple[int, ...]
    max_new_tokens: int
    complete: Callable[[str], str | None] | None = None
    """Computes the results of calculator notes, in place of the model."""
    sampling: Sampling | None = None
    method: DecodeMethod = FASTEST


@dataclass
class Answers:
    """Answers to N prompts."""

    texts: list[list[str]]
    """The samples of each prompt."""
    num_cut: int
    """Number of prompts whose first answer did not end within max_new_tokens."""
    seconds: float
    num_tokens: int
    loss: float | None = None
    """Mean loss per token of the references, in nats; None if they were not read."""


def answer_prompts(
    model: nn.Module,
    encoded: EncodedPrompts,
    decoding: Decoding,
    options: DecodeOptions,
    max_tokens: int,
    stop: Callable[[], bool],
    shrink: Callable[[int, int], int] | None,
    with_loss: bool = False,
) -> Answers | None:
    """Answers to all prompts, empty where the prompt leaves no room; None if `stop` ended it early.

    Args:
        with_loss: also return the references' loss, if the prefill can compute it.
    """
    asked = _usable(encoded)
    texts = [[""] * options.num_samples for _ in range(len(encoded))]
    if not len(asked):
        return Answers(texts, 0, 0.0, 0)
    decoded = _decode(model, encoded, asked, decoding, options, max_tokens, stop, shrink, with_loss=with_loss)
    if decoded is None:
        return None
    loss = None if decoded.loss is None else decoded.loss / int(encoded.num_labelled.sum())
    for row, answers in zip(asked, decoded.answers, strict=True):
        tokens = [answer.tokens for answer in answers]
        texts[row] = decoding.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    num_cut = sum(not answers[0].ended for answers in decoded.answers)
    return Answers(texts, num_cut, decoded.seconds, decoded.num_tokens, loss)


def _usable(encoded: EncodedPrompts) -> np.ndarray:
    return np.setdiff1d(np.arange(len(encoded)), encoded.unusable)


def _decode(
    model: nn.Module,
    encoded: EncodedPrompts,
    rows: np.ndarray,
    decoding: Decoding,
    options: DecodeOptions,
    max_tokens: int,
    stop: Callable[[], bool],
    shrink: Callable[[int, int], int] | None = None,
    eos_tokens: tuple[int, ...] | None = None,
    with_loss: bool = False,
) -> Decoded | None:
    with_loss = with_loss and reads_references(encoded, decoding)
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
        complete=decoding.complete,
        tokenizer=decoding.tokenizer if decoding.complete is not None else None,
        references=[encoded.answer(row) for row in rows] if with_loss else (),
    )


def reads_references(encoded: EncodedPrompts, decoding: Decoding) -> bool:
    """Whether the prefill can compute the references' loss: it reads every prompt, by the direct method."""
    return decoding.method.caching == Caching.DIRECT and not len(encoded.unusable)


def largest_batch(encoded: EncodedPrompts, decoding: Decoding, max_tokens: int) -> tuple[int, int]:
    """Rows and columns of the largest batch in decoding."""
    rows, lengths, _ = _largest_batch(encoded, decoding, max_tokens)
    return len(rows), int(cache_columns(lengths.max(), decoding.max_new_tokens))


def try_largest_batch(model: nn.Module, encoded: EncodedPrompts, decoding: Decoding, max_tokens: int) -> None:
    """Decode the largest batch up to the first check for ended rows, when its cache has its full size."""
    rows, lengths, _ = _largest_batch(encoded, decoding, max_tokens)
    options, looks = DecodeOptions(decoding.max_new_tokens), iter((False,))
    limit = len(rows) * int(cache_columns(lengths.max(), options.max_new_tokens))
    _decode(model, encoded, rows, decoding, options, limit, lambda: next(looks, True), eos_tokens=(-1,))


def expected_decode_s(model: nn.Module, encoded: EncodedPrompts, decoding: Decoding, max_tokens: int) -> float:
    """Seconds that decoding takes at most, from the first steps of the largest batch: as if all batches were like it,
    and no answer ended before `max_new_tokens`. RuntimeError where the memory is short.
    """
    rows, lengths, num_batches = _largest_batch(encoded, decoding, max_tokens)
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
        _decode(model, encoded, rows, decoding, options, limit, note, eos_tokens=(-1,), with_loss=True)
        return [*noted, time.perf_counter()]

    times()  # the first pass builds kernels and buffers
    began, *noted, end = times()
    if len(noted) < 3:  # there are no more steps than these
        return end - began + (num_batches - 1) * (end - noted[0])
    step_s = (noted[2] - noted[1]) / CHECK_EVERY
    batch_s = noted[1] - noted[0] + step_s * (options.max_new_tokens - CHECK_EVERY)
    return noted[0] - began + num_batches * batch_s


def _largest_batch(encoded: EncodedPrompts, decoding: Decoding, max_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(its prompts, the lengths that they are put side by side by, how many batches there are)."""
    usable = _usable(encoded)
    read = encoded.num_labelled[usable] if reads_references(encoded, decoding) else np.empty(0, np.int64)
    lengths = reading_lengths(encoded.prompt_lengths[usable], read, decoding.max_new_tokens)
    batches = batches_of(lengths, decoding.max_new_tokens, max_tokens, decoding.method)
    largest = max(batches, key=lambda rows: len(rows) * cache_columns(lengths[rows].max(), decoding.max_new_tokens))
    return usable[largest], lengths[largest], len(batches)
