"""The heatmap, by keyboard and mouse, at every size, with and without colour."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.app import App
from textual.pilot import Pilot

from fastpeft.tui.grids import Grid, importance_grid, rates_grid
from fastpeft.tui.parse import Importance, Rates
from fastpeft.tui.theme import CURVES, SHADES, THEMES, curve_color, ratio_color, scale_color, shade
from fastpeft.tui.widgets.cell_layout import ELLIPSIS, abbreviated, columns_in, headings, rows_in, shares, wrapped
from fastpeft.tui.widgets.heatmap import LEAST_RATIO, Heatmap, limits, share
from tests.support.pilots import lines_of

SIZES = [(80, 24), (120, 40), (200, 60)]
PROJECTIONS = ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense")


class HeatmapApp(App):
    def __init__(self, grid: Grid | None) -> None:
        super().__init__()
        self.grid, self.heard = grid, []

    def compose(self):
        yield Heatmap()

    def on_mount(self):
        heatmap = self.query_one(Heatmap)
        heatmap.focus()
        if self.grid is not None:
            heatmap.show(self.grid)

    def on_heatmap_cursor_moved(self, message: Heatmap.CursorMoved):
        assert message.control is self.query_one(Heatmap)
        self.heard.append((message.row, message.column))


def drive(grid: Grid | None, act: Callable[[Heatmap, Pilot], Awaitable[None]], size=(80, 24)) -> None:
    async def run() -> None:
        app = HeatmapApp(grid)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await act(app.query_one(Heatmap), pilot)

    asyncio.run(run())


def backgrounds(app: App, y: int) -> set[str]:
    return {s.style.bgcolor.name for s in app.screen._compositor.render_strips()[y] if s.style and s.style.bgcolor}


def foot(heatmap: Heatmap) -> list[str]:
    """The legend, and what is under the cursor."""
    return [line.rstrip() for line in lines_of(heatmap.app.screen)[-heatmap.num_foot_lines :]]


def numbered(heatmap: Heatmap) -> list[str]:
    """The lines with a row's label."""
    lines = lines_of(heatmap.app.screen)[len(heatmap.columns.head) : -heatmap.num_foot_lines]
    return [line for line in lines if line[: heatmap.label_width].strip()]


def grid(rows=4, columns=6, **options) -> Grid:
    names = PROJECTIONS[:columns] if columns <= 6 else tuple(f"projection_{i}" for i in range(columns))
    values = np.arange(rows * columns, dtype=float).reshape(rows, columns) / (rows * columns)
    return Grid(tuple(str(i) for i in range(rows)), names, values, "weight", **options)


def snapshot(weights, step=0, **more) -> Importance:
    names = ("l0.q", "l0.v", "l1.q", "l1.v")
    return Importance(1.0, step, names, (0, 0, 1, 1), ("q", "v", "q", "v"), np.array(weights, dtype=float), **more)


# ---- what it says --------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_cell_of_a_small_model_is_in_view(size):
    async def act(heatmap, pilot):
        assert [line.split()[0] for line in numbered(heatmap)] == ["0", "1", "2", "3"]
        head = " ".join(lines_of(pilot.app.screen)[: len(heatmap.columns.head)]).split()
        assert {"query_proj", "value_proj"} <= set(head)
        assert ELLIPSIS not in "".join(head)
        legend, said, *_ = foot(heatmap)
        assert "rows 1-" not in legend
        assert "columns 1-" not in legend
        assert said.startswith("0 query_proj  weight 0")
        assert legend.startswith("weight 0 ")
        assert "0.9583" in legend, "the scale's end"
        assert "0.9583" in " ".join(numbered(heatmap))
        assert sum(heatmap.columns.widths) + heatmap.label_width == size[0]
        assert heatmap.rows.edges[-1] == 2 * heatmap.num_rows_shown, "every line is used"
        assert len(backgrounds(pilot.app, len(heatmap.columns.head))) >= 6

    drive(grid(), act, size)


