"""Labelled texts as tokens.

Shapes: N rows, L tokens of the longest row of a batch, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpeft.data.batches import Batch, TokenRows, concatenate, move, pad
from fastpeft.data.tokenise import tokenised

_CUT = {"longest": "longest_first", "text": "only_first", "text_pair": "only_second"}


@dataclass(frozen=True)
class Examples:
    """Parallel columns; `text_pair` is None for single texts."""

    text: list[str]
    text_pair: list[str] | None
    labels: Sequence[Any]
    """Of each row what the task makes of it: a class number, a score, or C zeros and ones."""

    def __len__(self) -> int:
        return len(self.labels)

    def head(self, num_rows: int) -> Examples:
        """The first rows; 0 means all."""
        return self.pick(range(min(num_rows, len(self)))) if num_rows else self

    def pick(self, rows: Sequence[int]) -> Examples:
        pair = self.text_pair
        return Examples(
            [self.text[row] for row in rows],
            None if pair is None else [pair[row] for row in rows],
            [self.labels[row] for row in rows],
        )


@dataclass(frozen=True, kw_only=True)
class Encoded(TokenRows):
    """Labelled texts."""

    segments: np.ndarray | None
    """Token type ids, for models that read them."""
    labels: np.ndarray
    """N, or N x C."""
    num_truncated: int


def encode(
    examples: Examples,
    tokenizer: Any,
    max_length: int,
    segments: bool,
    *,
    cut: str = "longest",
    dtype: type = np.int64,
) -> Encoded:
    """Tokenise once, before training. What is longer than `max_length` is cut and counted.

    Args:
        tokenizer: of transformers.
        segments: the model reads token type ids.
        cut: which text of a pair gives way, as dataset.cut. Where the other one leaves no room, the longest does.
        dtype: of the labels.
    """
    call: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": segments}
    rows = _tokens(examples, tokenizer, max_length, cut, call)
    lengths = np.array([len(ids) for ids in rows["input_ids"]], dtype=np.int64)
    full = np.flatnonzero(lengths == max_length)
    num_truncated = 0
    if len(full):
        chosen = examples.pick(full.tolist())
        uncut = tokenised(tokenizer, chosen.text, chosen.text_pair, verbose=False, **call)
        num_truncated = sum(len(ids) > max_length for ids in uncut["input_ids"])
    return Encoded(
        tokens=concatenate(rows["input_ids"], np.int32),
        segments=concatenate(rows["token_type_ids"], np.uint8) if segments else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.array(examples.labels, dtype=dtype),
        num_truncated=num_truncated,
        pad_token=tokenizer.pad_token_id,
        max_length=max_length,
    )


def _tokens(
    examples: Examples, tokenizer: Any, max_length: int, cut: str, call: dict[str, Any]
) -> dict[str, list[list[int]]]:
    if examples.text_pair is None or cut == "longest":
        return tokenised(tokenizer, examples.text, examples.text_pair, truncation=True, max_length=max_length, **call)
    whole = tokenised(tokenizer, examples.text, examples.text_pair, verbose=False, **call)
    long = [row for row, ids in enumerate(whole["input_ids"]) if len(ids) > max_length]
    chosen = examples.pick(long)
    kept = chosen.text if cut == "text_pair" else chosen.text_pair
    assert kept is not None
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    plain = tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"] if long else []
    for row, ids in zip(long, plain):
        strategy = _CUT[cut] if len(ids) < room else _CUT["longest"]
        pair = (examples.text[row], examples.text_pair[row])
        shorter = tokenizer(*pair, truncation=strategy, max_length=max_length, **call)
        for key in whole:
            whole[key][row] = shorter[key]
    return whole


def collate(encoded: Encoded, rows: np.ndarray, device: torch.device) -> Batch:
    """Pad `rows` to the longest of them and move them to `device`, without waiting for it."""
    inputs = pad(encoded, rows, device, encoded.segments)
    return Batch(inputs, move(encoded.labels[rows], device), int(encoded.lengths[rows].sum()))
