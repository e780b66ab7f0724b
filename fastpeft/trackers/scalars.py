"""Events as rows of numbers, in an order that a resume does not change.

A row belongs to a number of optimizer steps done: the step event of step 9 and an evaluation after it are
both of 10. `order` numbers the rows of a run; it rises, and a row that a resume makes again gets the number
that it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastpeft.runs.events import Event, number

_KINDS = ("step", "eval", "test", "importance", "schedule", "forecast")
"""In the order in which they come after one step."""
_NO_MEASURES = {"type", "time_s", "elapsed_s", "step"}


@dataclass(frozen=True)
class Row:
    order: int
    step: int
    """Optimizer steps done."""
    time_s: float
    values: dict[str, float]
    """train/loss, eval/accuracy, importance/NAME, system/util, ..."""


class Rows:
    """Turns events into rows, one at a time. The newest system figures go with the step after them."""

    def __init__(self) -> None:
        self._system: dict[str, float] = {}

    def of(self, event: Event) -> Row | None:
        """None for an event that has no row of its own."""
        kind = event["type"]
        if kind == "system":
            self._system = dict(_numbers(event, "system/"))
        if kind not in _KINDS:
            return None
        step, values = event["step"], {}
        if kind == "step":
            step += 1
            values = dict(_numbers(event, "train/")) | self._system
            self._system = {}
        elif kind == "eval":
            kind = "test" if event.get("split") == "test" else "eval"
            values = dict(_numbers(event, f"{kind}/"))
            values[f"{kind}/{event['metric']}"] = values.pop(f"{kind}/value")
        elif kind in ("schedule", "forecast"):
            values = dict(_numbers(event, f"{kind}/"))
        elif kind == "importance":
            values = {f"importance/{name}": number(w) for name, w in zip(event["names"], event["weights"])}
        order = len(_KINDS) * step + _KINDS.index(kind)
        return Row(order, step, event["time_s"], {"step": step, "elapsed_s": event["elapsed_s"]} | values)


def _numbers(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Every number, the non-finite ones too, of an event and of the dicts in it."""
    for key, value in values.items():
        if key in _NO_MEASURES or isinstance(value, bool):
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) or value in ("nan", "inf", "-inf"):
            yield prefix + key, number(value)
