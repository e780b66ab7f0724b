"""Scores of parts of the data, metrics that are no shares, and correlations under 0."""

from __future__ import annotations

import math

import pytest

from fastpeft.tui import cells
from fastpeft.tui.parse import PartScores, parse
from fastpeft.tui.runs_index import RunRow
from fastpeft.tui.screens.compare_screen import CompareScreen
from fastpeft.tui.screens.dialogs import Help, Reading
from fastpeft.tui.screens.run_screen import RunScreen
from fastpeft.tui.tail import RunTail
from fastpeft.tui.widgets.plot import LinePlot
from tests.support.pilots import SIZES, drive, text_of, until, until_shown
from tests.support.tiers import some
from tests.support.tui_logs import evaluation, header, lines, make_run, step

PARTS = {
    "LOC": {"precision": 0.9, "recall": 0.8, "f1": 0.847, "support": 1234},
    "PER": {"precision": 0.5, "recall": 0.25, "f1": 0.3333, "support": 56},
}


def entities(tmp_path, name="entities"):
    events = [header(), *(step(i) for i in range(30))]
    early = {part: metrics | {"f1": 0.1} for part, metrics in PARTS.items()}
    more = {"precision": 0.7, "recall": 0.6}
    events += [evaluation(9, 0.4, metric="f1", groups=early), evaluation(29, 0.6, metric="f1", groups=PARTS, more=more)]
    events += [evaluation(29, 0.55, metric="f1", split="test", groups={"LOC": PARTS["LOC"]})]
    return make_run(tmp_path, name, events, status="done", metric={"name": "f1", "value": 0.6, "groups": PARTS})


def scores(tmp_path, name="scores"):
    events = [header(), *(step(i) for i in range(30))]
    events += [
        evaluation(9, -0.25, metric="spearman", more={"pearson": -0.3, "mse": 4.5}),
        evaluation(29, -0.125, metric="spearman", more={"pearson": 0.1, "mse": 0.5}),
    ]
    return make_run(tmp_path, name, events, status="done", metric={"name": "spearman", "value": -0.125})


async def opened(app, pilot) -> RunScreen:
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(app.screen, RunScreen) and app.screen._tail.is_caught_up)
    await until(pilot, lambda: app.screen.query_one("#plot_loss").curves)
    return app.screen


@pytest.mark.parametrize("size", some(SIZES))
def test_parts_are_a_key_away_where_there_are_any(tmp_path, size):
    entities(tmp_path)

    async def script(app, pilot):
        screen = await opened(app, pilot)
        assert screen._notes("metric") == ["test 0.5500", "p: parts"]
        await pilot.press("p")
        await until(pilot, lambda: isinstance(app.screen, Reading))
        await until_shown(pilot, "0.8470")
        inside = [line.split("│")[1] for line in text_of(app.screen).split("\n") if line.count("│") >= 2]
        shown = "\n".join(" ".join(line.split()) for line in inside)
        assert "Parts of the data in entities" in shown
        assert "precision recall f1 support" in shown
        assert "validation, step 30\nLOC 0.9000 0.8000 0.8470 1,234\nPER 0.5000 0.2500 0.3333 56" in shown
        assert "test, step 30\nLOC 0.9000 0.8000 0.8470 1,234" in shown
        await pilot.press("escape")
        assert app.screen is screen

    drive(tmp_path, script, size)


def test_without_parts_the_key_does_nothing_and_is_not_told(tmp_path):
    scores(tmp_path)

    async def script(app, pilot):
        screen = await opened(app, pilot)
        await pilot.press("p")
        await pilot.pause()
        assert app.screen is screen
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, Help))
        assert "Scores of parts" not in text_of(app.screen)

    drive(tmp_path, script, (120, 60))


def test_the_key_is_told_where_there_are_parts(tmp_path):
    entities(tmp_path)

    async def script(app, pilot):
        await opened(app, pilot)
        await pilot.press("question_mark")
        await until_shown(pilot, "Scores of parts of the data")

    drive(tmp_path, script, (120, 60))


