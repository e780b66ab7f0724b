"""Decoding in batches, greedily or by sampling, with a static cache and merged weights; pass@k.

Shapes: B rows of a batch, W columns of its prompts, C columns of the cache, N most new tokens, V vocabulary, E tokens
that end an answer.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from fastpeft.data.batches import WIDTH_MULTIPLE, split_by_width
from fastpeft.device_memory import free_memory, is_out_of_memory
from fastpeft.models.merge import Merged, merged
from fastpeft.tasks.causal_lm.calculator_notes import Notes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECK_EVERY = 8
"""Steps between two looks at which rows have ended: each look waits for the device."""

_COMPACT_AT = 0.75
"""Share of a batch's rows that are still decoded, below which the others are taken out: that copies the cache."""


@dataclass(frozen=True)
class DecodeOptions:
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability (Holtzman et al., arXiv:1904.09751)."""
    num_samples: int = 1
    """Answers a prompt."""
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
    """Without the token that ended it."""
    ended: bool
    """False where it was cut at `max_new_tokens`."""

    @property
    def num_tokens(self) -> int:
        """That it took to write it, with the one that ended it."""
        return len(self.tokens) + self.ended


@dataclass(frozen=True)
class Decoded:
    answers: list[list[Answer]]
    """Of each prompt, its samples."""
    num_tokens: int
    seconds: float
    merged: Merged


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
    complete: Callable[[str], str | None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Decoded | None:
    """Continue every prompt; None if `stop`, asked before each batch and every few steps, said so before the end.

    Greedy answers are those of transformers' `generate(do_sample=False)` without any processing of the logits. Sample j
    of prompt i is drawn with numbers that depend on (seed, i, j) alone: batches change it no more than they change
    the logits, by rounding. Leaves the model's modes, config and weights as they were; draws no global random numbers.

    Args:
        prompts: token numbers of each, at least one; with `max_new_tokens` more, they are to fit the model's context.
        eos_tokens: any of them ends an answer.
        max_tokens: most tokens of a batch, its prompts padded to the longest of them and `max_new_tokens` added.
        shrink: told the rows and the width of a batch that ran out of memory; returns a smaller `max_tokens`, and the
            prompts that are left, with those of that batch, go on in such batches.
        merge: fold the LoRA layers into their weights for the time (fastpeft.models.merge).
        complete: the result of a calculator note `<<EXPR=`, or None where it has none; with `tokenizer`. See Notes.

    Raises:
        ValueError: an empty prompt; `complete` without a tokenizer.
    """
    if complete is not None and tokenizer is None:
        raise ValueError("decode: complete needs the tokenizer")
    lengths = np.repeat([len(prompt) for prompt in prompts], options.num_samples).astype(np.int64)
    if not lengths.all():
        raise ValueError(f"decode: prompt {int(np.argmin(lengths)) // options.num_samples} is empty")
    start = time.perf_counter()
    with _evaluating(model), merged(model) if merge else nullcontext(Merged()) as how, torch.inference_mode():
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        decoder = _Decoder(core, prompts, options, eos_tokens, pad_token, stop, complete, tokenizer)
        try:
            answers = _all_rows(decoder, lengths, max_tokens, shrink)
        except _Stopped:
            return None
    num_tokens = sum(answer.num_tokens for answer in answers)
    each = [answers[i : i + options.num_samples] for i in range(0, len(answers), options.num_samples)]
    return Decoded(each, num_tokens, time.perf_counter() - start, how)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Probability that one of k answers is right: 1 - C(n - c, k) / C(n, k), from c right ones of n samples.

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


def batches_of(lengths: np.ndarray, max_new_tokens: int, max_tokens: int) -> list[np.ndarray]:
    """Which prompts, of these lengths, `decode` puts side by side."""
    widths = cache_columns(lengths, max_new_tokens)
    return list(split_by_width(np.arange(len(lengths)), lengths, widths, max_tokens))


def cache_columns(lengths: Any, max_new_tokens: int) -> Any:
    """Of the cache for prompts of these lengths; of kernels' favourite sizes."""
    return _round_up(lengths) + _round_up(max_new_tokens)


def _all_rows(
    decoder: _Decoder, lengths: np.ndarray, max_tokens: int, shrink: Callable[[int, int], int] | None
) -> list[Answer]:
    widths = cache_columns(lengths, decoder.options.max_new_tokens)
    answers: dict[int, Answer] = {}
    groups = deque(batches_of(lengths, decoder.options.max_new_tokens, max_tokens))
    while groups:
        if decoder.stop():
            raise _Stopped
        found = decoder.answers(groups[0], may_fail=shrink is not None)
        if found is None:
            assert shrink is not None
            free_memory()
            max_tokens = shrink(len(groups[0]), int(widths[groups[0]].max()))
            groups = deque(split_by_width(np.concatenate(groups), lengths, widths, max_tokens))
            continue
        answers |= zip(groups.popleft().tolist(), found, strict=True)
    return [answers[row] for row in range(len(lengths))]


