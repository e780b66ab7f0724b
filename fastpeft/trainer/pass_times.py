"""How long each rank's passes take before the all-reduce: which rank is slowest, and by how much.

A step is as slow as its slowest rank. The other ranks' time in the all-reduce does not tell which rank is late. So each
rank times its own passes, and the times are sent with the orders, which need a collective anyway.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from fastpeft.ranks import Ranks


class PassTimes:
    """Seconds of passes of all ranks, each by its own clock. A GPU's are CUDA events, read without waiting."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._on_gpu = ranks, ranks.size > 1 and ranks.device().type == "cuda"
        self._own_s = 0.0
        self._began: float | torch.cuda.Event | None = None
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._of_ranks = [0.0] * ranks.size

    # ---- this rank's -------------------------------------------------------------------------

    def begin(self) -> None:
        """Called before the passes of a step. Passes that run out of memory do not count."""
        self._began = self._now()

    def end(self) -> None:
        """Called after the passes, before the gradients are reduced."""
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
        """One number per rank: this rank's seconds since the last call, and 0 for the others."""
        while self._events and self._events[0][1].query():
            first, last = self._events.popleft()
            self._own_s += first.elapsed_time(last) / 1000
        own, self._own_s = self._own_s, 0.0
        return [own if rank == self._ranks.rank else 0.0 for rank in range(self._ranks.size)]

    # ---- all ranks' --------------------------------------------------------------------------

    def add(self, seconds: list[float]) -> None:
        self._of_ranks = [sum(pair) for pair in zip(self._of_ranks, seconds, strict=True)]

    def skew(self) -> dict[str, float]:
        """`slowest_rank` and its `rank_skew`, the percentage by which its passes took longer than the mean over the
        ranks since the last call. Empty with one rank, or if there was no step."""
        seconds, self._of_ranks = self._of_ranks, [0.0] * self._ranks.size
        mean = sum(seconds) / len(seconds)
        if len(seconds) == 1 or not mean:
            return {}
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {"slowest_rank": slowest, "rank_skew": round(100 * (seconds[slowest] / mean - 1), 1)}
