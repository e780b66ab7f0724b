"""Micro-batches that fit the device: after an out-of-memory error the same batch again, in smaller parts.

torch's allocator raises on the host while a pass is launched, without a wait, so the micro-batch in
flight is the one that did not fit. Only its forward and backward pass is tried again: outside of them,
in the penalty or the optimizer, smaller parts would not help, and an error there ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fastpeft.data.batches import Batch, micro_batches
from fastpeft.device_memory import OutOfMemory, free_memory, is_out_of_memory
from fastpeft.trainer.prefix_cache import reading
from fastpeft.trainer.rng import generator_states, set_generator_states

if TYPE_CHECKING:
    from fastpeft.trainer.build import Job

T = TypeVar("T")


class MicroBatches:
    """The micro-batches of one batch of `job`, which may be iterated more than once."""

    def __init__(self, job: Job, position: int, where: str, warn: Callable[[str], None]) -> None:
        """
        Args:
            position: of the batch, counted over all epochs from 0.
            where: tells the user which passes did not fit.
        """
        self._job, self._where, self._warn = job, where, warn
        self._rows, self._following = job.batches.rows(position), job.batches.rows(position + 1)
        self._in_flight: tuple[int, int] | None = None
        """Rows and width of the micro-batch that the model works on."""

    def __iter__(self) -> Iterator[Batch]:
        job = self._job
        parts = self._parts(self._rows)
        if job.ahead is None:
            made = map(self._collate, parts)
        else:
            made = job.ahead.batches(parts, self._parts(self._following))
        for part in parts:
            self._in_flight = job.batches.encoded.shape(part)
            batch = next(made)
            with reading(job.prefix_cache, part, batch, self._collate):
                yield batch
        self._in_flight = None

    def _collate(self, rows: np.ndarray) -> Batch:
        return self._job.task.collate(rows, self._job.device)

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        return micro_batches(self._job.batches.encoded, rows, self._job.limits.training)

    def until_it_fits(self, passes: Callable[[], T]) -> T:
        """`passes` over these micro-batches, again in smaller ones until they fit; dropout begins anew each time.

        Raises:
            OutOfMemory: a single row does not fit; nothing but gradients has changed.
        """
        job = self._job
        while True:
            generators = generator_states(job.device)
            try:
                return passes()
            except RuntimeError as error:
                if self._in_flight is None or not is_out_of_memory(error):
                    raise
            too_large, self._in_flight = self._in_flight, None
            job.adapter.discard_pass()
            job.adapter.flat.grad.zero_()
            free_memory()
            set_generator_states(job.device, generators)
            told = job.limits.halve_training(*too_large, self._where)
            self._warn(f"{told}; the batch of {len(self._rows)} rows stays")


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
