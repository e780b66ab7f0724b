"""What holds on every screen, at every size, for runs of every kind: nothing is cut, hidden, faint or run together."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from rich.color import Color
from rich.segment import Segment
from rich.text import Text
from textual.pilot import Pilot
from textual.widget import Widget
from textual.widgets import DataTable, Footer, Input, Static
from textual_hires_canvas import Canvas

from fastpeft.tui.contrast import contrast, least_contrast
from fastpeft.tui.program import FastpeftApp
from fastpeft.tui.widgets.canvas import PlotCanvas
from fastpeft.tui.widgets.cell_layout import ELLIPSIS, words
from fastpeft.tui.widgets.heatmap import Heatmap
from fastpeft.tui.widgets.plot import LinePlot
from tests.support import tui_gallery as gallery
from tests.support.pilots import SIZES, drive, text_of

LEAST_FILLED = 0.66
"""Of the lines between a heatmap's names and its legend."""

Views = Callable[[FastpeftApp, Pilot], AsyncIterator[str]]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery") / "results"
    gallery.make_gallery(folder)
    return folder


def _run(name: str) -> Views:
    return lambda app, pilot: gallery.run_views(app, pilot, name)


def _compare(num: int) -> Views:
    return lambda app, pilot: gallery.comparisons(app, pilot, gallery.compared(num))


VIEWS: dict[str, Views] = {
    "list": gallery.listed,
    "dialogs": gallery.dialogs,
    **{f"run {name[:9]}": _run(name) for name in (gallery.LONG, "fot_gsm8k", "ner", "diverged", "failed", "huge")},
    **{f"compare {num}": _compare(num) for num in (2, 4, 9, 17)},
}


QUICK = {("list", SIZES[0]), ("compare 4", SIZES[1]), ("list", "fastpeft-light")}
"""Of many seconds each; the others are for the soak."""


def cases(views: Iterable[str], others: Iterable) -> list:
    return [
        pytest.param(one, other, marks=[] if (one, other) in QUICK else pytest.mark.soak, id=f"{one}-{other}")
        for one in views
        for other in others
    ]


@pytest.mark.parametrize(("views", "size"), cases(VIEWS, SIZES))
def test_nothing_is_cut_hidden_or_run_together(results, views, size):
    async def script(app, pilot):
        async for name in VIEWS[views](app, pilot):
            await pilot.pause()
            found[name] = faults(app)

    found: dict[str, list[str]] = {}
    drive(results, script, size)
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    ("views", "theme"),
    cases(["list", "run iwlora_mn", "compare 9"], ["fastpeft-light", "textual-light", "fastpeft-dark", "nord"]),
)
def test_everything_stands_out_in_every_theme(results, views, theme):
    async def script(app, pilot):
        app.theme = theme
        await pilot.pause()
        async for name in VIEWS[views](app, pilot):
            await pilot.pause()
            found[name] = faint(app)

    found: dict[str, list[str]] = {}
    drive(results, script, (120, 40))
    assert not {name: what for name, what in found.items() if what}


# ---- faults --------------------------------------------------------------------------------


def faults(app: FastpeftApp) -> list[str]:
    checks = (outside, cut_texts, run_together, cut_numbers, cut_cells, alike_lines, broken_frames, empty_heatmaps)
    return [f"{check.__name__}: {what}" for check in checks for what in check(app)]


def shown(app: FastpeftApp, kind: type) -> list:
    """Widgets that are on the screen, and not below a dialog."""
    there = app.screen._compositor.visible_widgets
    return [widget for widget in app.screen.query(kind) if widget in there and widget.region.area]


def outside(app: FastpeftApp) -> list[str]:
    """Texts that are partly beyond what holds them, where that does not scroll; keys beyond the footer."""
    found = []
    for widget, (region, clip) in app.screen._compositor.visible_widgets.items():
        holders = [holder for holder in widget.ancestors_with_self if isinstance(holder, Widget)]
        scrolls = any(holder.allow_vertical_scroll for holder in holders if not isinstance(holder, Footer))
        holds_text = isinstance(widget, (Static, Canvas, Heatmap)) or isinstance(widget.parent, Footer)
        if holds_text and not scrolls and region.intersection(clip) != region:
            found.append(f"{widget} {region} in {clip}")
    return found


def cut_texts(app: FastpeftApp) -> list[str]:
    """Texts that need more room than they have."""
    found = []
    for widget in shown(app, Static):
        width, height = widget.content_size
        visual = widget._render()
        if visual.get_height(widget.styles, width) > height or (
            isinstance(widget.parent, LinePlot) and visual.get_optimal_width(widget.styles, 999) > width
        ):
            found.append(f"{widget}: {visual}")
    return found


