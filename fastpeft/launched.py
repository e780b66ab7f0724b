"""The rank and world size that torch's launcher gives each process. Read from the environment only."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """This process's place among the ranks."""

    rank: int = 0
    size: int = 1
    """Ranks on all hosts: the world size."""
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this host."""
    restarts: int = 0
    """How often the launcher has restarted the ranks."""
    max_restarts: int = 0


def place() -> Place:
    """This process's place. A process that no launcher started is the only rank."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names):
        return Place()
    size = int(os.environ["WORLD_SIZE"])
    return Place(
        rank=int(os.environ["RANK"]),
        size=size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        max_restarts=int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)),
    )
