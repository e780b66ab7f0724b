"""Prompts and answers as tokens: prompt, answer, end of text. Only answer and end of text have labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fastpeft.data.rows import NUM_NAMED
from fastpeft.data.token_cache import cached
from fastpeft.data.tokenise import Ragged, tokenised
from fastpeft.errors import UserError
from fastpeft.tasks.causal_lm.labelled_rows import LabelledRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompted:
    """Parallel columns of text. `name_row` and `noun` name a row and all rows in messages."""

    prompts: Sequence[str]
    answers: Sequence[str]
    """Text after the prompt, with its leading white space."""
    name_row: Callable[[int], str]
    noun: str = "rows"


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts(LabelledRows):
    """Row i starts with prompt_lengths[i] context tokens; its other tokens have labels."""

    prompt_lengths: np.ndarray
    rows: np.ndarray
    """Index of each row in the encoded Prompted."""
    unusable: np.ndarray
    """Indices of texts that are too long. Training omits them; evaluation counts them as wrong."""

    @property
    def num_labelled(self) -> np.ndarray:
        """Tokens to predict, of each row."""
        return self.lengths - self.prompt_lengths

    def places(self, row: int) -> np.ndarray:
        return np.arange(self.prompt_lengths[row], self.lengths[row])

    def prompt(self, row: int) -> np.ndarray:
        """The tokens that decoding starts from, int32."""
        start = self.offsets[row]
        return self.tokens[start : start + self.prompt_lengths[row]]

    def answer(self, row: int) -> np.ndarray:
        """The tokens to predict, int32."""
        return self.tokens[self.offsets[row] + self.prompt_lengths[row] : self.offsets[row + 1]]


def encode_prompts(
    texts: Prompted,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    training: bool = True,
    max_prompt: int | None = None,
) -> EncodedPrompts:
    """Tokenise prompts and answers separately, so that decoding starts from exactly the prompt's tokens.

    Special tokens are those that the tokenizer puts before a text, those written in the prompt, and the end of text
    after the answer. A prompt that already starts with the tokenizer's special tokens does not get them twice. In an
    answer the names of special tokens are plain text, so that none ends it early.

    Args:
        max_length: maximum number of tokens of a row.
        training: omit longer rows. False: keep every row, cut to max_length; a row is then unusable only if its prompt
            leaves no room for an answer.
        max_prompt: maximum prompt length, if less than max_length - 1; not for training.

    Raises:
        UserError: the tokenizer has no end-of-text token; a prompt has no tokens; no row fits.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(f"model {tokenizer.name_or_path}: its tokenizer has no end-of-text token to end answers with")
    assert isinstance(end, int)
    found = cached(
        lambda: _rows(texts, tokenizer, end, max_length, training),
        tokenizer,
        (texts.prompts, texts.answers),
        {"end": end, "max_length": max_length, "training": training},
    )
    lengths, prompt_lengths, kept = found["lengths"], found["prompt_lengths"], found["kept"]
    if not prompt_lengths.all():
        row = texts.name_row(int(prompt_lengths.argmin()))
        raise UserError(f"{row}: no token of model {tokenizer.name_or_path} stands for anything in the prompt")
    if training:
        unusable, what = _too_long(lengths, max_length, texts.noun)
    else:
        unusable, what = _without_room(prompt_lengths, max_length, max_prompt)
    named = lengths if training else prompt_lengths
    return EncodedPrompts(
        tokens=found["tokens"],
        offsets=found["offsets"],
        pad_token=end if tokenizer.pad_token_id is None else cast(int, tokenizer.pad_token_id),
        max_length=max_length,
        prompt_lengths=np.minimum(prompt_lengths[kept], max_length),
        rows=kept,
        unusable=unusable,
        notes=_notes(texts, unusable, named, what) + (training * _begun(tokenizer, int(found["num_begun"]))),
    )


def _too_long(lengths: np.ndarray, max_length: int, noun: str) -> tuple[np.ndarray, str]:
    """Training rows that do not fit, and a message on them. Raises UserError if none fits."""
    fits = lengths <= max_length
    if not fits.any():
        raise UserError(
            f"dataset.max_length: none of {len(lengths):,} training {noun} fits into {max_length} tokens; the shortest "
            f"has {lengths.min()}. Set it higher"
        )
    return np.flatnonzero(~fits), f"training {noun} are longer than {max_length} tokens and left out"


def _without_room(prompt_lengths: np.ndarray, max_length: int, max_prompt: int | None) -> tuple[np.ndarray, str]:
    """Rows whose prompt leaves no room for an answer, and a message on them."""
    longest = max_length - 1 if max_prompt is None else min(max_prompt, max_length - 1)
    what = f"prompts leave no room for an answer in {max_length} tokens and count as wrong"
    if longest < max_length - 1:
        what = f"prompts of over {longest} tokens leave no room for evaluation.max_new_tokens and count as wrong"
    return np.flatnonzero(prompt_lengths > longest), what


def writes_start(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text already starts with the special tokens that the tokenizer would put before it."""
    return _prompts([text], tokenizer)[1] == 1


def _rows(
    texts: Prompted, tokenizer: PreTrainedTokenizerBase, end: int, max_length: int, training: bool
) -> dict[str, np.ndarray]:
    """`tokens` of the texts that are `kept`; `lengths` of all of them, whole."""
    prompts, num_begun = _prompts(list(texts.prompts), tokenizer)
    answers = _tokens(list(texts.answers), tokenizer, split_special_tokens=True)
    last = np.array([end], dtype=np.int32)
    lengths = prompts.lengths + answers.lengths + 1
    kept = np.flatnonzero(lengths <= max_length) if training else np.arange(len(lengths))
    rows = Ragged.of(np.concatenate([prompts[i], answers[i], last])[:max_length] for i in kept.tolist())
    return {
        "tokens": rows.flat,
        "offsets": rows.offsets,
        "kept": kept,
        "lengths": lengths,
        "prompt_lengths": prompts.lengths,
        "num_begun": np.array(num_begun),
    }


def _prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Ragged, int]:
    """(tokens of each prompt, with the tokenizer's leading special tokens; number of prompts that wrote them)."""
    plain = _tokens(texts, tokenizer)
    with_special = tokenizer(texts[0], return_attention_mask=False, verbose=False)["input_ids"]
    first = plain[0].tolist()
    start = next(i for i in range(len(with_special) + 1) if with_special[i : i + len(first)] == first)
    if not start:
        return plain, 0
    before = np.array(with_special[:start], dtype=np.int32)
    begun = [np.array_equal(prompt[:start], before) for prompt in map(plain.__getitem__, range(len(plain)))]
    rows = (plain[i] if has else np.concatenate([before, plain[i]]) for i, has in enumerate(begun))
    return Ragged.of(rows), sum(begun)


def _begun(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[str, ...]:
    if not count:
        return ()
    token = tokenizer.bos_token or tokenizer.cls_token
    return (f"{count:,} prompts begin with {token!r}, which the tokenizer puts there itself: it stands there once",)


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, **options: bool) -> Ragged:
    call: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False, **options}
    return tokenised(tokenizer, texts, **call)["input_ids"]


def _notes(texts: Prompted, unusable: np.ndarray, lengths: np.ndarray, what: str) -> tuple[str, ...]:
    if not len(unusable):
        return ()
    named = ", ".join(f"{texts.name_row(row)} ({lengths[row]:,} tokens)" for row in unusable[:NUM_NAMED])
    more = ", ..." if len(unusable) > NUM_NAMED else ""
    return (f"{len(unusable):,} {what}: {named}{more}",)
