"""A metric over a run's seconds and joules: the area under its curve, and the cost of reaching a target.

Reads `eval` events of the validation split. The convention: the metric is 0 until the end of the first evaluation. If
that one is of step 0, its value holds from the start. The metric is linear between evaluations, and stays at the last
value to the end of the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastpeft.runs.events import Event, number

VALIDATION = "validation"


class Evaluation(NamedTuple):
    step: int
    elapsed_s: float
    """Seconds on the budget clock at the end of the evaluation."""
    energy_j: float | None
    """Joules spent until then; None without a meter."""
    value: float
    """The task's metric: at most 1, and below 0 for a negative correlation."""


def is_validation(event: Event) -> bool:
    """Whether this is an `eval` event of the validation split. The curve leaves out a test split, scored once."""
    return event["type"] == "eval" and event.get("split", VALIDATION) == VALIDATION


def evaluations(events: Iterable[Event]) -> list[Evaluation]:
    """Evaluations of the validation split, in order of time, without non-finite values."""
    found = []
    for event in events:
        if is_validation(event) and math.isfinite(value := number(event["value"])):
            energy_j = event.get("energy_j")
            energy_j = None if energy_j is None else number(energy_j)
            found.append(Evaluation(int(event["step"]), number(event["elapsed_s"]), energy_j, value))
    return sorted(found, key=lambda evaluation: evaluation.elapsed_s)


def auc(x: Sequence[float], values: Sequence[float], budget: float, from_start: bool = False) -> float:
    """The area under `values` over [0, budget], divided by `budget`: the metric's mean over the budget.

    Args:
        x: position of each value, ascending, in the unit of `budget`. A value beyond `budget` counts only through the
            part of the line to it that lies within.
        from_start: `values[0]` holds from 0 on, as after an evaluation before the first step. Otherwise the metric is 0
            up to x[0].

    Raises:
        ValueError: no values, another number of positions, or a budget that is not positive.
    """
    if not values or len(x) != len(values):
        raise ValueError(f"as many places as values, and at least one: got {len(x)} and {len(values)}")
    if not budget > 0:
        raise ValueError(f"the budget must be positive, got {budget}")
    points = list(zip(x, values))
    if from_start:
        points.insert(0, (min(0.0, x[0]), values[0]))
    area = 0.0
    for (left, before), (right, after) in itertools.pairwise(points):
        end = min(right, budget)
        if end > left:
            at_end = before + (after - before) * (end - left) / (right - left)
            area += (before + at_end) / 2 * (end - left)
    last_x, last = points[-1]
    return (area + last * max(0.0, budget - last_x)) / budget


def to_target(x: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """The position of the first evaluation at or above `target`; None if there is none.

    Nothing is interpolated: the metric was not measured between evaluations.
    """
    return next((place for place, value in zip(x, values) if value >= target), None)


@dataclass(frozen=True)
class Budgets:
    """The budgets that areas are divided by."""

    seconds: float
    joules: float | None

    @classmethod
    def of(cls, budget: dict[str, Any], elapsed_s: float, energy_j: float | None) -> Budgets:
        """The budget's limit in its own unit; in the other unit what the run spent, as in result.json."""
        kind, limit = budget.get("kind"), budget.get("limit")
        return cls(
            seconds=number(limit) if kind == "seconds" else elapsed_s,
            joules=None if energy_j is None else number(limit) if kind == "joules" else energy_j,
        )


def auc_of(found: Sequence[Evaluation], budgets: Budgets) -> dict[str, float | None]:
    """{seconds, joules} as result.json's `auc`; joules is None without a meter. Empty without an evaluation."""
    if not found or not budgets.seconds > 0:
        return {}
    values, from_start = [one.value for one in found], found[0].step == 0
    joules = _joules(found)
    return {
        "seconds": auc([one.elapsed_s for one in found], values, budgets.seconds, from_start),
        "joules": auc(joules, values, budgets.joules, from_start) if joules and budgets.joules else None,
    }


def to_target_of(found: Sequence[Evaluation], target: float) -> dict[str, float | None]:
    """{seconds, joules} spent by the end of the first evaluation at or above `target`; None: not reached, no meter."""
    values = [one.value for one in found]
    joules = _joules(found)
    return {
        "seconds": to_target([one.elapsed_s for one in found], values, target),
        "joules": to_target(joules, values, target) if joules else None,
    }


def _joules(found: Sequence[Evaluation]) -> list[float] | None:
    """Joules at each evaluation; None unless all are known."""
    joules = [one.energy_j for one in found if one.energy_j is not None and math.isfinite(one.energy_j)]
    return joules if len(joules) == len(found) else None