def test_a_large_model_scrolls_both_ways_and_says_where_it_is():
    async def act(heatmap, pilot):
        assert "rows 1-20 of 48" in foot(heatmap)[0]
        assert "columns 1-19 of 30" in foot(heatmap)[0]
        await pilot.press("G")
        for _ in range(40):
            await pilot.press("l")
        await pilot.pause()
        assert heatmap.cursor == (47, 29)
        legend, said, *_ = foot(heatmap)
        assert "rows 29-48 of 48" in legend
        assert "columns 12-30 of 30" in legend
        assert numbered(heatmap)[-1].startswith("47 ")
        assert said.startswith("47 projection_29  weight 0.9993")
        await pilot.press("g")
        await pilot.pause()
        assert numbered(heatmap)[0].startswith(" 0 ")

    drive(grid(48, 30), act)


@pytest.mark.parametrize("size", [(20, 6), (10, 3), (3, 2), (1, 1)])
def test_a_screen_too_small_is_no_fault(size):
    async def act(heatmap, pilot):
        await pilot.press("j", "l", "G")
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        await pilot.pause()
        assert heatmap.cursor == (3, 1)
        assert numbered(heatmap)[3].startswith("3")

    drive(grid(), act, size)


@pytest.mark.parametrize("empty", [None, Grid((), (), np.empty((0, 0)))])
def test_nothing_yet(empty):
    async def act(heatmap, pilot):
        assert lines_of(pilot.app.screen)[0].startswith("nothing measured yet")
        await pilot.press("j", "l", "G", "g", "pagedown")
        await pilot.hover(Heatmap, (5, 1))
        assert heatmap.cursor == (0, 0)
        heatmap.show(grid())
        await pilot.pause()
        assert numbered(heatmap)[0].startswith("0")

    drive(empty, act)


def test_holes_infinities_and_one_value_for_all():
    values = np.array([[np.nan, np.inf], [2.0, 2.0]])

    async def act(heatmap, pilot):
        assert "·" in numbered(heatmap)[0]
        assert "+inf" in numbered(heatmap)[0]
        assert "no such matrix" in foot(heatmap)[1]
        await pilot.press("l")
        await pilot.pause()
        assert "weight inf" in foot(heatmap)[1]

    drive(Grid(("0", "1"), ("a", "b"), values, "weight"), act)


def test_without_colour_shades_stand_for_it(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    async def act(heatmap, pilot):
        assert "░" in numbered(heatmap)[0]
        assert "█" in numbered(heatmap)[3]
        assert "░░░░▒▒▒▒▓▓▓▓████" in foot(heatmap)[0]
        assert "[" in numbered(heatmap)[0], "the cursor"

    drive(grid(), act)


# ---- keys and mouse ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "cursor"),
    [
        (["down", "down", "right"], (2, 1)),
        (["j", "j", "l"], (2, 1)),
        (["j", "j", "k", "l", "l", "h"], (1, 1)),
        (["up", "left"], (0, 0)),
        (["G"], (3, 0)),
        (["end", "right", "home"], (0, 1)),
        (["pagedown"], (3, 0)),
        (["pagedown", "pageup"], (0, 0)),
        (["right"] * 9, (0, 5)),
    ],
)
def test_keys_move_the_cursor(keys, cursor):
    async def act(heatmap, pilot):
        await pilot.press(*keys)
        await pilot.pause()
        assert heatmap.cursor == cursor
        assert foot(heatmap)[1].startswith(f"{cursor[0]} {PROJECTIONS[cursor[1]]}")
        assert pilot.app.heard[-1] == cursor

    drive(grid(), act)


def test_the_mouse_points():
    async def act(heatmap, pilot):
        x, head = heatmap.label_width + sum(heatmap.columns.widths[:2]) + 1, len(heatmap.columns.head)
        await pilot.hover(Heatmap, (x, head + heatmap.rows.number_line(2)))
        await pilot.pause()
        assert heatmap.cursor == (2, 2)
        await pilot.click(Heatmap, (x + heatmap.columns.widths[2], head))
        await pilot.pause()
        assert heatmap.cursor == (0, 3)
        await pilot.hover(Heatmap, (0, 0))
        await pilot.hover(Heatmap, (x, 23))
        assert heatmap.cursor == (0, 3)

    drive(grid(), act)


def test_the_cursor_stays_when_new_numbers_come():
    async def act(heatmap, pilot):
        await pilot.press("G", "l")
        heatmap.show(grid())
        assert heatmap.cursor == (3, 1)
        heatmap.show(grid(2, 1))
        await pilot.pause()
        assert heatmap.cursor == (1, 0)

    drive(grid(), act)


# ---- importances ---------------------------------------------------------------------------