def test_a_squared_error_has_a_plot_of_its_own_and_correlations_share_one(tmp_path):
    scores(tmp_path)

    async def script(app, pilot):
        screen = await opened(app, pilot)
        await until(pilot, lambda: "eval/mse" in screen.measured_plots())
        metric = screen.query_one("#plot_metric", LinePlot)
        await until(pilot, lambda: metric.curves)
        assert {curve.label for curve in metric.curves} == {"spearman", "pearson"}
        own = screen._plots["eval/mse"]
        screen.plot = "eval/mse"
        screen.draw()
        await until(pilot, lambda: own.curves)
        assert own.title == "mse"
        assert own.curves[0].series.y.tolist() == [4.5, 0.5]
        await until(pilot, lambda: metric._shown_y[0] < -0.25 < metric._shown_y[1] < 1)

    drive(tmp_path, script, (200, 60))


def test_runs_are_compared_by_their_own_metrics_first(tmp_path):
    entities(tmp_path, "a")
    entities(tmp_path, "b")

    async def script(app, pilot):
        await pilot.press("space", "j", "space", "c")
        await until(pilot, lambda: isinstance(app.screen, CompareScreen))
        await until(pilot, lambda: "eval/f1" in app.screen.metrics())
        assert app.screen.metrics()[:3] == ["loss", "eval/f1", "eval/loss"]

    drive(tmp_path, script, (120, 40))


def row(name: str, metric: float | None) -> RunRow:
    return RunRow(name, None, "done", 0.0, metric=metric)  # type: ignore[arg-type]


def test_a_best_of_0_stands_over_a_negative_one_and_none_comes_last():
    rows = [row("none", None), row("zero", 0.0), row("minus", -0.5), row("plus", 0.25), row("nan", math.nan)]
    ordered = [one.name for one in cells.ordered(rows, "best", descending=True)]
    assert ordered[:3] == ["plus", "zero", "minus"]
    assert set(ordered[3:]) == {"none", "nan"}


@pytest.mark.parametrize(
    ("value", "text"), [(-0.12345, "-0.123"), (-1.0, "-1.000"), (0.12345, "0.1235"), (None, "     -")]
)
def test_a_negative_score_is_rounded_to_its_column_and_not_cut(value, text):
    (best,) = [column for column in cells.COLUMNS if column.key == "best"]
    assert cells.cells(row("r", value), [best], 0)[0].plain == text


# ---- the log ------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [["LOC"], {"LOC": 0.5}, "LOC", {"LOC": ["f1"]}])
def test_groups_of_another_shape_are_a_malformed_line(groups):
    parsed = parse(lines([evaluation(9, groups=groups)]))
    assert (parsed.malformed, parsed.parts) == (1, [])


def test_what_is_no_number_and_what_would_steer_the_terminal_is_left_out_of_parts():
    groups = {"\x1b[31mLOC": {"f1": 0.5, "what": "text", "nan": math.nan}}
    (found,) = parse(lines([evaluation(9, groups=groups)])).parts
    assert found == PartScores("validation", 10, {"LOC": {"f1": 0.5, "nan": "nan"}})


def test_the_last_parts_of_each_split_are_kept(tmp_path):
    tail = RunTail(entities(tmp_path).events)
    while not tail.is_caught_up:
        tail.poll()
    assert [(one.split, one.step) for one in tail.parts] == [("validation", 30), ("test", 30)]
    assert tail.parts[0].groups == PARTS


def test_the_majority_stands_beside_the_accuracy(tmp_path):
    more = {"majority": 0.75}
    for name in ("a", "b"):
        events = [
            header(),
            *(step(i) for i in range(30)),
            evaluation(9, 0.7, more=more),
            evaluation(29, 0.8, more=more),
        ]
        metric = {"name": "accuracy", "value": 0.8, "more": more}
        best = {"value": 0.8, "step": 30, "more": more}
        make_run(tmp_path, name, events, status="done", method=name, dataset="d", metric=metric, best=best)

    async def script(app, pilot):
        screen = await opened(app, pilot)
        metric = screen.query_one("#plot_metric", LinePlot)
        await until(pilot, lambda: metric.curves)
        assert {curve.label for curve in metric.curves} == {"accuracy", "majority"}
        await pilot.press("escape", "space", "down", "space", "c")
        await until(pilot, lambda: isinstance(app.screen, CompareScreen))
        await until_shown(pilot, "majority")
        assert text_of(app.screen).count("0.7500") >= 2

    drive(tmp_path, script, (200, 60))
