"""A tracker's process: sends the rows of a run's event log to W&B, TensorBoard or another tracker.

The trainer starts it with --follow: it reads the log as it grows, until its standard input closes. Without --follow,
`python -m fastpeft.trackers results/NAME` sends the log of a finished run, or the part that W&B lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastpeft.config.registry import import_target
from fastpeft.config.trackers import TRACKERS
from fastpeft.errors import UnavailableError, UserError
from fastpeft.runs.events import LogTail
from fastpeft.trackers.scalars import Rows
from fastpeft.trackers.tracker import Tracker

POLL_S = 1.0
_NICE = 10
_REASON_CHARS = 300


def follow(log: LogTail, tracker: Tracker, over: Callable[[float], bool]) -> None:
    """Send the log until it is complete.

    Args:
        over: waits at most the given seconds; True once no more events will come.
    """
    rows, end, wait_s = Rows(), None, 0.0
    while True:
        last = over(wait_s)
        for event in log.read():
            if event["type"] == "end":
                end = event
            if event["type"] == "run":
                end = None
                tracker.describe(event)
            row = rows.of(event)
            if row is not None:
                tracker.add(row)
        if not wait_s:
            tracker.caught_up()
        if last:
            return tracker.finish(end)
        wait_s = POLL_S


def trainer_is_over(wait_s: float, finish_s: float) -> bool:
    """Whether the trainer has ended. It writes nothing to standard input, which becomes readable when it closes."""
    if not select.select([0], [], [], wait_s)[0]:
        return False
    signal.setitimer(signal.ITIMER_REAL, finish_s)  # ends this process even if it hangs
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.trackers", description="Send a run's event log.")
    parser.add_argument("folder", type=Path, help="the run's folder, such as results/NAME")
    parser.add_argument("--tracker", default=TRACKERS.names[0], help=" or ".join(TRACKERS.names))
    parser.add_argument("--mode", choices=("auto", "online", "offline"), default="auto", help="as the run's wandb.mode")
    parser.add_argument("--project", help="as the run's wandb.project")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--finish-s", type=float, default=10.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        _followed(options) if options.follow else _by_hand(options)
    except UserError as error:
        print(f"fastpeft.trackers: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _followed(options: argparse.Namespace) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the trainer decides when to end
    os.nice(_NICE)
    report = _reporter()
    try:
        with _alone(options, wait=True):
            tracker: Tracker = import_target(options.target)(options.folder, **options.settings)
            report(say=tracker.start())
            over = partial(trainer_is_over, finish_s=options.finish_s)
            follow(LogTail(options.folder / "events.jsonl"), tracker, over)
    except BaseException as error:
        report(stopped=_reason(error))
        os._exit(1)  # skips W&B's exit hooks, which may hang too


def _by_hand(options: argparse.Namespace) -> None:
    if options.tracker not in TRACKERS:
        raise UserError(f"--tracker {options.tracker}: there is no such tracker; there are {', '.join(TRACKERS.names)}")
    if not (options.folder / "events.jsonl").is_file():
        raise UserError(f"{options.folder} is no run's folder: it has no events.jsonl")
    kind, title = TRACKERS.load(options.tracker), TRACKERS[options.tracker].title
    settings = kind.settings(_section(options), print)
    if settings is None:
        raise UserError(f"{title} is switched off" + (f": see {kind.switches}" if kind.switches else ""))
    with _alone(options, wait=False):
        tracker: Tracker = kind(options.folder, **settings)
        try:
            print(tracker.start())
            follow(LogTail(options.folder / "events.jsonl"), tracker, lambda _: True)
        except Exception as error:  # each tracker has its own classes
            raise UnavailableError(f"{options.tracker}: {_reason(error)}") from error


def _section(options: argparse.Namespace) -> Any:
    """The run's section for the tracker, enabled, with the command line's settings."""
    from fastpeft.config import load_run

    entry = TRACKERS[options.tracker]
    if entry.config is None:
        return True
    stored = entry.section_of(load_run(options.folder / "run.yaml"))
    asked = {key: value for key in ("mode", "project") if (value := getattr(options, key)) is not None}
    known = {field.name for field in dataclasses.fields(stored)}
    return dataclasses.replace(stored, **{key: value for key, value in asked.items() if key in known})


def _reason(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _REASON_CHARS else f"{text[:_REASON_CHARS]}..."


class _alone:  # noqa: N801 (used like a function)
    """Ensures one process per tracker and run. That of a killed trainer may need up to FINISH_S to end."""

    def __init__(self, options: argparse.Namespace, *, wait: bool) -> None:
        self._path, self._wait = options.folder / f".{options.tracker}.lock", wait

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{self._path.parent} is being tracked by another process") from None

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _reporter() -> Callable[..., None]:
    """Sends messages to the trainer as JSON lines on standard output. Other prints are redirected to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(**message: Any) -> None:
        with contextlib.suppress(OSError):  # the trainer was killed
            print(json.dumps(message), file=channel, flush=True)

    return report


if __name__ == "__main__":
    main()
