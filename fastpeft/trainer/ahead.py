"""Micro-batches made on a thread while the device works on those before them.

It is for a GPU, whose host is otherwise late: a row's tokens are copied in Python and put into pinned memory. On a CPU,
where making a micro-batch takes a thousandth of a pass over it, there is no thread. What a batch holds is a function of
its rows; the thread draws no random number, so that nothing of it belongs in a checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from fastpeft.data.batches import Batch

NUM_AHEAD = 4

Collate = Callable[[np.ndarray], Batch]
"""Of the rows of a micro-batch."""


class Ahead:
    """One thread that makes the batches that come next."""

    def __init__(self, collate: Collate, num_ahead: int = NUM_AHEAD) -> None:
        self._collate, self._num_ahead = collate, num_ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastpeft-ahead")
        self._waiting: deque[tuple[np.ndarray, Future[Batch]]] = deque()

    def batches(self, parts: Sequence[np.ndarray], following: Sequence[np.ndarray] = ()) -> Iterator[Batch]:
        """Of `parts`, in their order. What the thread raises is raised here, in the place of its batch.

        Args:
            following: what is likely to be asked for next, to be begun when there is room. Other parts may come.
        """
        wanted = [*parts, *following]
        for i, part in enumerate(parts):
            if self._waiting and not np.array_equal(self._waiting[0][0], part):
                self._forget()
            for later in wanted[i + len(self._waiting) : i + 1 + self._num_ahead]:
                self._waiting.append((later, self._thread.submit(self._collate, later)))
            yield self._waiting.popleft()[1].result()

    def close(self) -> None:
        """Ends the thread; no batch may be asked for after."""
        self._forget()
        self._thread.shutdown()

    def _forget(self) -> None:
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
