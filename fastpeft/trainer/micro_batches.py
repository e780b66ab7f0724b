"""Micro-batches that fit the device: after an out-of-memory error the same batch again, in smaller parts.

torch's allocator raises on the host while a pass is launched, without a wait, so the micro-batch in
flight is the one that did not fit. Only its forward and backward pass is tried again: outside of them,
in the penalty or the optimizer, smaller parts would not help, and an error there ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fastpeft.data.batches import Batch, micro_batches
from fastpeft.device_memory import OutOfMemory, free_memory, is_out_of_memory
from fastpeft.trainer.rng import generator_states, set_generator_states

if TYPE_CHECKING:
    from fastpeft.trainer.build import Job

T = TypeVar("T")


class MicroBatches:
    """Splits batches for `job`. Called with the rows of a batch it gives its micro-batches, which may be iterated more
    than once."""

    def __init__(self, job: Job, warn: Callable[[str], None]) -> None:
        self._job, self._warn = job, warn
        self._in_flight: tuple[int, int] | None = None
        """Rows and width of the micro-batch that the model works on."""

    def __call__(self, rows: np.ndarray) -> Iterable[Batch]:
        return _Passes(self, rows)

    def split(self, rows: np.ndarray) -> Iterator[Batch]:
        encoded = self._job.batches.encoded
        for part in micro_batches(encoded, rows, self._job.limits.training):
            self._in_flight = len(part), int(encoded.widths[part].max())
            yield self._job.task.collate(part, self._job.device)
        self._in_flight = None

    def fit(self, attempt: Callable[[], T], num_rows: int, where: str) -> T:
        """`attempt`, which consumes this batch's micro-batches, until it fits; dropout begins anew each time.

        Raises:
            OutOfMemory: a single row does not fit; nothing but gradients has changed.
        """
        job = self._job
        while True:
            generators = generator_states(job.device)
            try:
                return attempt()
            except RuntimeError as error:
                if self._in_flight is None or not is_out_of_memory(error):
                    raise
            too_large, self._in_flight = self._in_flight, None
            job.adapter.discard_pass()
            job.adapter.flat.grad.zero_()
            free_memory()
            set_generator_states(job.device, generators)
            told = job.limits.halve_training(*too_large, where)
            self._warn(f"{told}; the batch of {num_rows} rows stays")


@dataclass(frozen=True)
class _Passes:
    owner: MicroBatches
    rows: np.ndarray

    def __iter__(self) -> Iterator[Batch]:
        return self.owner.split(self.rows)


@contextmanager
def out_of_memory_is_told() -> Iterator[None]:
    """What ran out of memory where smaller batches do not help becomes a message that says what to change."""
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).splitlines()[0].rstrip(".")
    raise OutOfMemory("outside of the passes over a micro-batch", cause)
