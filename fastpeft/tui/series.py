"""Growing columns of numbers, and the queries of a plot: a range, thinned to the screen and smoothed.

A worker thread appends, and the UI thread reads. Rows never change once appended, so a reader's arrays stay valid. Each
call reads one consistent state of the table.
"""

# N rows, C columns

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from fastpeft.tui.smooth import Smoothed
from fastpeft.tui.thin import BLOCK_ROWS, Blocks, Window, thinned

Floats = NDArray[np.float64]

AXES = ("time", "steps", "tokens", "joules")
"""The x axes of a curve: elapsed_s, optimizer steps, tokens trained on, joules spent."""

RATE_ROWS = 32
"""tokens_per_s and power_w are means over this many steps, as in the console."""

_FIRST_CAPACITY = 256
_GROWTH = 1.5
_LONG = 4
"""A range with more than this many blocks per bucket is drawn from the blocks."""


class Table:
    """Named float64 columns. Rows that were sampled ahead, from later offsets of the file, are kept separately."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._index = {name: i for i, name in enumerate(names)}
        self._rows_CN = np.empty((len(names), _FIRST_CAPACITY))
        self._num = 0
        self._ahead: dict[int, Floats] = {}
        self._joined: dict[str, Floats] = {}
        """Cache of columns that include the rows ahead, until more rows come."""
        self._lock = threading.Lock()

    def append(self, rows_CN: Floats) -> None:
        with self._lock:
            self._append(rows_CN)
            self._joined = {}

    def put_ahead(self, rows: dict[int, Floats]) -> None:
        """Show these rows, by file offset, after all appended ones, until `append_ahead(place)`."""
        with self._lock:
            self._ahead = dict(sorted([*self._ahead.items(), *rows.items()]))
            self._joined = {}

    def append_ahead(self, place: int) -> None:
        """Append the rows ahead at `place`, once all rows before it have been appended."""
        with self._lock:
            rows_CN = self._ahead.get(place)
            if rows_CN is not None:
                self._append(rows_CN)
                self._ahead = {later: rows_CN for later, rows_CN in self._ahead.items() if later != place}
                self._joined = {}

    def reserve(self, num: int) -> None:
        """Allocate room for this many rows. Unwritten memory costs nothing."""
        with self._lock:
            self._grow(num)

    def take(self, *names: str) -> list[Floats]:
        """Columns of one consistent state of the table. Do not write to them."""
        with self._lock:
            rows_CN, ahead = self._rows_CN[:, : self._num], list(self._ahead.values())
            if not ahead:
                return [rows_CN[self._index[name]] for name in names]
            for name in set(names) - self._joined.keys():
                self._joined[name] = self._join(self._index[name], rows_CN, ahead)
            return [self._joined[name] for name in names]

    def __len__(self) -> int:
        with self._lock:
            return self._num + sum(rows_CN.shape[1] for rows_CN in self._ahead.values())

    @property
    def num_settled(self) -> int:
        """Number of rows before which no row can be inserted any more."""
        return self._num

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows. Reserved room is not counted, since it is not memory until written."""
        return 8 * len(self.names) * len(self)

    def _join(self, column: int, rows_CN: Floats, ahead: list[Floats]) -> Floats:
        return np.concatenate([rows_CN[column], *(part_CN[column] for part_CN in ahead)])

    def _append(self, rows_CN: Floats) -> None:
        num = self._num + rows_CN.shape[1]
        if num > self._rows_CN.shape[1]:
            self._grow(max(num, int(self._rows_CN.shape[1] * _GROWTH)))
        self._rows_CN[:, self._num : num] = rows_CN
        self._num = num

    def _grow(self, capacity: int) -> None:
        grown_CN = np.empty((len(self.names), max(capacity, self._num)))
        grown_CN[:, : self._num] = self._rows_CN[:, : self._num]
        self._rows_CN = grown_CN


