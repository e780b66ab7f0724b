"""Whole runs on a CPU with an energy counter that the test turns: budgets in joules, resumes, meters that die."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fastpeft.budget import energy
from fastpeft.cli.console import ConsoleReporter
from fastpeft.cli.result_tables import closing_table
from fastpeft.errors import UserError
from fastpeft.runs.store import Result
from fastpeft.trainer import StopRequest, train
from fastpeft.trainer.checkpoint_files import newest_checkpoint
from tests.support.fake_power import FakeNvml, NVMLError, SteadyCpu, write_zone
from tests.support.tiny_runs import Listener, strict_events, tiny_run, write_run

POWER_W = 40.0
WINDOW_S = 0.2


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteadyCpu]:
    """A CPU that draws 40 W, and a meter with windows of 0.2 s."""
    for name, value in (("POWERCAP", tmp_path / "powercap"), ("WINDOW_S", WINDOW_S), ("LOST_AFTER_S", 0.5)):
        monkeypatch.setattr(energy, name, value)
    monkeypatch.setattr("fastpeft.trainer.build.WINDOW_S", WINDOW_S)
    with SteadyCpu(tmp_path / "powercap", POWER_W) as cpu:
        yield cpu


def longest_piece_j(events: list[dict]) -> float:
    """Of a step or an evaluation: neither is cut, and on a busy machine either takes longer than the last one did."""
    pairs = itertools.pairwise(e["elapsed_s"] for e in events if e["type"] in ("step", "eval"))
    return POWER_W * max(b - a for a, b in pairs)


def test_joules_are_kept_and_used(tmp_path: Path, cpu: SteadyCpu) -> None:
    write_run(tmp_path)
    run = tiny_run(
        tmp_path,
        budget="0.12kJ",
        regulariser={"warmup_steps": 150},
        training={"checkpoint_steps": 200},
        evaluation={"every": "25%"},
    )
    listener = Listener()
    result = train(run, results_dir=tmp_path, name="r", reporter=listener)
    events = strict_events(tmp_path / "r")
    assert (result.status, result.energy_method) == ("done", "rapl")
    assert result.energy_j == pytest.approx(POWER_W * result.elapsed_s, rel=0.05, abs=2)
    assert result.budget == {"kind": "joules", "limit": 120.0, "spent": result.energy_j}
    slack_j = max(0.01 * 120, longest_piece_j(events)) + POWER_W * WINDOW_S / 2
    assert 0.85 * 120 <= result.energy_j <= 120 + slack_j
    steps = [e for e in events if e["type"] == "step"]
    joules = [e["energy_j"] for e in steps]
    assert joules == sorted(joules)
    assert joules[0] < joules[-1]
    behind_j = POWER_W * (WINDOW_S + 0.3) + longest_piece_j(events)  # a meter waits for its turn like everybody
    for event in steps:
        assert event["energy_j"] == pytest.approx(POWER_W * event["elapsed_s"], abs=behind_j)
    share = longest_piece_j(events) / 120
    assert steps[-1]["progress"] > 0.9 - share
    assert steps[-1]["lr"] < (0.15 + share) * max(e["lr"] for e in steps)
    evaluations = [e for e in events if e["type"] == "eval"]
    assert 2 <= len(evaluations) <= 5  # on a busy machine one takes longer than it is to the next
    assert 0 < evaluations[0]["energy_j"] < evaluations[-1]["energy_j"] <= result.energy_j
    assert events[-1]["energy_j"] == result.energy_j
    assert any("calibration ended after" in message for message in listener.warnings())


def test_joules_go_on_across_a_stop_and_a_resume(tmp_path: Path, cpu: SteadyCpu) -> None:
    run = tiny_run(tmp_path, budget="100J", evaluation={"every": "25%"}, training={"checkpoint_steps": 100})
    stop = StopRequest()

    def on(event: dict) -> None:
        if event["type"] == "step" and event["energy_j"] > 40:
            stop.signal = signal.SIGTERM

    stopped = train(run, results_dir=tmp_path, name="r", reporter=Listener(on), stop=stop)
    assert stopped.status == "stopped"
    assert 40 < stopped.energy_j < 95
    checkpoint, _ = newest_checkpoint(tmp_path / "r" / "checkpoints")
    assert checkpoint is not None
    saved_j = checkpoint.parts["clock"]["energy"]["joules"]
    assert saved_j == pytest.approx(POWER_W * checkpoint.parts["clock"]["elapsed_s"], rel=0.1, abs=4)
    # What is spent between the two parts is not counted
    time.sleep(0.5)
    listener = Listener()
    result = train(None, results_dir=tmp_path, name="r", resume=True, reporter=listener)
    assert (result.status, result.energy_method) == ("done", "rapl")
    steps = [e for e in listener.events if e["type"] == "step"]
    assert saved_j <= steps[0]["energy_j"] < saved_j + POWER_W * (WINDOW_S + 0.3)
    assert result.energy_j == pytest.approx(POWER_W * result.elapsed_s, rel=0.07, abs=3)
    slack_j = max(1.0, longest_piece_j(steps)) + POWER_W * WINDOW_S
    assert 0.8 * 100 <= result.budget["spent"] <= 100 + slack_j
    assert json.loads((tmp_path / "r" / "result.json").read_text())["energy_j"] == result.energy_j


def test_a_meter_that_dies_costs_a_run_nothing_but_the_number(tmp_path: Path, cpu: SteadyCpu) -> None:
    dead = []

    def on(event: dict) -> None:
        if event["type"] == "step" and event["elapsed_s"] > 0.4 and not dead:
            cpu.die()
            dead.append(event["elapsed_s"])

    listener = Listener(on)
    run = tiny_run(tmp_path, budget="3s", evaluation={"every": "end"}, training={"checkpoint_steps": 10**6})
    result = train(run, results_dir=tmp_path, name="r", reporter=listener)
    assert result.status == "done"
    assert result.energy_j is None
    lost_at_s = float(result.energy_method.removeprefix("rapl, lost at ").removesuffix(" s"))
    assert dead[0] + 0.3 - 0.5 <= lost_at_s <= 4
    told = [w for w in listener.warnings() if "energy meter" in w]
    assert len(told) == 1
    assert result.energy_method in told[0]
    assert "FileNotFoundError" in told[0]
    assert "the joules of this run are not known" in told[0]
    steps = [e["energy_j"] for e in strict_events(tmp_path / "r") if e["type"] == "step"]
    assert steps[0] is not None
    assert steps[-1] is None


@pytest.mark.parametrize(("how", "budget"), [("raises", "250J"), ("hangs", "250J"), ("hangs", "2.5s")])
def test_an_nvml_that_dies_neither_ends_nor_stalls_a_run(
    how: str, budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that believes that it is on a GPU of 100 W, whose driver is gone after a second."""
    for name, value in (("WINDOW_S", WINDOW_S), ("LOST_AFTER_S", 1.0), ("LAST_READING_S", 0.2)):
        monkeypatch.setattr(energy, name, value)
    for module in ("fastpeft.trainer.run", "fastpeft.trainer.build"):
        monkeypatch.setattr(f"{module}.gpu_uuid", lambda _: "GPU-1234")
    monkeypatch.setattr("fastpeft.trainer.build.WINDOW_S", WINDOW_S)
    nvml, gone, wakes, began = FakeNvml(), threading.Event(), threading.Event(), time.monotonic()

    def counter() -> int:
        if gone.is_set():
            if how == "hangs":
                wakes.wait(60)
            raise NVMLError("GPU is lost")
        return 10**9 + int(100_000 * (time.monotonic() - began))

    nvml.counter_mj = counter
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    listener = Listener(lambda e: e["elapsed_s"] > 1 and gone.set())
    run = tiny_run(tmp_path, budget=budget, evaluation={"every": "end"}, training={"checkpoint_steps": 10**6})
    result = train(run, results_dir=tmp_path, name="r", reporter=listener)
    wakes.set()
    assert result.status == "done"
    assert (result.energy_j, result.energy_method.split(" at ")[0]) == (None, "nvml_counter, lost")
    told = [w for w in listener.warnings() if "the energy meter is lost (nvml_counter, lost at" in w]
    assert len(told) == 1
    if budget == "250J":
        assert result.budget["spent"] == pytest.approx(250, rel=0.2)
        watts = float(told[0].split("its budget goes on at ")[1].split(" W")[0])
        assert watts == pytest.approx(100, rel=0.2)
    assert result.elapsed_s == pytest.approx(2.5, rel=0.25)
    times = [e["elapsed_s"] for e in listener.events if e["type"] == "step"]
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.95  # nobody waits for the second until it is lost


