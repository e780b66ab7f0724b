"""Numbers of a model's matrices, layer x projection, as colours with a cursor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from fastpeft.tui.parse import Blocks, Importance, Rates
from fastpeft.tui.series import Floats
from fastpeft.tui.theme import ratio_color, scale_color, shade
from fastpeft.tui.widgets.axes import short

# R rows, C columns

MAX_CELL = 12
MIN_CELL = 4
"""A narrower screen scrolls sideways."""
LEAST_RATIO = 1.1
"""A scale of factors reaches at least from 1 / this to this, so that next to nothing looks like it."""
_NUMBERS_FROM = 7
"""Cells this wide show their numbers."""
_HEAD_LINES = 1
_FOOT_LINES = 2


@dataclass(frozen=True)
class Grid:
    """What a Heatmap shows. Every array is (rows, columns), nan where the model has no such matrix."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    value_name: str = "value"
    more: dict[str, Floats] = field(default_factory=dict)
    """Further numbers for the cursor, by name."""
    first: Floats | None = None
    """Earlier values, for the change since."""
    names: dict[tuple[int, int], str] = field(default_factory=dict)
    """Full names by row and column."""
    is_ratio: bool = False
    """Values are factors: the scale is logarithmic, 1 in its middle."""


def importance_grid(snapshots: Sequence[Importance], at: int = -1) -> Grid:
    """Snapshot `at` against the first. Several matrices of one layer and projection get columns of their own.

    Raises:
        IndexError: there is no such snapshot.
    """
    snapshot, first = snapshots[at], snapshots[0]
    grid = _grid(snapshot, first, snapshot.weights, first.weights)
    more = {"sensitivity": snapshot.sensitivity, "rank": snapshot.ranks}
    more = {name: _spread(snapshot, values)[2] for name, values in more.items() if values is not None}
    return replace(grid, value_name="weight", more=more)


def rates_grid(snapshots: Sequence[Rates], at: int = -1) -> Grid:
    """As `importance_grid`, of the factors on the learning rate."""
    snapshot, first = snapshots[at], snapshots[0]
    grid = _grid(snapshot, first, snapshot.multipliers, first.multipliers)
    return replace(grid, value_name="multiplier", is_ratio=True)


def _grid(snapshot: Blocks, first: Blocks, values: Floats, first_values: Floats) -> Grid:
    rows, columns, values_RC, keys = _spread(snapshot, values)
    return Grid(
        rows=rows,
        columns=columns,
        values=values_RC,
        first=_spread(first, first_values)[2] if first.names == snapshot.names and first is not snapshot else None,
        names=dict(zip(keys, snapshot.names)),
    )


def _spread(blocks: Blocks, values: Floats) -> tuple[tuple[str, ...], tuple[str, ...], Floats, list[tuple[int, int]]]:
    """Names of the rows and of the columns, the values there, and each block's row and column."""
    rows = sorted(set(blocks.layer))
    keys, columns = [], {}
    seen: dict[tuple[int, str], int] = {}
    for layer, projection in zip(blocks.layer, blocks.projection):
        seen[layer, projection] = again = seen.get((layer, projection), 0) + 1
        column = projection if again == 1 else f"{projection}#{again}"
        keys.append((rows.index(layer), columns.setdefault(column, len(columns))))
    out_RC = np.full((len(rows), len(columns)), np.nan)
    out_RC[tuple(np.array(keys).reshape(-1, 2).T)] = values
    return tuple(str(layer) for layer in rows), tuple(columns), out_RC, keys


def abbreviated(names: Sequence[str], width: int) -> list[str]:
    """Each at most `width` characters and told apart: cut off, or where that is not enough, their ends or numbers."""
    for cut in (lambda name: name[:width], lambda name: name[-width:], _middle_out(width)):
        found = [name if len(name) <= width else cut(name) for name in names]
        if len(set(found)) == len(names):
            return found
    return [name if len(name) <= width else f"{name[: width - len(str(i))]}{i}" for i, name in enumerate(names)]


def _middle_out(width: int):
    left = (width - 1) // 2
    return lambda name: f"{name[:left]}…{name[len(name) - (width - 1 - left) :]}"


