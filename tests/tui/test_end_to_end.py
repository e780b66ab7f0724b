"""A real trainer and the real program in a real terminal."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastpeft.runs.store import RunFolder
from fastpeft.tui.steer import last_run_event

TMUX = shutil.which("tmux")


class Terminal:
    """A tmux server of its own, 80x24."""

    def __init__(self, folder: Path) -> None:
        self._command = [TMUX, "-S", str(folder / "tmux"), "-f", "/dev/null"]

    def _tmux(self, *args: str) -> str:
        done = subprocess.run([*self._command, *args], capture_output=True, text=True, timeout=30)
        return done.stdout

    def start(self, *command: str) -> None:
        environment = os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        environment.pop("TMUX", None)
        new = ["new-session", "-d", "-x", "80", "-y", "24", "exec " + shlex.join(command)]
        subprocess.run([*self._command, *new], env=environment, check=True, timeout=30)

    @property
    def is_open(self) -> bool:
        return bool(self._tmux("list-panes", "-F", "#{pane_pid}"))

    @property
    def pid(self) -> int:
        return int(self._tmux("display-message", "-p", "#{pane_pid}"))

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    def modes(self) -> str:
        """Whether the other screen is shown, and the mouse is reported."""
        return self._tmux("display-message", "-p", "#{alternate_on} #{mouse_any_flag}").strip()

    def keys(self, *keys: str) -> None:
        for key in keys:
            self._tmux("send-keys", key)
            time.sleep(0.1)

    def shows(self, text: str) -> str:
        """Wait until it is on the screen."""
        return wait_for(lambda: seen if text in (seen := self.screen()) else "", self.screen)

    def close(self) -> None:
        self._tmux("kill-server")


def wait_for(condition, describe=lambda: "never"):
    until = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < until, describe()
        time.sleep(0.1)
    return found


@pytest.fixture
def terminal(tmp_path):
    if TMUX is None:
        pytest.skip("tmux is not installed")
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


@pytest.fixture
def results(tmp_path):
    """Whatever trains there at the end is ended."""
    folder = tmp_path / "results"
    yield folder
    event = last_run_event(folder / "live" / "events.jsonl")
    if event is not None and is_alive(event["pid"]):
        os.kill(event["pid"], signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.soak
def test_watching_killing_stopping_and_resuming(results, terminal):
    fastpeft = [sys.executable, "-m", "fastpeft"]
    settings = ["evaluation.max_examples=64", "training.threads=1"]
    where = ["--results-dir", str(results), "--name", "live", "--budget", "10m"]
    terminal.start(*fastpeft, "train", "--tui", "--run", "iwlora_mnli", *where, *settings)
    terminal.shows("starting live")
    seen = terminal.shows("of 10m00")
    assert "STAND-IN" in seen
    assert "● running" in seen
    terminal.keys("2")
    assert "query_proj" in terminal.shows("snapshot 1 of 1")
    terminal.keys("3")
    trainer = last_run_event(results / "live" / "events.jsonl")["pid"]
    terminal.shows(f"started by process {trainer}")
    terminal.keys("4")
    terminal.shows("method: iw_lora")

    program = terminal.pid
    assert program != trainer
    os.kill(program, signal.SIGKILL)
    wait_for(lambda: not is_alive(program))
    log = results / "live" / "events.jsonl"
    size = log.stat().st_size
    wait_for(lambda: log.stat().st_size > size)
    assert is_alive(trainer)
    assert "loading torch" in (results / "live" / "output.log").read_text()

    terminal.start(*fastpeft, "tui", str(results))
    terminal.shows("1 run, 1 running")
    terminal.keys("T")
    terminal.shows("Stop live?")
    terminal.keys("y")
    wait_for(lambda: not is_alive(trainer))
    terminal.shows("■ stopped")
    folder = RunFolder.at(results, "live")
    assert folder.status() == "stopped"
    steps = folder.read_result().steps
    assert any(folder.checkpoints.iterdir())

    with log.open("ab") as file:
        file.write(b"{no event\n")
    terminal.keys("Enter")
    terminal.shows("1 bad line")
    terminal.keys("Escape")
    terminal.shows("1 run, 0 running")
    terminal.keys("R")
    terminal.shows("● running")
    resumed = wait_for(lambda: (pid := last_run_event(log)["pid"]) != trainer and pid)
    wait_for(lambda: json.loads(log.read_bytes().splitlines()[-1]).get("step", 0) > steps)
    terminal.keys("q")
    wait_for(lambda: not terminal.is_open)
    assert is_alive(resumed)


def test_sigterm_and_ctrl_z_give_the_terminal_back(tmp_path, terminal):
    program = shlex.join([sys.executable, "-m", "fastpeft", "tui", str(tmp_path / "none")])
    terminal.start("bash", "--norc", "-ic", f"{program}; read -p suspended; fg; echo ended $?; sleep 60")
    terminal.shows("No runs")
    terminal.keys("C-z")
    terminal.shows("suspended")
    terminal.keys("Enter")
    terminal.shows("No runs")
    shell = terminal.pid
    children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    terminal.shows("ended 143")
    assert terminal.modes() == "0 0"