@dataclass
class _Decoder:
    """Everything that the batches of one `decode` have in common."""

    model: nn.Module
    prompts: Sequence[Sequence[int] | np.ndarray]
    options: DecodeOptions
    eos_tokens: Sequence[int]
    pad_token: int
    stop: Callable[[], bool]
    complete: Callable[[str], str | None] | None
    tokenizer: Any

    def answers(self, rows: np.ndarray, may_fail: bool) -> list[Answer] | None:
        """None if the memory did not suffice and it `may_fail`."""
        try:
            new_BN = self._decode(rows)
        except RuntimeError as error:
            if not (may_fail and is_out_of_memory(error)):
                raise
            return None
        return [self._answer(new_N) for new_N in new_BN]

    def _answer(self, new_N: np.ndarray) -> Answer:
        ends = np.flatnonzero(np.isin(new_N, self.eos_tokens))
        return Answer(new_N[: ends[0]].tolist(), True) if len(ends) else Answer(new_N.tolist(), False)

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        """B x N new tokens of these rows; what follows a token that ends is padding."""
        samples, most = self.options.num_samples, self.options.max_new_tokens
        device = next(self.model.parameters()).device
        eos_E = torch.tensor(self.eos_tokens, dtype=torch.int64, device=device)
        batch = _Batch(self.model, [self.prompts[row // samples] for row in rows], most, self.pad_token, device)
        uniform_BN = _uniforms(self.options, rows).to(device) if self.options.temperature else None
        notes = None if self.complete is None else Notes(self.complete, self.tokenizer, len(rows), self.eos_tokens)
        logits_BV = batch.forward()
        for step in range(most):
            if uniform_BN is None:
                next_B = logits_BV.argmax(-1)
            else:
                next_B = _sample(logits_BV, uniform_BN[batch.rows_B, step], self.options)
            if notes is not None:
                next_B = torch.tensor(notes.read(next_B.tolist(), batch.rows), device=device)
            batch.append(next_B, eos_E, step)
            if step + 1 == most or (step % CHECK_EVERY == CHECK_EVERY - 1 and not self._go_on(batch)):
                break
            logits_BV = batch.forward()
        return batch.new_BN.cpu().numpy()

    def _go_on(self, batch: _Batch) -> bool:
        if self.stop():
            raise _Stopped
        return batch.drop_ended()


class _Batch:
    """Rows that are decoded side by side, fewer and fewer of them.

    Of transformers it needs a StaticCache whose layers count their columns themselves, and its reorder_cache.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: list[Sequence[int] | np.ndarray],
        most: int,
        pad_token: int,
        device: torch.device,
    ) -> None:
        from transformers import StaticCache

        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(_round_up(lengths.max()))
        columns = int(cache_columns(width, most))
        ids_BW = np.full((len(prompts), width), pad_token, dtype=np.int64)
        for ids_W, prompt in zip(ids_BW, prompts):
            ids_W[width - len(prompt) :] = prompt
        column_C = np.arange(columns)
        mask_BC = (column_C >= width - lengths[:, None]) & (column_C < width)
        self.model, self.pad_token, self.device = model, pad_token, device
        self.cache = StaticCache(config=cast("PreTrainedModel", model).config, max_cache_len=columns)
        self.rows = list(range(len(prompts)))
        self.rows_B = torch.arange(len(prompts), device=device)
        """Of `new_BN`, those that are still decoded."""
        self.new_BN = torch.full((len(prompts), most), pad_token, device=device)
        self.alive_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self.width = width
        self._ids = torch.from_numpy(ids_BW).to(device)
        self._mask_BC = torch.from_numpy(mask_BC.astype(np.int64)).to(device)
        self._positions = (self._mask_BC[:, :width].cumsum(-1) - 1).clamp(min=0)

    def forward(self) -> torch.Tensor:
        """Logits (B x V) after the prompts, and later after the tokens that were appended last."""
        out = self.model(
            input_ids=self._ids,
            attention_mask=self._mask_BC,
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def append(self, next_B: torch.Tensor, eos_E: torch.Tensor, step: int) -> None:
        """The next token of each row, or padding where it has ended. Does not wait for the device."""
        next_B = next_B.where(self.alive_B, self.pad_token)
        self.new_BN[self.rows_B, step] = next_B
        self.alive_B &= (next_B[:, None] != eos_E).all(-1)
        self._ids = next_B[:, None]
        self._mask_BC[:, self.width + step] = 1
        self._positions = self._positions[:, -1:] + 1

    def drop_ended(self) -> bool:
        """Waits for the device. Goes on without the rows that have ended if they are many; False if all have."""
        alive = self.alive_B.tolist()
        kept = [i for i, is_alive in enumerate(alive) if is_alive]
        if kept and len(kept) <= _COMPACT_AT * len(alive):
            kept_B = torch.tensor(kept, device=self.device)
            self.cache.reorder_cache(cast(torch.LongTensor, kept_B))
            self.rows = [self.rows[i] for i in kept]
            self.rows_B, self.alive_B = self.rows_B[kept_B], self.alive_B[kept_B]
            self._ids, self._positions = self._ids[kept_B], self._positions[kept_B]
            self._mask_BC = self._mask_BC[kept_B]
        return bool(kept)


def _round_up(length: Any) -> Any:
    return -(-length // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _uniforms(options: DecodeOptions, rows: np.ndarray) -> torch.Tensor:
    """B x N numbers in [0, 1), those of a row a function of (seed, prompt, sample) alone."""
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
    found_B1 = found_B1.clamp(max=likely_BV.shape[1] - 1)  # past the end only where the logits are not finite
    return (found_B1 if order_BV is None else order_BV.gather(-1, found_B1))[:, 0]