class Heatmap(ScrollView, can_focus=True):
    """Call `show` with a Grid. Arrow keys or h j k l, g, G and the mouse move the cursor."""

    DEFAULT_CSS = """
    Heatmap { height: 1fr; width: 1fr; min-height: 5; overflow: hidden; scrollbar-size: 0 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1, 0)", "Up", id="heatmap.up", show=False),
        Binding("down,j", "move(1, 0)", "Down", id="heatmap.down", show=False),
        Binding("left,h", "move(0, -1)", "Left", id="heatmap.left", show=False),
        Binding("right,l", "move(0, 1)", "Right", id="heatmap.right", show=False),
        Binding("pageup", "page(-1)", "Page up", id="heatmap.page-up", show=False),
        Binding("pagedown", "page(1)", "Page down", id="heatmap.page-down", show=False),
        Binding("g,home", "move_to(0)", "First row", id="heatmap.first", show=False),
        Binding("G,end", "move_to(-1)", "Last row", id="heatmap.last", show=False),
    ]

    cursor: reactive[tuple[int, int]] = reactive((0, 0))
    """Row and column."""

    @dataclass
    class CursorMoved(Message):
        heatmap: Heatmap
        row: int
        column: int

        @property
        def control(self) -> Heatmap:
            return self.heatmap

    def __init__(self, title: str = "", *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.title = title
        self.grid = Grid((), (), np.empty((0, 0)))
        self._top, self._left = 0, 0

    def show(self, grid: Grid, title: str | None = None) -> None:
        """The cursor stays where it is, if that is still there."""
        self.grid = grid
        self.title = self.title if title is None else title
        row, column = self.cursor
        self.cursor = max(0, min(row, len(grid.rows) - 1)), max(0, min(column, len(grid.columns) - 1))
        self._keep_cursor_in_view()
        self.refresh()

    # ---- places ----------------------------------------------------------------------------

    @property
    def label_width(self) -> int:
        return max([len(row) for row in self.grid.rows] or [0]) + 1

    @property
    def cell_width(self) -> int:
        room = (self.size.width - self.label_width) // max(len(self.grid.columns), 1)
        return max(MIN_CELL, min(MAX_CELL, room))

    @property
    def num_rows_shown(self) -> int:
        return max(self.size.height - _HEAD_LINES - _FOOT_LINES, 1)

    @property
    def num_columns_shown(self) -> int:
        return max((self.size.width - self.label_width) // self.cell_width, 1)

    def _keep_cursor_in_view(self) -> None:
        row, column = self.cursor
        self._top = _kept_in_view(row, self._top, self.num_rows_shown, len(self.grid.rows))
        self._left = _kept_in_view(column, self._left, self.num_columns_shown, len(self.grid.columns))

    def cell_at(self, x: int, y: int) -> tuple[int, int] | None:
        """Row and column under a place within the widget."""
        shown_row, shown_column = y - _HEAD_LINES, (x - self.label_width) // self.cell_width
        row, column = self._top + shown_row, self._left + shown_column
        inside = 0 <= shown_row < self.num_rows_shown and 0 <= shown_column < self.num_columns_shown
        return (row, column) if inside and row < len(self.grid.rows) and column < len(self.grid.columns) else None

    def watch_cursor(self, cursor: tuple[int, int]) -> None:
        self._keep_cursor_in_view()
        self.post_message(self.CursorMoved(self, *cursor))
        self.refresh()

    def on_resize(self) -> None:
        self.virtual_size = Size(*self.size)
        self._keep_cursor_in_view()

    # ---- keys and mouse --------------------------------------------------------------------

    def action_move(self, rows: int, columns: int) -> None:
        num_rows, num_columns = len(self.grid.rows), len(self.grid.columns)
        if num_rows and num_columns:
            row, column = self.cursor[0] + rows, self.cursor[1] + columns
            self.cursor = min(max(row, 0), num_rows - 1), min(max(column, 0), num_columns - 1)

    def action_page(self, direction: int) -> None:
        self.action_move(direction * self.num_rows_shown, 0)

    def action_move_to(self, row: int) -> None:
        if self.grid.rows:
            self.cursor = row % len(self.grid.rows), self.cursor[1]

    def on_mouse_move(self, event: events.MouseMove) -> None:
        self._point(event)

    def on_click(self, event: events.Click) -> None:
        self._point(event)

    def _point(self, event: events.MouseEvent) -> None:
        offset = event.get_content_offset(self)
        cell = self.cell_at(offset.x, offset.y) if offset is not None else None
        if cell is not None:
            self.cursor = cell

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.action_move(-1, 0)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.action_move(1, 0)

    # ---- drawing ---------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        base = self.rich_style
        if not self.grid.rows or not self.grid.columns:
            return Strip([Segment("nothing measured yet" if y == 0 else "", base)]).adjust_cell_length(
                self.size.width, base
            )
        height = self.size.height
        if y < _HEAD_LINES:
            segments = self._head(base)
        elif y >= height - _FOOT_LINES:
            segments = self._scale(base) if y == height - 2 else [Segment(self.readout(), base + Style(bold=True))]
        else:
            segments = self._row(self._top + y - _HEAD_LINES, base)
        return Strip(segments).adjust_cell_length(self.size.width, base)

    def _limits(self) -> tuple[float, float]:
        finite = self.grid.values[np.isfinite(self.grid.values)]
        if self.grid.is_ratio:
            farthest = np.exp(np.abs(np.log(finite[finite > 0])).max(initial=math.log(LEAST_RATIO)))
            return 1 / float(farthest), float(farthest)
        return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)

    def _share(self, value: float, limits: tuple[float, float]) -> float:
        if not self.grid.is_ratio:
            return share(value, limits)
        low, high = map(math.log, limits)
        return share(math.log(value), (low, high)) if value > 0 else 0.0

    def _color(self, part: float) -> tuple[int, int, int]:
        return ratio_color(part) if self.grid.is_ratio else scale_color(part)

    def _columns(self) -> range:
        return range(self._left, min(self._left + self.num_columns_shown, len(self.grid.columns)))

    def _head(self, base: Style) -> list[Segment]:
        width = self.cell_width
        names = abbreviated(self.grid.columns, width - 1)
        segments = [Segment(" " * self.label_width, base)]
        for column in self._columns():
            at_cursor = column == self.cursor[1]
            segments.append(Segment(names[column].center(width), base + Style(bold=at_cursor, underline=at_cursor)))
        return segments

    def _row(self, row: int, base: Style) -> list[Segment]:
        if row >= len(self.grid.rows):
            return []
        at_cursor = row == self.cursor[0]
        label = self.grid.rows[row].rjust(self.label_width - 1) + " "
        segments = [Segment(label, base + Style(bold=at_cursor, underline=at_cursor))]
        limits = self._limits()
        for column in self._columns():
            value = float(self.grid.values[row, column])
            segments += self._cell(value, limits, (row, column) == self.cursor, base)
        return segments

    def _cell(self, value: float, limits: tuple[float, float], at_cursor: bool, base: Style) -> list[Segment]:
        width = self.cell_width
        if math.isnan(value):
            text, style = "·".center(width), base + Style(dim=True)
        elif math.isinf(value):
            text, style = ("+inf" if value > 0 else "-inf").center(width), base + Style(bold=True)
        else:
            part = self._share(value, limits)
            color = self._color(part)
            number = short(value) if width >= _NUMBERS_FROM else ""
            if self.app.no_color:
                text = f"{shade(part) * (width - len(number) - 1)}{number}".ljust(width)
                style = base
            else:
                text = number.center(width)
                style = Style(color="black" if _is_light(color) else "white", bgcolor="rgb({},{},{})".format(*color))
        if at_cursor:
            text = f"[{text[1:-1]}]" if width > 2 else text
            style += Style(bold=True, reverse=math.isnan(value))
        return [Segment(text, style)]

    def _scale(self, base: Style) -> list[Segment]:
        """The legend, with where the shown rows and columns lie among all."""
        low, high = self._limits()
        segments = [Segment(f"{self.title or self.grid.value_name} {short(low)} ", base)]
        for i in range(16):
            part = i / 15
            if self.app.no_color:
                segments.append(Segment(shade(part), base))
            else:
                segments.append(Segment(" ", Style(bgcolor="rgb({},{},{})".format(*self._color(part)))))
        segments.append(Segment(f" {short(high)}" + (" (log)" if self.grid.is_ratio else ""), base))
        for what, first, shown, num in (
            ("rows", self._top, self.num_rows_shown, len(self.grid.rows)),
            ("columns", self._left, self.num_columns_shown, len(self.grid.columns)),
        ):
            if shown < num:
                segments.append(Segment(f"  {what} {first + 1}-{min(first + shown, num)} of {num}", base))
        return segments

    def readout(self) -> str:
        """The numbers under the cursor."""
        grid, (row, column) = self.grid, self.cursor
        if not grid.rows or not grid.columns:
            return ""
        value = float(grid.values[row, column])
        said = [f"{grid.rows[row]} {grid.columns[column]}"]
        if math.isnan(value):
            return f"{said[0]}  no such matrix"
        said.append(f"{grid.value_name} {short(value)}")
        said += [f"{name} {short(float(values[row, column]))}" for name, values in grid.more.items()]
        if grid.first is not None and math.isfinite(before := float(grid.first[row, column])):
            change = f"{(value - before) / abs(before):+.1%}" if before else f"{value - before:+.3g}"
            said.append(f"first {short(before)} ({change})")
        return "  ".join(said)


def share(value: float, limits: tuple[float, float]) -> float:
    """Of the scale, 0..1; the middle where all values are the same."""
    low, high = limits
    return (value - low) / (high - low) if high > low else 0.5


def _is_light(color: tuple[int, int, int]) -> bool:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128


def _kept_in_view(at: int, first: int, shown: int, num: int) -> int:
    first = min(max(first, at - shown + 1), at)
    return max(0, min(first, num - shown))
