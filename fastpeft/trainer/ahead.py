"""Prefetching: a thread collates the next micro-batches while the device computes.

It is for GPUs, which would wait for the host: collating copies a row's tokens in Python and pins memory. On a CPU,
where collating takes a thousandth of a pass, there is no thread. A batch is a function of its rows and the thread draws
no random number, so a checkpoint needs nothing of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from fastpeft.data.batches import Batch

NUM_AHEAD = 4

Collate = Callable[[np.ndarray], Batch]
"""Makes a micro-batch from the indices of its rows."""


class Ahead:
    """One thread that collates upcoming batches."""

    def __init__(self, collate: Collate, num_ahead: int = NUM_AHEAD) -> None:
        self._collate, self._num_ahead = collate, num_ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastpeft-ahead")
        self._waiting: deque[tuple[np.ndarray, Future[Batch]]] = deque()

    def batches(self, parts: Sequence[np.ndarray], following: Sequence[np.ndarray] = ()) -> Iterator[Batch]:
        """The batches of `parts`, in order. An error in the thread is raised here, in place of its batch.

        Args:
            following: parts that the next call is likely to ask for; prefetched when there is room, dropped if wrong.
        """
        wanted = [*parts, *following]
        for i, part in enumerate(parts):
            if self._waiting and not np.array_equal(self._waiting[0][0], part):
                self._forget()
            for later in wanted[i + len(self._waiting) : i + 1 + self._num_ahead]:
                self._waiting.append((later, self._thread.submit(self._collate, later)))
            yield self._waiting.popleft()[1].result()

    def close(self) -> None:
        """End the thread. No batch may be asked for afterwards."""
        self._forget()
        self._thread.shutdown()

    def _forget(self) -> None:
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
