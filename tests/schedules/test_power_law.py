"""The power law: what its fit recovers, what it survives, and what its band is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpeft.schedules.power_law import MAX_EXPONENT, MIN_EXPONENT, PowerLaw, fit_power_law, forecast_band

W, NUM_BLOCKS = 32, 150
T = W * NUM_BLOCKS
TIMES = np.arange(NUM_BLOCKS) * W + (W + 1) / 2


def losses(law: PowerLaw, noise: float = 0.0, rng: np.random.Generator | None = None) -> np.ndarray:
    """Block means of a curve with `noise` on the loss of every step."""
    steps = np.arange(1, T + 1)
    curve = law.floor + np.exp(law.log_scale) * (steps + law.offset) ** -law.exponent
    if rng is not None:
        curve = curve * (1 + noise * rng.standard_normal(T))
    return curve.reshape(NUM_BLOCKS, W).mean(1)


def some_law(rng: np.random.Generator, floor: float = 0.0) -> PowerLaw:
    return PowerLaw(math.log(rng.uniform(1, 10)), rng.uniform(0, 200), rng.uniform(0.1, 0.8), floor)


def fit_along(loss_N: np.ndarray, until: int, every: int = 5, with_floor: bool = False) -> PowerLaw:
    """Refits as in training, each from the one before it."""
    law = None
    for num in range(10, until + 1):
        if num % every == 0 or num == until:
            law = fit_power_law(TIMES[:num], loss_N[:num], num * W, law, with_floor)
    assert law is not None
    return law


def cost(law: PowerLaw, times: np.ndarray, loss_N: np.ndarray) -> float:
    return float(sum((math.log(v) - math.log(law(t))) ** 2 for t, v in zip(times, loss_N)))


@pytest.mark.parametrize("true", [PowerLaw(1.0, 0.0, 0.5), PowerLaw(0.3, 120.0, 0.25), PowerLaw(5.0, 900.0, 0.9)])
def test_the_parameters_of_a_curve_without_noise_are_found(true: PowerLaw) -> None:
    exact_N = np.array([true(t) for t in TIMES])
    law = fit_along(exact_N, NUM_BLOCKS, every=1)
    assert law(T) == pytest.approx(true(T), rel=1e-4)
    assert law.exponent == pytest.approx(true.exponent, rel=0.01)
    assert law.offset == pytest.approx(true.offset, rel=0.03, abs=1)
    assert law.log_scale == pytest.approx(true.log_scale, abs=0.05)


def test_forecasts_of_noisy_curves_are_near_what_comes(seed: int) -> None:
    """Ten per cent of noise on every step, 40 curves; the medians are 1.4, 0.5 and 0.2 %."""
    rng = np.random.default_rng(seed)
    errors = {0.25: [], 0.5: [], 0.75: []}
    for _ in range(40):
        true = some_law(rng)
        loss_N = losses(true, 0.1, rng)
        for share, found in errors.items():
            law = fit_along(loss_N, round(share * NUM_BLOCKS))
            found.append(abs(law(T) / true(T) - 1))
    medians = {share: float(np.median(found)) for share, found in errors.items()}
    assert medians[0.25] < 0.03, medians
    assert medians[0.5] < 0.015, medians
    assert medians[0.75] < 0.008, medians


def test_no_refit_breaks_and_none_is_worse_than_the_straight_line(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        loss_N = losses(some_law(rng), 0.3, rng)
        law = None
        for num in range(10, NUM_BLOCKS, 7):
            law = fit_power_law(TIMES[:num], loss_N[:num], num * W, law)
            assert law is not None
            assert MIN_EXPONENT <= law.exponent <= MAX_EXPONENT
            assert 0 <= law.offset <= num * W
            slope, level = np.polyfit(np.log(TIMES[:num]), np.log(loss_N[:num]), 1)
            line = PowerLaw(level, 0.0, -slope)
            if MIN_EXPONENT <= -slope <= MAX_EXPONENT:
                assert cost(law, TIMES[:num], loss_N[:num]) <= cost(line, TIMES[:num], loss_N[:num]) * (1 + 1e-4)


@pytest.mark.parametrize(
    "curve",
    [np.full(40, 0.7), np.linspace(0.5, 3.0, 40), np.zeros(40), np.geomspace(1, 1e-12, 40)],
    ids=["flat", "rising", "zero", "vanishing"],
)
@pytest.mark.parametrize("with_floor", [False, True])
def test_odd_curves_stay_inside_the_bounds(curve: np.ndarray, with_floor: bool) -> None:
    law = None
    for num in range(10, 41):
        law = fit_power_law(TIMES[:num], curve[:num], num * W, law, with_floor)
        assert law is not None
        assert MIN_EXPONENT <= law.exponent <= MAX_EXPONENT
        assert 0 <= law.floor <= max(curve[:num].min(), 1e-8)
        assert 0 <= law(T) <= law(num * W)
        low, high = forecast_band(law, TIMES[:num], curve[:num], num * W, T)
        assert 0 <= low <= law(T) * (1 + 1e-9)
        assert law(T) * (1 - 1e-9) <= high < math.inf


def test_a_flat_or_rising_curve_is_forecast_flat() -> None:
    for curve in (np.full(40, 0.7), np.linspace(0.5, 3.0, 40)):
        law = fit_power_law(TIMES[:40], curve, 40 * W)
        assert law is not None
        assert law.exponent == MIN_EXPONENT
        assert law(40 * W) == pytest.approx(np.exp(np.log(curve).mean()), rel=2e-3)


def test_blocks_that_are_not_finite_are_left_out() -> None:
    loss_N = losses(PowerLaw(1.0, 50.0, 0.4))
    broken_N = loss_N.copy()
    broken_N[[3, 20, 77]] = math.nan, math.inf, math.nan
    keep_N = np.isfinite(broken_N)
    assert fit_power_law(TIMES, broken_N, T) == fit_power_law(TIMES[keep_N], loss_N[keep_N], T)
    assert fit_power_law(TIMES[:9], np.full(9, math.nan), 9 * W) is None
    assert fit_power_law(TIMES[:3], loss_N[:3], 3 * W, with_floor=True) is None


def test_a_floor_is_found_and_without_it_more_seems_left_to_gain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plain, floored, half = [], [], NUM_BLOCKS // 2
    for _ in range(20):
        true = PowerLaw(math.log(rng.uniform(4, 8)), rng.uniform(0, 100), rng.uniform(0.4, 0.8), 1.0)
        loss_N = losses(true, 0.03, rng)
        improvable = true(half * W) - true(T)
        for found, with_floor in ((plain, False), (floored, True)):
            law = fit_along(loss_N, half, with_floor=with_floor)
            found.append((law(half * W) - law(T)) / improvable)
    assert np.median(plain) > 1.5, np.median(plain)
    assert np.median(floored) == pytest.approx(1.0, abs=0.25)


def test_the_band_holds_nine_blocks_of_ten(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inside = []
    for _ in range(200):
        true = some_law(rng)
        loss_N = losses(true, 0.1, rng)
        half = NUM_BLOCKS // 2
        law = fit_along(loss_N, half, every=25)
        low, high = forecast_band(law, TIMES[:half], loss_N[:half], half * W, T)
        assert low < law(T) < high
        inside.append(low <= loss_N[-1] <= high)
    assert 0.8 <= np.mean(inside) <= 0.97, np.mean(inside)


@given(values=st.lists(st.floats(0, 1e6), min_size=5, max_size=60), with_floor=st.booleans())
def test_any_losses_give_a_law_inside_the_bounds(values: list[float], with_floor: bool) -> None:
    times, now = TIMES[: len(values)], len(values) * W
    law = fit_power_law(times, np.array(values), now, with_floor=with_floor)
    assert law is not None
    assert all(map(math.isfinite, (law.log_scale, law.offset, law.exponent, law.floor)))
    assert MIN_EXPONENT <= law.exponent <= MAX_EXPONENT
    assert 0 <= law.offset <= now
    low, high = forecast_band(law, times, np.array(values), now, 10 * now)
    assert 0 <= low <= high < math.inf
