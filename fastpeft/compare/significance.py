"""Tests of the difference between two methods, by scipy and statsmodels: over seeds, and over the rows of one split.

They answer different questions. Over seeds: would the method be better if it were trained again? Over rows: would these
trained models be better on other rows of the same distribution? Evaluations of one run depend on each other, and are
never treated as a sample.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from fastpeft.compare.comparison import CONFIDENCE, Comparison, Contrast
from fastpeft.compare.row_scores import RowScores, metrics

NUM_RESAMPLES = 4999
EXACT_BELOW = 25
"""Discordant rows, which only one of the two gets right. With fewer, McNemar's test is exact, else chi-squared (Dror et
al., doi:10.18653/v1/P18-1128)."""
_RESAMPLED_AT_ONCE = 2_000_000
"""Row indices per batch of resamples, which bounds the memory."""


def over_seeds(ours: dict[int, float], others: dict[int, float]) -> Contrast | None:
    """Paired t-test on the common seeds, which share data order and initial weights. With fewer than two of them,
    Welch's t-test on all seeds. None if a side has fewer than two runs.

    Args:
        ours: seed -> metric.
        others: the same of the baseline.
    """
    shared = sorted(ours.keys() & others.keys())
    if len(shared) >= 2:
        return paired_t([ours[seed] for seed in shared], [others[seed] for seed in shared])
    if min(len(ours), len(others)) >= 2:
        return welch_t(list(ours.values()), list(others.values()))
    return None


def paired_t(ours: Sequence[float], others: Sequence[float]) -> Contrast:
    """Student's t-test of the differences (Student 1908, doi:10.1093/biomet/6.1.1)."""
    from scipy.stats import ttest_rel

    apart, count = np.subtract(ours, others), len(ours)
    spread = float(apart.std(ddof=1))
    contrast = Contrast("paired t", float(apart.mean()), math.nan, math.nan, None, (count, count), effect_name="d_z")
    if _is_constant(apart):
        return replace(contrast, note="the differences do not vary")
    found: Any = ttest_rel(ours, others)
    low, high = found.confidence_interval(CONFIDENCE)
    return replace(
        contrast, low=float(low), high=float(high), p=float(found.pvalue), effect=contrast.difference / spread
    )


