"""One run, several runs, and the form that starts one."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from textual.binding import Binding
from textual.widgets import Checkbox, Input

from fastpeft.runs.store import RunFolder
from fastpeft.tui import steer
from fastpeft.tui.screens import start_screen as start_module
from fastpeft.tui.screens.compare_screen import CompareScreen, CompareTable
from fastpeft.tui.screens.dialogs import Ask, Reading
from fastpeft.tui.screens.run_screen import PLOTS, RunScreen
from fastpeft.tui.screens.runs_screen import RunsScreen
from fastpeft.tui.screens.start_screen import StartScreen
from fastpeft.tui.steer import Launch
from fastpeft.tui.widgets.event_list import EventLog
from fastpeft.tui.widgets.heatmap import Heatmap
from fastpeft.tui.widgets.plot import LinePlot
from tests.support.pilots import SIZES, drive, text_of, until, until_shown
from tests.support.tiers import some
from tests.support.tui_logs import evaluation, event, header, heartbeat, importance, lines, make_run, step, usual


@pytest.fixture
def results(tmp_path):
    """One run that has everything: energy, a GPU's heartbeats, importances that moved, a bad line."""
    events = [*usual(60)[:-1], importance(30, [0.1, 0.2, 0.3, 0.6])]
    events += [
        evaluation(59, value=0.75),
        heartbeat(6.0, 60, util=87.0, power_w=312.0, temp_c=61.0, rank_skew=12.0, slowest_rank=1),
    ]
    budget = {"kind": "seconds", "limit": 100.0, "spent": 6.0}
    fields = {"status": "running", "stand_in": True, "model": "a/deberta-tiny", "dataset": "embedded-nli"}
    run = make_run(tmp_path, "one", events, budget=budget, **fields)
    with run.events.open("ab") as file:
        file.write(b"not an event\n" + lines([step(60)]))
    run.config.write_text("method: iw_lora\nbudget: 100s\n")
    return tmp_path


async def opened(app, pilot) -> RunScreen:
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(app.screen, RunScreen) and app.screen._tail.is_caught_up)
    await until_shown(pilot, "1 bad line")
    return app.screen


# ---- one run -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", some(SIZES, (1,)))
def test_everything_of_a_run_can_be_seen(results, size):
    async def script(app, pilot):
        screen = await opened(app, pilot)
        text = text_of(screen)
        for fact in ("one", "● running", "STAND-IN", "iw_lora", "of 1m40", "loss 1.0164", "0.7500", "tok/s"):
            assert fact in text.split("\n")[0] + text.split("\n")[1], fact
        assert "validation 0.9" in text
        seen = set()
        for _ in PLOTS if size == SIZES[0] else "1":
            seen |= {plot.id.removeprefix("plot_") for plot in screen.query(LinePlot) if plot.display}
            await pilot.press("right_square_bracket")
        assert seen == set(PLOTS) - {"decode"}
        await pilot.press("2", "G", "l")
        await until_shown(pilot, "first 0.4 (+50.0%)")
        await pilot.press("left_square_bracket")
        await until_shown(pilot, "snapshot 1 of 2")
        await pilot.press("right_square_bracket")
        await until_shown(pilot, "snapshot 2 of 2")
        await pilot.press("3")
        await until_shown(pilot, "accuracy 0.7500, loss 0.9000 on 2,000 rows")
        for figure in ("87 %", "700 MB", "312 W", "61 °C"):
            assert figure in text_of(screen)
        await pilot.press("4")
        await until_shown(pilot, "budget: 100s")
        assert "Panes" in text_of(screen)
        await pilot.press("escape")
        assert isinstance(app.screen, RunsScreen)

    drive(results, script, size)


def test_a_wide_terminal_shows_all_at_once(results):
    async def script(app, pilot):
        text = text_of(await opened(app, pilot))
        for part in (
            "loss",
            "penalty",
            "rate",
            "energy",
            "power",
            "importance",
            "machine and events",
            "312 W",
            "+12 %",
            "rank 1",
        ):
            assert part in text

    drive(results, script, (200, 60))


def test_plots_and_parts_obey_their_keys(results):
    async def script(app, pilot):
        screen = await opened(app, pilot)
        plot = screen.query_one("#plot_loss", LinePlot)
        assert screen.focused is plot
        await pilot.press("y", "s", "right")
        assert (plot.log_scale, plot.smoothing > 0) == (True, True)
        assert plot.cursor_x is not None
        await pilot.press("plus", "0", "x")
        assert plot.view_x is None
        assert {p.axis for p in screen.query(LinePlot)} == {"steps"}
        await pilot.press("z")
        assert screen.maximized is plot
        await pilot.press("escape")
        assert screen.maximized is None
        await pilot.press("z", "z", "tab")
        assert screen.maximized is None
        assert screen.focused is not plot
        await pilot.press("3", "g", "G", "k", "j", "2", "j")
        assert screen.query_one(Heatmap).cursor[0] == 1
        await pilot.press("T")
        assert isinstance(app.screen, Ask)
        await pilot.press("n", "c")
        assert isinstance(app.screen, CompareScreen)
        await pilot.press("escape", "q")
        assert app.is_exiting

    drive(results, script, (120, 40))


