"""Events as rows of numbers, in an order that a resume does not change.

A row belongs to a number of completed optimizer steps: the event of step 9 and an evaluation after it both belong to
10. `order` numbers the rows of a run in ascending order. A row that a resume repeats gets the number that it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastpeft.runs.events import Event, number

_KINDS = ("step", "eval", "test", "importance", "schedule", "forecast")
"""Event types in the order of their rows within a step."""
_NO_MEASURES = {"type", "time_s", "elapsed_s", "step"}


@dataclass(frozen=True)
class Row:
    order: int
    step: int
    """Completed optimizer steps."""
    time_s: float
    values: dict[str, float]
    """train/loss, eval/accuracy, importance/NAME, system/util, ..."""


class Rows:
    """Turns events into rows, one at a time. The newest system values go into the next step's row."""

    def __init__(self) -> None:
        self._system: dict[str, float] = {}

    def of(self, event: Event) -> Row | None:
        """The event's row; None if it has none of its own."""
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
    """Every number of an event and of its nested dicts, non-finite ones included."""
    for key, value in values.items():
        if key in _NO_MEASURES or isinstance(value, bool):
            continue
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) or value in ("nan", "inf", "-inf"):
            yield prefix + key, number(value)
