"""A grid of numbers as colours, with a cursor. It fills its area."""

from __future__ import annotations

import math
from dataclasses import dataclass
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

from fastpeft.tui.format import flowed
from fastpeft.tui.grids import Grid
from fastpeft.tui.theme import ratio_color, scale_color, shade
from fastpeft.tui.widgets.axes import short
from fastpeft.tui.widgets.cell_layout import Columns, Rows, columns_in, rows_in

# R rows, C columns

MIN_CELL = 4
"""Least width of a cell. A narrower screen scrolls horizontally."""
LEAST_RATIO = 1.1
"""A scale of factors covers at least 1 / this to this, so that tiny differences look tiny."""
_NUMBERS_FROM = 7
"""Cells at least this wide show their numbers."""
_SPREAD_FROM = 1.5
"""Lines per row from which rows fill all lines, in half lines. Below it, each row has one line with its numbers."""
_MAX_HEAD_LINES = 3
_SCALE_CELLS = 16
_NARROW = 100
"""A narrower heatmap shows the readout at the cursor on two lines."""


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
        self._limits = (0.0, 0.0)
        self.nothing = "nothing measured yet"
        """Text for an empty grid."""
        self._top, self._left = 0, 0

    def show(self, grid: Grid, title: str | None = None) -> None:
        """Show `grid`. The cursor keeps its cell, if that still exists."""
        self.grid, self._limits = grid, limits(grid)
        self.title = self.title if title is None else title
        row, column = self.cursor
        self.cursor = max(0, min(row, len(grid.rows) - 1)), max(0, min(column, len(grid.columns) - 1))
        self._keep_cursor_in_view()
        self.refresh()

    # ---- layout ----------------------------------------------------------------------------

    @property
    def label_width(self) -> int:
        return max([len(row) for row in self.grid.rows] or [0]) + 1

    @property
    def columns(self) -> Columns:
        """The columns in view."""
        most = max(1, min(_MAX_HEAD_LINES, self.size.height // 4))
        return columns_in(self.grid.columns, self._left, self.size.width - self.label_width, MIN_CELL, most)

    @property
    def num_rows_shown(self) -> int:
        return max(self.size.height - len(self.columns.head) - self.num_foot_lines, 1)

    @property
    def num_foot_lines(self) -> int:
        return 2 if self.size.width >= _NARROW else 3

    @property
    def rows(self) -> Rows:
        """The rows in view, over all available lines."""
        num, lines = len(self.grid.rows), self.num_rows_shown
        return rows_in(num, lines, self._top, halves=not self.app.no_color, spread_from=_SPREAD_FROM)

    def _keep_cursor_in_view(self) -> None:
        row, column = self.cursor
        self._left = _kept_in_view(column, self._left, max(self.columns.num, 1), len(self.grid.columns))
        self._top = _kept_in_view(row, self._top, self.num_rows_shown, len(self.grid.rows))

    def cell_at(self, x: int, y: int) -> tuple[int, int] | None:
        """(row, column) at a position in the widget."""
        row = self.rows.at(2 * (y - len(self.columns.head)))
        column = self.columns.at(x - self.label_width)
        return (row, column) if row is not None and column is not None else None

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
            segments = [Segment(self.nothing if y == 0 else "", base)]
        elif y < len(self.columns.head):
            segments = self._head(y, base)
        elif (from_below := self.size.height - y) <= self.num_foot_lines:
            segments = self._foot(self.num_foot_lines - from_below, base)
        else:
            segments = self._line(y - len(self.columns.head), base)
        return Strip(segments).adjust_cell_length(self.size.width, base)

    def _share(self, value: float, limits: tuple[float, float]) -> float:
        if not self.grid.is_ratio:
            return share(value, limits)
        low, high = map(math.log, limits)
        return share(math.log(value), (low, high)) if value > 0 else 0.0

    def _color(self, part: float) -> tuple[int, int, int]:
        return ratio_color(part) if self.grid.is_ratio else scale_color(part)

    def _head(self, y: int, base: Style) -> list[Segment]:
        segments = [Segment(" " * self.label_width, base)]
        for (column, width), text in zip(self.columns, self.columns.head[y]):
            style = base + Style(bold=True, underline=True) if column == self.cursor[1] else base
            segments += _with_blanks(text.center(width - 1) + " ", style, base)
        return segments

    def _line(self, line: int, base: Style) -> list[Segment]:
        """A line of one row, or one shared by the end of a row and the beginning of the next."""
        rows = self.rows
        upper, lower = rows.at(2 * line), rows.at(2 * line + 1)
        if upper is None or lower is None:
            return []
        has_number = upper == lower and rows.number_line(upper) == line
        label = self.grid.rows[upper].rjust(self.label_width - 1) + " " if has_number else " " * self.label_width
        style = base + Style(bold=True, underline=True) if upper == self.cursor[0] else base
        segments = _with_blanks(label, style, base)
        for column, width in self.columns:
            if upper == lower:
                segments.append(self._cell(upper, column, width, has_number, base))
            else:
                segments.append(self._border(upper, lower, column, width, base))
        return segments

    def _cell(self, row: int, column: int, width: int, has_number: bool, base: Style) -> Segment:
        value = float(self.grid.values[row, column])
        if math.isnan(value):
            text, style = "·" if has_number else "", base + Style(dim=True)
        elif math.isinf(value):
            text, style = ("+inf" if value > 0 else "-inf") if has_number else "", base + Style(bold=True)
        else:
            number = short(value) if has_number and width >= _NUMBERS_FROM else ""
            if self.app.no_color:
                part = self._share(value, self._limits)
                text, style = f"{shade(part) * (width - len(number) - 1)}{number}".ljust(width), base
            else:
                color = self._background(row, column)
                assert color is not None
                text = number
                style = Style(color="black" if _is_light(color) else "white", bgcolor="rgb({},{},{})".format(*color))
        text = text.center(width)
        if (row, column) == self.cursor:
            text = f"[{text[1:-1]}]" if width > 2 else text
            style += Style(bold=True, reverse=math.isnan(value))
        return Segment(text, style)

    def _border(self, upper: int, lower: int, column: int, width: int, base: Style) -> Segment:
        """A line whose halves belong to two rows."""
        colors = [self._background(row, column) for row in (upper, lower)]
        front, behind = ("rgb({},{},{})".format(*color) if color else None for color in colors)
        if front is None:
            return Segment("▄" * width if behind else " " * width, base + Style(color=behind))
        return Segment("▀" * width, base + Style(color=front, bgcolor=behind))

    def _background(self, row: int, column: int) -> tuple[int, int, int] | None:
        value = float(self.grid.values[row, column])
        return self._color(self._share(value, self._limits)) if math.isfinite(value) else None

    def _foot(self, line: int, base: Style) -> list[Segment]:
        """The legend, the range of shown rows and columns among all, and the readout at the cursor."""
        if line == 0:
            return self._scale(base)
        lines = flowed(self.said(), self.size.width).split()
        return [Segment(lines[line - 1].plain, base + Style(bold=True))] if line <= len(lines) else []

    def _scale(self, base: Style) -> list[Segment]:
        low, high = self._limits
        places = [
            f"{what} {first + 1}-{min(first + shown, num)} of {num}"
            for what, first, shown, num in (
                ("rows", self._top, self.rows.num, len(self.grid.rows)),
                ("columns", self._left, self.columns.num, len(self.grid.columns)),
            )
            if shown < num
        ]
        end = "  ".join([f" {short(high)}" + (" (log)" if self.grid.is_ratio else ""), *places])
        title = f"{self.title or self.grid.value_name} "
        if len(title) + len(short(low)) + 1 + _SCALE_CELLS + len(end) > self.size.width:
            title = ""
        segments = [Segment(f"{title}{short(low)} ", base)]
        for i in range(_SCALE_CELLS):
            part = i / (_SCALE_CELLS - 1)
            if self.app.no_color:
                segments.append(Segment(shade(part), base))
            else:
                segments.append(Segment(" ", Style(bgcolor="rgb({},{},{})".format(*self._color(part)))))
        return [*segments, Segment(end, base)]

    def readout(self) -> str:
        """The numbers at the cursor."""
        return "  ".join(self.said())

    def said(self) -> list[str]:
        """The parts of the readout."""
        grid, (row, column) = self.grid, self.cursor
        if not grid.rows or not grid.columns:
            return []
        value = float(grid.values[row, column])
        said = [f"{grid.rows[row]} {grid.columns[column]}"]
        if math.isnan(value):
            return [*said, "no such matrix"]
        said.append(f"{grid.value_name} {short(value)}")
        said += [f"{name} {short(float(values[row, column]))}" for name, values in grid.more.items()]
        if grid.first is not None and math.isfinite(before := float(grid.first[row, column])):
            change = f"{(value - before) / abs(before):+.1%}" if before else f"{value - before:+.3g}"
            said.append(f"first {short(before)} ({change})")
        return said


def _with_blanks(text: str, style: Style, base: Style) -> list[Segment]:
    """Segments of `text`: `style` without the blanks at both ends, which get `base`."""
    inner = text.strip()
    before, _, after = text.partition(inner) if inner else (text, "", "")
    return [Segment(before, base), Segment(inner, style), Segment(after, base)]


def limits(grid: Grid) -> tuple[float, float]:
    """The ends of the scale."""
    finite = grid.values[np.isfinite(grid.values)]
    if grid.is_ratio:
        farthest = np.exp(np.abs(np.log(finite[finite > 0])).max(initial=math.log(LEAST_RATIO)))
        return 1 / float(farthest), float(farthest)
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def share(value: float, limits: tuple[float, float]) -> float:
    """Position on the scale, 0..1; the middle if all values are equal."""
    low, high = limits
    return (value - low) / (high - low) if high > low else 0.5


def _is_light(color: tuple[int, int, int]) -> bool:
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128


def _kept_in_view(at: int, first: int, shown: int, num: int) -> int:
    first = min(max(first, at - shown + 1), at)
    return max(0, min(first, num - shown))
