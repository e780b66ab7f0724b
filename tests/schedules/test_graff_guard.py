"""GRAFF's guard and rails: the projection, the limit on the rate, and whatever else may be measured.

Shape suffixes: K blocks, U units.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastpeft.schedules import planner
from fastpeft.schedules.graff import LOG_STEPS, LR_MAX, LR_MIN, SLEW, STABLE
from fastpeft.signals import BlockSums, Measured, Secants
from tests.support.graff_inputs import PEAK, U, curved, make, reading, trace, weights_file

rows = hnp.arrays(np.float64, planner.STATE, elements=st.floats(-5, 5))


@given(row_D=rows, mean_D=rows, low=st.floats(-9, 9), width=st.floats(0, 9))
def test_projection_holds_its_constraint_and_moves_no_further_than_it_must(row_D, mean_D, low, width):
    square, high = float(mean_D @ mean_D), low + width
    new_D = planner.project(row_D, mean_D, low, high)
    old, new = float(row_D @ mean_D), float(new_D @ mean_D)
    if square >= planner.MIN_SQUARE:
        assert low - 1e-6 <= new <= high + 1e-6
        distance = max(low - old, old - high, 0.0) / math.sqrt(square)
        assert np.linalg.norm(new_D - row_D) == pytest.approx(distance, abs=1e-9)
    else:  # part of the way, and never past it
        assert min(max(old, low), high) == pytest.approx(np.clip(new, min(old, low), max(old, high)), abs=9)
        assert max(low - new, new - high, 0.0) <= max(low - old, old - high, 0.0) + 1e-9
    if low <= old <= high:
        np.testing.assert_array_equal(new_D, row_D)


@pytest.mark.parametrize("guard", ["lagged", "paper"])
def test_guard_keeps_rate_times_curvature_under_the_limit_after_every_update(guard, seed, tmp_path):
    random = np.random.default_rng(seed)
    schedule = make(guard=guard, warm_start=weights_file(tmp_path, seed), outer_learning_rate=0.02)
    trace(schedule, [None])
    active, last_lr = 0, PEAK
    for step in range(1, 80):
        rates = schedule.rates(curved(step, random.uniform(0, 4000, size=U)), 0.0)
        limit = STABLE / schedule.curvature_max(rates.multiplier_K)
        schedule.save(tmp_path)
        row_D = planner.views(planner.load_weights(tmp_path / planner.SHIPPED.name))["decoder.weight"][0]
        mean_D = np.array(schedule.state_dict()["h"]).mean(0)
        log_eta = row_D @ mean_D + math.log(PEAK)
        assert mean_D @ mean_D >= planner.MIN_SQUARE
        assert log_eta <= math.log(limit) + 1e-6
        active += log_eta >= math.log(limit) - 1e-6
        # What is emitted holds it too, or falls as fast as it may.
        assert rates.lr <= max(limit * (1 + 1e-6), last_lr * math.exp(-SLEW) * (1 + 1e-9)) or step == 1
        last_lr = rates.lr
    assert active > 10  # the descent asks for more all the time


def test_guard_heeds_multipliers_and_no_negative_curvature(seed):
    schedule = make()
    trace(schedule, [None, curved(1, np.array([5.0, 2.0, -900.0, 1.0, 70.0, 70.0]))])
    assert schedule.curvature_max(np.array([1.0, 4.0, 1.0, 1.0])) == pytest.approx(8.0)
    flat = make()
    rates = trace(flat, [None, *(curved(step, np.full(U, -1e9)) for step in range(1, 50))])
    assert rates[-1][0] > rates[0][0]


def test_without_a_guard_the_rate_goes_past_the_limit(seed):
    rates = trace(make(guard="off"), [None, *(curved(step, np.full(U, 1e4)) for step in range(1, 100))])
    assert rates[-1][0] * 1e4 > 2 * STABLE


@pytest.mark.parametrize("descent", [1.0, -1.0])
def test_log_eta_moves_slowly_and_does_not_wind_up_at_a_rail(descent):
    rail = LR_MAX if descent > 0 else LR_MIN
    peak_lr = rail / 2 if descent > 0 else 2 * rail
    schedule = make(peak_lr=peak_lr, guard="off", outer_learning_rate=0.05)
    flat = np.zeros(U)
    there = trace(schedule, [None, *(curved(step, flat, descent) for step in range(1, 300))])
    back = trace(schedule, [curved(step, flat, -descent) for step in range(300, 400)])
    lr = np.array([row[0] for row in there + back])
    assert np.abs(np.diff(np.log(lr))).max() <= SLEW * (1 + 1e-9)
    assert lr[299] == pytest.approx(rail)
    assert abs(math.log(lr[-1] / rail)) > 0.5  # it left the rail soon after the turn


anything = st.floats(allow_nan=True, allow_infinity=True)
sums = hnp.arrays(np.float64, U, elements=anything)


ANYTHING = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1.0, 1e-300, 1e300, -1e300, 1e-8, 3.7)


def garbage(random: np.random.Generator, num_steps: int) -> list[Measured | None]:
    def sums() -> np.ndarray:
        return random.choice(ANYTHING, U)

    def one() -> float:
        return float(random.choice(ANYTHING))

    readings = []
    for step in range(1, num_steps + 1):
        blocks = BlockSums(sums(), sums(), sums(), sums()) if random.random() < 0.8 else None
        secant = Secants(sums(), sums()) if random.random() < 0.8 else None
        measured = Measured(
            step=step, progress=0.1, elapsed_s=one(), lr=one(), num_tokens=1, loss=one(), grad_norm=one(),
            skipped=bool(random.random() < 0.2), blocks=blocks, secant=secant, lens_entropy=one(),
        )  # fmt: skip
        readings.append(measured if random.random() < 0.7 else None)
    return readings


@pytest.mark.parametrize("guard", ["lagged", "off"])
@pytest.mark.parametrize("trace_decay", [0.0, 0.5])
def test_rates_stay_inside_the_rails_whatever_is_measured(guard, trace_decay, seed):
    random = np.random.default_rng(seed)
    for _ in range(20):
        schedule = make(guard=guard, trace_decay=trace_decay, anneal=0.5)
        for row in trace(schedule, garbage(random, 25)):
            assert LR_MIN <= row[0] <= LR_MAX  # false for NaN
            assert all(0 <= m <= 2 for m in row[1:])
        json.dumps(schedule.state_dict(), allow_nan=False)


def test_features_that_are_not_finite_are_replaced_and_counted(seed):
    random, schedule = np.random.default_rng(seed), make()
    readings = [None, *(reading(random, step) for step in range(1, LOG_STEPS))]
    readings[5] = dataclasses.replace(readings[5], lens_entropy=math.nan)
    readings[6] = dataclasses.replace(readings[6], lens_entropy=None)  # none where there is none: no fault
    readings[9] = dataclasses.replace(readings[9], blocks=BlockSums(*np.full((4, U), np.nan)))
    trace(schedule, readings)
    ((type, fields),) = schedule.told()
    assert type == "schedule"
    assert fields["replaced_features"] == 1
    assert fields["dropped_hypergradients"] == 1
