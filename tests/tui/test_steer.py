"""Steering acts on the run that is meant, and on nothing else."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fastpeft.runs.store import RunError, RunFolder
from fastpeft.tui import steer
from fastpeft.tui.steer import Order, SteerError
from tests.support.tui_logs import header, lines, make_run, step

TRAINER = """
import os, signal, socket, sys, time
from pathlib import Path
from fastpeft.runs.events import EventLog
from fastpeft.runs.store import Result, RunFolder
folder = RunFolder.at(Path(sys.argv[1]), sys.argv[2])
folder.create()
folder.config.write_text("method: lora\\n")
folder.write_result(Result(run_id="r", name=sys.argv[2]))
log = EventLog(folder.events)
log.write("run", elapsed_s=0.0, step=0, pid=os.getpid(), host=socket.gethostname())
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
print("ready", flush=True)
while not stopped:
    time.sleep(0.01)
folder.write_result(Result(run_id="r", name=sys.argv[2], status="stopped"))
"""


@pytest.fixture
def trainer(tmp_path):
    """A process that holds a run as a trainer does."""
    command = [sys.executable, "-c", TRAINER, str(tmp_path), "live"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def wait_for(condition, seconds=30.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


# ---- starting ------------------------------------------------------------------------------


def test_an_order_is_the_command_that_a_user_would_type(tmp_path):
    order = Order(run="iwlora_mnli", overrides=["training.seed=1", "--x=1"], budget="30m", name="a", seeds=[0, 2])
    command = "train --run iwlora_mnli --budget 30m --seeds 0,2 --name a --results-dir R -- training.seed=1 --x=1"
    assert order.arguments(Path("R")) == shlex.split(command)
    assert order.folder_name == "a-seed0"
    resumed = Order(name="b", resume=True, mode="trial", no_stand_in=True)
    assert resumed.arguments(Path("R")) == shlex.split(
        "train --mode trial --name b --results-dir R --resume --no-stand-in"
    )


def test_what_fails_at_the_start_says_why(tmp_path):
    launch = steer.start(Order(run="lora_mnli", overrides=["adapter.rank=none"], name="a"), tmp_path)
    wait_for(lambda: launch.exit_code is not None)
    assert launch.exit_code == 2
    assert launch.failed
    assert not launch.settle()
    assert "adapter.rank" in launch.text()
    assert launch.output == tmp_path.absolute() / ".starting" / "a.log"
    launch.forget()
    assert not launch.output.exists()


def test_the_output_moves_into_the_runs_folder(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\nmkdir -p {tmp_path}/a; echo one; touch {tmp_path}/a/run.yaml; sleep 0.3; echo two\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    launch = steer.start(Order(run="lora_mnli", name="a"), tmp_path)
    wait_for(launch.settle)
    wait_for(lambda: launch.exit_code is not None)
    assert (tmp_path / "a" / steer.OUTPUT).read_text() == "one\ntwo\n"
    assert not launch.failed
    launch.forget()
    assert launch.text() == "one\ntwo"


def test_two_programs_may_move_an_output(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/true")
    launch = steer.start(Order(run="lora_mnli", name="a"), tmp_path)
    wait_for(lambda: launch.exit_code is not None)
    make_run(tmp_path, "a")
    assert steer.left_behind(tmp_path) == {}
    assert launch.settle()
    assert launch.text() == ""


def test_a_trainer_has_a_session_of_its_own(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nps -o sid= -p $$ 2>/dev/null || cut -d' ' -f6 /proc/$$/stat\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    launch = steer.start(Order(run="lora_mnli", name="a"), tmp_path)
    wait_for(lambda: launch.exit_code is not None)
    assert int(launch.text()) == launch.pid


def test_a_name_that_is_taken_starts_nothing(tmp_path):
    make_run(tmp_path, "a")
    with pytest.raises(RunError, match="has this name"):
        steer.start(Order(run="lora_mnli", name="a"), tmp_path)
    with pytest.raises(RunError, match="cannot name a run"):
        steer.start(Order(run="lora_mnli", name="../a"), tmp_path)
    assert not (tmp_path / ".starting").exists()


def test_starts_that_nobody_watched_are_found(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho hello; sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    launch = steer.start(Order(run="lora_mnli", name="slow"), tmp_path)
    make_run(tmp_path, "there-seed1")
    (tmp_path / ".starting" / "there.log").write_text("mine")
    (tmp_path / ".starting" / "gone.log").write_text("it failed")
    assert steer.left_behind(tmp_path) == {"gone": "it failed"}
    assert (tmp_path / "there-seed1" / steer.OUTPUT).read_text() == "mine"
    assert os.listdir(tmp_path / ".starting") == ["slow.log"]  # its trainer lives
    with pytest.raises(SteerError, match="is being started already"):
        steer.start(Order(run="lora_mnli", name="slow"), tmp_path)
    os.killpg(launch.pid, signal.SIGKILL)
    wait_for(lambda: launch.exit_code is not None)
    wait_for(lambda: steer.left_behind(tmp_path) == {"slow": "hello"})
    assert steer.left_behind(tmp_path / "nowhere") == {}


# ---- stopping ------------------------------------------------------------------------------


def test_a_running_trainer_is_asked_to_stop(tmp_path, trainer):
    folder = RunFolder.at(tmp_path, "live")
    assert steer.stop(folder) == trainer.pid
    assert trainer.wait(30) == 0
    assert folder.status() == "stopped"
    with pytest.raises(SteerError, match="not running"):
        steer.stop(folder)


def test_a_pid_that_is_another_process_now_is_not_touched(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        event = header(pid=other.pid, host=socket.gethostname())
        folder = make_run(tmp_path, "a", [event, step(0)], status="running")
        (folder.path / ".lock").touch()
        with pytest.raises(SteerError, match="another one now"):
            steer.stop(folder)
        assert other.poll() is None
        other.kill()
    assert other.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"host": "elsewhere", "pid": 1}, "runs on elsewhere"),
        ({"pid": 2**22 + 1}, "no process"),
        ({"pid": "1"}, "no process"),
        ({"pid": -1}, "no process"),
        ({"pid": None}, "no process"),
    ],
)
def test_what_cannot_be_stopped_is_said(tmp_path, event, said):
    folder = make_run(tmp_path, "a", [header(**{"host": socket.gethostname()} | event)], status="running")
    with pytest.raises(SteerError, match=said):
        steer.stop(folder)


@pytest.mark.parametrize("log", [None, b"", b'{"type":"run",', b'x{"type":"run","pid":1}\n', b"\n\n"])
def test_a_log_without_a_run_event_stops_nothing(tmp_path, log):
    folder = make_run(tmp_path, "a", status="running")
    if log is not None:
        folder.events.write_bytes(log)
    with pytest.raises(SteerError, match="still being set up"):
        steer.stop(folder)


def test_the_newest_run_event_counts(tmp_path):
    path = tmp_path / "events.jsonl"
    quoted = step(1, message='{"type":"run","pid":3}')
    path.write_bytes(lines([header(pid=1), step(0), header(pid=2), quoted]) + b'{"type":"run","pid":4')
    assert steer.last_run_event(path)["pid"] == 2


# ---- resuming ------------------------------------------------------------------------------


def test_only_what_can_go_on_is_resumed(tmp_path, trainer):
    with pytest.raises(SteerError, match="is done"):
        steer.resume(make_run(tmp_path, "a", status="done"))
    with pytest.raises(SteerError, match="is running"):
        steer.resume(RunFolder.at(tmp_path, "live"))


def test_a_resume_writes_its_output_to_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    folder = make_run(tmp_path, "a", [header()], status="stopped")
    launch = steer.resume(folder)
    wait_for(lambda: launch.exit_code is not None)
    assert f"train --name a --results-dir {tmp_path} --resume" in launch.text()
    assert launch.settle()
    assert launch.output == folder.path / steer.OUTPUT


def test_a_resume_of_no_run_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    with pytest.raises(SteerError, match="there is no run"):
        steer.start(Order(name="a", resume=True), tmp_path)
    assert os.listdir(tmp_path) == []
    launch = steer.start(Order(run="lora_mnli", name="a", resume=True, seeds=[0, 1]), tmp_path)
    wait_for(lambda: launch.exit_code is not None)
    assert "--resume" in launch.text()
    assert os.listdir(tmp_path) == [steer.STARTING]


# ---- deleting ------------------------------------------------------------------------------


def test_a_run_is_deleted_with_all_that_is_in_it(tmp_path):
    folder = make_run(tmp_path, "a", [header()], status="done")
    (folder.path / "adapter").mkdir()
    (folder.path / "adapter" / "x.safetensors").write_text("x")
    make_run(tmp_path, "b")
    steer.delete(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == ["b"]


def test_a_running_run_is_not_deleted(tmp_path, trainer):
    with pytest.raises(SteerError, match="is running: stop it first"):
        steer.delete(tmp_path, "live")
    assert RunFolder.at(tmp_path, "live").result.exists()
    steer.stop(RunFolder.at(tmp_path, "live"))
    trainer.wait(30)
    steer.delete(tmp_path, "live")
    assert os.listdir(tmp_path) == []


def test_a_run_of_another_host_is_not_deleted_while_it_beats(tmp_path):
    folder = make_run(tmp_path, "a", [header(host="elsewhere")], status="running")
    with pytest.raises(SteerError, match="another host"):
        steer.delete(tmp_path, "a")
    os.utime(folder.events, (0, 0))
    steer.delete(tmp_path, "a")
    assert not folder.path.exists()


def test_links_are_never_followed(tmp_path):
    results, outside = tmp_path / "results", tmp_path / "outside"
    precious = make_run(outside, "precious", status="done")
    run = make_run(results, "a", status="done")
    (run.path / "inside").symlink_to(precious.path)
    (results / "link").symlink_to(precious.path)
    with pytest.raises(SteerError, match="is a link"):
        steer.delete(results, "link")
    steer.delete(results, "a")
    assert precious.config.exists()
    assert os.listdir(results) == ["link"]

    locked = make_run(results, "b", status="done")
    (locked.path / ".lock").symlink_to(precious.config)
    before = precious.config.read_text()
    with pytest.raises(SteerError, match=r"\.lock"):
        steer.delete(results, "b")
    assert precious.config.read_text() == before


@pytest.mark.parametrize("name", ["..", ".", "", "../outside", "/etc", "a/b", ".starting", "-rf"])
def test_nothing_outside_the_results_folder_can_be_named(tmp_path, name):
    results = tmp_path / "results"
    make_run(tmp_path, "outside")
    make_run(results, "a")
    with pytest.raises(RunError, match="cannot name a run"):
        steer.delete(results, name)
    assert (tmp_path / "outside" / "run.yaml").exists()


def test_a_folder_that_is_no_run_stays(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, said in (("notes", "no run.yaml"), ("file", "no run.yaml"), ("none", "no run")):
        with pytest.raises(SteerError, match=said):
            steer.delete(tmp_path, name)
    assert (tmp_path / "notes" / "a.txt").exists()


# ---- showing -------------------------------------------------------------------------------


def test_a_folder_is_opened_only_where_there_is_a_desktop(tmp_path, monkeypatch):
    opener = tmp_path / "xdg-open"
    opener.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    opener.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    assert not steer.open_folder(tmp_path)
    monkeypatch.setenv("DISPLAY", ":0")
    assert steer.open_folder(tmp_path)
    wait_for(lambda: (tmp_path / "opened").exists() and (tmp_path / "opened").read_text() == f"{tmp_path}\n")
    monkeypatch.setenv("SSH_CONNECTION", "1")
    assert not steer.open_folder(tmp_path)


def test_steering_loads_neither_torch_nor_a_screen():
    code = textwrap.dedent("""
        import sys, fastpeft.tui.steer, fastpeft.tui.orders
        print(sorted({"torch", "textual", "numpy", "pydantic"} & set(sys.modules)))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
