"""Each test against an example that its source, or a textbook, works out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, chi2, spearmanr

from fastpeft.compare.row_scores import RowScores, metrics
from fastpeft.compare.significance import (
    NUM_RESAMPLES,
    mcnemar_test,
    over_rows,
    over_seeds,
    paired_bootstrap,
    paired_t,
    welch_t,
    with_holm,
)
from fastpeft.data.predictions import Answer, Predictions

# ---- over seeds ---------------------------------------------------------------------------------


def test_paired_t_on_students_own_data():
    """Hours of sleep gained by two drugs, Student 1908; R's help of t.test prints t = -4.0621, df = 9, p = 0.002833 and
    the interval -2.4598858 to -0.7001142."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_t(first, second)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert found.effect == pytest.approx(-4.0621 / math.sqrt(10), abs=5e-5)
    assert (found.difference, found.count) == (pytest.approx(-1.58), (10, 10))


def test_welchs_t_on_a_published_example():
    """Example 1 of Wikipedia's article on Welch's test: t = -2.46, 25.0 degrees of freedom, p = 0.021."""
    first = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    second = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    found = welch_t(first, second)
    assert found.p == pytest.approx(0.021, abs=5e-4)
    assert found.difference == pytest.approx(20.82 - 22.98667, abs=1e-3)
    assert found.low < found.difference < found.high < 0


def test_hedges_g_on_borensteins_example():
    """Borenstein et al. 2009, page 26: means 103 and 100, deviations 5.5 and 4.5, 50 each: g = 0.5924."""

    def sample(mean, deviation):
        values = np.linspace(-1, 1, 50)
        return (mean + deviation * (values - values.mean()) / values.std(ddof=1)).tolist()

    assert welch_t(sample(103, 5.5), sample(100, 4.5)).effect == pytest.approx(0.5924, abs=5e-5)


def test_seeds_are_paired_where_both_sides_have_them():
    ours, others = {0: 0.5, 1: 0.6, 2: 0.9}, {1: 0.5, 2: 0.7, 3: 0.1}
    assert over_seeds(ours, others) == paired_t([0.6, 0.9], [0.5, 0.7])
    assert over_seeds(ours, {2: 0.7, 3: 0.1}) == welch_t([0.5, 0.6, 0.9], [0.7, 0.1])
    assert over_seeds(ours, {3: 0.1}) is None
    assert over_seeds({0: 1.0}, {0: 0.5}) is None, "one run is no sample"


def test_what_does_not_vary_has_no_p():
    found = paired_t([0.5, 0.6], [0.4, 0.5])
    assert (found.p, found.effect, found.difference) == (None, None, pytest.approx(0.1))
    assert "do not vary" in found.note
    assert welch_t([0.5, 0.5], [0.4, 0.4]).p is None
    assert welch_t([0.5, 0.5], [0.4, 0.3]).p is not None


# ---- over rows ----------------------------------------------------------------------------------


def shares(right, rows="same"):
    return RowScores(rows, "share", np.array(right, np.float64)[:, None])


def pair(both, gained, lost, neither):
    ours = [1] * both + [1] * gained + [0] * lost + [0] * neither
    others = [1] * both + [0] * gained + [1] * lost + [0] * neither
    return shares(ours), shares(others)


def test_mcnemar_on_a_published_example():
    """The first example of Wikipedia's article on McNemar's test: 121 and 59 of 314; (121 - 59)^2 / (121 + 59) = 21.35,
    and 20.67 with Edwards's correction, with one degree of freedom."""
    found = mcnemar_test(*pair(101, 121, 59, 33))
    assert pytest.approx((21.35, 20.67), abs=0.01) == (62**2 / 180, 61**2 / 180)
    assert found.p == pytest.approx(chi2.sf(61**2 / 180, 1))
    assert (found.difference, found.effect) == (pytest.approx(62 / 314), pytest.approx(121 / 59))
    assert found.note == "121 rows gained, 59 lost"


def test_the_interval_of_agrestis_ratings():
    """Agresti, Categorical Data Analysis, 2nd edition, page 410: approval fell by 0.04, 95 % interval 0.02 to 0.06."""
    found = over_rows(*([side] for side in pair(794, 150, 86, 570)))
    assert found.test == "McNemar"
    assert (found.difference, found.low, found.high) == pytest.approx((0.04, 0.021, 0.059), abs=2.5e-3)


def test_mcnemar_is_exact_where_few_rows_differ():
    """2 and 10 of 12: twice the lower tail of a fair coin."""
    found = mcnemar_test(*pair(20, 2, 10, 5))
    assert found.p == pytest.approx(2 * binom.cdf(2, 12, 0.5))
    assert mcnemar_test(*pair(20, 0, 0, 5)).p == 1.0
    assert mcnemar_test(*pair(20, 3, 0, 5)).effect is None


