"""Whose a running trial is. A sweep that dies leaves its trials RUNNING, and nothing in Optuna ends them: they keep the
sampler away from where they were, for ever.

On the machine of the sweep the process decides: it is there, and it began when the lease says. From another machine its
heartbeat does.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEASE, HEARTBEAT = "lease", "heartbeat_s"
"""User attributes of a trial."""
HEARTBEAT_EVERY_S = 20.0
DEAD_AFTER_S = 120.0
"""Several heartbeats, and a slow disk."""
_CLOCK_STEP_S = 2.0
"""What a correction of the machine's clock may move a process's beginning by."""


@dataclass(frozen=True)
class Lease:
    host: str
    pid: int
    started_s: float
    """When the process began, Unix time: a number is given again after a while."""

    @classmethod
    def mine(cls) -> Lease:
        import psutil

        return cls(_host(), os.getpid(), psutil.Process().create_time())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_alive(attributes: dict[str, Any], now_s: float | None = None) -> bool:
    """Whether the sweep that a running trial belongs to is there.

    Args:
        attributes: the trial's user attributes.
    """
    now_s = time.time() if now_s is None else now_s
    try:
        lease = Lease(**attributes[LEASE])
    except (KeyError, TypeError):
        return False  # none of ours, or it died before it said whose it is
    if lease.host == _host():
        return _runs(lease)
    beat = attributes.get(HEARTBEAT)
    return isinstance(beat, (int, float)) and now_s - beat <= DEAD_AFTER_S


def _runs(lease: Lease) -> bool:
    import psutil

    try:
        process = psutil.Process(lease.pid)
        return abs(process.create_time() - lease.started_s) < _CLOCK_STEP_S and (
            process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False


def _host() -> str:
    """This machine since it was started, and in it what shares process numbers: a container has numbers of its own."""
    return " ".join((socket.gethostname(), _read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid")))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
