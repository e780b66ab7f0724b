"""The trainer's side of trackers: start them, forward their messages, and never wait long for them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastpeft.config.trackers import TRACKERS
from fastpeft.trackers.choose import Choice

FINISH_S = 10.0
"""Seconds that a tracker may take after the last event to send the rest."""

_KILL_S = 2.0
_ROOT = str(Path(__file__).resolve().parents[2])
_CODE = (  # -m would put the working directory on the path, which may hold a folder `wandb`
    f"import sys; {_ROOT!r} in sys.path or sys.path.insert(0, {_ROOT!r}); "
    "from fastpeft.trackers.__main__ import main; main()"
)


class Trackers:
    """The running trackers of one run.

    Args:
        folder: the run's folder; its events.jsonl is there.
        say: receives where the run can be seen, and at the end what was not sent.
        warn: receives one warning for each tracker that stops during the run. Both are called from other threads.
    """

    def __init__(
        self, choices: list[Choice], folder: Path, say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self._all = [_Tracker(choice, folder, say, warn) for choice in choices]

    def close(self) -> None:
        """To be called after the last event. Takes little more than FINISH_S at most."""
        for tracker in self._all:
            tracker.end()
        for tracker in self._all:
            tracker.wait()


class _Tracker:
    """One process. It ends when its standard input closes, which a killed trainer causes too."""

    def __init__(self, choice: Choice, folder: Path, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
        entry = TRACKERS[choice.name]
        self._name, self._title, self._folder = entry.name, entry.title, folder
        self._say, self._warn = say, warn
        self._closing = self._told = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by wait)
        self._process: subprocess.Popen | None = None
        settings = ["--tracker", entry.name, "--target", entry.target, "--settings", json.dumps(choice.settings)]
        settings += ["--finish-s", str(FINISH_S)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, str(folder), "--follow", *settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the trainer
            )
        except OSError as error:
            self._failed(str(error))
            return
        self._listener = threading.Thread(target=self._listen, name=f"fastpeft-{choice.name}", daemon=True)
        self._listener.start()

    def end(self) -> None:
        self._closing = True
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(FINISH_S + _KILL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(_KILL_S)
        self._errors.close()

    def _listen(self) -> None:
        """Read messages until the process closes its standard output."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        for line in process.stdout:
            try:
                message: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            if "say" in message:
                self._say(message["say"])
            if "stopped" in message:
                self._failed(message["stopped"])
        code = process.wait()
        if code in (-signal.SIGALRM, -signal.SIGKILL) and self._closing:
            self._failed(f"not finished within {FINISH_S:g} s")
        elif code:
            self._failed(self._last_error() or f"its process ended with {code}")

    def _failed(self, reason: str) -> None:
        if self._told:
            return
        self._told = True
        later = f". The event log has everything: python -m fastpeft.trackers {shlex.quote(str(self._folder))}"
        later += " sends it" if self._name == TRACKERS.names[0] else f" --tracker {self._name} sends it"
        if self._closing:
            self._say(f"{self._title}: {reason}{later}")
        else:
            self._warn(f"{self._title} stopped ({reason}); training goes on{later}")

    def _last_error(self) -> str:
        try:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").split("\n")
        except ValueError:  # `wait` has given up and closed it
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _environment() -> dict[str, str]:
    """This process's environment, without variables that would join the caller's W&B run or wait for a network."""
    tied = ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_STATE")
    return {"WANDB_ERROR_REPORTING": "false"} | {k: v for k, v in os.environ.items() if k not in tied}
