"""Decoding in batches, greedily or by sampling, with merged weights; pass@k.

Shapes: B rows of a batch, N most new tokens, V vocabulary, E tokens that end an answer.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from fastpeft.data.batches import split_by_width
from fastpeft.device_memory import free_memory, is_out_of_memory
from fastpeft.models.merge import Merged, merged
from fastpeft.ranks import current, everybodys
from fastpeft.tasks.causal_lm.calculator_notes import Notes
from fastpeft.tasks.causal_lm.decode_batches import BATCHES, FASTEST, DecodeMethod, cache_columns, fastest_method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECK_EVERY = 8
"""Steps between two checks of `stop` and of ended rows, because the check synchronizes with a GPU. On a CPU ended rows
are checked in every step."""


@dataclass(frozen=True)
class DecodeOptions:
    max_new_tokens: int
    temperature: float = 0.0
    """0 selects greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: total probability of the tokens sampled from (Holtzman et al., arXiv:1904.09751)."""
    num_samples: int = 1
    """Number of answers per prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_samples < 1 or self.seed < 0:
            raise ValueError(f"max_new_tokens and num_samples must be at least 1, seed at least 0: {self}")
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise ValueError(f"temperature must be at least 0 and finite, top_p over 0 and at most 1: {self}")
        if not self.temperature and self.num_samples > 1:
            raise ValueError("temperature 0 is greedy, and gives the same answer for every one of num_samples")


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    """Token ids without the end token."""
    ended: bool
    """False if it was cut at `max_new_tokens`."""

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens, the end token included."""
        return len(self.tokens) + self.ended


@dataclass(frozen=True)
class Decoded:
    answers: list[list[Answer]]
    """The samples of each prompt."""
    num_tokens: int
    seconds: float
    merged: Merged
    loss: float | None = None
    """Sum of the references' loss, in nats; None if they were not read."""


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    options: DecodeOptions,
    eos_tokens: Sequence[int],
    pad_token: int,
    max_tokens: int,
    stop: Callable[[], bool] = lambda: False,
    shrink: Callable[[int, int], int] | None = None,
    merge: bool = True,
    method: DecodeMethod = FASTEST,
    complete: Callable[[str], str | None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    references: Sequence[np.ndarray] = (),
) -> Decoded | None:
    """Continue every prompt; None if `stop`, called before each batch and every few steps, ended it early.

    Greedy answers equal those of transformers' `generate(do_sample=False)` without logits processors. Sample j of
    prompt i uses random numbers that depend only on (seed, i, j): batching changes it only through rounding of the
    logits. Restores the model's modes, config and weights; does not use the global random state.

    Args:
        prompts: token ids of each prompt, at least one; plus `max_new_tokens` they have to fit the model's context.
        eos_tokens: tokens of which any ends an answer.
        max_tokens: maximum number of tokens of a batch, with prompts padded to the longest and `max_new_tokens` added.
        shrink: called with the rows and the width of a batch that ran out of memory; returns a smaller `max_tokens`,
            with which that batch and the remaining prompts are decoded.
        merge: merge the LoRA layers into their weights during decoding (fastpeft.models.merge).
        method: a method that is exact for the model, from fastpeft.tasks.causal_lm.decode_check. FASTEST means the
            static cache for a model with unknown layers.
        complete: returns the result of a calculator note `<<EXPR=`, or None; needs `tokenizer`. See Notes.
        references: expected continuation of each prompt, at least one token, for its loss, which the direct method
            computes in the prefill. With one sample per prompt only.

    Raises:
        ValueError: an empty prompt; `complete` without a tokenizer.
    """
    if complete is not None and tokenizer is None:
        raise ValueError("decode: complete needs the tokenizer")
    lengths = np.repeat([len(prompt) for prompt in prompts], options.num_samples).astype(np.int64)
    references = references if options.num_samples == 1 else ()
    if not lengths.all():
        raise ValueError(f"decode: prompt {int(np.argmin(lengths)) // options.num_samples} is empty")
    start = time.perf_counter()
    with _evaluating(model), merged(model) if merge else nullcontext(Merged()) as how, torch.inference_mode():
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        method = fastest_method(core) if method == FASTEST else method
        lengths = reading_lengths(lengths, np.array([len(own) for own in references]), options.max_new_tokens)
        decoder = _Decoder(core, prompts, options, method, eos_tokens, pad_token, stop, complete, tokenizer, references)
        try:
            own = _own_rows(decoder, lengths, max_tokens, shrink)
        except _Stopped:
            own = None
        found, loss = _of_all_ranks(own, decoder.loss)
    if found is None:
        return None
    answers = [found[row] for row in range(len(lengths))]
    num_tokens = sum(answer.num_tokens for answer in answers)
    each = [answers[i : i + options.num_samples] for i in range(0, len(answers), options.num_samples)]
    return Decoded(each, num_tokens, time.perf_counter() - start, how, loss)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Probability that at least one of k answers is right: 1 - C(n - c, k) / C(n, k), with c of n samples right.

    Unbiased (Chen et al., arXiv:2107.03374, eq. 1).

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@k: {num_correct} right of {num_samples} samples, k {k}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


