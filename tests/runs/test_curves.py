"""The area under a metric, and what it took to reach a target."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastpeft.runs.curves import Budgets, auc, auc_of, evaluations, is_validation, to_target, to_target_of


def event(step: int, elapsed_s: float, value, **fields):
    common = {"type": "eval", "split": "validation", "metric": "exact_match", "energy_j": 10.0 * elapsed_s}
    return common | {"step": step, "elapsed_s": elapsed_s, "value": value} | fields


@pytest.mark.parametrize(
    ("x", "values", "budget", "from_start", "area"),
    [
        ([10.0], [0.5], 10.0, False, 0.0),  # reached only at the very end
        ([10.0], [0.5], 20.0, False, 0.25),
        ([5.0, 10.0], [0.2, 0.6], 10.0, False, 0.2),
        ([5.0, 10.0], [0.2, 0.6], 20.0, False, 0.4),
        ([2.0, 10.0], [0.2, 0.6], 10.0, True, 0.36),
        ([0.0, 10.0], [0.2, 0.6], 10.0, False, 0.4),
        ([5.0, 15.0], [0.2, 0.6], 10.0, False, 0.15),  # the last one ends after the budget
        ([15.0], [0.7], 10.0, False, 0.0),
        ([5.0, 5.0], [0.2, 0.6], 10.0, False, 0.3),
    ],
)
def test_the_area_by_hand(x, values, budget, from_start, area):
    assert auc(x, values, budget, from_start) == pytest.approx(area, abs=1e-12)


def test_the_area_is_the_integral_of_the_line_through_the_evaluations(seed):
    rng = random.Random(seed)
    for _ in range(20):
        x = sorted(rng.uniform(0, 100) for _ in range(rng.randint(1, 9)))
        values = [rng.random() for _ in x]
        budget = rng.uniform(10, 120)
        grid = (np.arange(200_000) + 0.5) / 200_000 * budget
        for from_start in (False, True):
            line = np.interp(grid, x, values, left=values[0] if from_start else 0.0)
            assert auc(x, values, budget, from_start) == pytest.approx(line.mean(), abs=2e-5)


def test_it_lies_between_0_and_the_best_value_and_a_faster_run_has_more():
    slow, fast = auc([50, 100], [0.3, 0.6], 100), auc([20, 100], [0.3, 0.6], 100)
    assert 0 < slow < fast < 0.6


@pytest.mark.parametrize(("x", "values", "budget"), [([], [], 1.0), ([1.0], [0.5], 0.0), ([1.0], [], 1.0)])
def test_no_area_is_made_up(x, values, budget):
    with pytest.raises(ValueError, match=r"at least one|must be positive"):
        auc(x, values, budget)


def test_the_target_is_reached_at_an_evaluation_never_between_two():
    assert to_target([5.0, 10.0, 15.0], [0.2, 0.6, 0.5], 0.4) == 10.0
    assert to_target([5.0, 10.0, 15.0], [0.2, 0.6, 0.5], 0.6) == 10.0
    assert to_target([5.0, 10.0], [0.2, 0.6], 0.61) is None
    assert to_target([], [], 0.1) is None


def test_only_the_validation_split_and_finite_values_count():
    old = event(3, 3.0, 0.3)
    del old["split"]
    events = [
        {"type": "step", "step": 0, "elapsed_s": 0.5, "loss": 1.0},
        event(10, 10.0, 0.4),
        old,
        event(11, 11.0, "nan"),
        event(12, 12.0, 0.9, split="test"),
        event(12, 13.0, 1.0, split="multiarith"),
    ]
    assert [is_validation(e) for e in events] == [False, True, True, True, False, False]
    found = evaluations(events)
    assert [(e.step, e.elapsed_s, e.energy_j, e.value) for e in found] == [(3, 3.0, 30.0, 0.3), (10, 10.0, 100.0, 0.4)]
    assert to_target_of(found, 0.5) == {"seconds": None, "joules": None}
    assert to_target_of(found, 0.4) == {"seconds": 10.0, "joules": 100.0}


def test_a_budget_divides_in_its_own_unit_and_what_was_spent_in_the_other():
    found = evaluations([event(0, 2.0, 0.2), event(50, 10.0, 0.6)])
    seconds = Budgets.of({"kind": "seconds", "limit": 20.0}, 15.0, 160.0)
    assert (seconds.seconds, seconds.joules) == (20.0, 160.0)
    assert auc_of(found, seconds) == {
        "seconds": pytest.approx((2 * 0.2 + 8 * 0.4 + 10 * 0.6) / 20),
        "joules": pytest.approx((20 * 0.2 + 80 * 0.4 + 60 * 0.6) / 160),
    }
    joules = Budgets.of({"kind": "joules", "limit": 200.0}, 15.0, 160.0)
    assert (joules.seconds, joules.joules) == (15.0, 200.0)
    steps = Budgets.of({"kind": "steps", "limit": 1000}, 15.0, None)
    assert (steps.seconds, steps.joules) == (15.0, None)
    assert auc_of(found, steps)["joules"] is None


def test_without_a_meter_or_an_evaluation_there_is_none():
    found = evaluations([event(1, 1.0, 0.5), event(2, 2.0, 0.6, energy_j=None)])
    assert auc_of(found, Budgets(10.0, 100.0))["joules"] is None, "one reading is missing"
    assert to_target_of(found, 0.5) == {"seconds": 1.0, "joules": None}
    assert auc_of([], Budgets(10.0, None)) == {}
    assert auc_of(found, Budgets(0.0, None)) == {}
