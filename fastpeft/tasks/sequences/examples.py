"""Labelled texts as tokens.

Shapes: N rows, L tokens of the longest row of a batch, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpeft.data.batches import Batch, TokenRows, inputs_of, move
from fastpeft.data.splitting import sample
from fastpeft.data.token_cache import cached
from fastpeft.data.tokenise import Ragged, tokenised

_CUT = {"longest": "longest_first", "text": "only_first", "text_pair": "only_second"}


@dataclass(frozen=True)
class Examples:
    """Parallel columns; `text_pair` is None for single texts."""

    text: list[str]
    text_pair: list[str] | None
    labels: Sequence[Any]
    """Label of each row, by task: a class index, a score, or C zeros and ones."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The one or two texts of each row, without white space at their ends."""
        columns = [self.text] if self.text_pair is None else [self.text, self.text_pair]
        return list(zip(*([text.strip() for text in column] for column in columns)))

    def sample(self, limit: int) -> Examples:
        """`limit` rows drawn at random, independent of the run's seed; 0 means all."""
        return self.pick(sample(len(self), limit)) if limit else self

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
    """(N,) or (N, C)."""
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
    """Tokenise once, before training, or read the tokens from the cache. Rows longer than `max_length` are cut and
    counted.

    Args:
        tokenizer: a tokenizer of transformers.
        segments: whether the model reads token type ids.
        cut: which text of a pair is cut, as dataset.cut. If the other text leaves no room, the longest is cut.
        dtype: dtype of the labels.
    """
    found = cached(
        lambda: _arrays(examples, tokenizer, max_length, segments, cut),
        tokenizer,
        (examples.text, examples.text_pair),
        {"max_length": max_length, "segments": segments, "cut": cut},
    )
    return Encoded(
        tokens=found["tokens"],
        segments=found["segments"] if segments else None,
        offsets=found["offsets"],
        labels=np.array(examples.labels, dtype=dtype),
        num_truncated=int(found["num_truncated"]),
        pad_token=tokenizer.pad_token_id,
        max_length=max_length,
    )


def _arrays(examples: Examples, tokenizer: Any, max_length: int, segments: bool, cut: str) -> dict[str, np.ndarray]:
    call: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": segments}
    rows = _tokens(examples, tokenizer, max_length, cut, call)
    tokens = rows["input_ids"]
    full = np.flatnonzero(tokens.lengths == max_length)
    num_truncated = 0
    if len(full):
        chosen = examples.pick(full.tolist())
        uncut = tokenised(tokenizer, chosen.text, chosen.text_pair, verbose=False, **call)
        num_truncated = int((uncut["input_ids"].lengths > max_length).sum())
    arrays = {"tokens": tokens.flat, "offsets": tokens.offsets, "num_truncated": np.array(num_truncated)}
    return arrays | ({"segments": rows["token_type_ids"].flat.astype(np.uint8)} if segments else {})


def _tokens(examples: Examples, tokenizer: Any, max_length: int, cut: str, call: dict[str, Any]) -> dict[str, Ragged]:
    if examples.text_pair is None or cut == "longest":
        return tokenised(tokenizer, examples.text, examples.text_pair, truncation=True, max_length=max_length, **call)
    whole = tokenised(tokenizer, examples.text, examples.text_pair, verbose=False, **call)
    long = np.flatnonzero(whole["input_ids"].lengths > max_length).tolist()
    if not long:
        return whole
    chosen = examples.pick(long)
    kept = chosen.text if cut == "text_pair" else chosen.text_pair
    assert kept is not None
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    plain = tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"]
    shorter = {}
    for row, ids in zip(long, plain):
        strategy = _CUT[cut] if len(ids) < room else _CUT["longest"]
        pair = (examples.text[row], examples.text_pair[row])
        shorter[row] = tokenizer(*pair, truncation=strategy, max_length=max_length, **call)
    return {
        key: Ragged.of(shorter[row][key] if row in shorter else rows[row] for row in range(len(rows)))
        for key, rows in whole.items()
    }


def collate(encoded: Encoded, rows: np.ndarray, device: torch.device) -> Batch:
    """Pad `rows` to the longest row, or pack them, and move them to `device` without synchronization."""
    inputs = inputs_of(encoded, rows, device, encoded.segments)
    sequences = inputs["attention_mask"] if encoded.varlen else None
    return Batch(inputs, move(encoded.labels[rows], device), int(encoded.lengths[rows].sum()), sequences=sequences)
