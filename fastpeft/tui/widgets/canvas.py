"""The canvas of a LinePlot: frame and ticks are textual-plot's; the lines, which are many, are drawn here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from rich.style import Style
from textual import events
from textual.app import ComposeResult
from textual.containers import Grid
from textual.geometry import Region
from textual.strip import Strip
from textual_hires_canvas import Canvas
from textual_plot import PlotWidget
from textual_plot.plot_widget import Legend

from fastpeft.tui.series import Floats
from fastpeft.tui.widgets.axes import Durations, Numbers
from fastpeft.tui.widgets.raster import BLANK, braille, mark_places, owners

MARGIN_LEFT = 9
_BAND = "░"
_CURSOR = "│"
_END = "◆"
_LEVEL_DASH = (4, 4)
_BRAILLE = [chr(BLANK + dots) for dots in range(256)]


@dataclass(frozen=True)
class Line:
    x: Floats
    y: Floats
    color: str
    dash: tuple[int, int]
    mark: str = ""
    """A symbol placed at intervals on the line."""


@dataclass(frozen=True)
class Shade:
    x: Floats
    low: Floats
    high: Floats
    color: str
    level: Floats | None = None
    """A line within the area, which ends in a symbol."""


@dataclass(frozen=True)
class Marks:
    """Marks of non-finite values: × for nan and ▼ for -inf at the lower edge, ▲ for inf at the upper edge."""

    x: Floats
    values: Floats


@dataclass(frozen=True)
class Scene:
    """The content of one drawing, in the axes' units."""

    lines: list[Line]
    shades: list[Shade]
    marks: list[Marks]
    x: tuple[float, float]
    y: tuple[float, float]
    cursor_x: float | None


class Steered(Protocol):
    """The plot that mouse events on a canvas act on."""

    view_y: tuple[float, float] | None

    def at(self, x: float, y: float) -> tuple[float, float]: ...

    def zoom_x(self, center: float, direction: int) -> None: ...

    def zoom_y(self, center: float, direction: int) -> None: ...

    def pan(self, columns: int, rows: int) -> None: ...

    def point_at(self, x: float | None) -> None: ...

    def action_reset(self) -> None: ...

    def focus(self) -> object: ...


class _Cells(Canvas):
    _style: Style | None = None

    @property
    def rich_style(self) -> Style:
        """Cached per drawing, since Textual asks for it once per line."""
        return self._style or super().rich_style

    def render_lines(self, crop: Region) -> list[Strip]:
        self._style = super().rich_style
        try:
            return super().render_lines(crop)
        finally:
            self._style = None

    def render_line(self, y: int) -> Strip:
        """As textual-plot's, but a line without a style, which a screen without colour cannot show."""
        strip = super().render_line(y)
        return strip if strip.cell_length else Strip.blank(self.size.width, self.rich_style)


