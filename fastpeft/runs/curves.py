"""A metric over a run's seconds and joules: the area under it, and what it took to reach a target.

Reads `eval` events of the validation split. The convention: the metric counts 0 until the first evaluation has ended,
or, where that one is of step 0, its value from the start; it is linear between evaluations; and it stays at the last
one's value to the end of the budget.
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
    """The budget clock when the evaluation had ended."""
    energy_j: float | None
    """Spent until then; None without a meter."""
    value: float
    """Of the task's metric: at most 1, and under 0 for a correlation the wrong way."""


def is_validation(event: Event) -> bool:
    """An `eval` event of the split that the metric's curve is of; a test split is scored once and is no part of it."""
    return event["type"] == "eval" and event.get("split", VALIDATION) == VALIDATION


def evaluations(events: Iterable[Event]) -> list[Evaluation]:
    """Of the validation split, in order of time. A value that is not finite is left out."""
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
        x: where each value was measured, rising, in the unit of `budget`. What lies beyond it counts only as far as
            the line to it lies within.
        from_start: `values[0]` holds from 0 on, as of an evaluation before the first step; else 0 does, up to x[0].

    Raises:
        ValueError: no values, or a budget that is not positive.
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
    """The place of the first evaluation that is at or above `target`; None where none is.

    Nothing is interpolated: what the metric was between two evaluations was not measured.
    """
    return next((place for place, value in zip(x, values) if value >= target), None)


@dataclass(frozen=True)
class Budgets:
    """What the areas are divided by."""

    seconds: float
    joules: float | None

    @classmethod
    def of(cls, budget: dict[str, Any], elapsed_s: float, energy_j: float | None) -> Budgets:
        """The budget's limit in its own unit; in the other what the run spent, as result.json has it."""
        kind, limit = budget.get("kind"), budget.get("limit")
        return cls(
            seconds=number(limit) if kind == "seconds" else elapsed_s,
            joules=None if energy_j is None else number(limit) if kind == "joules" else energy_j,
        )


def auc_of(found: Sequence[Evaluation], budgets: Budgets) -> dict[str, float | None]:
    """{seconds, joules} as result.json's `auc`: None where there is no meter. Empty without an evaluation."""
    if not found or not budgets.seconds > 0:
        return {}
    values, from_start = [one.value for one in found], found[0].step == 0
    joules = _joules(found)
    return {
        "seconds": auc([one.elapsed_s for one in found], values, budgets.seconds, from_start),
        "joules": auc(joules, values, budgets.joules, from_start) if joules and budgets.joules else None,
    }


def to_target_of(found: Sequence[Evaluation], target: float) -> dict[str, float | None]:
    """{seconds, joules} up to the end of the first evaluation at or above `target`; None: not reached, or no meter."""
    values = [one.value for one in found]
    joules = _joules(found)
    return {
        "seconds": to_target([one.elapsed_s for one in found], values, target),
        "joules": to_target(joules, values, target) if joules else None,
    }


def _joules(found: Sequence[Evaluation]) -> list[float] | None:
    """None unless every evaluation's are known."""
    joules = [one.energy_j for one in found if one.energy_j is not None and math.isfinite(one.energy_j)]
    return joules if len(joules) == len(found) else None
