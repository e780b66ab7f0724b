"""Classic schedules against their closed formulas, their warm-up, and their state."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpeft.config.schedules import SCHEDULES, ScheduleConfig
from fastpeft.schedules import classic, make_schedule
from fastpeft.schedules.schedule import WARMUP_CAP, Schedule

PEAK = 3e-4
FINAL, DECAY = 0.1, 0.25

# A schedule is one row: its share of the peak at q = 0, 1/4, 1/2, 3/4, 7/8, 1 after the warm-up,
# for final_ratio 0.1 and decay_fraction 0.25, worked out by hand.
POINTS = (0.0, 0.25, 0.5, 0.75, 0.875, 1.0)
HALF_COSINE = tuple(0.1 + 0.9 * (1 + math.cos(math.pi * q)) / 2 for q in POINTS)
SHARES = {
    "constant": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "linear": (1.0, 0.775, 0.55, 0.325, 0.2125, 0.1),
    "cosine": HALF_COSINE,
    "wsd": (1.0, 1.0, 1.0, 1.0, 0.1 + 0.9 * (1 - math.sqrt(0.5)), 0.1),
    "rex": (1.0, 6 / 7, 2 / 3, 0.4, 2 / 9, 0.0),
}
SHARE_AT_END = {"constant": 1.0, "rex": 0.0}
NAMES = tuple(SHARES)


def make(name: str, warmup_steps: int = 0, final_ratio: float = FINAL) -> Schedule:
    config = ScheduleConfig(name=name, warmup_steps=warmup_steps, final_ratio=final_ratio, decay_fraction=DECAY)
    return make_schedule(config, PEAK)


def trace(schedule: Schedule, progresses: list[float]) -> list[float]:
    return [schedule.rates(None, progress).lr for progress in progresses]


def steps(count: int) -> list[float]:
    return [i / count for i in range(count)]


def test_every_classic_has_a_row() -> None:
    assert {entry.name for entry in SCHEDULES if entry.target.startswith(f"{classic.__name__}:")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shape_is_the_closed_formula(name: str) -> None:
    assert trace(make(name), list(POINTS)) == pytest.approx(
        [PEAK * share for share in SHARES[name]], rel=1e-9, abs=1e-18
    )


@pytest.mark.parametrize("name", NAMES)
def test_shape_is_stretched_over_what_the_warmup_leaves(name: str) -> None:
    schedule = make(name, warmup_steps=10)
    trace(schedule, [i / 200 for i in range(10)])
    start = 10 / 200
    rates = trace(schedule, [start + (1 - start) * q for q in POINTS])
    assert rates == pytest.approx([PEAK * share for share in SHARES[name]], rel=1e-9, abs=1e-18)


def test_points_of_the_papers_that_end_at_zero() -> None:
    rex = trace(make("rex"), [0.0, 0.1, 0.5, 0.9])
    assert rex == pytest.approx([PEAK, 18 / 19 * PEAK, 2 / 3 * PEAK, 2 / 11 * PEAK])
    cosine = trace(make("cosine", final_ratio=0.0), [0.0, 1 / 3, 0.5, 2 / 3])
    assert cosine == pytest.approx([PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.25 * PEAK])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup_steps", [0, 7, 500])
def test_ends_at_the_final_ratio_exactly_at_the_end(name: str, warmup_steps: int, seed: int) -> None:
    final_ratio = random.Random(seed).uniform(0, 0.5)
    schedule = make(name, warmup_steps, final_ratio)
    rates = trace(schedule, [*steps(230), 1.0])
    assert rates[-1] == pytest.approx(PEAK * SHARE_AT_END.get(name, final_ratio), rel=1e-6, abs=1e-9 * PEAK)


@pytest.mark.parametrize("name", NAMES)
def test_warmup_is_linear_to_the_peak(name: str) -> None:
    schedule = make(name, warmup_steps=20)
    rates = trace(schedule, steps(1000)[:21])
    assert rates[:20] == pytest.approx([PEAK * (i + 1) / 20 for i in range(20)])
    assert rates[20] == pytest.approx(PEAK)
    assert not schedule.told()


@pytest.mark.parametrize("name", NAMES)
def test_warmup_is_capped_at_six_percent_and_says_so(name: str) -> None:
    schedule = make(name, warmup_steps=500)
    rates = trace(schedule, steps(100)[:6])
    assert rates == pytest.approx([PEAK * max((i + 1) / 500, i / 6) for i in range(6)])
    assert not schedule.told()
    assert trace(schedule, [0.06]) == pytest.approx([PEAK])
    ((type, fields),) = schedule.told()
    assert type == "warning"
    assert "6 of 500" in fields["message"]
    assert "6%" in fields["message"]
    trace(schedule, steps(100)[7:])
    assert not schedule.told()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [4, 13, 40, 180])
def test_state_continues_in_warmup_and_in_decay(name: str, stop: int) -> None:
    """Steps 4 and 13 lie in the warm-up, 40 after it, 180 in the decay of every schedule."""
    progresses = steps(200)
    # 14 warm-up steps: over before 6 % of 1,000 steps, cut short by 6 % of 200.
    for scale in (1.0, 0.2):
        unbroken, first, second = (make(name, warmup_steps=14) for _ in range(3))
        scaled = [p * scale for p in progresses]
        expected = trace(unbroken, scaled)
        trace(first, scaled[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert trace(second, scaled[stop:]) == expected[stop:]


def test_no_two_schedules_give_the_same_trace() -> None:
    traces = {name: tuple(trace(make(name, warmup_steps=5), steps(300))) for name in NAMES}
    for name, other in ((a, b) for a in NAMES for b in NAMES if a < b):
        gap = max(abs(x - y) for x, y in zip(traces[name], traces[other]))
        assert gap > 0.05 * PEAK, f"{name} and {other} differ by {gap} only"


@pytest.mark.parametrize("name", NAMES)
@given(
    progresses=st.lists(st.floats(0, 1), min_size=1, max_size=40).map(sorted),
    warmup_steps=st.integers(0, 60),
    final_ratio=st.floats(0, 0.99),
)
def test_rate_is_sane_for_any_monotone_progress(
    name: str, progresses: list[float], warmup_steps: int, final_ratio: float
) -> None:
    schedule = make(name, warmup_steps, final_ratio)
    rates = trace(schedule, progresses)
    assert all(0 <= rate <= PEAK * (1 + 1e-9) for rate in rates)  # false for NaN too
    warm = next((i for i, p in enumerate(progresses) if p >= WARMUP_CAP or i >= warmup_steps), len(rates))
    assert rates[:warm] == sorted(rates[:warm])
    if warm < len(rates):
        assert rates[warm] == pytest.approx(PEAK)
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
