"""Lengths of the rows of a batch, drawn anew: what rows without padding have to be right for."""

from __future__ import annotations

import random

DRAWN = ("mixed", "one row", "one token", "all equal", "one long among short")


def draw_lengths(kind: str, rng: random.Random, longest: int = 48) -> list[int]:
    """One of DRAWN, in no order."""
    if kind == "one row":
        return [rng.randint(2, longest)]
    if kind == "one token":
        return [1] * rng.randint(1, 4)
    if kind == "all equal":
        return [rng.randint(2, longest)] * rng.randint(2, 5)
    if kind == "one long among short":
        lengths = [rng.randint(1, 4) for _ in range(rng.randint(2, 5))] + [longest]
        rng.shuffle(lengths)
        return lengths
    return [rng.randint(1, longest) for _ in range(rng.randint(3, 7))]
