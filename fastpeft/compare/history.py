"""One pass over a run's event log: its steps as columns, its evaluations, and what else a report shows.

The log is read line by line. What is kept of a step is 8 bytes a column, whatever its line holds, so that 100,000 steps
take 8 MB; heartbeats and importances are thinned to a bounded number.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Generic, TypeVar

import numpy as np

from fastpeft.runs.curves import is_validation
from fastpeft.runs.events import Event, number

COLUMNS = ("step", "elapsed_s", "loss", "penalty", "lr", "grad_norm", "tokens", "energy_j")
"""Of a step. What it lacks is NaN."""
SYSTEM = ("elapsed_s", "util", "memory_mb", "power_w", "temp_c")
MAX_SNAPSHOTS = 64
MAX_HEARTBEATS = 4096
MAX_WARNINGS = 20
_STEP = itemgetter(*COLUMNS)
_T = TypeVar("_T")


class Thinned(Generic[_T]):
    """At most `limit` of the items added, evenly spaced from the first on, and the last. `limit` is even."""

    def __init__(self, limit: int) -> None:
        self._limit, self._every, self._count = limit, 1, 0
        self._kept: list[_T] = []
        self._last: _T | None = None

    def add(self, item: _T) -> None:
        if self._count % self._every == 0:
            if len(self._kept) == self._limit:
                self._kept, self._every = self._kept[::2], 2 * self._every
            if self._count % self._every == 0:
                self._kept.append(item)
        self._count, self._last = self._count + 1, item

    def items(self) -> list[_T]:
        """In order."""
        if self._last is None or self._kept[-1] is self._last:
            return list(self._kept)
        return [*self._kept, self._last]


@dataclass(frozen=True)
class Snapshot:
    """Of K adapted matrices."""

    elapsed_s: float
    names: list[str]
    layer: list[int]
    projection: list[str]
    weights: np.ndarray


@dataclass
class History:
    steps: dict[str, np.ndarray] = field(default_factory=dict)
    """COLUMNS -> N."""
    validations: list[Event] = field(default_factory=list)
    tests: list[Event] = field(default_factory=list)
    """Evaluations of other splits."""
    importance: list[Snapshot] = field(default_factory=list)
    system: dict[str, np.ndarray] = field(default_factory=dict)
    """SYSTEM -> M; thinned."""
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """The first ones."""
    num_warnings: int = 0
    end: Event | None = None
    num_events: int = 0

    def __len__(self) -> int:
        return len(self.steps.get("step", ()))


def read_history(blocks: Iterable[list[Event]]) -> History:
    """Of a log from its beginning, as runs.events.read_blocks has it. A resumed run's log has each step once."""
    history, columns = History(), {name: array("d") for name in COLUMNS}
    heartbeats, snapshots = Thinned[Event](MAX_HEARTBEATS), Thinned[Snapshot](MAX_SNAPSHOTS)
    for block in blocks:
        history.num_events += len(block)
        steps, others = [], []
        for event in block:
            (steps if event["type"] == "step" else others).append(event)
        _extend(columns, steps)
        for event in others:
            if event["type"] == "system":
                heartbeats.add(event)
            elif event["type"] == "importance":
                snapshots.add(_snapshot(event))
            else:
                _note(history, event)
    history.steps = {name: np.frombuffer(column, np.float64) for name, column in columns.items()}
    kept = heartbeats.items()
    history.system = {name: np.array([_float(event.get(name)) for event in kept]) for name in SYSTEM}
    history.importance = snapshots.items()
    return history


def _extend(columns: dict[str, array], steps: list[Event]) -> None:
    try:
        rows = list(zip(*map(_STEP, steps)))
    except KeyError:
        rows = [[event.get(name) for event in steps] for name in COLUMNS]
    for column, values in zip(columns.values(), rows):
        try:
            column.fromlist(list(values))  # all of them or none
        except TypeError:  # a number that is missing or not finite
            column.fromlist([_float(value) for value in values])


def _float(value: Any) -> float:
    return math.nan if value is None else number(value)


def _note(history: History, event: Event) -> None:
    kind = event["type"]
    if kind == "eval":
        (history.validations if is_validation(event) else history.tests).append(event)
    elif kind == "warning":
        history.num_warnings += 1
        if len(history.warnings) < MAX_WARNINGS:
            history.warnings.append(str(event.get("message", "")))
    elif kind == "run":
        history.config = event.get("config", {})
    elif kind == "end":
        history.end = event


def _snapshot(event: Event) -> Snapshot:
    weights = np.array([number(weight) for weight in event["weights"]])
    return Snapshot(float(event["elapsed_s"]), event["names"], event["layer"], event["projection"], weights)


@dataclass(frozen=True)
class Binned:
    """A long column as at most so many bins of as many steps each."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_bin: int


def binned(x: np.ndarray, values: np.ndarray, num_bins: int) -> Binned:
    """Mean, least and greatest of each bin, over what is finite in it; x is its middle. Bins without any are left
    out."""
    per_bin = -(-len(values) // num_bins) if len(values) else 1
    starts = np.arange(0, len(values), per_bin)
    if not len(starts):
        return Binned(*[np.empty(0)] * 4, per_bin)
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    middle = np.add.reduceat(x, starts) / np.diff([*starts, len(values)])
    there = count > 0
    return Binned(middle[there], total[there] / count[there], low[there], high[there], per_bin)