def test_refusals_of_a_joules_budget(tmp_path: Path, cpu: SteadyCpu) -> None:
    write_run(tmp_path, num_dev=300)
    run = tiny_run(tmp_path, budget="1J", evaluation={"batch_tokens": 64})
    with pytest.raises(UserError, match=r"the final evaluation and save alone would cost about \d+ J") as caught:
        train(run, results_dir=tmp_path / "out", name="r")
    assert caught.value.exit_code == 2
    cpu.die()
    write_zone(tmp_path / "powercap", "0", "package-0", 77)
    with pytest.raises(UserError, match=r"needs an energy meter.*(stands|stood) still"):
        train(tiny_run(tmp_path, budget="500J"), results_dir=tmp_path / "out", name="r")
    assert not (tmp_path / "out").exists()


def test_without_a_meter_there_is_no_number_and_environment_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "open_source", lambda *_: (None, "nobody has one here"))
    result = train(tiny_run(tmp_path, budget="3steps"), results_dir=tmp_path, name="r")
    assert (result.energy_j, result.energy_method) == (None, "none")
    facts = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert (facts["energy_method"], facts["energy_reason"]) == ("none", "nobody has one here")
    assert {e["energy_j"] for e in strict_events(tmp_path / "r") if e["type"] in ("step", "eval")} == {None}


@pytest.mark.parametrize(
    ("joules", "method", "shown"),
    [
        (1234.5, "rapl", "1,234 J (rapl)"),
        (None, "nvml_counter, lost at 9 s", "not known (nvml_counter, lost at 9 s)"),
        (None, "none", None),
    ],
)
def test_the_console_shows_joules_where_there_is_a_meter(joules: float | None, method: str, shown: str | None) -> None:
    console = Console(width=200, record=True, quiet=False, force_terminal=False)
    reporter = ConsoleReporter(console)
    event = {"type": "step", "step": 0, "elapsed_s": 1.0, "tokens": 9, "loss": 1.0, "lr": 1e-3, "progress": 0.1}
    reporter.on_event(event | {"energy_j": joules})
    live = console.export_text()
    assert ("1,234 J" in live) == (joules is not None)
    console.print(closing_table(Result(run_id="x", name="x", energy_j=joules, energy_method=method)))
    table = console.export_text()
    assert shown in table if shown else "energy" not in table
