"""The line plot, by keyboard and mouse, at every size; its raster and its ticks."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual.app import App
from textual.pilot import Pilot
from textual_hires_canvas import Canvas

from fastpeft.tui.series import Series, StepTable, Table
from fastpeft.tui.theme import CURVES
from fastpeft.tui.widgets.axes import Durations, Numbers, Powers, clock, nice_ticks, position, short
from fastpeft.tui.widgets.canvas import MARGIN_LEFT, PlotCanvas
from fastpeft.tui.widgets.plot import SMOOTHING, Band, Curve, LinePlot, looks
from fastpeft.tui.widgets.raster import DASHES, braille
from tests.support.pilots import lines_of

SIZES = [(80, 24), (120, 40), (200, 60)]


class PlotApp(App):
    def __init__(self, *curves: Curve, bands=(), **options) -> None:
        super().__init__()
        self.curves, self.bands, self.options, self.heard = curves, bands, options, []

    def compose(self):
        yield LinePlot("loss", **self.options)

    def on_mount(self):
        plot = self.query_one(LinePlot)
        plot.focus()
        plot.show(self.curves, self.bands)

    def on_line_plot_axis_changed(self, message: LinePlot.AxisChanged):
        self.heard.append((message.control, message.axis))


def drive(app: PlotApp, act: Callable[[LinePlot, Pilot], Awaitable[None]], size=(80, 24)) -> None:
    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await act(app.query_one(LinePlot), pilot)

    asyncio.run(run())


def readout(app: App) -> str:
    return lines_of(app.screen)[0]


def cells(plot: LinePlot) -> list[str]:
    """What is inside the frame."""
    canvas = plot.query_one("#plot", Canvas)
    inner = canvas._buffer[1 : plot.query_one(PlotCanvas).num_rows + 1]
    return ["".join(row[1 : plot.query_one(PlotCanvas).num_columns + 1]) for row in inner]


def drawn_columns(plot: LinePlot) -> set[int]:
    return {i for row in cells(plot) for i, sign in enumerate(row) if 0x2800 < ord(sign) <= 0x28FF}


def ramp(num=101, label="loss") -> Curve:
    x = np.arange(num, dtype=float)
    return Curve(label, Series.of(x, x + 1))


# ---- what is drawn -------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_whole_range_fills_the_frame(size):
    async def act(plot, pilot):
        canvas = plot.query_one(PlotCanvas)
        assert (canvas.num_columns, canvas.num_rows) == (size[0] - MARGIN_LEFT - 2, size[1] - 4)
        assert drawn_columns(plot) == set(range(canvas.num_columns))
        rows = cells(plot)
        assert any(ord(sign) > 0x2800 for sign in "".join(row[-3:] for row in rows[:4]))
        assert any(ord(sign) > 0x2800 for sign in "".join(row[:3] for row in rows[-4:]))
        shown = lines_of(plot.app.screen)
        assert "loss" in shown[0]
        assert "101" in shown[0], "the last value"
        assert "time" in shown[0]
        assert any(label in shown[-1] for label in ("50s", "60s", "0.5min", "1min")), shown[-1]

    drive(PlotApp(ramp()), act, size)


@pytest.mark.parametrize("size", [(20, 5), (12, 4), (5, 3), (1, 1), (80, 6)])
def test_a_screen_too_small_is_no_fault(size):
    async def act(plot, pilot):
        await pilot.press("right", "plus", "y", "x", "0")
        await pilot.pause()
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        await pilot.pause()
        assert len(drawn_columns(plot)) > 60

    drive(PlotApp(ramp()), act, size)


@pytest.mark.parametrize(
    "y",
    [[], [1.0], [2.0, 2.0, 2.0], [math.nan] * 3, [0.0, 0.0], [1e-300, 1e300], [-1.0, math.inf, 1.0], [1e-12, 2e-12]],
)
def test_odd_columns_are_drawn_as_far_as_they_go(y):
    async def act(plot, pilot):
        for key in ("y", "y", "s", "right", "plus", "K", "minus", "J", "0", "end"):
            await pilot.press(key)
        await pilot.pause()
        finite = [v for v in y if math.isfinite(v)]
        assert bool(drawn_columns(plot)) == bool(finite)

    drive(PlotApp(Curve("y", Series.of(np.arange(len(y), dtype=float), np.array(y, dtype=float)))), act)


def test_no_curves_then_some_then_more_rows():
    table = Table("elapsed_s", "step", "y")

    async def act(plot, pilot):
        assert drawn_columns(plot) == set()
        plot.show([Curve("late", Series(table, "y", StepTable()))])
        await pilot.pause()
        assert drawn_columns(plot) == set()
        assert "late –" in readout(plot.app)
        table.append(np.array([[0.0, 1.0], [0, 1], [5, 6]]))
        plot.redraw()
        await pilot.pause()
        assert "late 6" in readout(plot.app)
        before = cells(plot)
        table.append(np.array([[2.0], [2.0], [99.0]]))
        plot.redraw()
        await pilot.pause()
        assert cells(plot) != before
        assert "late 99" in readout(plot.app)

    drive(PlotApp(), act)


def test_values_that_are_not_finite_are_marked_at_the_edges():
    y = np.array([1.0, math.nan, 2.0, math.inf, 1.0, -math.inf, 2.0])

    async def act(plot, pilot):
        rows, num = cells(plot), plot.query_one(PlotCanvas).num_columns
        assert rows[-1][num // 6] == "×"
        assert rows[0][num // 2] == "▲"
        assert rows[-1][num * 5 // 6] == "▼"
        assert "3 not finite" in readout(plot.app)

    drive(PlotApp(Curve("y", Series.of(np.arange(7.0), y))), act)


def test_a_band_lies_behind_the_curve():
    x = np.linspace(0, 100, 11)

    async def act(plot, pilot):
        text = "".join(cells(plot))
        assert "░" in text
        assert drawn_columns(plot) == set(range(plot.query_one(PlotCanvas).num_columns))
        column = [row[-1] for row in cells(plot)]
        assert column.count("░") > 3, "it goes beyond the curve"
        await pilot.press("y")
        await pilot.pause()
        assert "░" in "".join(cells(plot))
        await pilot.press("y")
        plot.show(plot.curves)
        await pilot.pause()
        assert "░" not in "".join(cells(plot))

    drive(PlotApp(ramp(), bands=[Band(x, x - 50.0, x + 50.0)]), act)


def test_a_band_far_ahead_and_far_off_leaves_the_curve_legible():
    far = Band(np.array([90.0, 1e6]), np.full(2, -1e9), np.full(2, 1e9), label="soon", level=np.full(2, 50.0))

    async def act(plot, pilot):
        assert plot._shown_x == (0.0, 125.0)
        assert plot._shown_y[1] - plot._shown_y[0] < 4 * 100
        assert "╌ soon" in readout(plot.app)
        assert "◆" not in "".join(cells(plot))
        await pilot.press("y")
        await pilot.pause()
        assert math.isfinite(plot._shown_y[0])
        plot.show(plot.curves, [Band(np.array([90.0, 110.0]), *(np.full(2, np.nan),) * 2, level=np.full(2, 50.0))])
        await pilot.pause()
        text = "".join(cells(plot))
        assert ("◆" in text, "░" in text) == (True, False)
        assert plot._shown_x == (0.0, 110.0)
        plot.show(plot.curves, [Band(np.array([90.0, 110.0]), *(np.full(2, -9.0),) * 2, level=np.full(2, -9.0))])
        await pilot.pause()
        assert "◆" not in "".join(cells(plot)), "a log scale has no place for it"

    drive(PlotApp(ramp(), bands=[far]), act)


def test_a_band_alone_fills_the_plot():
    band = Band(np.array([0.0, 10.0]), np.zeros(2), np.ones(2), level=np.full(2, 0.5))

    async def act(plot, pilot):
        assert plot._shown_x == (0.0, 10.0)
        assert plot._shown_y == (-0.05, 1.05)

    drive(PlotApp(bands=[band]), act)


def test_more_curves_have_colours_of_their_own_and_dashes_without_colour(monkeypatch):
    curves = [Curve(f"c{i}", Series.of(np.arange(100.0), np.full(100, float(i)))) for i in range(4)]

    async def in_colour(plot, pilot):
        assert [look.dash for look in plot.looks] == [0] * 4
        styles = {style for row in plot.query_one("#plot", Canvas)._styles for style in row}
        assert set(CURVES[:4]) <= styles
        assert {len(row.replace(" ", "")) for row in cells(plot)} <= {0, len(cells(plot)[0])}

    async def without(plot, pilot):
        lengths = {len(row.replace(" ", "")) for row in cells(plot)} - {0}
        assert len(lengths) >= 2, "dashed lines have holes"
        assert len({sign for sign in "━╍┅┉" if sign in readout(plot.app)}) == 4

    monkeypatch.delenv("NO_COLOR", raising=False)
    drive(PlotApp(*curves), in_colour)
    monkeypatch.setenv("NO_COLOR", "1")
    drive(PlotApp(*curves), without)


def flat(label, y=1.0, color="", mark="") -> Curve:
    return Curve(label, Series.of(np.arange(100.0), np.full(100, y)), color, mark)


def styles(plot: LinePlot) -> dict[str, int]:
    """How many cells of the line have a colour."""
    canvas = plot.query_one("#plot", Canvas)
    drawn = zip(itertools.chain(*canvas._buffer), itertools.chain(*canvas._styles))
    return Counter(style for sign, style in drawn if 0x2800 < ord(sign) <= 0x28FF)


@pytest.mark.parametrize("num", [2, 3, 7])
def test_lines_that_coincide_take_turns(num):
    async def act(plot, pilot):
        found = styles(plot)
        assert set(found) == set(CURVES[:num])
        assert max(found.values()) - min(found.values()) <= 3

    drive(PlotApp(*(flat(f"c{i}") for i in range(num))), act)


def test_a_thin_line_lies_before_a_thick_one():
    noise = Curve("noise", Series.of(np.arange(5000.0), np.random.default_rng(0).normal(size=5000)))

    async def act(plot, pilot):
        found = styles(plot)
        thin = next(plot.looks[i].color for i, curve in enumerate(plot.curves) if curve.label == "thin")
        assert found[thin] == plot.query_one(PlotCanvas).num_columns

    thin = Curve("thin", Series.of(np.array([0.0, 4999.0]), np.zeros(2)))
    for curves in ((noise, thin), (thin, noise)):
        drive(PlotApp(*curves), act)


def test_lines_of_one_colour_have_other_dashes_and_all_lines_their_marks():
    marks = "123456789abcdefghijklmno"
    curves = [flat(f"c{i}", color=CURVES[i % 2], mark=mark) for i, mark in enumerate(marks)]

    async def act(plot, pilot):
        assert len(set(plot.looks)) == len(curves)
        assert {look.dash for look in plot.looks} == set(range(len(DASHES)))
        assert set(marks) <= set("".join(cells(plot))), "each is on the line, though all are one"

    drive(PlotApp(*curves), act)
    assert len(set(looks([flat(f"c{i}") for i in range(7 * len(DASHES))], no_color=False))) == 7 * len(DASHES)


def test_marks_of_points_that_coincide_stand_side_by_side():
    points = [Curve(f"c{i}", Series.of(np.array([5.0]), np.array([1.0])), mark="abc"[i]) for i in range(3)]

    async def act(plot, pilot):
        assert set("abc") <= set("".join(cells(plot)))

    drive(PlotApp(*points), act)


@pytest.mark.parametrize("num", [1, 2, 5, 12, 24])
def test_the_line_above_has_room_for_every_curve_or_says_how_many_it_leaves_out(num):
    async def act(plot, pilot):
        for keys in ([], ["y", "s", "right"]):
            await pilot.press(*keys)
            await pilot.pause()
            said = readout(plot.app).rstrip()
            assert len(said) <= 80
            named = sum(map(said.count, "━╍┅┉"))
            assert f"{num - named} more" in said if named < num else "more" not in said
            assert "time" in said

    long = "a-rather-long-name-of-a-run-with-seed"
    drive(PlotApp(*(flat(f"{long}{i}", mark="123456789abcdefghijklmno"[i]) for i in range(num))), act)
    drive(PlotApp(*(flat(f"{long}{i}") for i in range(num))), act)


# ---- keys ----------------------------------------------------------------------------------


def test_log_scale_leaves_out_and_says_so():
    y = np.array([0.0, -1.0, *10.0 ** np.arange(1, 9)])

    async def act(plot, pilot):
        await pilot.press("y")
        await pilot.pause()
        assert plot.log_scale
        assert "log" in readout(plot.app)
        assert "2 ≤ 0 left out" in readout(plot.app)
        assert any("10M" in line for line in lines_of(plot.app.screen)[1:])
        low, high = plot._shown_y
        assert (low, high) == (pytest.approx(1 - 0.35), pytest.approx(8 + 0.35))
        await pilot.press("y")
        await pilot.pause()
        assert "left out" not in readout(plot.app)

    drive(PlotApp(Curve("y", Series.of(np.arange(10.0), y))), act)


def test_smoothing_goes_round():
    rng = np.random.default_rng(0)
    curve = Curve("y", Series.of(np.arange(500.0), rng.normal(size=500)))

    async def act(plot, pilot):
        spans = []
        for weight in [*SMOOTHING[1:], 0.0]:
            await pilot.press("s")
            await pilot.pause()
            assert plot.smoothing == weight
            assert (f"smoothed {weight:g}" in readout(plot.app)) == bool(weight)
            spans.append(plot._shown_y[1] - plot._shown_y[0])
        assert spans[:3] == sorted(spans[:3], reverse=True)
        await pilot.press("S")
        assert plot.smoothing == SMOOTHING[-1]

    drive(PlotApp(curve), act)


def test_the_axis_goes_through_those_that_there_are():
    steps = StepTable()
    rows = np.zeros((len(StepTable.READ), 10))
    rows[0], rows[1], rows[2], rows[3] = np.arange(10), np.arange(10) * 2, 100.0, np.nan
    steps.append(rows)

    async def act(plot, pilot):
        for axis in ("steps", "tokens", "time"):
            await pilot.press("x")
            await pilot.pause()
            assert plot.axis == axis
            assert axis in readout(plot.app)
        assert [axis for _, axis in plot.app.heard] == ["steps", "tokens", "time"]
        assert plot.app.heard[0][0] is plot

    drive(PlotApp(Curve("loss", Series(steps, "loss", steps))), act)


def test_zoom_and_pan_and_reset():
    async def act(plot, pilot):
        await pilot.press("plus")
        await pilot.pause()
        low, high = plot.view_x
        assert (low + high) / 2 == pytest.approx(50)
        assert high - low == pytest.approx(100 / 1.5)
        assert "zoomed" in readout(plot.app)
        assert plot.view_y is None
        assert plot._shown_y[0] == pytest.approx(low + 1, abs=4), "y fits what is in view"
        await pilot.press("greater_than_sign")
        assert plot.view_x[0] > low
        assert plot.view_x[1] - plot.view_x[0] == pytest.approx(high - low)
        await pilot.press("shift+left")
        assert plot.view_x[0] == pytest.approx(low)
        await pilot.press("K")
        await pilot.pause()
        assert plot.view_y is not None
        top = plot.view_y[1]
        await pilot.press("shift+up")
        assert plot.view_y[1] > top
        await pilot.press("right", "0")
        await pilot.pause()
        assert (plot.view_x, plot.view_y, plot.cursor_x) == (None, None, None)
        assert plot._shown_x == (0, 100)
        await pilot.press("minus")
        assert plot.view_x is None

    drive(PlotApp(ramp()), act)


def test_zooming_in_for_ever_ends():
    async def act(plot, pilot):
        for _ in range(150):
            plot.action_zoom(1)
            plot.action_zoom_y(1)
            plot._draw()
        await pilot.pause()
        low, high = plot._shown_x
        assert high > low

    drive(PlotApp(ramp()), act)


def test_the_cursor_reads_out_every_curve():
    other = Curve("other", Series.of(np.arange(0, 101, 10.0), np.arange(11.0) ** 2))

    async def act(plot, pilot):
        await pilot.press("end")
        await pilot.pause()
        assert "1:40" in readout(plot.app)
        assert "loss 101" in readout(plot.app)
        assert "other 100" in readout(plot.app)
        assert [row[-1] for row in cells(plot)].count("│") > 10
        await pilot.press("home")
        await pilot.pause()
        assert "0.0s" in readout(plot.app)
        assert "loss 1 " in readout(plot.app)
        for _ in range(10):
            await pilot.press("right")
        step = 100 / plot.query_one(PlotCanvas).num_columns
        assert plot.cursor_x == pytest.approx(10 * step)
        await pilot.press("left")
        assert plot.cursor_x == pytest.approx(9 * step)
        await pilot.press("plus")
        low, high = plot.view_x
        assert (plot.cursor_x - low) / (high - low) == pytest.approx(0.09 * step, abs=0.02), "zooms at the cursor"

    drive(PlotApp(ramp(), other), act)


# ---- the mouse -----------------------------------------------------------------------------


def test_the_mouse_points_zooms_pans_and_resets():
    async def act(plot, pilot):
        canvas = plot.query_one(PlotCanvas)
        middle = (MARGIN_LEFT + 1 + canvas.num_columns // 2, 10)
        await pilot.hover(LinePlot, middle)
        await pilot.pause()
        assert plot.cursor_x == pytest.approx(50, abs=1)
        assert "loss 5" in readout(plot.app)
        await scroll(pilot, plot, middle, up=True)
        assert plot.view_x[1] - plot.view_x[0] == pytest.approx(100 / 1.5)
        assert sum(plot.view_x) / 2 == pytest.approx(50, abs=1)
        assert plot.view_y is None
        await scroll(pilot, plot, (3, 10), up=True)
        assert plot.view_y is not None
        low = plot.view_x[0]
        await pilot.mouse_down(LinePlot, middle)
        await pilot._post_mouse_events([_move(-10, 0)], LinePlot, (middle[0] - 10, 10), button=1)
        await pilot.mouse_up(LinePlot, (middle[0] - 10, 10))
        await pilot.pause()
        assert plot.view_x[0] > low
        await pilot.click(LinePlot, middle, times=2)
        await pilot.pause()
        assert plot.view_x is None

    drive(PlotApp(ramp()), act, (120, 40))


def _move(delta_x, delta_y):
    from textual.events import MouseMove

    def make(**fields):
        return MouseMove(**fields | {"delta_x": delta_x, "delta_y": delta_y})

    return make


async def scroll(pilot, plot, at, up):
    from textual.events import MouseScrollDown, MouseScrollUp

    await pilot._post_mouse_events([MouseScrollUp if up else MouseScrollDown], LinePlot, at)
    await pilot.pause()


# ---- the raster ----------------------------------------------------------------------------


def lit(drawn):
    """(column, row) of every dot."""
    places = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))
    dots = {1 << i: place for i, place in enumerate(places)}
    return {
        (2 * w + x, 4 * h + y)
        for (h, w), bits in np.ndenumerate(drawn)
        for bit, (x, y) in dots.items()
        if int(bits) & bit
    }


def test_a_line_a_point_and_a_dash():
    assert lit(braille(np.array([0.0, 3.9]), np.array([0.1, 0.1]), 4, 2)) == {(x, 0) for x in range(8)}
    assert lit(braille(np.array([1.5]), np.array([1.5]), 4, 2)) == {(3, 6)}
    assert lit(braille(np.array([0.0, 3.9]), np.array([0.1, 0.1]), 4, 2, DASHES[2])) == {(x, 0) for x in (0, 1, 5, 6)}
    assert not braille(np.empty(0), np.empty(0), 4, 2).any()
    assert lit(braille(np.array([4.0]), np.array([2.0]), 4, 2)) == {(7, 7)}, "on the edges"
    assert lit(braille(np.array([4.0, 4.0]), np.array([0.0, 2.0]), 4, 2)) == {(7, y) for y in range(8)}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=2, max_size=8),
    st.integers(1, 30),
    st.integers(1, 10),
)
def test_lines_are_whole_and_cut_at_the_edges(points, width, height):
    """Every dot lies on a segment; a segment within the frame has both its ends and no hole."""
    x, y = np.array(points).T
    drawn = braille(x, y, width, height)
    assert drawn.shape == (height, width)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if all(0 <= a < width and 0 <= b < height for a, b in ((x0, y0), (x1, y1))):
            ends = [(int(a * 2), int(b * 4)) for a, b in ((x0, y0), (x1, y1))]
            assert set(ends) <= lit(drawn)
    for column, row in lit(drawn):
        near = min(_distance((column + 0.5, row + 0.5), (2 * a[0], 4 * a[1]), (2 * b[0], 4 * b[1]))
                   for a, b in itertools.pairwise(points))  # fmt: skip
        assert near < 2


def _distance(p, a, b):
    (px, py), (ax, ay), (bx, by) = p, a, b
    length = (bx - ax) ** 2 + (by - ay) ** 2
    t = 0.0 if length == 0 else min(1.0, max(0.0, ((px - ax) * (bx - ax) + (py - ay) * (by - ay)) / length))
    return math.hypot(px - ax - t * (bx - ax), py - ay - t * (by - ay))


# ---- ticks ---------------------------------------------------------------------------------


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 12))
def test_ticks_are_few_and_in_range(low, span, most):
    ticks = nice_ticks(low, low + span, most)
    assert len(ticks) <= most
    room = 1e-6 * (abs(low) + span)
    assert all(low - room <= tick <= low + span + room for tick in ticks)
    if most >= 3:
        assert ticks or span < 1e-9 * abs(low)


def test_numbers_are_short():
    assert [short(v) for v in (0.0, 0.57312, 12.0, 1234.5, 12345.0, 2.5e6, 3e9, 1.23e-5, -0.5)] == [
        "0", "0.5731", "12", "1234", "12.35k", "2.5M", "3G", "1.2e-5", "-0.5",
    ]  # fmt: skip
    assert [clock(s) for s in (3.25, 65, 3723)] == ["3.2s", "1:05", "1:02:03"]
    assert position("tokens", 1234567.0) == "1,234,567 tokens"


@given(st.floats(0, 1e7), st.floats(1e-3, 1e7), st.integers(20, 190), st.sampled_from([Numbers, Durations]))
def test_no_tick_at_the_right_has_a_label_that_goes_over_the_end(low, span, columns, kind):
    axis = kind()
    axis.most, axis.columns = max(2, columns // 12), columns
    for tick, label in zip(*axis.get_ticks_and_labels(low, low + span)):
        assert tick == low + span or (tick - low) / span * columns + len(label) // 2 <= columns


def test_ticks_that_are_close_have_labels_that_differ():
    ticks, labels = Numbers().get_ticks_and_labels(0.80001, 0.80004)
    assert len(ticks) > 1
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(ticks)


def test_formatters():
    numbers, powers, durations = Numbers(), Powers(), Durations()
    assert numbers.get_ticks_and_labels(0.0, 1e-5)[1] == ["0", "2.0e-6", "4.0e-6", "6.0e-6", "8.0e-6", "1.0e-5"]
    assert powers.get_ticks_and_labels(-3.0, 1.0) == ([-3, -2, -1, 0, 1], ["0.001", "0.01", "0.1", "1", "10"])
    ticks, labels = powers.get_ticks_and_labels(0.05, 0.95)
    assert labels == ["2", "5"]
    assert [10**t for t in ticks] == pytest.approx([2, 5])
    assert durations.get_ticks_and_labels(0, 7200)[1][-1] == "2.0h"
