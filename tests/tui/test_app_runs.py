"""The list of runs: what it shows, its keys, its size."""

from __future__ import annotations

import os
import time

import pytest
from textual.binding import Binding
from textual.widgets import DataTable, Input

from fastpeft.tui import cells
from fastpeft.tui.screens.compare_screen import CompareScreen
from fastpeft.tui.screens.dialogs import Ask, Help, Reading
from fastpeft.tui.screens.run_screen import RunScreen
from fastpeft.tui.screens.runs_screen import RunsScreen
from fastpeft.tui.screens.start_screen import StartScreen
from tests.support.pilots import SIZES, drive, text_of, until, until_shown
from tests.support.tiers import some
from tests.support.tui_logs import evaluation, header, lines, make_run, step, usual


@pytest.fixture
def results(tmp_path):
    """Four runs, oldest first: alpha, beta, and two seeds of gamma."""
    spent = {"kind": "seconds", "limit": 100.0, "spent": 100.0}
    facts = {"model": "embedded/deberta-tiny", "dataset": "embedded-nli", "stand_in": True, "budget": spent}
    done = {"status": "done", "elapsed_s": 100.0, "tokens": 5000, "steps": 10, "energy_j": 2000.0}
    best = {"metric": {"name": "accuracy", "value": 0.5}, "best": {"value": 0.625, "step": 5}}
    runs = [
        ("alpha", usual(10), done | best | {"method": "iw_lora"}),
        ("beta", [header(), *map(step, range(20))], {"status": "running", "method": "lora"}),
        ("gamma-seed0", usual(10), done | best | {"method": "adalora", "group": "gamma", "seed": 0}),
        ("gamma-seed1", usual(10), done | best | {"method": "adalora", "group": "gamma", "seed": 1, "stand_in": False}),
    ]
    for i, (name, events, fields) in enumerate(runs):
        folder = make_run(tmp_path, name, events, **facts | fields)
        os.utime(folder.config, (1_790_000_000 + i, 1_790_000_000 + i))
    return tmp_path


def names(app) -> list[str]:
    """Of the lines, from above."""
    return list(app.screen._lines)


ALL = ["group gamma", "gamma-seed0", "gamma-seed1", "beta", "alpha"]


@pytest.mark.parametrize("size", SIZES)
def test_every_fact_of_a_run_is_on_the_screen(results, size):
    async def script(app, pilot):
        assert names(app) == ALL
        await pilot.press("G")
        await pilot.pause()
        text = text_of(app.screen)
        for fact in ("● running", "✔ done", "alpha", "iw_lora", "0.6250", "100%", "STAND-IN", "deberta-tiny", "2.00kJ"):
            assert fact in text, f"{fact} is missing:\n{text}"
        assert "2/2 done" in text
        assert "4 runs, 1 running" in text
        assert "50 tok/s" in text
        assert any(block in text for block in "▁▂▃▄▅▆▇█")
        for key in ("Stop", "Resume", "New", "Mark", "Compare", "Filter", "Sort", "Quit", "Help"):
            assert key in text.splitlines()[-1]

    drive(results, script, size)


def test_a_run_without_a_heartbeat_is_dead(results):
    old = time.time() - 60
    os.utime(results / "beta" / "events.jsonl", (old, old))

    async def script(app, pilot):
        assert "✖ dead" in text_of(app.screen)
        assert "0 running" in text_of(app.screen)

    drive(results, script)


@pytest.mark.parametrize("size", SIZES)
def test_no_run_says_how_to_make_one(tmp_path, size):
    async def script(app, pilot):
        await until_shown(pilot, "n starts one from a preset")
        await pilot.press("enter", "space", "c", "T", "D", "j", "o", "t", "i", "greater_than_sign")
        assert isinstance(app.screen, RunsScreen)

    drive(tmp_path / "not there", script, size)


def test_it_is_live(results):
    async def script(app, pilot):
        await until(pilot, lambda: "beta" in text_of(app.screen))
        with (results / "beta" / "events.jsonl").open("ab") as file:
            file.write(lines([step(20, loss=7.25)]))
        make_run(results, "delta", [header()], status="running")
        app.read_soon()
        await until(pilot, lambda: "delta" in names(app) and "7.2500" in text_of(app.screen))

    drive(results, script)


# ---- keys ----------------------------------------------------------------------------------


async def _cursor(app, pilot):
    seen = []
    for key in ("j", "down", "k", "G", "g"):
        await pilot.press(key)
        seen.append(app.screen.current)
    assert seen == ["gamma-seed0", "gamma-seed1", "gamma-seed0", "alpha", "group gamma"]


async def _open(app, pilot):
    await pilot.press("G", "enter")
    assert isinstance(app.screen, RunScreen)
    assert app.screen.run == "alpha"
    await pilot.press("escape")
    assert isinstance(app.screen, RunsScreen)


