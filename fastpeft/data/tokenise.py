"""Many texts to tokens, saying how far that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fastpeft import phases

PART_ROWS = 2048
"""Tokenised at once: enough for a fast tokenizer's threads, few enough that a slow one is heard of, and that the lists
it gives, of 36 bytes a number, are small beside the model."""


@dataclass(frozen=True)
class Ragged:
    """Rows of numbers, concatenated: row i is flat[offsets[i]:offsets[i + 1]]."""

    flat: np.ndarray
    """int32."""
    offsets: np.ndarray
    """int64."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | np.ndarray]) -> Self:
        """Of lists, or of the rows of others."""
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        lengths = np.array([len(row) for row in arrays], dtype=np.int64)
        flat = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
        return cls(flat, np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def tokenised(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, **call: Any
) -> dict[str, Ragged]:
    """What `tokenizer(texts, pairs, **call)` returns, by the same names; it is called for some rows at a time."""
    parts: dict[str, list[Ragged]] = {}
    for start in range(0, len(texts), PART_ROWS):
        part = slice(start, start + PART_ROWS)
        rows = tokenizer(list(texts[part]), None if pairs is None else list(pairs[part]), **call)
        for name, lists in rows.items():
            parts.setdefault(name, []).append(Ragged.of(lists))
        phases.progress(min(start + PART_ROWS, len(texts)), len(texts), "rows")
    return {name: joined(found) for name, found in parts.items()}


def joined(parts: Sequence[Ragged]) -> Ragged:
    """Their rows, one after another."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.flat for part in parts]), np.concatenate([[0], np.cumsum(lengths)]))