def run_together(app: FastpeftApp) -> list[str]:
    """Words of two kinds without a blank between them: a title's parts, a table's columns, names above a heatmap."""
    typed = {(field.region.y, field.region.x) for field in shown(app, Input)}
    found = []
    for y, strip in enumerate(app.screen._compositor.render_strips()):
        if any(y == row for row, _ in typed) or "palette" in str(app.screen).lower():
            continue
        segments = [segment for segment in Segment.simplify(strip) if segment.text]
        for one, other in itertools.pairwise(segments):
            if one.text[-1].isalnum() and other.text[0].isalnum() and one.style != other.style:
                found.append(f"{one.text!r} and {other.text!r} in {strip.text!r}")
    return found


def cut_numbers(app: FastpeftApp) -> list[str]:
    return re.findall(rf"\S*\d\.\d*{ELLIPSIS}", text_of(app.screen))


def cut_cells(app: FastpeftApp) -> list[str]:
    """Cells longer than their columns, and columns beyond their table."""
    found = []
    for table in shown(app, DataTable):
        columns = table.ordered_columns
        if (width := sum(column.get_render_width(table) for column in columns)) > table.content_size.width:
            found.append(f"{table}: columns of {width} in {table.content_size.width}")
        rows = [[column.label for column in columns], *(table.get_row_at(i) for i in range(table.row_count))]
        found += [f"{cell!r}" for row in rows for cell, c in zip(row, columns) if Text(str(cell)).cell_len > c.width]
    return found


def alike_lines(app: FastpeftApp) -> list[str]:
    """Two lines of one look, and lines of which nothing is to be seen."""
    found = []
    for plot in shown(app, LinePlot):
        if len(set(plot.looks)) < len(plot.looks):
            found.append(f"{plot}: {plot.looks}")
        canvas = plot.query_one("#plot", Canvas)
        signs = {(sign, style) for row in zip(canvas._buffer, canvas._styles) for sign, style in zip(*row)}
        styles = {style for sign, style in signs if "\u2800" < sign <= "\u28ff"}
        for curve, look in zip(plot.curves, plot.looks):
            y = curve.series.y[np.isfinite(curve.series.y)]
            drawn = (y > 0).any() if plot.log_scale else len(y) > 0
            if drawn and not ((look.mark, f"bold {look.color}") in signs if look.mark else look.color in styles):
                found.append(f"{plot}: nothing of {curve.label}")
    return found


def broken_frames(app: FastpeftApp) -> list[str]:
    """Frames that something is drawn over, and ticks whose labels are cut."""
    found = []
    for plot in shown(app, PlotCanvas):
        if plot.num_columns < 1 or plot.num_rows < 1:
            continue
        rows = plot.query_one("#plot", Canvas)._buffer
        edges = "".join(row[0] + row[plot.num_columns + 1] for row in rows)
        if set(edges) - set("┃┣┫┏┓┗┛┻┳╋┼│"):
            found.append(f"{plot}: {edges}")
        labels = plot._x_formatter.get_ticks_and_labels(plot._x_min, plot._x_max)[1]
        written = "".join(plot.query_one("#margin-bottom", Canvas)._buffer[0]).split()
        if labels != written:
            found.append(f"{plot}: {labels} as {written}")
        upright = plot._y_formatter.get_ticks_and_labels(plot._y_min, plot._y_max)[1]
        written = ["".join(row).strip() for row in plot.query_one("#margin-left", Canvas)._buffer]
        if not set(upright) <= set(written) or len(set(upright)) < len(upright):
            found.append(f"{plot}: {upright} as {written}")
    return found


def empty_heatmaps(app: FastpeftApp) -> list[str]:
    """Maps that leave most of their room empty, and names that are cut though there is room."""
    found = []
    for heatmap in shown(app, Heatmap):
        if not heatmap.grid.rows:
            continue
        strips = app.screen._compositor.render_strips()
        first, num = heatmap.region.y + len(heatmap.columns.head), heatmap.num_rows_shown
        left, right = heatmap.region.x + heatmap.label_width, heatmap.region.right
        own = heatmap.background_colors[1].rich_color
        cells = [
            segment.style is not None and segment.style.bgcolor not in (None, own)
            for strip in strips[first : first + num]
            for segment in strip.crop(left, right)
            for _ in segment.text
        ]
        if sum(cells) < LEAST_FILLED * len(cells):
            found.append(f"{sum(cells) / len(cells):.0%} of {heatmap.region}")
        whole = sum(max(map(len, words(name))) + 1 for name in heatmap.grid.columns)
        cut = [text for line in heatmap.columns.head for text in line if ELLIPSIS in text]
        if cut and whole <= heatmap.size.width - heatmap.label_width and len(heatmap.columns.head) < 3:
            found.append(f"cut: {cut}")
    return found


def faint(app: FastpeftApp) -> list[str]:
    found = []
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            style = segment.style
            if style is None or style.color is None or style.bgcolor is None:
                continue
            colors = [color.get_truecolor() for color in (style.color, style.bgcolor) if isinstance(color, Color)]
            if contrast(*colors) < least_contrast(segment.text) - 0.01:
                found.append(f"{segment.text!r} {colors}")
    return found
