"""Running curvature on a quadratic whose Hessian is known, trained by Adam with and without noise.

Shape suffixes: U units.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastpeft.schedules.running_curvature import RunningCurvature
from fastpeft.signals import Secants

SIZES = (40, 60, 100)
HESSIAN_U = (0.3, 1.0, 4.0)
RATE, BETA1, BETA2 = 0.01, 0.9, 0.99


def measure(random, curvature_scale: float, noise: float, num_steps: int = 600) -> dict[str, np.ndarray]:
    """rate * lambda of each unit: plain, lagged, and from the exact product, each the mean over the last 200 steps."""
    unit = np.repeat(np.arange(3), SIZES)
    hessian = curvature_scale * np.array(HESSIAN_U)[unit]
    x = random.normal(size=len(unit))
    first, second, changes, grad_before = 0.0, 0.0, [np.zeros_like(x)] * 2, None
    kinds = {name: RunningCurvature() for name in ("plain", "lagged", "exact")}
    seen = {name: [] for name in kinds}

    def sums(values):
        return np.bincount(unit, values)

    for step in range(1, num_steps + 1):
        grad = hessian * x + noise * random.normal(size=len(x))
        first, second = BETA1 * first + (1 - BETA1) * grad, BETA2 * second + (1 - BETA2) * grad**2
        root = np.sqrt(second / (1 - BETA2**step))
        if grad_before is not None:
            last, change = changes[1], grad - grad_before
            for name, along, by in (
                ("plain", last, change), ("lagged", changes[0], change), ("exact", last, hessian * last),
            ):  # fmt: skip
                kinds[name].update(Secants(sums(by * along), sums(last * root * along)))
                if step > num_steps - 200:
                    seen[name].append(kinds[name].per_unit())
        grad_before = grad
        delta = -RATE * first / (1 - BETA1**step) / (root + 1e-8)
        x = x + delta
        changes = [changes[1], delta]
    return {name: RATE * np.mean(values, axis=0) for name, values in seen.items()}


def test_without_noise_every_secant_is_the_hessian(seed):
    found = measure(np.random.default_rng(seed), 1.0, 0.0, num_steps=300)
    np.testing.assert_allclose(found["plain"], found["exact"], rtol=1e-9)
    np.testing.assert_allclose(found["lagged"], found["exact"], rtol=0.2)


def test_pure_noise_fools_the_plain_secant_and_not_the_lagged_one(seed):
    found = measure(np.random.default_rng(seed), 0.0, 1.0)
    np.testing.assert_allclose(found["plain"], 1 + BETA1, rtol=0.15)  # at the limit of 1.9, with no curvature at all
    assert (np.abs(found["lagged"]) < 0.2).all()
    np.testing.assert_array_equal(found["exact"], 0)


def test_under_noise_the_lagged_secant_is_near_the_exact_product(seed):
    found = measure(np.random.default_rng(seed), 10.0, 1.0, num_steps=1200)
    assert (np.abs(found["lagged"] - found["exact"]) < 0.15 + 0.25 * found["exact"]).all()
    assert (np.abs(found["plain"] - found["exact"]) > 0.4).all()


def test_readings_that_mean_nothing():
    curvature = RunningCurvature(decay=0.5)
    assert curvature.per_unit() is None
    assert curvature.overall() is None
    curvature.update(Secants(np.array([1.0, 3.0, -1.0]), np.array([2.0, -1.0, 4.0])))
    curvature.update(Secants(np.array([np.nan, 3.0, 1.0]), np.array([2.0, -1.0, np.inf])))
    np.testing.assert_allclose(curvature.per_unit(), [0.5, np.nan, -0.25])
    total = (0.5 + 2.25 - 0.5) / (1.0 - 0.75 + 2.0)
    assert curvature.overall() == pytest.approx(total)


def test_overall_weighs_the_units_by_their_change(seed):
    random = np.random.default_rng(seed)
    curvature = RunningCurvature(decay=0.0)
    curvature.update(Secants(random.normal(size=4), np.ones(4)))
    last = Secants(random.normal(size=4), random.uniform(1, 2, size=4))
    curvature.update(last)
    assert curvature.overall() == pytest.approx(last.change_U.sum() / last.square_U.sum())
    np.testing.assert_allclose(curvature.per_unit(), last.change_U / last.square_U)


def test_state_is_exact(seed):
    random = np.random.default_rng(seed)
    first, second = RunningCurvature(), RunningCurvature()
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.per_unit() is None
    for _ in range(3):
        reading = Secants(random.normal(size=4), random.uniform(size=4))
        first.update(reading)
        second.update(reading)
        second.load_state(json.loads(json.dumps(second.state())))
        np.testing.assert_array_equal(first.per_unit(), second.per_unit())