def test_a_run_says_what_it_is_busy_with_before_its_first_step(tmp_path):
    figures = {"done": 5120, "total": 13_000, "unit": "tokens", "left_s": 95.0}
    events = [header(), event("phase", 0.0, 0, name="first_step", text="step 1 under way", **figures)]
    run = make_run(tmp_path, "one", events, status="running")

    async def script(app, pilot):
        await pilot.press("enter")
        await until_shown(pilot, "step 1 under way: 5,120 of 13,000 tokens, 1m35 left")
        with run.events.open("ab") as file:
            file.write(lines([step(0)]))
        await until_shown(pilot, "loss 2.0000")
        assert "under way:" not in text_of(app.screen)

    drive(tmp_path, script)


def test_a_live_run_grows_and_a_resume_cuts_it_back(results):
    log = results / "one" / "events.jsonl"
    before = log.read_bytes()

    async def script(app, pilot):
        screen = await opened(app, pilot)
        with log.open("ab") as file:
            file.write(lines([step(61, loss=3.5)])[:-30])
        await asyncio.sleep(0.05)
        assert len(screen._tail.series["loss"]) == 61
        with log.open("ab") as file:
            file.write(lines([step(61, loss=3.5)])[-30:])
        await until(pilot, lambda: len(screen._tail.series["loss"]) == 62)
        await until_shown(pilot, "3.5")
        log.write_bytes(before[: len(before) // 2] + b"\n" + lines([header(resumed=True), step(30, loss=4.25)]))
        await until(pilot, lambda: screen._tail.series["loss"].last == 4.25)
        await until_shown(pilot, "4.25")
        await pilot.press("3")
        await until_shown(pilot, "resumed by process")
        shown = screen.query_one(EventLog).shown
        assert [event.kind for event in shown].count("run") == 2

    drive(results, script)


def test_a_log_is_not_read_again_when_its_run_is_opened_again(results):
    async def script(app, pilot):
        screen = await opened(app, pilot)
        tail = screen._tail
        await pilot.press("escape")
        screen = await opened(app, pilot)
        assert screen._tail is tail
        assert tail.bytes_read == (results / "one" / "events.jsonl").stat().st_size

    drive(results, script)


def test_a_run_that_vanishes_is_said(results):
    async def script(app, pilot):
        await opened(app, pilot)
        await pilot.press("escape", "D", "y", "enter")
        await until_shown(pilot, "running on another host")
        await pilot.press("enter")
        for path in (results / "one").iterdir():
            path.unlink()
        (results / "one").rmdir()
        app.read_soon()
        await until_shown(pilot, "there is no such run now")

    drive(results, script)


# ---- several runs --------------------------------------------------------------------------


@pytest.fixture
def seeds(tmp_path):
    """Two methods, two seeds each."""
    for method, base in (("lora", 0.5), ("iw_lora", 0.6)):
        for seed in (0, 1):
            make_run(
                tmp_path,
                f"{method}-seed{seed}",
                usual(100),
                status="done",
                method=method,
                seed=seed,
                group=method,
                dataset="mnli",
                model="m",
                metric={"name": "accuracy", "value": base + seed / 10},
                best={"value": base + seed / 10, "step": 1},
                elapsed_s=60.0,
                energy_j=500.0,
            )
    return tmp_path


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_roomy_comparison_shows_all_at_once(seeds, size):
    async def script(app, pilot):
        await pilot.press("c")
        await until_shown(pilot, "0.1000 ± 0.0000")
        plot = app.screen.query_one("#overlay", LinePlot)
        await until(pilot, lambda: len(plot.curves) == 4)
        for fact in ("loss", "iw_lora-seed1", "✔ done", "500J", "0.5500 ± 0.6353"):
            assert fact in text_of(app.screen)
        await pilot.press("2", "space")
        assert len(plot.curves) == 3

    drive(seeds, script, size)


def test_runs_are_compared(seeds):
    async def script(app, pilot):
        await pilot.press("c")
        screen = app.screen
        assert isinstance(screen, CompareScreen)
        plot = screen.query_one("#overlay", LinePlot)
        await until(pilot, lambda: len(plot.curves) == 4)
        assert len({curve.color for curve in plot.curves}) == 4
        for axis in ("steps", "tokens", "joules", "time"):
            await pilot.press("x")
            assert plot.axis == axis
        await pilot.press("m")
        assert (screen.metric, plot.smoothing) == ("eval/accuracy", 0.0)
        await pilot.press("m", "M", "M")
        assert (screen.metric, plot.smoothing) == ("loss", 0.9)
        await pilot.press("t")
        assert len({curve.color for curve in plot.curves}) == 2
        table = screen.query_one(CompareTable)
        assert len({str(table.get_row(name)[0].spans) for name in screen.names}) == 2
        await pilot.press("t", "2")
        assert isinstance(screen.focused, CompareTable)
        await pilot.press("j", "k", "G", "g", "space")
        assert len(plot.curves) == 3
        await pilot.press("space", "3")
        await until_shown(pilot, "0.1000 ± 0.0000")  # iw_lora minus lora, paired by seed
        assert "0.5500 ± 0.6353" in text_of(screen)
        await pilot.press("1", "2", "enter")
        assert isinstance(app.screen, RunScreen)
        await pilot.press("escape", "escape")
        assert isinstance(app.screen, RunsScreen)

    drive(seeds, script)


def test_stand_ins_and_unlike_metrics_are_pointed_out(seeds):
    make_run(seeds, "other", usual(5), stand_in=True, metric={"name": "f1", "value": 0.5}, status="done")

    async def script(app, pilot):
        await pilot.press("c")
        await until_shown(pilot, "several metrics")
        assert "STAND-IN" in text_of(app.screen)

    drive(seeds, script)


# ---- starting ------------------------------------------------------------------------------


async def form(app, pilot) -> StartScreen:
    await pilot.press("n")
    assert isinstance(app.screen, StartScreen)
    return app.screen


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_form_at_other_sizes(tmp_path, size):
    async def script(app, pilot):
        screen = await form(app, pilot)
        screen.query_one("#overrides", Input).value = "adapter.rank=999"
        await pilot.press(*"lora_rte")
        await until_shown(pilot, "less than or equal to 256")
        screen.query_one("#overrides", Input).value = "adapter.rank=9"
        await until_shown(pilot, "✓ lora on microsoft/deberta-v3-base")

    drive(tmp_path, script, size)


def test_the_form_checks_while_one_types(tmp_path):
    async def script(app, pilot):
        screen = await form(app, pilot)
        await until_shown(pilot, "✗ Run:")
        await pilot.press(*"iwlora_mn", "right", "tab")
        assert screen.query_one("#run", Input).value == "iwlora_mnli"
        await until_shown(pilot, "✓ iw_lora on microsoft/deberta-v3-base")
        await pilot.press(*"10x")
        await until_shown(pilot, "'10x' is no budget")
        await pilot.press("backspace", "s", "down")
        await until_shown(pilot, "budget 10s")
        await pilot.press(*"1,1")
        await until_shown(pilot, "a seed is there twice")
        await pilot.press("backspace", *"2", "tab", *"a b")
        await until_shown(pilot, "cannot name a run")
        await pilot.press("backspace", "backspace", "tab", *"adapter.rank=999")
        await until_shown(pilot, "less than or equal to 256")
        assert "Rank r of every update" in text_of(screen)
        await pilot.press("backspace", "backspace", *" regulariser.norm", "right", *"max")
        await until(pilot, lambda: screen.checked.order is not None)
        order = screen.checked.order
        assert (order.run, order.budget, order.seeds, order.name) == ("iwlora_mnli", "10s", [1, 2], "a")
        assert order.overrides == ["adapter.rank=9", "regulariser.normalise=max"]
        await until_shown(pilot, "--seeds 1,2")
        assert "▐ ▌ trial" in text_of(screen)
        screen.query_one("#trial", Checkbox).value = True
        await until_shown(pilot, "▐X▌ trial")
        await until(pilot, lambda: screen.checked.order and screen.checked.order.mode == "trial")
        await pilot.press("f1")
        assert "Start" in text_of(app.screen)
        await pilot.press("escape", "up", "escape")
        assert isinstance(app.screen, RunsScreen)
        assert os.listdir(tmp_path) == []

    drive(tmp_path, script)


def test_what_is_wrong_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(steer, "start", lambda *_: pytest.fail("started"))

    async def script(app, pilot):
        screen = await form(app, pilot)
        await pilot.press(*"lora_mnly", "ctrl+s")
        await until_shown(pilot, "did you mean lora_mnli")
        await pilot.press("enter")
        assert app.screen is screen

    drive(tmp_path, script)


def test_a_failing_start_shows_its_error(tmp_path, monkeypatch):
    """The trainer sees what the form cannot: here a folder without data."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho loading torch\necho 'fastpeft: no train.* in nowhere' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    results = tmp_path / "results"

    async def script(app, pilot):
        await form(app, pilot)
        await pilot.press(*"lora_mnli", "ctrl+s")
        await until(pilot, lambda: isinstance(app.screen, Reading))
        await until_shown(pilot, "fastpeft: no train.* in nowhere")
        assert "exit code 2" in text_of(app.screen)
        await pilot.press("escape")
        assert not app.launches
        assert os.listdir(results / ".starting") == []

    drive(results, script)


def test_a_start_that_failed_unseen_is_told(tmp_path):
    (tmp_path / ".starting").mkdir()
    (tmp_path / ".starting" / "lost.log").write_text("fastpeft: no such data")

    async def script(app, pilot):
        await until_shown(pilot, "lost ended before its training began")
        assert "no such data" in text_of(app.screen)
        await pilot.press("enter")
        assert isinstance(app.screen, RunsScreen)

    drive(tmp_path, script)


def test_a_start_is_followed_until_its_run_is_there(tmp_path, monkeypatch):
    """As `train --tui` does: the run's screen opens by itself."""
    gate, program = tmp_path / "gate", tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho loading torch\nwhile [ ! -e {gate} ]; do sleep 0.05; done\nsleep 0.2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    results = tmp_path / "results"
    launch = steer.start(steer.Order(run="lora_mnli", name="new"), results)

    async def script(app, pilot):
        await until_shown(pilot, "● starting new: loading torch")
        make_run(results, "new", [header(), step(0)], status="running")
        gate.touch()
        app.read_soon()
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        await pilot.press("O")
        await until_shown(pilot, "loading torch")
        await until(pilot, lambda: not app.launches)

    drive(results, script, launch=launch)
    assert (results / "new" / "output.log").read_text() == "loading torch\n"


def test_the_program_closes_without_touching_a_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/sleep")
    monkeypatch.setattr(steer.Order, "arguments", lambda *_: [])
    monkeypatch.setattr(steer.subprocess, "Popen", _sleeper(steer.subprocess.Popen))
    launch = steer.start(steer.Order(run="lora_mnli", name="new"), tmp_path)

    async def script(app, pilot):
        await pilot.press("q")

    drive(tmp_path, script, launch=launch)
    assert launch.exit_code is None
    launch._process.kill()
    launch._process.wait()


def _sleeper(popen):
    return lambda command, **options: popen(["/bin/sleep", "60"], **options)


def test_resume_and_stop_from_the_list(tmp_path, monkeypatch):
    """What the keys hand to steering."""
    make_run(tmp_path, "one", [header(), step(0)], status="stopped")
    calls = []

    def resumed(folder: RunFolder) -> Launch:
        calls.append(("resume", folder.path.name))
        return steer.start(steer.Order(name="one", resume=True), tmp_path)

    monkeypatch.setattr(sys, "executable", "/bin/true")
    monkeypatch.setattr(steer, "resume", resumed)
    monkeypatch.setattr(steer, "stop", lambda folder: calls.append(("stop", folder.path.name)) or 42)

    async def script(app, pilot):
        await pilot.press("R")
        await until_shown(pilot, "goes on as process")
        await pilot.press("T", "enter")
        await until_shown(pilot, "process 42")
        assert calls == [("resume", "one"), ("stop", "one")]

    drive(tmp_path, script)


# ---- bindings ------------------------------------------------------------------------------


def test_every_key_has_an_id_a_description_and_a_test():
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_app*.py"))
    ids = []
    for owner in (RunScreen, CompareScreen, CompareTable, StartScreen, EventLog, Ask, Reading):
        for binding in vars(owner)["BINDINGS"]:
            assert isinstance(binding, Binding)
            assert binding.id, binding
            assert binding.description, binding
            ids.append(binding.id)
            keys = binding.key.split(",")
            assert any(f'"{key}"' in source for key in keys), f"no test presses {keys}"
    assert len(ids) == len(set(ids))


def test_the_form_waits_for_the_last_key(tmp_path, monkeypatch):
    seen = []
    check = start_module.orders.check
    monkeypatch.setattr(start_module.orders, "check", lambda draft, path: seen.append(draft.run) or check(draft, path))

    async def script(app, pilot):
        screen = await form(app, pilot)
        screen.query_one("#run", Input).value = "lora_mnl"
        screen.query_one("#run", Input).value = "lora_mnli"
        await until(pilot, lambda: screen.checked.order is not None)
        assert "lora_mnl" not in seen

    drive(tmp_path, script)
