"""How long each rank computes before it waits for the others: which one is slowest, and by how much.

A step is as slow as its slowest rank. The others' time in the all-reduce says that somebody is late, and not who. So
each rank times its own passes, and the figures travel with the orders, in a collective that is there anyway.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from fastpeft.ranks import Ranks


class PassTimes:
    """Of all ranks, in seconds, each by its own clock; on a GPU by the device's, which nobody waits for."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._on_gpu = ranks, ranks.size > 1 and ranks.device().type == "cuda"
        self._own_s = 0.0
        self._began: float | torch.cuda.Event | None = None
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._of_ranks = [0.0] * ranks.size

    # ---- this rank's -------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the passes of a step. Passes that do not end, for lack of memory, do not count."""
        self._began = self._now()

    def end(self) -> None:
        """Behind them, before the gradients are added up."""
        began, now, self._began = self._began, self._now(), None
        if isinstance(began, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
            self._events.append((began, now))
        elif isinstance(began, float) and isinstance(now, float):
            self._own_s += now - began

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take_own(self) -> list[float]:
        """A number for each rank, 0 for others: this one's seconds since they were taken last."""
        while self._events and self._events[0][1].query():
            first, last = self._events.popleft()
            self._own_s += first.elapsed_time(last) / 1000
        own, self._own_s = self._own_s, 0.0
        return [own if rank == self._ranks.rank else 0.0 for rank in range(self._ranks.size)]

    # ---- all ranks' --------------------------------------------------------------------------

    def add(self, seconds: list[float]) -> None:
        self._of_ranks = [sum(pair) for pair in zip(self._of_ranks, seconds, strict=True)]

    def skew(self) -> dict[str, float]:
        """`slowest_rank` and its `rank_skew`, the percentage by which its passes take longer than the mean of all
        ranks, since it was asked for last. Empty where there is one rank, or no step meanwhile."""
        seconds, self._of_ranks = self._of_ranks, [0.0] * self._ranks.size
        mean = sum(seconds) / len(seconds)
        if len(seconds) == 1 or not mean:
            return {}
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {"slowest_rank": slowest, "rank_skew": round(100 * (seconds[slowest] / mean - 1), 1)}