def welch_t(ours: Sequence[float], others: Sequence[float]) -> Contrast:
    """t-test with unequal variances (Welch 1947, doi:10.1093/biomet/34.1-2.28). The effect size is Hedges' g (1981,
    doi:10.3102/10769986006002107)."""
    from scipy.stats import ttest_ind
    from statsmodels.stats.meta_analysis import effectsize_smd

    means, counts = (float(np.mean(ours)), float(np.mean(others))), (len(ours), len(others))
    contrast = Contrast("Welch's t", means[0] - means[1], math.nan, math.nan, None, counts, effect_name="g")
    if _is_constant(ours) and _is_constant(others):
        return replace(contrast, note="the seeds do not vary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one side may be constant: its variance of 0 is valid
        found: Any = ttest_ind(ours, others, equal_var=False)
    low, high = found.confidence_interval(CONFIDENCE)
    spreads = float(np.std(ours, ddof=1)), float(np.std(others, ddof=1))
    effect, _ = effectsize_smd(means[0], spreads[0], counts[0], means[1], spreads[1], counts[1])
    return replace(contrast, low=float(low), high=float(high), p=float(found.pvalue), effect=float(effect))


def over_rows(ours: Sequence[RowScores], others: Sequence[RowScores], seed: int = 0) -> Contrast | None:
    """McNemar's test for one run on each side with a right or wrong answer per row. Else the paired bootstrap of the
    difference of the mean metrics. None unless all runs were scored on the same rows."""
    runs = [*ours, *others]
    if not ours or not others or len({(run.rows, run.form) for run in runs}) > 1 or not len(runs[0]):
        return None
    bootstrapped = paired_bootstrap(ours, others, seed)
    if len(ours) == len(others) == 1 and ours[0].form == "share":
        return replace(mcnemar_test(ours[0], others[0]), low=bootstrapped.low, high=bootstrapped.high)
    return bootstrapped


def mcnemar_test(ours: RowScores, others: RowScores) -> Contrast:
    """McNemar's test of the rows that one gets right and the other wrong (1947, doi:10.1007/BF02295996). It gives no
    interval: `over_rows` adds the bootstrap's."""
    from statsmodels.stats.contingency_tables import mcnemar

    is_right, other_is_right = ours.values[:, 0] > 0.5, others.values[:, 0] > 0.5
    gained, lost = int((is_right & ~other_is_right).sum()), int((~is_right & other_is_right).sum())
    table = [[int((is_right & other_is_right).sum()), gained], [lost, int((~is_right & ~other_is_right).sum())]]
    found: Any = mcnemar(table, exact=gained + lost < EXACT_BELOW, correction=True)
    return Contrast(
        "McNemar",
        (gained - lost) / len(ours),
        math.nan,
        math.nan,
        float(found.pvalue) if gained + lost else 1.0,
        (len(ours), len(ours)),
        effect=gained / lost if lost else None,
        effect_name="odds",
        note=f"{gained:,} rows gained, {lost:,} lost",
    )


def paired_bootstrap(ours: Sequence[RowScores], others: Sequence[RowScores], seed: int = 0) -> Contrast:
    """Bootstrap over rows, with the same resampled rows for every run (Koehn 2004, aclanthology.org/W04-3250).

    The interval consists of percentiles. p is the level at which such an interval just touches 0 (Efron and Tibshirani
    1993, section 15.4); it is at least 2 / (NUM_RESAMPLES + 1).
    """
    from scipy.stats import bootstrap

    count, is_share = len(ours[0]), ours[0].form == "share"
    gained = np.mean([run.values[:, 0] for run in ours], axis=0) - np.mean([run.values[:, 0] for run in others], axis=0)

    def difference(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        del axis  # the last
        if is_share:  # a mean over rows of a mean over runs
            return gained[rows].mean(-1)
        found = metrics([*ours, *others], rows)
        return found[..., : len(ours)].mean(-1) - found[..., len(ours) :].mean(-1)

    found: Any = bootstrap(
        (np.arange(count),),
        difference,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, _RESAMPLED_AT_ONCE // count),
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    drawn, interval = cast(np.ndarray, found.bootstrap_distribution), found.confidence_interval
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Contrast(
        "paired bootstrap",
        float(difference(np.arange(count))),
        float(interval.low),
        float(interval.high),
        min(1.0, 2 * (tail + 1) / (NUM_RESAMPLES + 1)),
        (count, count),
    )


def with_holm(contrasts: Sequence[Contrast | None]) -> list[Contrast | None]:
    """The contrasts with p corrected for multiple testing (Holm 1979, jstor.org/stable/4615733)."""
    from statsmodels.stats.multitest import multipletests

    known = [contrast.p for contrast in contrasts if contrast is not None and contrast.p is not None]
    found: Any = multipletests(known, method="holm") if known else ((), np.empty(0))
    adjusted = iter(found[1].tolist())
    return [
        contrast if contrast is None or contrast.p is None else replace(contrast, p_holm=next(adjusted))
        for contrast in contrasts
    ]


def with_tests(comparison: Comparison, scores: Mapping[str, RowScores | None]) -> Comparison:
    """Test each row against the baseline of its task, over seeds and over rows. Holm's correction covers each kind.

    Args:
        scores: row scores by run name. A test over rows needs those of every run on both sides.
    """
    seeds: list[Contrast | None] = []
    rows: list[Contrast | None] = []
    for row in comparison.rows:
        base = comparison.row(comparison.baseline or "", row.task)
        if base is None or base is row:
            seeds.append(None)
            rows.append(None)
            continue
        seeds.append(over_seeds(row.by_seed, base.by_seed))
        ours, others = ([scores.get(run) for run in one.runs] for one in (row, base))
        known, known_others = ([one for one in side if one is not None] for side in (ours, others))
        has_all = (len(known), len(known_others)) == (len(ours), len(others))
        rows.append(over_rows(known, known_others) if has_all else None)
    tested = zip(comparison.rows, with_holm(seeds), with_holm(rows))
    return replace(comparison, rows=[replace(row, seeds_test=seed, rows_test=own) for row, seed, own in tested])


def _is_constant(values: Any) -> bool:
    """Whether the values are equal up to rounding."""
    return float(np.ptp(values)) <= 1e-12 * max(1.0, float(np.abs(values).max()))