class _Stopped(Exception):
    pass


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def reading_lengths(lengths: np.ndarray, reference_lengths: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """Lengths of prompts, increased where a reference is longer than `max_new_tokens`."""
    if not len(reference_lengths):
        return lengths
    return np.maximum(lengths, lengths + reference_lengths - max_new_tokens)


def batches_of(
    lengths: np.ndarray, max_new_tokens: int, max_tokens: int, method: DecodeMethod = FASTEST
) -> list[np.ndarray]:
    """The batches, as indices of prompts, that `decode` makes of prompts of these lengths."""
    widths = cache_columns(lengths, max_new_tokens)
    return list(split_by_width(np.arange(len(lengths)), lengths, widths, max_tokens, method.padded))


def _own_rows(
    decoder: _Decoder, lengths: np.ndarray, max_tokens: int, shrink: Callable[[int, int], int] | None
) -> dict[int, Answer]:
    """Answers of this rank's batches."""
    widths = cache_columns(lengths, decoder.options.max_new_tokens)
    answers: dict[int, Answer] = {}
    groups = deque(current().share(batches_of(lengths, decoder.options.max_new_tokens, max_tokens, decoder.method)))
    while groups:
        if decoder.stop():
            raise _Stopped
        found = decoder.answers(groups[0], may_fail=shrink is not None)
        if found is None:
            assert shrink is not None
            free_memory()
            max_tokens = shrink(len(groups[0]), int(widths[groups[0]].max()))
            rows = np.concatenate(groups)
            groups = deque(split_by_width(rows, lengths, widths, max_tokens, decoder.method.padded))
            continue
        answers |= zip(groups.popleft().tolist(), found, strict=True)
    return answers


def _of_all_ranks(
    answers: dict[int, Answer] | None, loss: float | None
) -> tuple[dict[int, Answer] | None, float | None]:
    """Every row's answer, None if a rank was stopped; loss of all references, None if a rank has not read its own."""
    if current().size == 1:
        return answers, loss
    found = everybodys(None if answers is None else _as_tensors(answers, loss))
    if found is None:
        return None, None
    joined: dict[int, Answer] = {}
    for each in found:
        tokens = (part.tolist() for part in each["tokens"].split(each["lengths"].tolist()))
        joined |= zip(each["rows"].tolist(), map(Answer, tokens, each["ended"].tolist()), strict=True)
    return joined, sum(float(each["loss"]) for each in found) if all(each["has_loss"] for each in found) else None


def _as_tensors(answers: dict[int, Answer], loss: float | None) -> dict[str, torch.Tensor]:
    tokens = [token for answer in answers.values() for token in answer.tokens]
    return {
        "rows": torch.tensor(list(answers), dtype=torch.int64),
        "lengths": torch.tensor([len(answer.tokens) for answer in answers.values()], dtype=torch.int64),
        "ended": torch.tensor([answer.ended for answer in answers.values()], dtype=torch.bool),
        "tokens": torch.tensor(tokens, dtype=torch.int64),
        "loss": torch.tensor(math.nan if loss is None else loss, dtype=torch.float64),
        "has_loss": torch.tensor(loss is not None),
    }


@dataclass
class _Decoder:
    """The state shared by the batches of one `decode` call."""

    model: nn.Module
    prompts: Sequence[Sequence[int] | np.ndarray]
    options: DecodeOptions
    method: DecodeMethod
    eos_tokens: Sequence[int]
    pad_token: int
    stop: Callable[[], bool]
    complete: Callable[[str], str | None] | None
    tokenizer: Any
    references: Sequence[np.ndarray]
    loss: float | None = 0.0
    """Loss of the references of all batches so far; None once those of a batch were not read."""

    def answers(self, rows: np.ndarray, may_fail: bool) -> list[Answer] | None:
        """Answers of these rows; None if out of memory and `may_fail`."""
        try:
            new_BN = self._decode(rows)
        except RuntimeError as error:
            if not (may_fail and is_out_of_memory(error)):
                raise
            return None
        ends_BN = np.isin(new_BN, self.eos_tokens)
        ended_B: np.ndarray = np.any(ends_BN, axis=1)
        num_tokens_B = np.where(ended_B, ends_BN.argmax(1), new_BN.shape[1]).tolist()
        return [
            Answer(tokens[:num], ended) for tokens, num, ended in zip(new_BN.tolist(), num_tokens_B, ended_B.tolist())
        ]

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        """(B, N) new tokens of these rows, padding after an end token."""
        samples, most = self.options.num_samples, self.options.max_new_tokens
        device = next(self.model.parameters()).device
        look_every = 1 if device.type == "cpu" else CHECK_EVERY
        eos_E = torch.tensor(self.eos_tokens, dtype=torch.int64, device=device)
        prompts = [self.prompts[row // samples] for row in rows]
        batch = BATCHES[self.method.caching](self.model, prompts, most, self.pad_token, device)
        uniform_BN = _uniforms(self.options, rows).to(device) if self.options.temperature else None
        notes = None if self.complete is None else Notes(self.complete, self.tokenizer, len(rows), self.eos_tokens)
        if self.references:
            batch.read_behind([self.references[row] for row in rows])
        logits_BV = batch.forward()
        for step in range(most):
            if uniform_BN is None:
                next_B = logits_BV.argmax(-1)
            else:
                next_B = _sample(logits_BV, uniform_BN[batch.rows_B, step], self.options)
            if notes is not None:
                next_B = torch.tensor(notes.read(next_B.tolist(), batch.rows), device=device)
            batch.append(next_B, eos_E, step)
            if step + 1 == most:
                break
            if step % CHECK_EVERY == CHECK_EVERY - 1 and self.stop():
                raise _Stopped
            if step % look_every == look_every - 1 and not batch.drop_ended():
                break
            logits_BV = batch.forward()
        self.loss = None if batch.loss is None or self.loss is None else self.loss + float(batch.loss)
        return batch.new_BN.cpu().numpy()


def _uniforms(options: DecodeOptions, rows: np.ndarray) -> torch.Tensor:
    """(B, N) numbers in [0, 1); a row depends only on (seed, prompt, sample)."""
    keys = (np.random.default_rng([options.seed, *divmod(int(row), options.num_samples)]) for row in rows)
    return torch.from_numpy(np.stack([key.random(options.max_new_tokens, dtype=np.float32) for key in keys]))


def _sample(logits_BV: torch.Tensor, uniform_B: torch.Tensor, options: DecodeOptions) -> torch.Tensor:
    """The token at which the cumulative probability passes `uniform_B`."""
    logits_BV = logits_BV.float()
    likely_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / options.temperature).softmax(-1)
    order_BV = None
    if options.top_p < 1:
        likely_BV, order_BV = likely_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = likely_BV.cumsum(-1, dtype=torch.float64) - likely_BV
        likely_BV = likely_BV.masked_fill(before_BV >= options.top_p, 0)
    upto_BV = likely_BV.cumsum(-1, dtype=torch.float64)
    found_B1 = torch.searchsorted(upto_BV, uniform_B.double()[:, None] * upto_BV[:, -1:], right=True)
    found_B1 = found_B1.clamp(max=likely_BV.shape[1] - 1)  # beyond the end only if the logits are not finite
    return (found_B1 if order_BV is None else order_BV.gather(-1, found_B1))[:, 0]