class StepTable(Table):
    """One row per optimizer step. Rows are appended with the columns of `READ`; the other columns are derived."""

    READ = ("elapsed_s", "step", "tokens", "energy_j", "loss", "penalty", "grad_norm", "lr", "penalty_share")
    MADE = ("tokens_per_s", "power_w")

    def __init__(self) -> None:
        super().__init__(*self.READ, *self.MADE)

    def put_ahead(self, rows: dict[int, Floats]) -> None:
        nothing_CN = np.empty((len(self.names), 0))
        super().put_ahead({place: _with_rates(rows_CN, nothing_CN) for place, rows_CN in rows.items()})

    def _append(self, rows_CN: Floats) -> None:
        read_CN = rows_CN[: len(self.READ)].copy()
        if rows_CN.shape[0] > len(self.READ):  # rows ahead: tokens are cumulative from their first
            read_CN[2] = np.diff(read_CN[2], prepend=0.0)
        before_CN = self._rows_CN[:, max(0, self._num - RATE_ROWS) : self._num]
        super()._append(_with_rates(read_CN, before_CN))

    def _join(self, column: int, rows_CN: Floats, ahead: list[Floats]) -> Floats:
        """Tokens of steps not read yet are estimated by the mean of the others."""
        if self.names[column] != "tokens":
            return super()._join(column, rows_CN, ahead)
        ahead = [part_CN for part_CN in ahead if part_CN.shape[1]]
        total, last = (rows_CN[2, -1], rows_CN[1, -1]) if rows_CN.shape[1] else (0.0, -1.0)
        num_read = rows_CN.shape[1] + sum(part_CN.shape[1] for part_CN in ahead)
        mean = (total + sum(part_CN[2, -1] for part_CN in ahead)) / max(num_read, 1)
        joined = [rows_CN[2]]
        for part_CN in ahead:
            total += max(0.0, part_CN[1, 0] - last - 1.0) * mean
            joined.append(total + part_CN[2])
            total, last = joined[-1][-1], part_CN[1, -1]
        return np.concatenate(joined)


def _with_rates(read_CN: Floats, before_CN: Floats) -> Floats:
    """`read_CN` with cumulative tokens and added rates, computed with up to RATE_ROWS earlier rows."""
    num_before = before_CN.shape[1]
    read_CN = read_CN.copy()
    read_CN[2] = np.cumsum(read_CN[2]) + (before_CN[2, -1] if num_before else 0.0)
    time_N, tokens_N, energy_N = np.concatenate([before_CN[[0, 2, 3]], read_CN[[0, 2, 3]]], axis=1)
    since_N = np.maximum(np.arange(len(time_N)) - RATE_ROWS, 0)
    seconds_N = time_N - time_N[since_N]
    seconds_N[seconds_N <= 0] = np.nan
    rates_2N = [(column_N - column_N[since_N]) / seconds_N for column_N in (tokens_N, energy_N)]
    return np.concatenate([read_CN, np.array(rates_2N)[:, num_before:]])