class PlotCanvas(PlotWidget, can_focus=False, inherit_bindings=False):
    """Draws scenes, and forwards mouse events to its plot."""

    DEFAULT_CSS = """
    PlotCanvas { height: 1fr; width: 1fr; }
    PlotCanvas > .plot--axis { color: $foreground 40%; }
    PlotCanvas > .plot--tick { color: $foreground 75%; text-style: none; }
    """

    def __init__(self, plot: Steered) -> None:
        super().__init__(allow_pan_and_zoom=False)
        self._plot = plot
        self._scene: Scene | None = None
        self.set_reactive(PlotWidget.margin_top, 0)
        self.set_reactive(PlotWidget.margin_bottom, 1)
        self.set_reactive(PlotWidget.margin_left, MARGIN_LEFT)

    def compose(self) -> ComposeResult:
        with Grid():
            for name in ("margin-top", "margin-left", "plot", "margin-bottom"):
                yield _Cells(1, 1, id=name)
        yield Legend(id="legend")

    @property
    def num_columns(self) -> int:
        """Width inside the frame, in cells."""
        return max(self.size.width - MARGIN_LEFT - 2, 0)

    @property
    def num_rows(self) -> int:
        return max(self.size.height - 3, 0)

    def draw(self, scene: Scene, x_format: Numbers | Durations, y_format: Numbers) -> None:
        self._scene = scene
        x_format.most, x_format.columns = max(2, self.num_columns // 12), self.num_columns
        y_format.most = max(2, (self.num_rows + 1) // 2)
        self.set_x_formatter(x_format)
        self.set_y_formatter(y_format)
        self.set_xlimits(*scene.x)
        self.set_ylimits(*scene.y)
        if not self._needs_canvas_resize:  # otherwise textual-plot draws one frame later
            self._render_plot()
            self._needs_rerender = False

    def _render_plot(self) -> None:
        if self.num_columns < 1 or self.num_rows < 1:
            return
        canvas = self.query_one("#plot", Canvas)
        with canvas.batch_refresh():
            super()._render_plot()
            if self._scene is not None:
                self._draw(canvas, self._scene)

    def _draw(self, canvas: Canvas, scene: Scene) -> None:
        for shade in scene.shades:
            self._draw_shade(canvas, shade)
        self._draw_cursor(canvas, scene.cursor_x)
        levels = [Line(s.x, s.level, s.color, _LEVEL_DASH) for s in scene.shades if s.level is not None]
        self._draw_lines(canvas, [*levels, *scene.lines])
        for level in levels:
            self._draw_end(canvas, level)
        for marks in scene.marks:
            self._draw_marks(canvas, marks)

    def _draw_lines(self, canvas: Canvas, lines: list[Line]) -> None:
        """Draw all lines. A cell that several lines cross has the dots of all."""
        if not lines:
            return
        width, height = self._scale_rectangle.width, self._scale_rectangle.height
        dots_LHW = np.stack([braille(*self._cells(line.x, line.y), width, height, line.dash) for line in lines])
        dots_HW, owner_HW = np.bitwise_or.reduce(dots_LHW), owners(dots_LHW > 0)
        rows, columns = np.nonzero(dots_HW)
        cells = (columns + 1, rows + 1, dots_HW[rows, columns], owner_HW[rows, columns])
        for x, y, dots, i in zip(*(cell.tolist() for cell in cells)):
            canvas.set_pixel(x, y, _BRAILLE[dots], lines[i].color)
        marked = [i for i, line in enumerate(lines) if line.mark]
        for i, places in zip(marked, mark_places(dots_LHW[marked] > 0)):
            for row, column in places:
                canvas.set_pixel(column + 1, row + 1, lines[i].mark, f"bold {lines[i].color}")

    def _cells(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Convert axes' units to cells from the upper left corner inside the frame."""
        scene = self._scene
        assert scene is not None
        x = (x - scene.x[0]) / (scene.x[1] - scene.x[0]) * self._scale_rectangle.width
        y = (scene.y[1] - y) / (scene.y[1] - scene.y[0]) * self._scale_rectangle.height
        return x, y

    def _draw_shade(self, canvas: Canvas, shade: Shade) -> None:
        """Fill each column from the band's low to its high, taken at the column's middle."""
        scene = self._scene
        assert scene is not None
        (low_x, high_x), width = scene.x, self._scale_rectangle.width
        x = low_x + (np.arange(width) + 0.5) / width * (high_x - low_x)
        inside = (x >= shade.x[0]) & (x <= shade.x[-1]) if len(shade.x) else np.zeros(width, bool)
        for column in np.flatnonzero(inside).tolist():
            edges = np.array([np.interp(x[column], shade.x, edge) for edge in (shade.high, shade.low)])
            top, bottom = self._cells(np.zeros(2), edges)[1]
            if not (math.isfinite(top) and math.isfinite(bottom)):
                continue
            for row in range(max(int(top), 0), min(math.ceil(bottom), self._scale_rectangle.height)):
                canvas.set_pixel(column + 1, row + 1, _BAND, shade.color)

    def _draw_end(self, canvas: Canvas, line: Line) -> None:
        column = self._column(float(line.x[-1]))
        row = self._cells(line.x[-1:], line.y[-1:])[1][0]
        if column is not None and 0 <= row < self._scale_rectangle.height:
            canvas.set_pixel(column + 1, int(row) + 1, _END, line.color)

    def _draw_cursor(self, canvas: Canvas, at: float | None) -> None:
        column = self._column(at)
        if column is not None:
            style = str(self.get_component_rich_style("plot--axis"))
            for row in range(self._scale_rectangle.height):
                canvas.set_pixel(column + 1, row + 1, _CURSOR, style)

    def _draw_marks(self, canvas: Canvas, marks: Marks) -> None:
        bottom = self._scale_rectangle.height
        style = f"bold {self.app.theme_variables.get('error', 'red')}"
        for x, value in zip(marks.x.tolist(), marks.values.tolist()):
            column = self._column(x)
            if column is not None:
                sign, row = ("×", bottom) if math.isnan(value) else ("▲", 1) if value > 0 else ("▼", bottom)
                canvas.set_pixel(column + 1, row, sign, style)

    def _column(self, x: float | None) -> int | None:
        if x is None or self._scene is None:
            return None
        low, high = self._scene.x
        share = (x - low) / (high - low)
        return (
            min(int(share * self._scale_rectangle.width), self._scale_rectangle.width - 1) if 0 <= share <= 1 else None
        )

    # ---- the mouse -------------------------------------------------------------------------

    def _share(self, event: events.MouseEvent) -> tuple[float, float] | None:
        """(share of the width, share of the height from below), beyond 0..1 in the margins. None outside the widget."""
        if not self.region.contains_point(event.screen_offset) or not self.num_columns or not self.num_rows:
            return None
        offset = event.screen_offset - self.region.offset
        x = (offset.x - MARGIN_LEFT - 1 + 0.5) / self.num_columns
        return x, 1 - (offset.y - 1 + 0.5) / self.num_rows

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self._zoom_at(event, -1)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self._zoom_at(event, 1)

    def _zoom_at(self, event: events.MouseEvent, direction: int) -> None:
        """Zoom y in the margin of its labels, else x."""
        event.stop()
        share = self._share(event)
        if share is None:
            return
        x, y = self._plot.at(*share)
        if share[0] < 0:
            self._plot.zoom_y(y, direction)
        else:
            self._plot.zoom_x(x, direction)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Move the cursor. With a button pressed, pan, vertically only if y is zoomed."""
        share = self._share(event)
        if event.button:
            self._plot.pan(-event.delta_x, event.delta_y if self._plot.view_y else 0)
        elif share is not None:
            self._plot.point_at(share[0] if 0 <= share[0] <= 1 else None)

    def on_leave(self, event: events.Leave) -> None:
        if not self.is_mouse_over:
            self._plot.point_at(None)

    def on_click(self, event: events.Click) -> None:
        self._plot.focus()
        if event.chain == 2:
            self._plot.action_reset()
