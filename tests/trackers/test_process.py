"""A tracker's process, with a W&B that works, and with fakes that raise, hang and die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpeft.runs.events import LogTail
from fastpeft.trackers import Choice, Trackers, process
from tests.support.tracked_logs import write_log
from tests.support.wandb_server import KEY, WandbServer, files_with


class Heard:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def track(self, folder: Path, mode: str = "offline") -> Trackers:
        return Trackers([Choice("wandb", {"mode": mode, "project": "p"})], folder, self.said.append, self.warned.append)

    def until(self, heard: Callable[[], object], timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not heard():
            assert time.monotonic() < deadline, vars(self)
            time.sleep(0.01)


# ---- faults ----------------------------------------------------------------------------------

FAKE = """
import json, os, time
from types import SimpleNamespace as S

class Settings:
    model_fields = {{}}

def note(*what):
    with open({calls!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")

def init(dir, **_):
    {init}
    return S(starting_step=0, settings=S(sync_dir=dir), define_metric=lambda *a, **k: None,
             config=S(update=lambda values, **k: note("config", values)),
             summary=S(update=lambda values: note("summary", values)), log=log, finish=finish)

def log(values, step, commit):
    {log}
    note("log", step, values)

def finish(exit_code):
    {finish}
    note("finish", exit_code)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a package `wandb` before the real one for child processes; returns what it was called with."""
    monkeypatch.setattr(process, "FINISH_S", 0.5)
    monkeypatch.setattr(process, "_KILL_S", 1.0)
    calls = tmp_path / "calls.jsonl"

    def make(**faults: str) -> Callable[[], list]:
        code = FAKE.format(calls=str(calls), **{"init": "pass", "log": "pass", "finish": "pass"} | faults)
        package = tmp_path / "fake" / "wandb"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return make


def test_the_whole_log_is_handed_on(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "FINISH_S", 30)
    calls, heard = fake(), Heard()
    log = write_log(tmp_path / "r", range(3))
    trackers = heard.track(tmp_path / "r")
    heard.until(lambda: len(calls()) == 5)
    write_log(tmp_path / "r", range(3, 8), "done").close()
    trackers.close()
    log.close()
    kinds = [call[0] for call in calls()]
    assert kinds == ["config", *["log"] * 4, "config", *["log"] * 7, "summary", "finish"]
    assert [row["step"] for _, _, row in (c for c in calls() if c[0] == "log")] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert calls()[0][1]["training"] == {"seed": 1}
    assert "overrides" not in calls()[0][1]
    assert calls()[-2][1] == {
        "status": "done", "steps": 8, "elapsed_s": 9.0, "final/accuracy": 0.5, "best/accuracy": 0.75, "best/step": 4,
    }  # fmt: skip
    assert calls()[-1] == ["finish", 0]
    assert heard.warned == []
    assert len(heard.said) == 1
    assert heard.said[0].startswith("W&B: offline; to send the run: wandb sync ")


@pytest.mark.parametrize(("status", "code"), [("stopped", 255), ("failed", 1), ("diverged", 1)])
def test_how_the_run_ended_is_told(status, code, fake, tmp_path):
    calls, heard = fake(), Heard()
    write_log(tmp_path / "r", range(1), status).close()
    heard.track(tmp_path / "r").close()
    assert calls()[-1] == ["finish", code]


def test_an_event_after_the_end_does_not_undo_it(fake, tmp_path):
    calls, heard = fake(), Heard()
    log = write_log(tmp_path / "r", range(1), "done")
    log.write("system", elapsed_s=9.0, step=1, util=1.0)  # a heartbeat that hung while the run ended
    log.close()
    heard.track(tmp_path / "r").close()
    assert [call[0] for call in calls()][-2:] == ["summary", "finish"]
    assert calls()[-1] == ["finish", 0]


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"init": "raise RuntimeError('no such entity')"}, "RuntimeError: no such entity"),
        ({"log": "raise OSError(28, 'No space left on device')"}, "No space left on device"),
        ({"log": "os._exit(9)"}, "its process ended with 9"),
        ({"init": "import ctypes; ctypes.string_at(0)"}, "its process ended with -11"),
        ({"init": "import no_such_package_at_all"}, "No module named 'no_such_package_at_all'"),
    ],
)
def test_a_tracker_that_dies_is_told_once_while_the_run_goes_on(faults, reason, fake, tmp_path):
    fake(**faults)
    heard = Heard()
    log = write_log(tmp_path / "r", range(4))
    trackers = heard.track(tmp_path / "r")
    heard.until(lambda: heard.warned)
    write_log(tmp_path / "r", range(4, 8), "done").close()
    trackers.close()
    log.close()
    assert len(heard.warned) == 1
    assert reason in heard.warned[0]
    assert heard.warned[0].startswith("W&B stopped (")
    assert "training goes on" in heard.warned[0]
    assert f"python -m fastpeft.trackers {tmp_path / 'r'} sends it" in heard.warned[0]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_is_given_up_in_time(where, fake, tmp_path):
    # Held by C code with the interpreter's lock: no thread of that process could run.
    fake(**{where: "import ctypes; ctypes.PyDLL(None).sleep(99)"})
    heard = Heard()
    log = write_log(tmp_path / "r", range(4), "done")
    trackers = heard.track(tmp_path / "r")
    if where != "init":
        heard.until(lambda: heard.said)
    began = time.monotonic()
    trackers.close()
    log.close()
    assert time.monotonic() - began < 5
    assert heard.warned == []
    assert heard.said[-1].startswith("W&B: not finished within 0.5 s. The event log has everything: python -m")


def test_a_process_that_cannot_be_started_is_told(tmp_path, monkeypatch):
    heard = Heard()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    heard.track(tmp_path).close()
    assert len(heard.warned) == 1
    assert "No such file" in heard.warned[0]


def test_a_log_that_is_still_being_written_is_read_line_by_line(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"type": "a"}\nnot json\n{"type": "b"')
    tail = LogTail(path)
    assert [event["type"] for event in tail.read()] == ["a"]
    with path.open("ab") as file:
        file.write(b'}\n{"type": "c"}\n')
    assert [event["type"] for event in tail.read()] == ["b", "c"]
    assert list(tail.read()) == []


# ---- the real W&B ----------------------------------------------------------------------------


TRAINER = """
import sys, time
from pathlib import Path
from fastpeft.trackers import Choice, Trackers
folder = Path(sys.argv[1])
choice = Choice("wandb", {"mode": "online", "project": "p"})
trackers = Trackers([choice], folder, lambda text: print(text, flush=True), print)
time.sleep(99)
"""


@pytest.mark.soak
def test_an_online_run_whose_trainer_is_killed_goes_on_where_wandb_is(
    online_wandb: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its tracker sends what the log has; the resume redoes two steps that W&B has already."""
    monkeypatch.setattr(process, "FINISH_S", 60.0)
    folder = tmp_path / "r"
    write_log(folder, range(6)).close()
    child = subprocess.Popen([sys.executable, "-c", TRAINER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.readline()
    assert said.startswith(f"W&B: {online_wandb.url}/someone/p/runs/"), said
    child.send_signal(signal.SIGKILL)
    child.wait()
    heard = Heard()
    heard.until(lambda: online_wandb.exit_code is not None)
    assert [row["step"] for row in online_wandb.rows("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert online_wandb.exit_code == 1

    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"type":"step"' in line and '"step":4' in line)
    (folder / "events.jsonl").write_text("".join(lines[:cut]))
    trackers = heard.track(folder, "online")
    write_log(folder, range(4, 8), "done").close()
    trackers.close()
    assert heard.warned == []
    assert [row["step"] for row in online_wandb.rows("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in online_wandb.rows("eval/accuracy")] == [4, 8]
    assert [row["step"] for row in online_wandb.rows("importance/q")] == [0]
    assert len(online_wandb.lines) == 11
    assert (online_wandb.exit_code, online_wandb.summary["final/accuracy"]) == (0, 0.5)
    assert files_with(KEY, tmp_path) == []


def test_a_run_is_sent_by_hand(online_wandb: WandbServer, tmp_path: Path):
    folder = tmp_path / "r"
    write_log(folder, range(8), "done").close()
    (folder / "run.yaml").write_text("extends: lora_mnli\nwandb: {project: theirs, mode: disabled}\n")
    for _ in range(2):  # the second time there is nothing left to send
        done = subprocess.run(
            [sys.executable, "-m", "fastpeft.trackers", str(folder)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert f"{online_wandb.url}/someone/theirs/runs/" in done.stdout
        assert [row["step"] for row in online_wandb.rows("train/loss")] == list(range(1, 9))
        assert len(online_wandb.lines) == 11


def test_by_hand_a_folder_without_a_log_is_refused(tmp_path: Path):
    done = subprocess.run([sys.executable, "-m", "fastpeft.trackers", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "has no events.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_by_hand_what_wandb_raises_is_a_message(fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    fake(init="raise RuntimeError('no such entity')")
    write_log(tmp_path / "r", range(2), "done").close()
    (tmp_path / "r" / "run.yaml").write_text("extends: lora_mnli\n")
    command = [sys.executable, "-m", "fastpeft.trackers", str(tmp_path / "r"), "--mode", "offline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "RuntimeError: no such entity" in done.stderr
    assert "Traceback" not in done.stderr
