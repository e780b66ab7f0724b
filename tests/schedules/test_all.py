"""What holds for every schedule, whatever it measures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from fastpeft.config.schedules import SCHEDULES
from fastpeft.schedules.schedule import Schedule
from fastpeft.signals import BlockSums, Measured, Need, Secants
from tests.support.measurements import BLOCKS, FIELDS, PEAK, K, U, make, only, rates_of, run_of, spoilt, table

NAMES = SCHEDULES.names
MOST = 30
"""No rate is more than this many peaks."""
GARBAGE = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-300, 1e300, -1e300, 1e-8, 1.0)


def through_json(schedule: Schedule, name: str) -> Schedule:
    other = make(name)
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict(), allow_nan=False)))
    return other


def check_sane(schedule: Schedule, measured: Measured | None, progress: float) -> None:
    rates = schedule.rates(measured, progress)
    assert 0 <= rates.lr <= MOST * PEAK * (1 + 1e-9), (rates, measured)  # false for NaN too
    if rates.multiplier_K is not None:
        assert rates.multiplier_K.shape == (K,)
        assert np.isfinite(rates.multiplier_K).all(), (rates, measured)
        assert (rates.multiplier_K >= 0).all()


def test_the_measurements_have_a_field_for_every_need() -> None:
    assert set(FIELDS) == set(Need)


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_is_exact_wherever_it_stops(name: str, seed: int) -> None:
    """A relay of schedules, each of which takes a few steps and hands its state on, gives the rates of one."""
    rng = np.random.default_rng(seed)
    run = run_of(420, seed, skips=(2, 40, 41, 133))
    schedule = make(name)
    whole = rates_of(schedule, run)
    relay, told = make(name), []
    for i in range(len(run)):
        (rates,) = rates_of(relay, run[: i + 1], first=i)
        assert rates.lr == whole[i].lr, i
        assert np.array_equal(table([rates]), table([whole[i]])), i
        told += relay.told()
        if i < 12 or rng.random() < 0.15:
            relay = through_json(relay, name)
    assert told == schedule.told()
    assert relay.state_dict() == schedule.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_not_changed_by_the_steps_after_it(name: str) -> None:
    run = run_of(60)
    schedule = make(name)
    rates_of(schedule, run[:40])
    state = schedule.state_dict()
    text = json.dumps(state)
    rates_of(schedule, run, first=40)
    assert json.dumps(state) == text


@pytest.mark.parametrize("name", NAMES)
def test_what_it_declares_is_all_that_it_reads(name: str, seed: int) -> None:
    schedule = make(name)
    run = run_of(480, seed, skips=(17, 90))
    bare = [only(measured, schedule.needs) for measured in run]
    want, got = rates_of(make(name), run), rates_of(schedule, bare)
    assert np.array_equal(table(got), table(want))
    assert [rates.lr for rates in got] == [rates.lr for rates in want]


@pytest.mark.parametrize("name", [name for name in NAMES if make(name).needs])
def test_whatever_it_declares_it_reads(name: str, seed: int) -> None:
    """Without one of the needs the trace is another one."""
    needs, run = make(name).needs, run_of(480, seed)
    want = table(rates_of(make(name), run))
    for need in needs:
        bare = [only(measured, needs - {need}) for measured in run]
        assert not np.array_equal(table(rates_of(make(name), bare)), want), need


@pytest.mark.parametrize("name", NAMES)
def test_a_run_keeps_the_rails(name: str, seed: int) -> None:
    run, schedule = run_of(400, seed, skips=(1, 2, 3, 200)), make(name)
    for before, measured in zip([None, *run], run):
        check_sane(schedule, before, measured.progress)
    json.dumps(schedule.state_dict(), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_garbage_comes_to_nothing(name: str, seed: int) -> None:
    """Figures that are not finite, huge or negative, skipped or not, in and after the warm-up; then a run as any."""
    rng = np.random.default_rng(seed)
    schedule, num_steps = make(name), 400

    def draw() -> float:
        return float(rng.choice(GARBAGE))

    def draws(count: int) -> np.ndarray:
        return rng.choice(GARBAGE, count)

    for step, good in enumerate(run_of(num_steps, seed), 1):
        bad = replace(
            good, loss=draw(), grad_norm=draw(), elapsed_s=draw(), skipped=bool(rng.integers(2)),
            blocks=BlockSums(*(draws(U) for _ in range(4))), secant=Secants(draws(U), draws(U)),
            answer_fisher=draw(), prompt_fisher=draw(), entropy=draw(), lens_entropy=draw(),
            answer_grad_sq_K=draws(K),
        )  # fmt: skip
        some = replace(good, **{field: getattr(bad, field) for field in vars(bad) if rng.random() < 0.3})
        measured = (bad, good, some, None)[int(rng.integers(4))]
        check_sane(schedule, measured, min(1.0, step / num_steps))
        if step % 10 == 0:
            json.dumps(schedule.state_dict(), allow_nan=False)
    for value in GARBAGE:
        check_sane(schedule, replace(spoilt(good, value), skipped=False), 1.0)
        json.dumps(schedule.state_dict(), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.inf, 1e300, 7.0])
def test_what_a_skipped_step_measured_means_nothing(name: str, value: float) -> None:
    skips = (3, 30, 31, 120)
    nothing = run_of(200, 1, skips)
    something = [spoilt(measured, value) if measured.skipped else measured for measured in nothing]
    traces = [table(rates_of(make(name), run)) for run in (nothing, something)]
    assert np.array_equal(*traces)


def test_no_two_schedules_give_the_same_trace() -> None:
    run = run_of(400)
    traces = {name: table(rates_of(make(name), run)) for name in NAMES}
    for name, other in combinations(NAMES, 2):
        gap = np.abs(traces[name] - traces[other])
        assert gap.max() > 0.03 * PEAK, f"{name} and {other} differ by {gap.max():.2g} only"
        assert (gap > 1e-3 * PEAK).any(1).mean() > 0.15, f"{name} and {other} differ on a few steps only"


@pytest.mark.parametrize("name", NAMES)
def test_it_knows_nothing_but_its_state(name: str) -> None:
    """Two at once do not disturb each other: nothing is kept in the class or the module."""
    run, other = run_of(120), run_of(120, seed=9, skips=(5, 50))
    want = table(rates_of(make(name), run))
    first, second = make(name), make(name)
    rows = []
    for i in range(len(run)):
        rows += rates_of(first, run[: i + 1], first=i)
        rates_of(second, other[: i + 1], first=i)
    assert np.array_equal(table(rows), want)


def test_blocks_are_those_of_the_measurements() -> None:
    assert (len(BLOCKS), len(BLOCKS.num_elements)) == (K, U)
