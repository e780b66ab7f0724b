"""Reads a run's event log in one pass: steps as columns, evaluations, and the other events that a report shows.

The log is read in blocks of 1 MB. A step keeps 8 bytes per column, whatever else its line holds: 100,000 steps take
6.4 MB. Heartbeats and importances are thinned to a bounded number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from fastpeft.runs.curves import is_validation
from fastpeft.runs.events import Event, number, parse_event

COLUMNS = ("step", "elapsed_s", "loss", "penalty", "lr", "grad_norm", "tokens", "energy_j")
"""Columns of a step. Missing values are NaN."""
SYSTEM = ("elapsed_s", "util", "memory_mb", "power_w", "temp_c")
MAX_SNAPSHOTS = 64
MAX_HEARTBEATS = 4096
MAX_WARNINGS = 20
_STEP = b'{"type":"step"'
_T = TypeVar("_T")


class Thinned(Generic[_T]):
    """Keeps at most `limit` evenly spaced items from the first on, and the last item. `limit` must be even."""

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
        """The kept items, in order."""
        if self._last is None or self._kept[-1] is self._last:
            return list(self._kept)
        return [*self._kept, self._last]


@dataclass(frozen=True)
class Snapshot:
    """Importances of K adapted matrices; every sequence has length K."""

    elapsed_s: float
    names: list[str]
    layer: list[int]
    projection: list[str]
    weights: np.ndarray


@dataclass
class History:
    steps: dict[str, np.ndarray] = field(default_factory=dict)
    """Name in COLUMNS -> (steps,)."""
    validations: list[Event] = field(default_factory=list)
    tests: list[Event] = field(default_factory=list)
    """Evaluations of other splits."""
    importance: list[Snapshot] = field(default_factory=list)
    system: dict[str, np.ndarray] = field(default_factory=dict)
    """Name in SYSTEM -> (heartbeats,), thinned."""
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """The first MAX_WARNINGS messages."""
    num_warnings: int = 0
    end: Event | None = None
    num_events: int = 0

    def __len__(self) -> int:
        return len(self.steps.get("step", ()))


def read_history(blocks: Iterable[list[bytes]]) -> History:
    """The history of a whole log, in blocks of lines from runs.events.read_lines. A resumed run's log has each step
    once."""
    history, columns = History(), [[np.empty(0)] for _ in COLUMNS]
    heartbeats, snapshots = Thinned[Event](MAX_HEARTBEATS), Thinned[Snapshot](MAX_SNAPSHOTS)
    for lines in blocks:
        steps, others = _parted(lines)
        history.num_events += len(steps[0]) + len(others)
        for column, values in zip(columns, steps):
            column.append(values)
        for event in others:
            if event["type"] == "system":
                heartbeats.add(event)
            elif event["type"] == "importance":
                snapshots.add(_snapshot(event))
            else:
                _note(history, event)
    history.steps = {name: np.concatenate(column) for name, column in zip(COLUMNS, columns)}
    kept = heartbeats.items()
    history.system = {name: np.array([_float(event.get(name)) for event in kept]) for name in SYSTEM}
    history.importance = snapshots.items()
    return history


def _parted(lines: Sequence[bytes]) -> tuple[list[np.ndarray], list[Event]]:
    """(COLUMNS of the steps, the other events)."""
    others = [event for line in lines if not line.startswith(_STEP) and (event := parse_event(line)) is not None]
    if all(event["type"] != "step" for event in others):
        steps = _columns([line for line in lines if line.startswith(_STEP)])
        if steps is not None:
            return steps, others
    events = [event for line in lines if (event := parse_event(line)) is not None]
    steps = [event for event in events if event["type"] == "step"]
    found = [np.array([_float(event.get(name)) for event in steps]) for name in COLUMNS]
    return found, [event for event in events if event["type"] != "step"]


def _columns(steps: Sequence[bytes]) -> list[np.ndarray] | None:
    """Columns of lines that `EventLog` wrote, in half the time of parsing one line after another.

    None if a line is damaged, or holds a number that is not finite, which is written as text.
    """
    import pyarrow as pa
    from pyarrow import json

    if not steps:
        return [np.empty(0)] * len(COLUMNS)
    text = b"\n".join(steps)
    schema = pa.schema([(name, pa.float64()) for name in COLUMNS])
    parse = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = json.read_json(pa.BufferReader(text), json.ReadOptions(False, len(text) + 1), parse)
    except pa.ArrowInvalid:
        return None
    return [table.column(name).to_numpy() for name in COLUMNS]


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
    """A column summarised in bins of `per_bin` values each; the last bin may be shorter."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    per_bin: int


def binned(x: np.ndarray, values: np.ndarray, num_bins: int) -> Binned:
    """Mean, minimum and maximum of the finite values of each bin, and the mean of `x` in it. At most `num_bins`; bins
    without a finite value are left out."""
    per_bin = -(-len(values) // num_bins) if len(values) else 1
    starts = np.arange(0, len(values), per_bin)
    if not len(starts):
        nothing = np.empty(0)
        return Binned(nothing, nothing, nothing, nothing, per_bin)
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(finite, values, 0.0), starts)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    middle = np.add.reduceat(x, starts) / np.diff(np.append(starts, len(values)))
    there = count > 0
    return Binned(middle[there], total[there] / count[there], low[there], high[there], per_bin)