async def _fold(app, pilot):
    await pilot.press("enter")
    assert names(app) == ["group gamma", "beta", "alpha"]
    await pilot.press("enter")
    assert names(app) == ALL


async def _group(app, pilot):
    await pilot.press("t")
    assert names(app) == ["gamma-seed1", "gamma-seed0", "beta", "alpha"]


async def _mark(app, pilot):
    await pilot.press("space")
    assert list(app.marked) == ["gamma-seed0", "gamma-seed1"]
    await pilot.press("m")
    assert list(app.marked) == ["gamma-seed1"]
    assert "1 marked" in text_of(app.screen)
    await pilot.press("u")
    assert not app.marked


async def _compare(app, pilot):
    await pilot.press("space", "c")
    assert isinstance(app.screen, CompareScreen)
    assert app.screen.names == ["gamma-seed0", "gamma-seed1"]
    await pilot.press("escape", "u", "c")
    assert app.screen.names == ALL[1:]


async def _filter(app, pilot):
    await pilot.press("slash", *"adalora done")
    assert names(app) == ["group gamma", "gamma-seed0", "gamma-seed1"]
    await pilot.press("enter", "j")
    assert app.screen.current == "gamma-seed0"
    assert "/adalora done" in text_of(app.screen)
    await pilot.press("escape")
    assert names(app) == ALL
    await pilot.press("slash", *"q?", "escape")  # letters in the field, not keys
    assert app.screen.query_one(Input).value == ""
    assert app.is_running


async def _sort(app, pilot):
    await pilot.press("t")
    sorts = {}
    for _ in cells.sorts(cells.COLUMNS):
        await pilot.press("greater_than_sign")
        sorts[app.screen.sort_by] = names(app)
    assert set(sorts) == set(cells.sorts(cells.COLUMNS))
    assert sorts["name"][0] == "gamma-seed1"
    await pilot.press("less_than_sign")
    assert app.screen.sort_by == cells.sorts(cells.COLUMNS)[-1]
    await pilot.press("greater_than_sign", "greater_than_sign", "greater_than_sign", "i")
    assert (app.screen.sort_by, names(app)) == ("name", ["alpha", "beta", "gamma-seed0", "gamma-seed1"])


async def _new(app, pilot):
    await pilot.press("n")
    assert isinstance(app.screen, StartScreen)
    await pilot.press("escape")
    assert isinstance(app.screen, RunsScreen)


async def _help(app, pilot):
    await pilot.press("question_mark")
    assert isinstance(app.screen, Help)
    assert "Start a run" in text_of(app.screen)
    await pilot.press("escape", "f1", "question_mark")
    assert isinstance(app.screen, RunsScreen)


async def _stop(app, pilot):
    await pilot.press("j", "j", "j", "T")
    assert isinstance(app.screen, Ask)
    assert "Stop beta?" in text_of(app.screen)
    await pilot.press("n", "T", "escape", "T", "y")
    await until_shown(pilot, "beta runs on h")  # the log's host


async def _resume(app, pilot):
    await pilot.press("G", "R")
    await until_shown(pilot, "alpha is done")


async def _delete(app, pilot):
    await pilot.press("G", "D")
    assert isinstance(app.screen, Ask)
    await pilot.press("enter")  # No is the answer in focus
    assert (app.results_dir / "alpha").exists()
    await pilot.press("D", "y")
    await until(pilot, lambda: "alpha" not in names(app))
    assert not (app.results_dir / "alpha").exists()
    await pilot.press("G", "D", "y")
    await until_shown(pilot, "is running on another host")
    assert (app.results_dir / "beta").exists()


async def _folder(app, pilot):
    await pilot.press("G", "o")
    await until_shown(pilot, "Copied to the clipboard")
    assert app.clipboard == str((app.results_dir / "alpha").absolute())


async def _output(app, pilot):
    (app.results_dir / "alpha" / "output.log").write_text("said the trainer")
    await pilot.press("G", "O")
    assert isinstance(app.screen, Reading)
    await until_shown(pilot, "said the trainer")
    await pilot.press("j", "k", "G", "g", "space", "pageup", "escape")
    await pilot.press("k", "O")
    await until_shown(pilot, "Nothing is kept here")


async def _suspend(app, pilot):
    """Without a terminal there is no shell to go to; see test_end_to_end."""
    await pilot.press("ctrl+z")
    assert not app.is_exiting


async def _quit(app, pilot):
    await pilot.press("q")
    assert app.is_exiting


