"""How often, and on how many rows, a run evaluates before its end, so that the budget goes into training."""

from __future__ import annotations

from dataclasses import dataclass

from fastpeft.config import Interval

SHARE = 0.1
"""Largest share of a budget in seconds or joules for all evaluations before the final one."""
MOST = 4
"""Evaluations before the final one: one every fifth of the budget."""
LEAST_ROWS = 100
"""Smallest sample. An accuracy of 0.8 on it has a standard error of 0.04."""


@dataclass(frozen=True)
class EvaluationPlan:
    interval: Interval
    num_rows: int | None = None
    """Validation rows that an evaluation before the end takes; None: all."""
    note: str | None = None
    is_auto: bool = False
    """Evaluations before the end share SHARE of the budget, and stop once it is spent."""


def plan_evaluations(share: float, num_rows: int, noun: str = "validation rows") -> EvaluationPlan:
    """MOST evaluations before the end, on all rows. Where they would exceed SHARE, on a sample of the rows; where the
    sample would be under LEAST_ROWS, fewer evaluations.

    Args:
        share: the budget's share that one evaluation of all `num_rows` takes.
    """
    for count in range(MOST, 0, -1):
        room = SHARE / count
        interval = Interval("fraction", 1 / (count + 1))
        if share <= room:
            note = None if count == MOST else _said(share, count, f"all {noun}")
            return EvaluationPlan(interval, None, note, is_auto=True)
        sampled = int(num_rows * room / share)
        if sampled >= LEAST_ROWS:
            note = _said(share, count, f"{sampled:,} of {num_rows:,} {noun}")
            return EvaluationPlan(interval, sampled, note, is_auto=True)
    return EvaluationPlan(Interval("end"), None, _said(share, 0, ""), is_auto=True)


def _said(share: float, count: int, rows: str) -> str:
    times = {0: "none", 1: "one"}.get(count, f"{count}, each")
    on = f" on {rows}" if rows else ""
    return (
        f"evaluations before the end: {times}{on}, because one on all takes about {share:.1%} of the budget "
        f"(evaluation.every: auto)"
    )