class Series:
    """One quantity of a run.

    Every table has columns elapsed_s and step; `steps` provides tokens and joules for a table without them.
    `nan_is_missing`: nan means that a value was not measured, and is not marked in a plot.
    """

    def __init__(self, table: Table, column: str, steps: StepTable, nan_is_missing: bool = False) -> None:
        self._table, self._column, self._steps = table, column, steps
        self.nan_is_missing = nan_is_missing
        self._smoothed = Smoothed()
        self._blocks: dict[tuple[float, bool], Blocks] = {}
        self._ordered_to: dict[str, int] = {}

    @classmethod
    def of(cls, x: Floats, y: Floats) -> Series:
        """A standalone series, with `x` as its time and its steps."""
        table = Table("elapsed_s", "step", "y")
        table.append(np.array([x, x, y], dtype=float))
        return cls(table, "y", StepTable())

    def __len__(self) -> int:
        return len(self._table)

    def xy(self, axis: str = "time") -> tuple[Floats, Floats]:
        """(x, y) of one consistent state. An unknown x is nan."""
        table, column, steps = self._table, self._column, self._steps
        if axis in ("time", "steps"):
            x, y = table.take("elapsed_s" if axis == "time" else "step", column)
            return x, y
        own = {"tokens": "tokens", "joules": "energy_j"}[axis]
        if table is steps:
            x, y = table.take(own, column)
            return x, y
        if axis == "tokens":
            at, y = table.take("step", column)
            step_N, tokens_N = steps.take("step", "tokens")
            return np.concatenate([[0.0], tokens_N])[np.searchsorted(step_N, at, side="left")], y
        time_N, energy_N = steps.take("elapsed_s", "energy_j")
        if "energy_j" in table.names:
            x, y = table.take("energy_j", column)
            return x, y
        at, y = table.take("elapsed_s", column)
        known = np.isfinite(energy_N)
        return (np.interp(at, time_N[known], energy_N[known]) if known.any() else np.full(len(at), np.nan)), y

    def x(self, axis: str = "time") -> Floats:
        return self.xy(axis)[0]

    @property
    def y(self) -> Floats:
        return self._table.take(self._column)[0]

    def columns(self, *names: str) -> list[Floats]:
        """Columns of its table, of one consistent state."""
        return self._table.take(*names)

    @property
    def last(self) -> float | None:
        """The newest measured value, finite or not; None if there is none."""
        y = self.y[-RATE_ROWS:]
        if self.nan_is_missing:
            y = y[~np.isnan(y)]
        return float(y[-1]) if len(y) else None

    def limits(self, axis: str) -> tuple[float, float] | None:
        """The least and the greatest x; None if there is none."""
        x = self.x(axis)
        ends = x[[0, -1]] if len(x) and np.isfinite(x[[0, -1]]).all() and x[0] <= x[-1] else x[np.isfinite(x)]
        return (float(ends.min()), float(ends.max())) if len(ends) else None

    def at_step(self, axis: str, step: float) -> float | None:
        """The position of `step` on an axis. A step after the last one is extrapolated at the mean rate over the second
        half of the steps. None if unknown."""
        own = {"time": "elapsed_s", "steps": "step", "tokens": "tokens", "joules": "energy_j"}[axis]
        step_N, x_N = self._steps.take("step", own)
        num = len(step_N)
        if not num or not np.isfinite(step):
            return None
        if step <= step_N[-1]:
            x = x_N[np.searchsorted(step_N, step)]
        elif step_N[-1] > step_N[num // 2]:
            rate = (x_N[-1] - x_N[num // 2]) / (step_N[-1] - step_N[num // 2])
            x = x_N[-1] + rate * (step - step_N[-1])
        else:
            return None
        return float(x) if np.isfinite(x) else None

    def window(
        self,
        axis: str,
        low: float = -np.inf,
        high: float = np.inf,
        buckets: int = 1000,
        smoothing: float = 0.0,
        positive: bool = False,
    ) -> Window:
        """The points of [low, high] to draw, and one neighbour on either side.

        Args:
            buckets: number of equal parts of the range, each of which keeps its least and its greatest value.
            smoothing: the weight of an exponential moving average, in [0, 1); see `smooth.ema`.
            positive: leave out values that a log scale cannot show.
        """
        x, y = self._drawn(axis, smoothing)
        first = max(int(np.searchsorted(x, low)) - 1, 0)
        last = int(np.searchsorted(x, high, side="right")) + 1
        if len(y) == len(self._table) and min(last, len(x)) - first > _LONG * BLOCK_ROWS * buckets:
            blocks = self._blocks.setdefault((smoothing, positive), Blocks(positive, self.nan_is_missing))
            return blocks.thinned(x, y, first, last, buckets, self._table.num_settled)
        return thinned(x[first:last], y[first:last], buckets, positive, self.nan_is_missing)

    def _drawn(self, axis: str, smoothing: float) -> tuple[Floats, Floats]:
        """(x, smoothed y), sorted by x, without rows whose x is unknown."""
        x, y = self.xy(axis)
        num_settled = min(self._table.num_settled, len(x))
        if smoothing:
            y = self._smoothed(y, smoothing, num_settled)
        checked = x[max(self._ordered_to.get(axis, 0) - 1, 0) :]
        if (checked[1:] >= checked[:-1]).all() and np.isfinite(checked).all():
            self._ordered_to[axis] = num_settled
            return x, y
        return _ordered(x, y)

    def nearest(self, axis: str, at: float, smoothing: float = 0.0) -> tuple[float, float] | None:
        """(x, y) of the row whose x is nearest to `at`, for the cursor."""
        x, y = self._drawn(axis, smoothing)
        if self.nan_is_missing and np.isnan(y).any():
            x, y = x[~np.isnan(y)], y[~np.isnan(y)]
        if not len(x):
            return None
        i = int(np.searchsorted(x, at))
        i = min(range(max(i - 1, 0), min(i + 1, len(x))), key=lambda j: abs(x[j] - at))
        return float(x[i]), float(y[i])


def _ordered(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """(x, y) sorted by x, without rows whose x is unknown."""
    known = np.isfinite(x)
    if not known.all():
        x, y = x[known], y[known]
    if len(x) > 1 and (x[1:] < x[:-1]).any():
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
    return x, y
