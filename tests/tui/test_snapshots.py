"""How screens look, with a clock that stands still. FASTPEFT_UPDATE_SNAPSHOTS=1 writes them anew."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

import pytest

from fastpeft.tui.screens.compare_screen import CompareScreen
from fastpeft.tui.screens.dialogs import Reading
from fastpeft.tui.screens.run_screen import RunScreen
from tests.support.pilots import drive, text_of, until
from tests.support.tui_logs import evaluation, header, heartbeat, importance, make_run, planned, step

STORED = Path(__file__).parent / "snapshots"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two runs with a given history. Their paths and times are the same on every machine."""
    monkeypatch.chdir(tmp_path)
    for i, (name, method) in enumerate((("lora-a", "lora"), ("iwlora-b", "iw_lora"))):
        events = [header()]
        for k in range(200):
            if k % 50 == 0:
                events.append(importance(k, [0.1 + k / 1000, 0.2, 0.3, 0.4 - k / 2000]))
                events.append(heartbeat(k / 10, k, util=50.0 + k / 8, power_w=300.0, temp_c=60.0))
            events.append(step(k, loss=1.1 - 0.002 * k + 0.05 * (k * 7919 % 13 - 6) / 6 + 0.1 * i))
            if k % 40 == 39:
                events.append(evaluation(k, value=0.4 + k / 1000 - 0.03 * i))
        folder = make_run(
            Path("results"),
            name,
            events,
            status="done",
            method=method,
            model="embedded/deberta-tiny",
            dataset="embedded-nli",
            stand_in=True,
            metric={"name": "accuracy", "value": 0.599 - 0.03 * i},
            best={"value": 0.6 - 0.03 * i, "step": 160},
            budget={"kind": "seconds", "limit": 20.0, "spent": 19.8},
            elapsed_s=19.8,
            tokens=100_000,
            steps=200,
            energy_j=4000.0,
        )
        os.utime(folder.config, (1_790_000_000 + i, 1_790_000_000 + i))
    return Path("results")


@pytest.fixture
def planned_results(tmp_path, monkeypatch):
    """A run with a schedule that forecasts and moves blocks apart, in the middle of it, and one that ended."""
    monkeypatch.chdir(tmp_path)
    for i, (name, num, test) in enumerate((("ended", 200, {"name": "exact_match", "value": 0.584}), ("half", 120, {}))):
        folder = make_run(
            Path("results"),
            name,
            planned(num),
            status="done",
            method="lora",
            model="embedded/qwen3-tiny",
            dataset="embedded-problems",
            stand_in=True,
            metric={"name": "exact_match", "value": 0.003 * num},
            best={"value": 0.003 * num, "step": num},
            test=test,
            budget={"kind": "seconds", "limit": 20.0, "spent": num / 10},
            elapsed_s=num / 10,
            tokens=500 * num,
            steps=num,
            energy_j=20.0 * num,
        )
        os.utime(folder.config, (1_790_000_000 + i, 1_790_000_000 + i))
    return Path("results")


async def _nothing(app, pilot): ...


async def _run(app, pilot):
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(app.screen, RunScreen) and app.screen._tail.is_caught_up)
    await until(pilot, lambda: app.screen.query_one("#plot_loss").curves)


async def _importance(app, pilot):
    await _run(app, pilot)
    await pilot.press("2", "j", "l")


async def _compare(app, pilot):
    await pilot.press("c")
    await until(pilot, lambda: isinstance(app.screen, CompareScreen) and app.screen._comparison.rows)
    await until(pilot, lambda: len(app.screen.query_one("#overlay").curves) == 2)


async def _forecast(app, pilot):
    await _run(app, pilot)
    await until(pilot, lambda: app.screen.query_one("#plot_loss").bands)


async def _multipliers(app, pilot):
    await _run(app, pilot)
    await pilot.press("2", "j")


async def _parts(app, pilot):
    await _run(app, pilot)
    await pilot.press("p")
    await until(pilot, lambda: isinstance(app.screen, Reading))


async def _panel(app, pilot):
    await pilot.press("j")
    await _run(app, pilot)
    await pilot.press("3")
    await until(pilot, lambda: " 200 end " in text_of(app.screen))


SNAPSHOTS = {
    "runs_80x24": (_nothing, (80, 24)),
    "run_80x24": (_run, (80, 24)),
    "importance_80x24": (_importance, (80, 24)),
    "compare_120x40": (_compare, (120, 40)),
    "run_120x40": (_run, (120, 40)),
}
PLANNED = {
    "runs_test_80x24": (_nothing, (80, 24)),
    "forecast_80x24": (_forecast, (80, 24)),
    "multipliers_80x24": (_multipliers, (80, 24)),
    "schedule_80x24": (_panel, (80, 24)),
}


def test_parts_look_as_they_did(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = {
        name: {"precision": 0.9 - i / 10, "recall": 0.8 - i / 9, "f1": 0.85 - i / 8, "support": 10 ** (i + 1)}
        for i, name in enumerate(("LOC", "MISC", "ORG", "PER"))
    }
    events = [header(), *(step(k) for k in range(20)), evaluation(19, 0.7, metric="f1", groups=parts)]
    events.append(evaluation(19, 0.6, metric="f1", split="test", groups=parts))
    facts = {"model": "embedded/deberta-tiny", "dataset": "embedded-entities", "stand_in": True}
    make_run(Path("results"), "entities", events, status="done", metric={"name": "f1", "value": 0.7}, **facts)
    compare(Path("results"), "parts_80x24", _parts, (80, 24))


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_the_screen_looks_as_it_did(results, name):
    compare(results, name, *SNAPSHOTS[name])


@pytest.mark.parametrize("name", PLANNED)
def test_a_schedules_screens_look_as_they_did(planned_results, name):
    compare(planned_results, name, *PLANNED[name])


def compare(results, name, script, size):
    taken = []

    async def shoot(app, pilot):
        await script(app, pilot)
        for _ in range(40):  # until nothing is drawn any more
            await pilot.pause(0.3)
            taken.append(normal(app.export_screenshot()))
            if taken[-2:-1] == taken[-1:]:
                break

    drive(results, shoot, size)
    path = STORED / f"{name}.svg"
    if os.environ.get("FASTPEFT_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(taken[-1])
    assert lines_of(taken[-1]) == lines_of(path.read_text()), "FASTPEFT_UPDATE_SNAPSHOTS=1 takes it anew"
    assert taken[-1] == path.read_text(), "the colours differ"


def normal(svg: str) -> str:
    """Without the number that every drawing gets."""
    return re.sub(r"terminal-\d+", "terminal", svg)


def lines_of(svg: str) -> list[str]:
    """What is typed, which says more than an SVG when it differs."""
    found: dict[float, dict[int, str]] = {}
    for x, y, text in re.findall(r'<text [^>]*x="([\d. ]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg):
        columns = [round(float(place) / 12.2) for place in x.split()]
        found.setdefault(float(y), {}).update(zip(columns, html.unescape(text)))
    return ["".join(found[y].get(i, " ") for i in range(max(found[y]) + 1)) for y in sorted(found)]