FLOWS = {
    _cursor: "list.down list.up list.first list.last",
    _open: "runs.open",
    _fold: "",
    _group: "runs.group",
    _mark: "runs.mark runs.unmark",
    _compare: "runs.compare",
    _filter: "runs.filter runs.clear",
    _sort: "runs.sort runs.sort_back runs.invert",
    _new: "runs.new",
    _help: "app.help",
    _stop: "run.stop",
    _resume: "run.resume",
    _delete: "run.delete",
    _folder: "run.folder",
    _output: "run.output",
    _suspend: "app.suspend",
    _quit: "app.quit",
}


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.__name__.strip("_"))
def test_keys(results, flow, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    drive(results, flow, (120, 40) if flow is _sort else (80, 24))


@pytest.mark.parametrize("size", some(SIZES[1:]))
def test_keys_at_other_sizes(results, size):
    async def script(app, pilot):
        for flow in (_cursor, _open, _delete):
            await pilot.press("g")
            await flow(app, pilot)

    drive(results, script, size)


def test_every_binding_is_in_some_flow(results):
    async def script(app, pilot):
        owners = [type(app.screen), *type(app.screen).__mro__, type(app), type(app.screen.query_one(DataTable))]
        there = {b.id for o in owners for b in vars(o).get("BINDINGS", []) if isinstance(b, Binding) and b.id}
        assert there == set(" ".join(FLOWS.values()).split())

    drive(results, script)


def test_q_quits_from_a_question_too(results):
    async def script(app, pilot):
        await pilot.press("G", "D", "q")
        assert app.is_exiting

    drive(results, script)


# ---- mouse, palette, colours ---------------------------------------------------------------


def test_the_mouse_sorts_and_opens(results):
    async def script(app, pilot):
        table = app.screen.query_one(DataTable)
        await until(pilot, lambda: table.row_count and table.virtual_size.height > table.row_count)  # it is laid out
        await pilot.click(table, offset=(15, 0))
        await until(pilot, lambda: app.screen.sort_by == "name")
        first = names(app)
        await pilot.click(table, offset=(15, 0))
        await until(pilot, lambda: names(app) != first)
        await pilot.click(table, offset=(15, 1))
        await pilot.click(table, offset=(15, 1))
        await until(pilot, lambda: isinstance(app.screen, RunScreen) or app.screen.folded)

    drive(results, script)


def test_the_palette_has_every_key_and_themes(results):
    async def script(app, pilot):
        found = {command.title for command in app.get_system_commands(app.screen)}
        assert {"Stop", "Resume", "New", "Compare", "Delete", "Theme", "Quit"} <= found
        await pilot.press("ctrl+p")
        await pilot.press(*"group")
        await until_shown(pilot, "Seeds of a run under one line")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, RunsScreen) and not app.screen.group)
        for theme in ("fastpeft-light", "textual-light", "nord", "fastpeft-dark"):
            app.theme = theme
            await pilot.pause()
            assert "alpha" in text_of(app.screen)

    drive(results, script, (120, 40))


def test_without_colour_every_status_has_its_sign(results, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    make_run(results, "x1", [header()], status="failed")
    make_run(results, "x2", [header()], status="diverged")
    make_run(results, "x3", [header()], status="stopped")

    async def script(app, pilot):
        assert app.no_color
        text = text_of(app.screen)
        for sign in ("✔ done", "● running", "✖ failed", "▲ diverged", "■ stopped"):
            assert sign in text

    drive(results, script)


# ---- odd folders ---------------------------------------------------------------------------


def test_odd_runs_are_listed(tmp_path):
    make_run(tmp_path, "empty log", [])
    make_run(tmp_path, "no-log", None, result=False)
    half = make_run(tmp_path, "half", [header(), step(0)], result=False)
    half.events.write_bytes(half.events.read_bytes()[:-20])
    torn = make_run(tmp_path, "torn", [header(), step(0), evaluation(0)])
    torn.result.write_text('{"status": ')
    make_run(tmp_path, "[bold]markup", [header()])
    make_run(tmp_path, "n" * 120, [header()])
    (tmp_path / "file").write_text("x")

    async def script(app, pilot):
        assert len(app.rows) == 6
        await pilot.press("O", "escape")
        for name in ("empty log", "half", "torn"):
            app.screen.query_one(DataTable).move_cursor(row=names(app).index(name))
            await pilot.press("enter", "escape")
        assert "[bold]markup" in text_of(app.screen)

    drive(tmp_path, script)


def test_a_name_in_a_message_is_no_markup(tmp_path):
    make_run(tmp_path, "a [bold] run", usual(3))

    async def script(app, pilot):
        await pilot.press("T", "y")
        await until_shown(pilot, "a [bold] run runs on h: stop it there")

    drive(tmp_path, script, (120, 40))


def test_two_hundred_runs_keep_the_cursor(tmp_path):
    for i in range(200):
        make_run(tmp_path, f"run{i:03}", None, status="done")

    async def script(app, pilot):
        await pilot.press("j", "j", "j")
        at = app.screen.current
        make_run(tmp_path, "newer", None, status="done")
        app.read_soon()
        await until(pilot, lambda: "newer" in names(app))
        assert app.screen.current == at

    drive(tmp_path, script)
