"""Rows above the length limit: dropped, cut at their beginning, or split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class TokenRow(NamedTuple):
    tokens: list[int]
    labelled: list[bool]


class Lost(NamedTuple):
    """Of a conversation."""

    num_rows: int
    """That were too long."""
    num_tokens: int
    num_labelled: int


def fitted(rows: Sequence[TokenRow], max_length: int, overflow: str) -> tuple[list[TokenRow], Lost]:
    """Rows of at most `max_length` tokens that have something to predict, and what is not in them.

    The first token of a row has nothing before it to be predicted from: its label goes.
    """
    kept: list[TokenRow] = []
    for row in rows:
        pieces = [row] if len(row.tokens) <= max_length else _pieces(row, max_length, overflow)
        for tokens, labelled in pieces:
            if True in labelled[1:]:
                kept.append(TokenRow(tokens, [False, *labelled[1:]]))
    num_long = sum(len(row.tokens) > max_length for row in rows)
    tokens = sum(len(row.tokens) for row in rows) - sum(len(row.tokens) for row in kept)
    labelled = sum(row.labelled.count(True) for row in rows) - sum(row.labelled.count(True) for row in kept)
    return kept, Lost(num_long, tokens, labelled)


def _pieces(row: TokenRow, max_length: int, overflow: str) -> list[TokenRow]:
    if overflow == "drop":
        return []
    starts = [len(row.tokens) - max_length] if overflow == "truncate_left" else range(0, len(row.tokens), max_length)
    return [
        TokenRow(row.tokens[start : start + max_length], row.labelled[start : start + max_length]) for start in starts
    ]