def test_the_numbers_under_the_cursor_and_how_they_moved():
    first = snapshot([0.1, 0.2, 0.3, 0.4], sensitivity=np.array([1.0, 2, 3, 4]))
    now = snapshot([0.2, 0.1, 0.3, 0.4], 9, sensitivity=np.array([1.5, 2, 3, 4]), ranks=np.array([8.0, 4, 2, 0]))

    async def act(heatmap, pilot):
        assert heatmap.readout() == "0 q  weight 0.2  sensitivity 1.5  rank 8  first 0.1 (+100.0%)"
        await pilot.press("l")
        assert heatmap.readout() == "0 v  weight 0.1  sensitivity 2  rank 4  first 0.2 (-50.0%)"

    found = importance_grid([first, now])
    assert (found.rows, found.columns) == (("0", "1"), ("q", "v"))
    assert found.values.tolist() == [[0.2, 0.1], [0.3, 0.4]]
    assert found.names[1, 0] == "l1.q"
    drive(found, act)
    alone = importance_grid([first])
    assert alone.first is None
    assert "rank" not in alone.more


def test_layers_with_other_matrices_have_holes_and_experts_have_columns():
    mixed = Importance(
        0.0, 0, ("a", "b", "c", "d"), (0, 2, 2, 2), ("q", "up", "up", "q"), np.array([1.0, 2.0, 3.0, 4.0])
    )
    found = importance_grid([mixed])
    assert found.rows == ("0", "2")
    assert found.columns == ("q", "up", "up#2")
    np.testing.assert_array_equal(found.values, [[1, np.nan, np.nan], [4, 2, 3]])


def test_a_first_snapshot_of_other_matrices_is_no_measure():
    other = Importance(0.0, 0, ("z",), (0,), ("q",), np.array([1.0]))
    assert importance_grid([other, snapshot([1, 2, 3, 4])]).first is None
    with pytest.raises(IndexError):
        importance_grid([])


# ---- factors -------------------------------------------------------------------------------


def factors(values, step=0) -> Rates:
    return Rates(1.0, step, ("a", "b", "c", "d"), (0, 0, 1, 1), ("q", "v", "q", "v"), np.array(values, dtype=float))


def test_factors_lie_on_a_log_scale_around_1():
    async def act(heatmap, pilot):
        assert heatmap._limits == (0.25, pytest.approx(4.0))
        shares = [heatmap._share(value, heatmap._limits) for value in (0.25, 0.5, 1.0, 2.0, 4.0, 0.0, 9.0)]
        assert shares == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 1.292481])
        assert "multiplier 0.25" in foot(heatmap)[0]
        assert "4 (log)" in foot(heatmap)[0]
        blue, red = (tuple(map(round, ratio_color(part))) for part in (0.0, 1.0))
        cells = pilot.app.screen._compositor.render_strips()[1:3]
        colors = [s.style.bgcolor.triplet for strip in cells for s in strip if s.style and s.style.bgcolor]
        assert blue in colors
        assert ratio_color(0.5) in colors
        assert red not in colors, "nothing is as far above 1"
        assert heatmap.readout() == "0 q  multiplier 0.25  first 0.5 (-50.0%)"

    found = rates_grid([factors([0.5, 1, 1, 2]), factors([0.25, 1, 1, 2], 9)])
    assert (found.is_ratio, found.values.tolist()) == (True, [[0.25, 1.0], [1.0, 2.0]])
    drive(found, act)


@pytest.mark.parametrize("values", [[1, 1, 1, 1], [1.01, 1, 1, 0.99], [0, 0, np.nan, np.inf]])
def test_next_to_nothing_looks_like_it(values):
    async def act(heatmap, pilot):
        assert heatmap._limits == pytest.approx((1 / LEAST_RATIO, LEAST_RATIO))
        assert 0.4 < heatmap._share(1.01, heatmap._limits) < 0.6

    drive(rates_grid([factors(values)]), act)


def test_the_scale_of_factors_is_blue_below_and_red_above_and_light_in_the_middle():
    for part in np.linspace(0, 0.4, 9):
        red, _, blue = ratio_color(part)
        assert blue > red
        red, _, blue = ratio_color(1 - part)
        assert red > blue
    assert min(ratio_color(0.5)) > 240


