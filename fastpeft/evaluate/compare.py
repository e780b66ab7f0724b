"""Several runs side by side: means over seeds with t-intervals, and the GLUE average. Reads result.json only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastpeft.runs.events import number
from fastpeft.runs.store import Result

CONFIDENCE = 0.95
GLUE_TASKS = ("mnli", "sst2", "rte")


@dataclass(frozen=True)
class Mean:
    """Mean over `count` values, and half the width of its two-sided 95 % t-interval; NaN for a single value."""

    value: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.count == 1 else f"{self.value:.4f} ± {self.half_width:.4f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Student's t: half width t(0.975, n - 1) s / sqrt(n). Raises ValueError without values."""
    if not values:
        raise ValueError("the mean of no values")
    if len(values) == 1:
        return Mean(values[0], math.nan, 1)
    from scipy.stats import t

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread, len(values))


def metric_of(results: Iterable[Result], of: str = "metric") -> Mean | None:
    """Mean `metric` (or `best`) of the runs that have one; None if none has."""
    found = [number(getattr(result, of)["value"]) for result in results if "value" in getattr(result, of)]
    return mean_of(found) if found else None


def glue_average(results: Iterable[Result]) -> Mean | None:
    """Mean over MNLI, SST-2 and RTE of their primary metrics, seed by seed; None unless some seed has all three.

    The tasks count alike, as in GLUE (Wang et al., arXiv:1804.07461). A stand-in is no GLUE task.
    """
    by_seed: dict[int, dict[str, list[float]]] = {}
    for result in results:
        if result.dataset in GLUE_TASKS and "value" in result.metric and not result.stand_in:
            scores = by_seed.setdefault(result.seed, {}).setdefault(result.dataset, [])
            scores.append(number(result.metric["value"]))
    whole = [
        statistics.fmean(statistics.fmean(scores[task]) for task in GLUE_TASKS)
        for scores in by_seed.values()
        if all(task in scores for task in GLUE_TASKS)
    ]
    return mean_of(whole) if whole else None
