"""Many texts to tokens, saying how far that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpeft import phases

PART_ROWS = 2048
"""Tokenised at once: enough for a fast tokenizer's threads, few enough that a slow one is heard of."""


def tokenised(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, **call: Any
) -> dict[str, list[list[int]]]:
    """What `tokenizer(texts, pairs, **call)` returns, by the same names; it is called for some rows at a time."""
    found: dict[str, list[list[int]]] = {}
    for start in range(0, len(texts), PART_ROWS):
        part = slice(start, start + PART_ROWS)
        rows = tokenizer(list(texts[part]), None if pairs is None else list(pairs[part]), **call)
        for name, lists in rows.items():
            found.setdefault(name, []).extend(lists)
        phases.progress(min(start + PART_ROWS, len(texts)), len(texts), "rows")
    return found