# ---- names and colours ---------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 4, 6, 11, 30])
def test_abbreviations_are_short_and_told_apart(width):
    for names in (
        PROJECTIONS,
        ("attention.q", "attention.k", "attention.v"),
        tuple(f"projection_{i}" for i in range(30)),
    ):
        found = abbreviated(names, width)
        assert len(set(found)) == len(names)
        assert all(len(name) <= width for name in found)
        if width == 30:
            assert found == list(names)


def test_names_are_wrapped_at_words_and_cut_only_where_there_is_no_room():
    assert wrapped("attention.output.dense", 12) == ["attention.", "output.dense"]
    assert wrapped("query_proj", 10) == ["query_proj"]
    assert wrapped("intermediate.dense", 8) == ["interme…", "dense"]
    found = columns_in(PROJECTIONS, 0, 74, 4, 3)
    assert sum(found.widths) == 74
    text = [" ".join(line[i] for line in found.head).split() for i in range(6)]
    assert ["".join(parts) for parts in text] == list(PROJECTIONS)
    narrow = headings(PROJECTIONS, [5] * 6, 3)
    assert len({tuple(lines) for lines in narrow}) == 6
    assert all(len(line) <= 5 for lines in narrow for line in lines)


@pytest.mark.parametrize("needs", [[], [1], [7, 5, 7, 11, 14, 8], [30, 1, 1], [40, 40, 40], [12] * 6])
@pytest.mark.parametrize("room", [74, 75, 76, 113])
def test_columns_share_all_the_room_and_get_what_they_need(needs, room):
    found = shares(needs, room)
    assert sum(found) == (room if needs else 0)
    if sum(needs) <= room:
        assert all(one >= need for one, need in zip(found, needs))
    small = [one for one, need in zip(found, needs) if need < one]
    assert max(small, default=0) - min(small, default=0) <= 1


@given(st.integers(1, 60), st.integers(1, 60), st.booleans())
def test_rows_fill_the_lines_and_each_has_a_line_for_its_number(num_rows, num_lines, halves):
    rows = rows_in(num_rows, num_lines, 0, halves=halves, spread_from=1.5)
    assert rows.num == min(num_rows, num_lines)
    lines = [rows.number_line(row) for row in range(rows.num)]
    assert lines == sorted(set(lines))
    assert all(rows.at(2 * line) == rows.at(2 * line + 1) == row for row, line in enumerate(lines))
    assert rows.edges[-1] <= 2 * num_lines
    if halves:
        assert rows.edges[-1] >= 2 * num_lines / 1.5
        heights = np.diff(rows.edges)
        assert heights.max() - heights.min() <= 1
    assert rows.at(rows.edges[-1]) is None


def test_a_line_that_two_rows_share_has_the_colours_of_both():
    async def act(heatmap, pilot):
        edges = heatmap.rows.edges
        shared = next(edge // 2 for edge in edges[1:-1] if edge % 2)
        strip = pilot.app.screen._compositor.render_strips()[len(heatmap.columns.head) + shared]
        halves = [s.style for s in strip if "▀" in s.text]
        assert len(halves) == 6
        row = heatmap.rows.at(2 * shared)
        wanted = [scale_color(share(heatmap.grid.values[i, 0], limits(heatmap.grid))) for i in (row, row + 1)]
        assert [tuple(color.triplet) for color in (halves[0].color, halves[0].bgcolor)] == wanted

    drive(grid(8), act)


def test_the_scale_rises_in_lightness_and_the_shades_in_ink():
    light = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(scale_color, np.linspace(0, 1, 50))]
    assert light == sorted(light)
    assert light[-1] - light[0] > 150
    assert scale_color(-1) == scale_color(0)
    assert scale_color(2) == scale_color(1)
    assert [shade(part) for part in (0, 0.3, 0.6, 1)] == list(SHADES[1:])
    assert (share(1, (0, 4)), share(5, (5, 5))) == (0.25, 0.5)


def test_curves_have_seven_colours_that_differ_and_themes_load():
    assert len({curve_color(i) for i in range(7)}) == 7
    assert curve_color(7) == CURVES[0]

    class Themed(App):
        def on_mount(self):
            for theme in THEMES:
                self.register_theme(theme)
                self.theme = theme.name

    async def run():
        async with Themed().run_test() as pilot:
            await pilot.pause()
            assert pilot.app.theme == THEMES[-1].name

    asyncio.run(run())
