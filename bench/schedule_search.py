"""Search for a peak learning rate in bench/schedules.py, with the same number of trials and rule for every schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping


def next_exponent(scores: Mapping[float, float]) -> float:
    """Next exponent k to try. Learning rates are start * factor^k; `scores` maps each k tried to its score, lower is
    better.

    k = 0, 1 and -1 come first. While the best k is at an end, the next is one further out. Otherwise it is the middle
    of the wider gap beside the best, and of equal gaps the one towards the better neighbour.
    """
    for k in (0.0, 1.0, -1.0):
        if k not in scores:
            return k
    best = best_exponent(scores)
    below = max((k for k in scores if k < best), default=None)
    above = min((k for k in scores if k > best), default=None)
    if below is None or above is None:
        return best - 1 if below is None else best + 1
    gaps = {below: best - below, above: above - best}
    neighbour = min(gaps, key=lambda k: (-gaps[k], _rank(scores[k]), k))
    return (best + neighbour) / 2


def best_exponent(scores: Mapping[float, float]) -> float:
    """Exponent of the best score, for ties the lowest: after divergence everywhere the search goes to lower rates."""
    return min(scores, key=lambda k: (_rank(scores[k]), k))


def at_edge(scores: Mapping[float, float]) -> bool:
    """Whether the best trial has the lowest or highest learning rate tried: the optimum may lie beyond it."""
    return len(scores) > 1 and best_exponent(scores) in (min(scores), max(scores))


def rate_at(start: float, factor: float, k: float) -> float:
    return float(f"{start * factor**k:.4g}")


def _rank(score: float) -> float:
    return math.inf if math.isnan(score) else score
