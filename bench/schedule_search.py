"""The search for a peak rate that every schedule of bench/schedules.py gets: as many trials, by the same rule."""

from __future__ import annotations

import math
from collections.abc import Mapping


def next_exponent(scores: Mapping[float, float]) -> float:
    """Where to look next. Rates are start * factor^k; `scores` has the score of each k tried, lower is better.

    k = 0, 1 and -1 first. While the best lies at an end, one further out; else halfway into the wider gap beside it, of
    equal ones the gap towards the better neighbour.
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
    """Of equal scores the lower rate's: what has diverged at every rate is tried at ever lower ones."""
    return min(scores, key=lambda k: (_rank(scores[k]), k))


def at_edge(scores: Mapping[float, float]) -> bool:
    """The best trial is the lowest or the highest rate tried: the true best may lie beyond it."""
    return len(scores) > 1 and best_exponent(scores) in (min(scores), max(scores))


def rate_at(start: float, factor: float, k: float) -> float:
    return float(f"{start * factor**k:.4g}")


def _rank(score: float) -> float:
    return math.inf if math.isnan(score) else score
