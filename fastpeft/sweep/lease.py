"""Ownership of running trials. A sweep that dies leaves its trials RUNNING, and Optuna never ends them: they would
keep the sampler away from their region for ever.

On the machine of the sweep, it is alive if its process exists and started at the time in the lease. From another
machine, it is alive if its heartbeat is recent.
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
"""Allows for several lost heartbeats and a slow disk."""
_CLOCK_STEP_S = 2.0
"""Tolerance for the start time of a process, which moves when the system clock is corrected."""


@dataclass(frozen=True)
class Lease:
    host: str
    pid: int
    started_s: float
    """Unix time at which the process started. It tells a reused process ID apart."""

    @classmethod
    def mine(cls) -> Lease:
        import psutil

        return cls(_host(), os.getpid(), psutil.Process().create_time())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_alive(attributes: dict[str, Any], now_s: float | None = None) -> bool:
    """Whether the sweep that owns a running trial is alive.

    Args:
        attributes: the trial's user attributes.
    """
    now_s = time.time() if now_s is None else now_s
    try:
        lease = Lease(**attributes[LEASE])
    except (KeyError, TypeError):
        return False  # not created by a sweep, or its sweep died before it wrote the lease
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
    """Host name, boot ID and PID namespace. Process IDs are comparable only if all three agree."""
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
