"""The heartbeat, with drivers that work, fail and lie; and what a run says of its machine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import types

import pytest

import fastpeft
from fastpeft.runs import system
from fastpeft.runs.events import EventLog, read_events
from fastpeft.runs.system import Heartbeat, environment, git_commit

FIELDS = {"util", "memory_mb", "power_w", "temp_c"}


class NVMLError(Exception):
    pass


def fake_nvml(**broken: Exception) -> types.ModuleType:
    """A pynvml in which the functions named in `broken` raise."""
    answers = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByUUID": "gpu",
        "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=87),
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=3 * 2**30),
        "nvmlDeviceGetPowerUsage": 412_500,
        "nvmlDeviceGetTemperature": 61,
    }
    module = types.ModuleType("pynvml")
    module.NVMLError, module.NVML_TEMPERATURE_GPU = NVMLError, 0

    def function(name, answer):
        def call(*arguments):
            if name in broken:
                raise broken[name]
            return answer

        return call

    for name, answer in answers.items():
        setattr(module, name, function(name, answer))
    return module


@pytest.fixture
def beats(monkeypatch):
    """Run a heartbeat until it has beaten `count` times; returns the figures."""
    monkeypatch.setattr(system, "HEARTBEAT_S", 0.01)
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)

    def run(gpu_uuid: str | None, count: int = 3) -> list[dict]:
        seen, enough = [], threading.Event()

        def emit(**figures) -> None:
            seen.append(figures)
            if len(seen) >= count:
                enough.set()

        with Heartbeat(emit, gpu_uuid):
            assert enough.wait(20), f"{len(seen)} beats, failures {failures}"
        assert not failures
        return seen

    return run


def test_a_heart_beats_often_enough_for_a_display_and_rarely_enough_for_a_log():
    assert system.HEARTBEAT_S == 2.0


def test_on_a_cpu_it_tells_load_and_memory(beats):
    for figures in beats(None):
        assert set(figures) == FIELDS
        assert figures["util"] >= 0
        assert 1 < figures["memory_mb"] < 2**20
        assert figures["power_w"] is None


def test_on_a_gpu_it_tells_the_drivers_figures_in_our_units(beats, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert beats(0)[0] == {"util": 87, "memory_mb": 3072.0, "power_w": 412.5, "temp_c": 61}


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
@pytest.mark.parametrize(
    "error", [NVMLError("lost"), OSError("no library"), RuntimeError("?")], ids=lambda e: type(e).__name__
)
def test_a_driver_that_cannot_be_opened_gives_no_figures(function, error, beats, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**{function: error}))
    assert beats(0)[0] == dict.fromkeys(FIELDS)


def test_without_the_drivers_package_there_are_no_figures(beats, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert beats(0)[0] == dict.fromkeys(FIELDS)


def test_an_empty_module_of_the_drivers_name_gives_no_figures(beats, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", types.ModuleType("pynvml"))
    assert beats(0)[0] == dict.fromkeys(FIELDS)


@pytest.mark.parametrize(
    "error", [NVMLError("not supported"), ValueError("?"), UnicodeDecodeError("utf-8", b"", 0, 1, "")]
)
def test_a_figure_that_cannot_be_had_is_none_and_the_others_go_on(error, beats, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetPowerUsage=error))
    assert beats(0)[-1] == {"util": 87, "memory_mb": 3072.0, "power_w": None, "temp_c": 61}


def test_a_driver_without_the_newer_functions_gives_the_other_figures(beats, monkeypatch):
    module = fake_nvml()
    del module.nvmlDeviceGetTemperature, module.NVMLError
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert beats(0)[-1] == {"util": 87, "memory_mb": 3072.0, "power_w": 412.5, "temp_c": None}


def test_the_heart_stops_with_the_run(beats):
    beats(None)
    assert not [thread for thread in threading.enumerate() if thread.name == "fastpeft-heartbeat"]


def test_a_driver_that_hangs_when_it_is_opened_holds_nothing_up(monkeypatch):
    module, wakes = fake_nvml(), threading.Event()
    module.nvmlInit = wakes.wait
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(system, "HEARTBEAT_S", 0.01)
    began = time.monotonic()
    with Heartbeat(lambda **figures: None, "GPU-1234"):
        pass
    assert time.monotonic() - began < 5
    wakes.set()


def test_a_run_that_fails_stops_its_heart_and_keeps_its_error(monkeypatch):
    with pytest.raises(ZeroDivisionError), Heartbeat(lambda **figures: None, None):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name == "fastpeft-heartbeat"]


def test_heartbeats_are_events(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "HEARTBEAT_S", 0.01)
    log, heard = EventLog(tmp_path / "events.jsonl"), threading.Event()

    def emit(**figures) -> None:
        log.write("system", elapsed_s=0.0, step=0, **figures)
        heard.set()

    with Heartbeat(emit, None):
        assert heard.wait(20)
    event = next(read_events(tmp_path / "events.jsonl"))
    assert event["type"] == "system"
    assert set(event) >= FIELDS


def test_the_environment_is_json_and_names_versions():
    facts = json.loads(json.dumps(environment()))
    assert facts["fastpeft"] == fastpeft.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["packages"]["torch"]
    assert facts["cpu_count"] >= 1


def test_a_package_that_is_not_installed_is_none(monkeypatch):
    monkeypatch.setattr(system, "_PACKAGES", ("no-such-package",))
    assert environment()["packages"] == {"no-such-package": None}


def test_the_commit_is_one_word_or_none_where_git_fails(monkeypatch):
    commit = git_commit()
    assert commit is None or (commit and not set(commit) & set(" \n"))

    def fail(*arguments, **options):
        raise subprocess.TimeoutExpired("git", 5)

    monkeypatch.setattr(system.subprocess, "run", fail)
    assert git_commit() is None