def test_the_bootstrap_agrees_with_mcnemar_on_many_rows():
    ours, others = pair(1500, 80, 50, 400)
    exact, drawn = mcnemar_test(ours, others), paired_bootstrap([ours], [others])
    assert drawn.difference == pytest.approx(exact.difference)
    assert drawn.p == pytest.approx(exact.p, abs=0.006)


def test_the_bootstrap_keeps_rows_together(seed):
    """The spread of the difference is that of paired rows: seeds that are right on the same rows have nearly none."""
    rng = np.random.default_rng(seed)
    right = rng.random(800) < 0.7
    ours, others = shares(right | (np.arange(800) < 40)), shares(right)
    found = paired_bootstrap([ours], [others])
    apart = ours.values[:, 0] - others.values[:, 0]
    assert found.high - found.low == pytest.approx(2 * 1.96 * apart.std() / math.sqrt(800), rel=0.1)
    assert found.low > 0


def test_several_seeds_are_averaged_and_a_sure_difference_has_the_least_p():
    right, wrong = shares([1] * 50), shares([0] * 50)
    found = over_rows([right, right], [wrong, right])
    assert (found.test, found.difference) == ("paired bootstrap", 0.5)
    assert found.p == pytest.approx(2 / (NUM_RESAMPLES + 1))
    assert paired_bootstrap([right], [right]).p == 1.0


def test_rows_must_be_the_same():
    ours, others = pair(5, 2, 1, 1)
    assert over_rows([ours], [shares(others.values[:, 0], rows="others")]) is None
    assert over_rows([], [others]) is None


def test_other_metrics_are_computed_on_each_sample(seed):
    rng = np.random.default_rng(seed)
    counts = np.stack([np.minimum(a := rng.integers(0, 4, 60), b := rng.integers(0, 4, 60)), a, b], 1)
    numbers = rng.normal(size=(60, 2)).round(1)
    f1, rank = RowScores("r", "f1", counts.astype(np.float64)), RowScores("r", "rank", numbers)
    samples = rng.integers(0, 60, (5, 60))
    for rows, one, other in zip(samples, metrics([f1], samples)[:, 0], metrics([rank], samples)[:, 0]):
        hits, said, there = counts[rows].sum(0)
        assert one == pytest.approx(2 * hits / (said + there))
        assert other == pytest.approx(spearmanr(*numbers[rows].T).statistic)
    assert metrics([RowScores("r", "rank", np.ones((4, 2)))], np.arange(4)) == 0
    assert metrics([RowScores("r", "f1", np.zeros((4, 3)))], np.arange(4)) == 0


def test_several_runs_are_sampled_alike(seed):
    rng = np.random.default_rng(seed)
    runs = [shares(rng.random(30) < 0.5) for _ in range(3)]
    samples = rng.integers(0, 30, (4, 30))
    expected = [[run.values[rows, 0].mean() for run in runs] for rows in samples]
    assert metrics(runs, samples) == pytest.approx(np.array(expected))


def test_row_scores_of_answers():
    def predictions(*answers):
        return Predictions("test", 1, "m", 0.0, "hash", list(answers), [()] * len(answers))

    assert RowScores.of(predictions(Answer("a", "b", correct=False))).values.tolist() == [[0]]
    assert RowScores.of(predictions(Answer([], [], counts=(1, 2, 3)))).form == "f1"
    assert RowScores.of(predictions(Answer(1.5, 2.0))).values.tolist() == [[2.0, 1.5]]
    assert RowScores.of(predictions(Answer(1.5, "nan"))) is None
    assert RowScores.of(predictions()) is None


# ---- many of them -------------------------------------------------------------------------------


def test_holm_on_a_published_example():
    """Wikipedia's article on Holm's method: 0.01, 0.04, 0.03 and 0.005 at 0.05: the first and the last are rejected."""
    contrasts = [paired_t([1.0, 2.0], [0.0, 0.0])] * 4
    contrasts = [type(one)(**vars(one) | {"p": p}) for one, p in zip(contrasts, (0.01, 0.04, 0.03, 0.005))]
    found = with_holm([contrasts[0], None, *contrasts[1:]])
    assert found[1] is None
    assert [one.p_holm for one in found if one] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert with_holm([None]) == [None]
    unknown = paired_t([0.5, 0.6], [0.4, 0.5])
    assert with_holm([unknown, contrasts[0]])[1].p_holm == 0.01, "one without p counts for nothing"
