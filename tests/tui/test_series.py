"""Columns, axes, thinning and smoothing against plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpeft.tui.series import Series, StepTable, Table
from fastpeft.tui.smooth import Smoothed, ema
from fastpeft.tui.thin import BLOCK_ROWS, thinned


def slow_ema(y, weight):
    state, out = 0.0, []
    for i, value in enumerate(y, 1):
        state = weight * state + (1 - weight) * value
        out.append(state / (1 - weight**i))
    return np.array(out)


def step_rows(num, first=0, tokens=10.0, seconds=0.5, watts=100.0):
    """As StepTable reads them."""
    i = np.arange(first, first + num, dtype=float)
    rows = np.zeros((len(StepTable.READ), num))
    rows[:4] = [(i + 1) * seconds, i, np.full(num, tokens), (i + 1) * seconds * watts]
    rows[4] = i
    return rows


# ---- tables --------------------------------------------------------------------------------


def test_a_table_grows_and_earlier_views_stay():
    table = Table("a", "b")
    table.append(np.array([[1.0, 2.0], [3.0, 4.0]]))
    early = table.take("b")[0]
    for i in range(1000):
        table.append(np.full((2, 7), i, dtype=float))
    assert len(table) == 7002
    assert early.tolist() == [3.0, 4.0]
    assert table.take("a")[0][:9].tolist() == [1.0, 2.0] + [0.0] * 7


def test_rows_ahead_are_shown_in_the_order_of_their_places_and_then_settle():
    table = Table("a")
    table.put_ahead({30: np.array([[3.0]]), 10: np.array([[1.0]])})
    table.put_ahead({20: np.array([[2.0]])})
    table.append(np.array([[0.0]]))
    assert table.take("a")[0].tolist() == [0, 1, 2, 3]
    assert table.num_settled == 1
    table.append_ahead(10)
    table.append(np.array([[1.5]]))
    assert table.take("a")[0].tolist() == [0, 1, 1.5, 2, 3]
    table.append_ahead(20)
    table.append_ahead(30)
    assert table.take("a")[0].tolist() == [0, 1, 1.5, 2, 3]
    assert table.num_settled == len(table) == 5


@pytest.mark.parametrize("sizes", [[100], [1, 1, 98], [31, 33, 36], [50, 50]])
def test_rates_do_not_depend_on_how_the_rows_came(sizes):
    table, first = StepTable(), 0
    for size in sizes:
        table.append(step_rows(size, first))
        first += size
    tokens, rate, power = table.take("tokens", "tokens_per_s", "power_w")
    assert tokens.tolist() == [10.0 * (i + 1) for i in range(100)]
    assert math.isnan(rate[0])
    np.testing.assert_allclose(rate[1:], 20.0)
    np.testing.assert_allclose(power[1:], 100.0)


def test_a_rate_is_the_mean_over_the_last_32_steps():
    rows = step_rows(100)
    rows[2, 60:] = 40.0
    table = StepTable()
    table.append(rows)
    rate = table.take("tokens_per_s")[0]
    assert rate[59] == pytest.approx(20.0)
    assert rate[75] == pytest.approx((16 * 10 + 16 * 40) / 16)
    assert rate[95] == pytest.approx(80.0)


def test_tokens_between_rows_ahead_are_estimated_and_exact_once_read():
    table, rows = StepTable(), step_rows(100)
    table.put_ahead({0: rows[:, :10], 900: rows[:, 90:]})
    assert table.take("tokens")[0].tolist() == [10.0 * (i + 1) for i in [*range(10), *range(90, 100)]]
    table.append_ahead(0)
    table.append(rows[:, 10:90])
    table.append_ahead(900)
    tokens, rate = table.take("tokens", "tokens_per_s")
    assert tokens.tolist() == [10.0 * (i + 1) for i in range(100)]
    np.testing.assert_allclose(rate[1:], 20.0)


# ---- axes ----------------------------------------------------------------------------------


def test_every_axis_of_a_step_series():
    steps = StepTable()
    steps.append(step_rows(4))
    series = Series(steps, "loss", steps)
    assert series.x("time").tolist() == [0.5, 1.0, 1.5, 2.0]
    assert series.x("steps").tolist() == [0, 1, 2, 3]
    assert series.x("tokens").tolist() == [10, 20, 30, 40]
    assert series.x("joules").tolist() == [50, 100, 150, 200]
    assert series.y.tolist() == [0, 1, 2, 3]


def test_other_tables_take_tokens_and_joules_from_the_steps():
    steps, table = StepTable(), Table("elapsed_s", "step", "y")
    steps.append(step_rows(4))
    table.append(np.array([[0.1, 1.25, 9.0], [0, 2, 4], [7, 8, 9.0]]))
    series = Series(table, "y", steps)
    assert series.x("tokens").tolist() == [0, 20, 40]
    assert series.x("joules").tolist() == [50, 125, 200]


def test_an_axis_of_which_nothing_is_known_draws_nothing():
    series = Series.of(np.arange(3.0), np.arange(3.0))
    assert series.limits("joules") is None
    assert len(series.window("joules").x) == 0
    assert series.nearest("joules", 1.0) is None
    assert series.limits("time") == (0.0, 2.0)


def test_last_passes_over_what_was_not_measured():
    values = np.array([1.0, 2.0, np.nan])
    table = Table("elapsed_s", "step", "y")
    table.append(np.array([np.arange(3.0), np.arange(3.0), values]))
    assert Series(table, "y", StepTable(), nan_is_missing=True).last == 2.0
    assert math.isnan(Series(table, "y", StepTable()).last)
    empty = Series(Table("elapsed_s", "step", "y"), "y", StepTable())
    assert (empty.last, empty.limits("time"), len(empty)) == (None, None, 0)


def test_nearest_is_the_nearest_row():
    series = Series.of(np.array([0.0, 1.0, 3.0]), np.array([5.0, 6.0, 7.0]))
    assert series.nearest("time", -9) == (0.0, 5.0)
    assert series.nearest("time", 1.9) == (1.0, 6.0)
    assert series.nearest("time", 2.1) == (3.0, 7.0)
    assert series.nearest("time", 99) == (3.0, 7.0)


def test_rows_out_of_order_are_sorted():
    series = Series.of(np.array([2.0, 0.0, 1.0]), np.array([20.0, 0.0, 10.0]))
    assert series.window("time").y.tolist() == [0, 10, 20]


# ---- thinning ------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(-1e3, 1e3)), min_size=1, max_size=300),
    st.integers(1, 20),
)
def test_thinning_keeps_each_buckets_extremes(points, buckets):
    points = sorted(points)
    x, y = (np.array(column) for column in zip(*points))
    window = thinned(x, y, buckets)
    assert len(window.x) <= max(2 * buckets, 0) or len(x) <= 2 * buckets
    assert set(zip(window.x, window.y)) <= set(points)
    assert (np.diff(window.x) >= 0).all()
    edges = np.linspace(x[0], x[-1], buckets + 1)
    bucket = np.searchsorted(edges[:-1], x, side="right")
    kept_in = np.searchsorted(edges[:-1], window.x, side="right")
    for i in set(bucket):
        there, kept = y[bucket == i], window.y[kept_in == i]
        assert kept.min() == there.min()
        assert kept.max() == there.max()


def test_only_the_range_is_drawn_and_a_neighbour_on_either_side():
    series = Series.of(np.arange(100.0), np.arange(100.0))
    x, y, *_ = series.window("time", 20.5, 30.5, 1000)
    assert x.tolist() == y.tolist() == list(range(20, 32))


def test_values_that_are_not_finite_are_marked_and_missing_ones_are_not():
    y = np.array([1.0, np.nan, np.inf, -np.inf, 2.0])
    window = thinned(np.arange(5.0), y, 100)
    assert window.x.tolist() == [0, 4]
    assert window.gaps_x.tolist() == [1, 2, 3]
    assert window.num_not_finite == 3
    window = thinned(np.arange(5.0), y, 100, nan_is_missing=True)
    assert window.gaps_x.tolist() == [2, 3]
    assert window.x.tolist() == [0, 4]


def test_a_log_scale_leaves_out_and_counts():
    window = thinned(np.arange(5.0), np.array([1.0, 0.0, -3.0, np.nan, 2.0]), 100, positive=True)
    assert window.y.tolist() == [1, 2]
    assert (window.num_not_positive, window.num_not_finite) == (2, 1)


@pytest.mark.parametrize("positive", [False, True])
def test_long_ranges_are_drawn_from_blocks_to_within_a_block(positive, seed):
    rng = np.random.default_rng(seed)
    num, buckets = 200_000, 20
    y = rng.normal(size=num)
    y[rng.integers(num, size=50)] = np.nan
    y[rng.integers(num, size=50)] = np.inf
    x = np.cumsum(rng.exponential(size=num))
    series, grown = Series.of(x, y), 0
    table = Table("elapsed_s", "step", "y")
    live = Series(table, "y", StepTable())
    for size in (1, 30_000, 70_000, 99_999):  # as it grows, and all at once
        table.append(np.array([x, x, y])[:, grown : grown + size])
        grown += size
        live.window("time", buckets=buckets, positive=positive)
    exact = thinned(x, y, buckets, positive)
    for found in (series.window("time", buckets=buckets, positive=positive), live.window("time", buckets=buckets)):
        assert len(found.x) <= 2 * buckets
        assert found.num_not_finite == exact.num_not_finite
        rows = np.searchsorted(x, found.x)
        np.testing.assert_array_equal(y[rows], found.y)
        assert found.y.max() == exact.y.max()
    found = series.window("time", buckets=buckets, positive=positive)
    assert found.num_not_positive == exact.num_not_positive
    assert found.y.min() == exact.y.min()
    part = series.window("time", low=x[1000], high=x[-1000], buckets=buckets, positive=positive)
    inside = y[999:-998]
    assert part.num_not_finite == (~np.isfinite(inside)).sum()
    assert part.y.max() == inside[np.isfinite(inside)].max()
    rows_a_bucket = num / buckets
    assert rows_a_bucket > 4 * BLOCK_ROWS, "or the blocks were not used"


# ---- smoothing -----------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.sampled_from([0.0, 0.1, 0.6, 0.9, 0.99, 0.9999]))
def test_the_average_is_what_its_formula_says(y, weight):
    np.testing.assert_allclose(ema(np.array(y), weight), slow_ema(y, weight), rtol=1e-9, atol=1e-6)


def test_a_growing_column_is_smoothed_as_a_whole_one(seed):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=5000)
    y[rng.integers(5000, size=20)] = np.nan
    finite = np.isfinite(y)
    want = np.full(5000, np.nan)
    want[finite] = slow_ema(y[finite], 0.97)
    smoothed = Smoothed()
    for num in (1, 100, 101, 2500, 5000):
        got = smoothed(y[:num], 0.97, num_settled=max(0, num - 60))
        np.testing.assert_allclose(got, want[:num], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(smoothed(y, 0.6, 5000)[finite], slow_ema(y[finite], 0.6), rtol=1e-9, atol=1e-12)


def test_a_constant_stays_and_the_beginning_is_not_pulled_to_zero():
    np.testing.assert_allclose(ema(np.full(1000, 3.0), 0.99), 3.0)
