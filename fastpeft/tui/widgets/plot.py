"""Curves over time, steps, tokens or joules, for keyboard and mouse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Static

from fastpeft.tui.format import joined, shortened
from fastpeft.tui.series import AXES, Floats, Window
from fastpeft.tui.widgets.axes import Durations, Numbers, Powers, position, short
from fastpeft.tui.widgets.canvas import Line, Marks, PlotCanvas, Scene, Shade
from fastpeft.tui.widgets.looks import Curve, Look, looks
from fastpeft.tui.widgets.raster import DASHES

SMOOTHING = (0.0, 0.6, 0.9, 0.97, 0.99)
"""Smoothing weights that the key `s` cycles through."""
ZOOM = 1.5
AHEAD = 0.25
_LEVEL_SIGN = "╌"
_FLAT = 1e-9
"""Least range relative to the values. A smaller one is rounding error of a constant."""
_LEAST_LABEL = 8
"""Least characters of a label, for a curve without a mark."""


@dataclass(frozen=True)
class Band:
    """An area from `low` to `high`, as of a forecast; x in the unit of the plot's axis, rising.

    It extends the initial view by at most AHEAD of the curves' range to the right, and by their height up and down, so
    that the curves stay legible. The rest of it can be panned to.
    """

    x: Floats
    low: Floats
    high: Floats
    """nan where there is no area."""
    color: str = "#999999"
    label: str = ""
    level: Floats | None = None
    """A line within the area."""


class LinePlot(Widget, can_focus=True):
    """Call `show` with the curves, and `redraw` when their series have grown. Zoom and cursor are kept."""

    DEFAULT_CSS = """
    LinePlot { height: 1fr; width: 1fr; min-height: 6; }
    LinePlot > #readout { height: 1; width: 1fr; text-wrap: nowrap; text-overflow: ellipsis; }
    LinePlot:focus > #readout { background: $boost; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "cursor(-1)", "Cursor left", id="plot.cursor-left", show=False),
        Binding("right", "cursor(1)", "Cursor right", id="plot.cursor-right", show=False),
        Binding("home", "cursor_to(0)", "Cursor to the start", id="plot.cursor-start", show=False),
        Binding("end", "cursor_to(1)", "Cursor to the end", id="plot.cursor-end", show=False),
        Binding("plus,equals_sign", "zoom(1)", "Zoom in", id="plot.zoom-in", key_display="+", show=False),
        Binding("minus", "zoom(-1)", "Zoom out", id="plot.zoom-out", key_display="-", show=False),
        Binding("shift+left,less_than_sign", "pan(-1, 0)", "Pan left", id="plot.pan-left", show=False),
        Binding("shift+right,greater_than_sign", "pan(1, 0)", "Pan right", id="plot.pan-right", show=False),
        Binding("shift+up", "pan(0, 1)", "Pan up", id="plot.pan-up", show=False),
        Binding("shift+down", "pan(0, -1)", "Pan down", id="plot.pan-down", show=False),
        Binding("K", "zoom_y(1)", "Zoom in on y", id="plot.zoom-y-in", show=False),
        Binding("J", "zoom_y(-1)", "Zoom out on y", id="plot.zoom-y-out", show=False),
        Binding("y", "log", "Log", tooltip="Log scale", id="plot.log"),
        Binding("s", "smooth(1)", "Smooth", tooltip="Smooth more", id="plot.smooth"),
        Binding("S", "smooth(-1)", "Smooth less", id="plot.smooth-less", show=False),
        Binding("x", "axis", "Axis", tooltip="The next x axis", id="plot.axis"),
        Binding("0", "reset", "Reset", tooltip="Show everything again", id="plot.reset"),
    ]

    axis: reactive[str] = reactive("time", init=False)
    log_scale: reactive[bool] = reactive(False, init=False)
    smoothing: reactive[float] = reactive(0.0, init=False)
    cursor_x: reactive[float | None] = reactive(None, init=False)

    @dataclass
    class AxisChanged(Message):
        """The user chose another x axis."""

        plot: LinePlot
        axis: str

        @property
        def control(self) -> LinePlot:
            return self.plot

    def __init__(
        self,
        title: str = "",
        *,
        axis: str = "time",
        log: bool = False,
        axes: Sequence[str] = AXES,
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.title, self.axes = title, tuple(axes)
        self.set_reactive(LinePlot.axis, axis)
        self.set_reactive(LinePlot.log_scale, log)
        self.curves: tuple[Curve, ...] = ()
        self.bands: tuple[Band, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.looks: list[Look] = []
        """Looks of the curves, as last drawn."""
        self.view_x: tuple[float, float] | None = None
        """The zoomed x range; None shows everything."""
        self.view_y: tuple[float, float] | None = None
        """The zoomed y range, of log10 values on a log scale; None fits the curves."""
        self.num_not_finite = 0
        self.num_not_positive = 0
        """Number of values in view that the log scale leaves out."""
        self._shown_x, self._shown_y = (0.0, 1.0), (0.0, 1.0)
        self._is_stale = False

    def compose(self) -> ComposeResult:
        yield Static(id="readout", markup=False)
        yield PlotCanvas(self)

    def on_mount(self) -> None:
        self.redraw()

    def on_resize(self) -> None:
        self.call_after_refresh(self.redraw)

    # ---- content ---------------------------------------------------------------------------

    def show(self, curves: Sequence[Curve], bands: Sequence[Band] = (), notes: Sequence[str] = ()) -> None:
        """Draw these from now on. `notes` follow the curves' values in the line above."""
        self.curves, self.bands, self.notes = tuple(curves), tuple(bands), tuple(notes)
        self.redraw()

    def redraw(self) -> None:
        """Draw again after the series have grown. Consecutive calls draw once."""
        if not self._is_stale:
            self._is_stale = True
            self.call_next(self._draw)

    def _draw(self) -> None:
        self._is_stale = False
        canvases = self.query(PlotCanvas)
        if not self.is_mounted or not self.size.area or not canvases:  # not mounted yet, or being removed
            return
        canvas = canvases.first()
        self._shown_x = low, high = self.view_x or self._all_x()
        buckets = max(2 * canvas.num_columns, 2)
        windows = [
            c.series.window(self.axis, low, high, buckets, self.smoothing, positive=self.log_scale) for c in self.curves
        ]
        self.num_not_finite = sum(w.num_not_finite for w in windows)
        self.num_not_positive = sum(w.num_not_positive for w in windows)
        bands = [self._shade(band) for band in self.bands]
        self._shown_y = self.view_y or self._needed_y(windows, bands)
        self.looks = looks(self.curves, self.app.no_color)
        lines = [
            Line(w.x, self._scaled(w.y), look.color, DASHES[look.dash], look.mark)
            for w, look in zip(windows, self.looks)
        ]
        marks = [Marks(w.gaps_x, w.gaps_y) for w in windows if len(w.gaps_x)]
        x_format = Durations() if self.axis == "time" else Numbers()
        y_format = Powers() if self.log_scale else Numbers()
        canvas.draw(Scene(lines, bands, marks, self._shown_x, self._shown_y, self.cursor_x), x_format, y_format)
        self._say()

    def _all_x(self) -> tuple[float, float]:
        limits = [found for c in self.curves if (found := c.series.limits(self.axis)) is not None]
        ahead = [(float(b.x[0]), float(b.x[-1])) for b in self.bands if len(b.x)]
        if not limits + ahead:
            return 0.0, 1.0
        low, high = min(found[0] for found in limits or ahead), max(found[1] for found in limits or ahead)
        if limits and ahead:
            high = max(high, min(high + AHEAD * (high - low), max(found[1] for found in ahead)))
        return (low, high) if high > low else (low - 0.5, low + 0.5)

    def _scaled(self, y: Floats) -> Floats:
        return np.log10(y) if self.log_scale else y

    def _shade(self, band: Band) -> Shade:
        low, high = band.low, band.high
        if self.log_scale:
            positive = high > 0
            least = float(high[positive].min()) / 10 if positive.any() else 1.0
            low, high = np.log10(np.maximum(low, least)), np.log10(np.maximum(high, least))
        level = None if band.level is None or (self.log_scale and (band.level <= 0).any()) else band.level
        level = level if level is None else self._scaled(level)
        return Shade(band.x, low, high, band.color, level)

    def _needed_y(self, windows: list[Window], bands: list[Shade]) -> tuple[float, float]:
        low_x, high_x = self._shown_x
        values = _finite([self._scaled(w.y[(w.x >= low_x) & (w.x <= high_x)]) for w in windows])
        edges = _finite([edge for band in bands for edge in _edges(band, low_x, high_x)])
        if len(values) and len(edges):
            room = (values.max() - values.min()) or np.inf
            edges = np.clip(edges, values.min() - room, values.max() + room)
        values = np.concatenate([values, edges])
        if not len(values):
            return (-1.0, 0.0) if self.log_scale else (0.0, 1.0)
        low, high = float(values.min()), float(values.max())
        flat = high - low <= _FLAT * (1.0 if self.log_scale else max(abs(low), abs(high)))
        room = 0.05 * (abs(low) if flat else high - low) or 0.5
        return low - room, high + room

    # ---- the line above --------------------------------------------------------------------

    def _say(self) -> None:
        """Fill the line above, with labels as long as fit, and the number of curves that do not fit."""
        values = [self._value(curve, self.cursor_x) for curve in self.curves]
        longest = max([len(curve.label) for curve in self.curves], default=0)
        widths = [*range(longest, _LEAST_LABEL, -1), min(longest, _LEAST_LABEL)]
        widths += [0] if self.looks and all(look.mark for look in self.looks) else []
        tries = [(len(values), width) for width in widths] + [
            (num, widths[-1]) for num in range(len(values) - 1, 0, -1)
        ]
        texts = (self._said(values[:num], width) for num, width in tries)
        text = next((text for text in texts if text.cell_len <= self.size.width), self._said(values[:1], widths[-1]))
        self.query_one("#readout", Static).update(text, layout=False)

    def _said(self, values: Sequence[str], width: int) -> Text:
        """The line above, for as many curves as there are values, with labels of `width` characters."""
        parts = [Text(self.title, "bold")]
        if self.cursor_x is not None:
            parts.append(Text(position(self.axis, self.cursor_x), "reverse"))
        for curve, look, value in zip(self.curves, self.looks, values):
            label = f" {shortened(curve.label, width)}" if width else ""
            parts.append(Text.assemble((f"{look.sign}{label}", look.color), f" {value}"))
        if len(values) < len(self.curves):
            parts.append(Text(f"{len(self.curves) - len(values)} more"))
        parts += [Text(f"{_LEVEL_SIGN} {band.label}", band.color) for band in self.bands if band.label]
        parts += map(Text, self.notes)
        parts.append(Text(" · ".join(["", self.axis, *self._flags()])[1:], "dim"))
        text = joined(parts)
        text.no_wrap, text.overflow, text.end = True, "ellipsis", ""
        return text

    def _value(self, curve: Curve, at: float | None) -> str:
        if at is None:
            value = curve.series.last
        else:
            found = curve.series.nearest(self.axis, at, self.smoothing)
            value = found[1] if found else None
        return "–" if value is None else short(value)

    def _flags(self) -> list[str]:
        said = ["log"] if self.log_scale else []
        if self.smoothing:
            said.append(f"smoothed {self.smoothing:g}")
        if self.num_not_positive:
            said.append(f"{self.num_not_positive:,} ≤ 0 left out")
        if self.num_not_finite:
            said.append(f"{self.num_not_finite:,} not finite")
        if self.view_x or self.view_y:
            said.append("zoomed")
        return said

    # ---- keys and mouse --------------------------------------------------------------------

    def watch_axis(self) -> None:
        self.view_x = self.cursor_x = None
        self.redraw()

    def watch_log_scale(self) -> None:
        self.view_y = None
        self.redraw()

    def watch_smoothing(self) -> None:
        self.redraw()

    def watch_cursor_x(self) -> None:
        self.redraw()

    def action_cursor(self, columns: int) -> None:
        low, high = self._shown_x
        step = (high - low) / max(self.query_one(PlotCanvas).num_columns, 1)
        at = self.cursor_x
        if at is None:
            at = high - step / 2 if columns < 0 else low + step / 2
        self.cursor_x = min(max(at + columns * step, low), high)

    def action_cursor_to(self, part: int) -> None:
        self.cursor_x = self._shown_x[part]

    def action_zoom(self, direction: int) -> None:
        low, high = self._shown_x
        at = self.cursor_x
        if at is None or not low <= at <= high:
            at = (low + high) / 2
        self.zoom_x(at, direction)

    def action_zoom_y(self, direction: int) -> None:
        self.zoom_y(sum(self._shown_y) / 2, direction)

    def action_pan(self, columns: int, rows: int) -> None:
        canvas = self.query_one(PlotCanvas)
        self.pan(columns * max(canvas.num_columns // 10, 1), rows * max(canvas.num_rows // 10, 1))

    def action_log(self) -> None:
        self.log_scale = not self.log_scale

    def action_smooth(self, direction: int) -> None:
        at = min(range(len(SMOOTHING)), key=lambda i: abs(SMOOTHING[i] - self.smoothing))
        self.smoothing = SMOOTHING[(at + direction) % len(SMOOTHING)]

    def action_axis(self) -> None:
        """Change to the next axis for which the curves have values."""
        start = self.axes.index(self.axis) if self.axis in self.axes else -1
        for i in range(1, len(self.axes)):
            axis = self.axes[(start + i) % len(self.axes)]
            if any(c.series.limits(axis) is not None for c in self.curves):
                self.axis = axis
                self.post_message(self.AxisChanged(self, axis))
                return

    def action_reset(self) -> None:
        self.view_x = self.view_y = None
        self.cursor_x = None
        self.redraw()

    def zoom_x(self, center: float, direction: int) -> None:
        """Zoom around `center`. Zooming out beyond the whole range shows the whole range."""
        found, all_x = _zoomed(self._shown_x, center, direction), self._all_x()
        whole = found[0] <= all_x[0] and found[1] >= all_x[1]
        self.view_x = None if whole else found
        self.redraw()

    def zoom_y(self, center: float, direction: int) -> None:
        self.view_y = _zoomed(self._shown_y, center, direction)
        self.redraw()

    def pan(self, columns: int, rows: int) -> None:
        """Move the view by cells to the right and up."""
        canvas = self.query_one(PlotCanvas)
        if columns:
            low, high = self._shown_x
            by = columns * (high - low) / max(canvas.num_columns, 1)
            self.view_x = low + by, high + by
        if rows:
            low, high = self._shown_y
            by = rows * (high - low) / max(canvas.num_rows, 1)
            self.view_y = low + by, high + by
        self.redraw()

    def point_at(self, x: float | None) -> None:
        """Put the cursor at a share of the width; None removes it."""
        low, high = self._shown_x
        self.cursor_x = None if x is None else low + x * (high - low)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The point at a share of the width, and of the height from below."""
        (low_x, high_x), (low_y, high_y) = self._shown_x, self._shown_y
        return low_x + x * (high_x - low_x), low_y + y * (high_y - low_y)


def _edges(band: Shade, low_x: float, high_x: float) -> list[Floats]:
    """The band clipped to the x range, with its points where it enters and leaves."""
    if not len(band.x) or band.x[0] > high_x or band.x[-1] < low_x:
        return []
    x = np.concatenate([np.clip(band.x[[0, -1]], low_x, high_x), band.x[(band.x >= low_x) & (band.x <= high_x)]])
    return [np.interp(x, band.x, edge) for edge in (band.low, band.high, band.level) if edge is not None]


def _finite(parts: list[Floats]) -> Floats:
    return np.concatenate([part[np.isfinite(part)] for part in parts] or [np.empty(0)])


def _zoomed(shown: tuple[float, float], center: float, direction: int) -> tuple[float, float]:
    factor = ZOOM**-direction
    low, high = center - (center - shown[0]) * factor, center + (shown[1] - center) * factor
    smallest = 1e-9 * max(abs(low), abs(high), 1e-300)
    return (low, high) if high - low > smallest and math.isfinite(high - low) else shown
