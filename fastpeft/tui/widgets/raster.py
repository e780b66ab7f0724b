"""Polylines as braille: each cell is 2 x 4 dots."""

# L lines, H cells high, W cells wide, N points

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Dots = NDArray[np.intp]

BLANK = 0x2800
DOTS_42 = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], dtype=np.int32)

DASHES = ((1, 0), (6, 4), (2, 3), (12, 3))
"""(dots drawn, dots skipped) along x, which distinguish curves without colour."""
_ALIKE = 1.5
"""A line more than this many times as thick as another, such as noise, is drawn behind it."""
_STRIPE = 3
"""Cells along x after which the next of equally thick lines is in front."""


def braille(x: Floats, y: Floats, width: int, height: int, dash: tuple[int, int] = DASHES[0]) -> NDArray[np.int32]:
    """The line through the points as code points minus BLANK, (height, width); 0 where a cell is empty.

    Args:
        x, y: in cells from the upper left corner. The line is clipped to the area.
    """
    if len(x) == 1:
        x, y = np.repeat(x, 2), np.repeat(y, 2)
    dots_YX = np.zeros((height * 4, width * 2), dtype=bool)
    points_N2, size = np.column_stack([x * 2, y * 4]), np.array([width * 2, height * 4])
    last = size - 1e-9  # points on the edge belong to the last cell
    starts, ends = _clipped(np.where(np.isclose(points_N2, size, rtol=1e-9, atol=0), last, points_N2), last)
    if len(starts):
        starts, ends = np.floor(starts).astype(int), np.floor(ends).astype(int)
        steep = np.abs(ends[:, 0] - starts[:, 0]) <= 1
        _upright(dots_YX, starts[steep], ends[steep])
        _sloping(dots_YX, starts[~steep], ends[~steep])
        dots_YX[:, np.arange(width * 2) % sum(dash) >= dash[0]] = False
    return np.einsum("hawb,ab->hw", dots_YX.reshape(height, 4, width, 2).astype(np.int32), DOTS_42)


def owners(drawn_LHW: NDArray[np.bool_]) -> Dots:
    """The line whose colour each cell gets, of those that cross it: (height, width); 0 where none does.

    A thin line is in front of a thick one. Equally thick lines alternate along x, so that none hides another.
    """
    num_columns_L = drawn_LHW.any(axis=1).sum(axis=1)
    thickness_L = drawn_LHW.sum(axis=(1, 2)) / np.maximum(num_columns_L, 1)
    thickness_LHW = np.where(drawn_LHW, thickness_L[:, None, None], np.inf)
    front_LHW = drawn_LHW & (thickness_LHW <= _ALIKE * thickness_LHW.min(axis=0))
    turn_HW = np.arange(drawn_LHW.shape[2]) // _STRIPE % np.maximum(front_LHW.sum(axis=0), 1)
    return (front_LHW & (np.cumsum(front_LHW, axis=0) - 1 == turn_HW)).argmax(axis=0)


def mark_places(drawn_LHW: NDArray[np.bool_], num: int = 4) -> list[list[tuple[int, int]]]:
    """(row, column) of up to `num` cells for each line's mark, no cell for two lines.

    Each line gets its own columns. If no cell of the line is free there, its mark is placed beside it.
    """
    num_lines, _, width = drawn_LHW.shape
    period, taken = max(width // num, 2 * num_lines), set[tuple[int, int]]()
    found = []
    for i, drawn_HW in enumerate(drawn_LHW):
        columns = np.flatnonzero(drawn_HW.any(axis=0)).tolist()
        cells = [(_middle(drawn_HW[:, column]), column) for column in columns]
        first = (2 * i + 1) * period // (2 * num_lines)
        own = [cell for cell in cells if cell[1] % period == first and cell not in taken]
        beside = [(row, (column + by) % width) for row, column in cells[-1:] for by in range(width)]
        own = own or next(([cell] for cell in [*reversed(cells), *beside] if cell not in taken), [])
        taken.update(own)
        found.append(own)
    return found


def _middle(drawn_H: NDArray[np.bool_]) -> int:
    rows = np.flatnonzero(drawn_H)
    return int(rows[len(rows) // 2])


def _upright(dots_YX: NDArray[np.bool_], starts: Dots, ends: Dots) -> None:
    """Draw segments within a column, or between adjacent ones with half in each, which a long log consists of. Each run
    of dots adds +1 at its start and -1 after its end; a dot is set where the sum down the column is positive."""
    middle = (starts[:, 1] + ends[:, 1]) // 2
    edges_YX = np.zeros((dots_YX.shape[0] + 1, dots_YX.shape[1]), dtype=np.int32)
    for end in (starts, ends):
        np.add.at(edges_YX, (np.minimum(end[:, 1], middle), end[:, 0]), 1)
        np.add.at(edges_YX, (np.maximum(end[:, 1], middle) + 1, end[:, 0]), -1)
    dots_YX |= np.cumsum(edges_YX[:-1], axis=0) > 0


def _sloping(dots_YX: NDArray[np.bool_], starts: Dots, ends: Dots) -> None:
    num = np.abs(ends - starts).max(axis=1, initial=0) + 1
    line = np.repeat(np.arange(len(num)), num)
    part = (np.arange(len(line)) - np.repeat(np.cumsum(num) - num, num)) / np.maximum(num - 1, 1)[line]
    dot = np.rint(starts[line] + part[:, None] * (ends - starts)[line]).astype(int)
    dots_YX[dot[:, 1], dot[:, 0]] = True


def _clipped(points_N2: Floats, size: Floats) -> tuple[Floats, Floats]:
    """The parts of the segments between the points that lie in [0, size): Liang and Barsky, 1984."""
    start, step = points_N2[:-1], np.diff(points_N2, axis=0)
    first, last = np.zeros(len(start)), np.ones(len(start))
    for i in (0, 1):
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.sort(np.column_stack([-start[:, i] / step[:, i], (size[i] - start[:, i]) / step[:, i]]), axis=1)
        flat = step[:, i] == 0
        inside = (start[:, i] >= 0) & (start[:, i] <= size[i])
        first = np.where(flat, np.where(inside, first, 2.0), np.maximum(first, at[:, 0]))
        last = np.where(flat, last, np.minimum(last, at[:, 1]))
    kept = first <= last
    start, step, first, last = start[kept], step[kept], first[kept, None], last[kept, None]
    return np.clip(start + first * step, 0, size), np.clip(start + last * step, 0, size)
