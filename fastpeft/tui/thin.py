"""Thins long columns to the screen's resolution: the least and the greatest value of each part of the range."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

BLOCK_ROWS = 256


class Window(NamedTuple):
    """The points of a series that a plot draws within a range."""

    x: Floats
    y: Floats
    """At most two points per bucket, the least and the greatest, in order of x. All finite."""
    gaps_x: Floats
    gaps_y: Floats
    """The non-finite values: nan, inf or -inf. At most one per bucket."""
    num_not_finite: int
    num_not_positive: int
    """Number of values left out for a log scale."""


def thinned(x: Floats, y: Floats, buckets: int, positive: bool = False, nan_is_missing: bool = False) -> Window:
    """Rows ordered by x, thinned to the least and greatest value of each of `buckets` equal parts of their range."""
    shown, gap, num_not_positive = _kinds(y, positive, nan_is_missing)
    gaps = np.flatnonzero(gap)
    num_not_positive = int(num_not_positive)
    gaps_x, gaps_y = x[gaps], y[gaps]
    kept = _first_of_each(gaps_x, buckets)
    if not shown.all():
        x, y = x[shown], y[shown]
    if len(x) > 2 * buckets:
        rows = _extremes(x, y, buckets)
        x, y = x[rows], y[rows]
    return Window(x, y, gaps_x[kept], gaps_y[kept], len(gaps), num_not_positive)


def _starts(x: Floats, buckets: int) -> NDArray[np.intp]:
    """The first row of every non-empty bucket."""
    edges = np.linspace(x[0], x[-1], buckets + 1)[:-1]
    starts = np.searchsorted(x, edges)
    return starts[np.append(starts[1:] > starts[:-1], True)]


def _first_of_each(x: Floats, buckets: int) -> NDArray[np.intp]:
    return _starts(x, buckets) if len(x) > buckets else np.arange(len(x))


def _extremes(x: Floats, y: Floats, buckets: int) -> NDArray[np.intp]:
    """Rows of the least and the greatest y of each bucket, in order."""
    starts = _starts(x, buckets)
    counts = np.diff(starts, append=len(x))
    rows = []
    for reduce in (np.minimum, np.maximum):
        hits = np.flatnonzero(y == np.repeat(reduce.reduceat(y, starts), counts))
        rows.append(hits[np.searchsorted(hits, starts)])
    return _distinct(np.concatenate(rows))


def _distinct(rows: Rows) -> Rows:
    """Sorted distinct rows. They come in a few sorted runs, which a stable sort merges; np.unique would hash them."""
    rows = np.sort(rows, kind="stable")
    return rows[np.append(True, rows[1:] != rows[:-1])] if len(rows) else rows


class Blocks:
    """The extremes of each block of BLOCK_ROWS rows of a growing column, computed once.

    Ranges of many blocks are drawn from them. A bucket may show a value of a block that extends beyond the bucket's
    edge, which is off by less than a block.
    """

    def __init__(self, positive: bool, nan_is_missing: bool) -> None:
        self._positive, self._nan_is_missing = positive, nan_is_missing
        self._num = 0
        self._table_5B = np.empty((5, 0), dtype=np.intp)
        """Per block: rows of the least value, the greatest value and the first gap (-1: none); number of gaps; number
        of values left out for a log scale."""

    def thinned(self, x: Floats, y: Floats, first: int, last: int, buckets: int, num_settled: int) -> Window:
        """As the function `thinned`, for rows [first, last)."""
        last = min(last, len(y))
        self._extend(y, min(num_settled, len(y)))
        begin, end = -(-first // BLOCK_ROWS), min(last // BLOCK_ROWS, self._num)
        if begin >= end:
            return thinned(x[first:last], y[first:last], buckets, self._positive, self._nan_is_missing)
        least, greatest, gap, num_gaps, num_not_positive = self._table_5B[:, begin:end]
        rows, gaps = [np.concatenate([least, greatest])], [gap]
        left_out = [int(num_gaps.sum()), int(num_not_positive.sum())]
        for part in (slice(first, begin * BLOCK_ROWS), slice(end * BLOCK_ROWS, last)):
            shown, is_gap, not_positive = _kinds(y[part], self._positive, self._nan_is_missing)
            rows.append(np.flatnonzero(shown) + part.start)
            gaps.append(np.flatnonzero(is_gap) + part.start)
            left_out = [left_out[0] + int(is_gap.sum()), left_out[1] + int(not_positive)]
        row, gap = (_distinct(np.concatenate(found)) for found in (rows, gaps))
        row, gap = row[row >= 0], gap[gap >= 0]
        drawn = thinned(x[row], y[row], buckets)
        kept = gap[_first_of_each(x[gap], buckets)]
        return Window(drawn.x, drawn.y, x[kept], y[kept], *left_out)

    def _extend(self, y: Floats, num_settled: int) -> None:
        num = num_settled // BLOCK_ROWS
        if num <= self._num:
            return
        start = self._num * BLOCK_ROWS
        y_BN = y[start : num * BLOCK_ROWS].reshape(-1, BLOCK_ROWS)
        shown, gap, not_positive = _kinds(y_BN, self._positive, self._nan_is_missing)
        first_row = start + np.arange(len(y_BN)) * BLOCK_ROWS

        def rows(found: Rows, there: NDArray[np.bool_]) -> Rows:
            return np.where(there.any(axis=1), first_row + found, -1)

        more = [
            rows(np.where(shown, y_BN, np.inf).argmin(axis=1), shown),
            rows(np.where(shown, y_BN, -np.inf).argmax(axis=1), shown),
            rows(gap.argmax(axis=1), gap),
            gap.sum(axis=1),
            not_positive,
        ]
        self._table_5B = np.concatenate([self._table_5B, np.array(more, dtype=np.intp)], axis=1)
        self._num = num


def _kinds(y: Floats, positive: bool, nan_is_missing: bool) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Rows]:
    """(values to draw, values to mark as non-finite, count along the last axis of those left out for a log scale)."""
    finite = np.isfinite(y)
    gap = np.isinf(y) if nan_is_missing else ~finite
    shown = finite & (y > 0) if positive else finite
    return shown, gap, finite.sum(axis=-1) - shown.sum(axis=-1)
