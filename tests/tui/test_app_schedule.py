"""What a schedule logs, and the test split's score: read, put into words, and on the screens."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from textual_hires_canvas import Canvas

from fastpeft.tui import cells
from fastpeft.tui import forecast_band as forecasts
from fastpeft.tui.parse import MAX_FIGURES, SplitScore
from fastpeft.tui.runs_index import RunsIndex
from fastpeft.tui.screens.compare_screen import CompareScreen
from fastpeft.tui.screens.run_screen import MAX_PLOTS, RunScreen
from fastpeft.tui.tail import MAX_SNAPSHOTS, RunTail
from fastpeft.tui.widgets.heatmap import Heatmap
from fastpeft.tui.widgets.plot import LinePlot
from tests.support.pilots import SIZES, drive, text_of, until, until_shown
from tests.support.tiers import some
from tests.support.tui_logs import (
    evaluation,
    event,
    figures,
    forecast,
    header,
    importance,
    lines,
    make_run,
    planned,
    rates,
    step,
    usual,
)

DONE = {
    "status": "done",
    "metric": {"name": "exact_match", "value": 0.6},
    "best": {"value": 0.6, "step": 200},
    "elapsed_s": 20.0,
    "budget": {"kind": "seconds", "limit": 20.0, "spent": 20.0},
}
TEST = {"name": "exact_match", "value": 0.584, "num": 1319, "weights": "best", "step": 200}


def read(path, events) -> RunTail:
    path.write_bytes(lines(events))
    tail = RunTail(path)
    while not tail.is_caught_up:
        tail.poll()
    return tail


@pytest.fixture
def log(tmp_path):
    return tmp_path / "events.jsonl"


# ---- what is read --------------------------------------------------------------------------


def test_all_of_it_is_read(log):
    tail = read(log, planned(200))
    assert (tail.malformed, tail.num_events) == (0, len(planned(200)))
    assert tail.series["forecast"].y[[0, -1]] == pytest.approx([0.595, 0.5])
    assert tail.series["schedule/at_bound"].y[-1] == pytest.approx(0.5)
    assert tail.series["schedule/divergences"].last == 1.0
    assert [r.step for r in tail.rates] == list(range(9, 200, 10))
    assert tail.rates[-1].multipliers == pytest.approx([0.5, 1.0, math.sqrt(2), 2.0])
    assert tail.tests == [SplitScore("test", "exact_match", 0.584)]


def test_another_split_is_no_part_of_the_curve(log):
    tail = read(log, [step(0), evaluation(0, 0.3), evaluation(0, 0.9, split="test"), evaluation(0, 0.8, split="svamp")])
    assert tail.series["eval/accuracy"].y.tolist() == [0.3]
    assert tail.series["eval/loss"].y.tolist() == [0.9]
    assert [(t.split, t.value) for t in tail.tests] == [("test", 0.9), ("svamp", 0.8)]
    assert tail.notable[-1].text.endswith("on 2,000 rows of the svamp split")
    tail = read(log, [{k: v for k, v in evaluation(0, 0.3).items() if k != "split"}])
    assert tail.series["eval/accuracy"].y.tolist() == [0.3], "an old log's"


def test_a_group_of_figures_is_read_and_a_yes_or_no_is_a_number(log):
    said = {
        "at_bound": True,
        "forecast_error": {"25%": 0.1, "50%": None, "75%": 0.3},
        "gone": None,
        "rewards": [1.0, 2.0],
    }
    tail = read(log, [figures(0, **said)])
    found = {name: s.last for name, s in tail.series.items() if name.startswith("schedule/")}
    assert found.pop("schedule/rewards") == 1.5
    assert found == {"schedule/at_bound": 1, "schedule/forecast_error 25%": 0.1, "schedule/forecast_error 75%": 0.3}
    assert tail.malformed == 0


@pytest.mark.parametrize(
    "bad",
    [
        event("forecast", 1.0, 1, value=0.5),
        event("forecast", 1.0, 1, value="much", horizon=10),
        event("rates", 1.0, 1, names=["a"], layer=[0], projection=["q"]),
        rates(1, [1.0, 1.0]),
        event("schedule", 1.0, 1, a=["b"]),
        event("schedule", 1.0, 1, a={"b": "c"}),
        event("eval", 1.0, 1, split="test", metric="accuracy"),
    ],
)
def test_what_is_not_whole_is_counted(log, bad):
    tail = read(log, [step(0), bad, step(1)])
    assert (tail.malformed, len(tail.series["loss"]), tail.rates, tail.tests) == (1, 2, [], [])


def test_many_snapshots_are_thinned_and_many_figures_cut(log):
    events = [rates(i, [float(i + 1)] * 4) for i in range(1000)]
    tail = read(log, [*events, figures(0, **{f"f{i}": 1.0 for i in range(MAX_FIGURES + 9)}, gone=None)])
    assert len(tail.rates) <= MAX_SNAPSHOTS
    assert [tail.rates[i].step for i in (0, -1)] == [0, 999]
    assert sum(name.startswith("schedule/") for name in tail.series) == MAX_FIGURES


# ---- forecasts -----------------------------------------------------------------------------


def test_the_newest_forecast_that_is_a_number_and_those_at_the_quarters(log):
    tail = read(log, [*planned(160), forecast(160, math.nan, 200)])
    assert (forecasts.newest(tail).at, forecasts.newest(tail).horizon) == (159, 200)
    found = forecasts.at_quarters(tail)
    assert [(at, one.at, one.progress) for at, one in found] == [(0.25, 49, 0.25), (0.5, 99, 0.5), (0.75, 149, 0.75)]
    assert forecasts.came(tail) is None, "it has not ended"
    assert "came" not in str(forecasts.summary(tail))
    tail = read(log, planned(100))
    assert [at for at, _ in forecasts.at_quarters(tail)] == [0.25, 0.5]
    tail = read(log, usual(20))
    assert (forecasts.newest(tail), forecasts.at_quarters(tail), str(forecasts.summary(tail))) == (None, [], "")


def test_how_forecasts_compare_with_what_came(log):
    tail = read(log, planned(200))
    real = np.mean([e["loss"] for e in planned(200) if e["type"] == "step"][-32:])
    assert forecasts.came(tail) == pytest.approx(real)
    said = str(forecasts.summary(tail))
    for at, value in ((25, 0.575), (50, 0.55), (75, 0.525)):
        assert f"{at}% {value:g} ({(value - real) / real:+.1%})" in said
    assert "at bound 0.5  at rail 0  divergences 1" in said
    for status in ("stopped", "diverged"):
        tail = read(log, [*planned(150), event("end", 15.0, 150, status=status)])
        assert forecasts.came(tail) is None, "the end of its budget never came"


def test_a_forecast_without_a_band(log):
    tail = read(log, [step(0), step(1), forecast(1, 0.4123, 10, low="nan", high=None, progress=None, at=None)])
    assert str(forecasts.newest(tail)) == "0.412"
    assert forecasts.newest(tail).at == 1
    assert str(forecasts.summary(tail)) == "forecast  0.412 at step 10, made at step 1"


@pytest.mark.parametrize(
    ("axis", "ends"),
    [("steps", (89, 200)), ("time", (9.0, 20.1)), ("tokens", (45_000, 100_500)), ("joules", (1800, 4020))],
)
def test_the_end_is_extrapolated_on_every_axis(log, axis, ends):
    tail = read(log, planned(90))
    band = forecasts.band(forecasts.newest(tail), tail.series["loss"], axis)
    assert band.x == pytest.approx(ends)
    assert band.level.tolist() == pytest.approx([0.555] * 2)
    assert (band.low[0], band.high[1]) == (pytest.approx(0.445), pytest.approx(0.665))
    assert band.label == "forecast 0.555 (0.445–0.665)"


def test_the_rate_is_that_of_the_last_half(log):
    slow = [step(i) | {"elapsed_s": 10.0 * i} for i in range(10)]
    fast = [step(10 + i) | {"elapsed_s": 100.0 + i} for i in range(10)]
    loss = read(log, slow + fast).series["loss"]
    assert loss.at_step("time", 29) == pytest.approx(119.0)
    assert loss.at_step("time", 5) == 50.0
    assert loss.at_step("time", math.nan) is None
    assert read(log, [step(0)]).series["loss"].at_step("time", 5) is None
    bare = read(log, [step(i, energy_j=None) for i in range(4)]).series["loss"]
    assert bare.at_step("joules", 2) is bare.at_step("joules", 9) is None


# ---- one run -------------------------------------------------------------------------------


async def opened(app, pilot) -> RunScreen:
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(app.screen, RunScreen) and app.screen._tail.is_caught_up)
    await until(pilot, lambda: app.screen._plots["loss"].curves)
    return app.screen


def drawn(plot: LinePlot) -> str:
    return "".join("".join(row) for row in plot.query_one("#plot", Canvas)._buffer)


@pytest.mark.parametrize("size", some(SIZES[:2]))
def test_a_forecast_is_drawn_ahead_of_the_curve_and_f_hides_it(tmp_path, size):
    make_run(tmp_path, "one", planned(150))

    async def script(app, pilot):
        screen = await opened(app, pilot)
        plot = screen._plots["loss"]
        await until_shown(pilot, "forecast 0.525 (0.475–0.57" if size == SIZES[0] else "forecast 0.525")
        await until(pilot, lambda: "░" in drawn(plot))
        assert plot._shown_x[1] == pytest.approx(15.0 + 0.25 * 14.9), "a quarter ahead, and not to the end"
        assert "◆" not in drawn(plot)
        await pilot.press("f")
        await until(pilot, lambda: "░" not in drawn(plot))
        assert "forecast" not in text_of(screen).split("\n")[2]
        await pilot.press("f", "x")
        await until(pilot, lambda: plot.bands and plot.bands[0].x[1] == 200.0)
        for _ in range(3):
            await pilot.press("shift+right")
        await until(pilot, lambda: "◆" in drawn(plot))

    drive(tmp_path, script, size)


@pytest.mark.parametrize("no_color", [False, True])
def test_multipliers_are_a_map_and_m_changes_between_maps(tmp_path, monkeypatch, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    make_run(tmp_path, "one", [*planned(100), importance(99, [0.1, 0.2, 0.3, 0.4])])

    async def script(app, pilot):
        screen = await opened(app, pilot)
        await pilot.press("2")
        await until_shown(pilot, "importance, m: multipliers")
        await pilot.press("m")
        await until_shown(pilot, "factors on the learning rate, m: importance")
        await until_shown(pilot, "snapshot 10 of 10")
        heatmap = screen.query_one(Heatmap)
        assert heatmap.grid.values == pytest.approx(np.array([[2**-0.5, 1.0], [2**0.25, 2**0.5]]))
        await until_shown(pilot, "multipliers 0.7071")
        assert ("░" in text_of(screen)) == no_color
        await pilot.press("left_square_bracket")
        await until_shown(pilot, "snapshot 9 of 10")
        await pilot.press("m")
        await until_shown(pilot, "snapshot 1 of 1")

    drive(tmp_path, script)


def test_multipliers_alone_are_shown_at_once(tmp_path):
    make_run(tmp_path, "one", planned(100))

    async def script(app, pilot):
        await opened(app, pilot)
        await pilot.press("2", "m")
        await until_shown(pilot, "factors on the learning rate")
        assert "m:" not in text_of(app.screen)

    drive(tmp_path, script)


@pytest.mark.parametrize("size", some(SIZES[:2]))
def test_every_figure_of_a_schedule_has_its_plot(tmp_path, size):
    make_run(tmp_path, "one", planned(200), **DONE, test=TEST)

    async def script(app, pilot):
        screen = await opened(app, pilot)
        await until_shown(pilot, "test 0.5840")
        await until(pilot, lambda: "schedule/divergences" in screen.measured_plots())
        seen = set()
        for _ in range(4):
            await pilot.press("left_square_bracket")
            shown = [plot for plot in screen.query(LinePlot) if plot.display]
            assert len(shown) == (1 if size == SIZES[0] else MAX_PLOTS)
            assert screen.focused in shown
            seen |= {plot.title for plot in shown}
        assert {"at bound", "at rail", "divergences", "decoding"} <= seen
        assert ("gradient" in seen) == (size != SIZES[0]), "those before them stay in view where there is room"
        assert "4 more: ]" in text_of(screen) or size == SIZES[0]

    drive(tmp_path, script, size)


def test_the_panel_says_what_came_and_the_metric_what_was_tested(tmp_path):
    make_run(tmp_path, "one", planned(200), **DONE, test=TEST)

    async def script(app, pilot):
        screen = await opened(app, pilot)
        await pilot.press("right_square_bracket")
        plot = screen._plots["metric"]
        await until(pilot, lambda: plot.display and plot.curves)
        assert [curve.label for curve in plot.curves] == ["exact match", "no answer", "pass@4"]
        assert plot.notes == ("test 0.5840",)
        assert plot.curves[0].series.y.tolist() == pytest.approx([0.15, 0.3, 0.45, 0.6])
        assert "test 0.5840" in text_of(screen).split("\n")[2]
        await pilot.press("3")
        await until_shown(pilot, "50% 0.55 (+9.0%)")
        await until_shown(pilot, "at bound 0.5  at rail 0  divergences 1")

    drive(tmp_path, script)


def test_a_run_without_any_of_it_has_no_trace_of_it(tmp_path):
    make_run(tmp_path, "one", usual(100), **DONE | {"metric": {"name": "accuracy", "value": 0.6}})

    async def script(app, pilot):
        screen = await opened(app, pilot)
        assert not screen._plots["loss"].bands
        assert not screen.query_one("#schedule").display
        assert "test" not in text_of(screen)
        await pilot.press("2")
        await until_shown(pilot, "importance")
        assert "m:" not in text_of(screen)

    drive(tmp_path, script)


# ---- several runs --------------------------------------------------------------------------


@pytest.fixture
def seeds(tmp_path):
    """Three runs that were tested."""
    for method, seed, test in (("lora", 0, 0.5), ("lora", 1, 0.6), ("iw_lora", 0, 0.7)):
        fields = DONE | {"method": method, "seed": seed, "group": method, "auc": {"seconds": 0.3, "joules": None}}
        make_run(tmp_path, f"{method}{seed}", planned(200), **fields, test=TEST | {"value": test})
    return tmp_path


def test_the_list_has_a_column_of_tests_where_there_is_one(seeds):
    rows = RunsIndex(seeds).refresh()
    assert [(row.name, row.best, row.test) for row in rows if row.seed == 1] == [("lora1", 0.6, 0.6)]
    assert "test" in cells.sorts(cells.columns_of(rows))
    assert cells.columns_of([row for row in rows if row.test is None]) == cells.COLUMNS

    async def script(app, pilot):
        await until_shown(pilot, "0.5500")
        head, *_ = (line for line in text_of(app.screen).split("\n") if "status" in line)
        assert head.split() == ["status", "run", "budget", "ETA", "loss", "best", "test"]
        app.screen.sort_by, app.screen.descending = "test", False
        app.screen.draw()
        await until_shown(pilot, "▲test")
        (seeds / "iw_lora0" / "result.json").unlink()
        for seed in (0, 1):
            path = seeds / f"lora{seed}" / "result.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"test": {}}))
        app.read_soon()
        await until(pilot, lambda: app.screen.sort_by == "created")
        assert "test" not in text_of(app.screen).split("\n")[1], "the column is gone"

    drive(seeds, script)


@pytest.mark.parametrize("size", SIZES[:2])
def test_tests_are_compared_where_all_runs_have_one_else_the_best(seeds, size):
    wide = size != SIZES[0]

    async def script(app, pilot):
        await pilot.press("c", "3")
        assert isinstance(app.screen, CompareScreen)
        await until_shown(pilot, "minus lora (test)" if wide else "test")
        await until_shown(pilot, "0.2000")  # iw_lora 0.7 less lora 0.5, seed 0
        assert ("AUC" in text_of(app.screen)) == wide
        path = seeds / "lora1" / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"test": {}}))
        app.read_soon()
        await until_shown(pilot, "minus lora (best)" if wide else "0.0000")

    drive(seeds, script, size)


def test_a_forecast_of_a_live_run_follows_it(tmp_path):
    folder = make_run(tmp_path, "one", planned(50))

    async def script(app, pilot):
        await opened(app, pilot)
        await until_shown(pilot, "forecast 0.575")
        with folder.events.open("ab") as file:
            file.write(lines([step(50, loss=0.8), forecast(50, 0.25, 300)]))
        await until_shown(pilot, "forecast 0.25")
        folder.events.write_bytes(lines([header(resumed=True), step(10)]))
        await until(pilot, lambda: "forecast" not in text_of(app.screen))

    drive(tmp_path, script)
