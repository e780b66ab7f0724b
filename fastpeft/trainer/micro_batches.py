"""Micro-batches that fit the device: an out-of-memory error repeats the batch in smaller micro-batches.

torch's allocator raises on the host while a pass is launched, without a wait, so the micro-batch in flight is the one
that did not fit. Only forward and backward passes are repeated. In the penalty or the optimizer smaller micro-batches
would not help, and an error there ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from fastpeft.adapters.flat import FlatParameters
from fastpeft.data.batches import Batch, micro_batches
from fastpeft.device_memory import OutOfMemory, free_memory, is_out_of_memory
from fastpeft.signals import STATISTICS, Signals
from fastpeft.trainer.prefix_cache import reading
from fastpeft.trainer.rng import generator_states, set_generator_states

if TYPE_CHECKING:
    from fastpeft.trainer.build import Job

T = TypeVar("T")

_SMALLER = "Set training.micro_batch_tokens lower"


class MicroBatches:
    """The micro-batches of one batch of `job`, which may be iterated more than once."""

    def __init__(self, job: Job, position: int, where: str, warn: Callable[[str], None]) -> None:
        """
        Args:
            position: number of the batch, counted over all epochs from 0.
            where: names the passes in messages about memory.
        """
        self._job, self._where, self._warn = job, where, warn
        self.position = position
        self.batch = job.batches.rows(position)
        """Rows of all ranks; `rows` are this rank's."""
        self.rows, self._following = (job.ranks.share(job.batches.rows(p)) for p in (position, position + 1))
        self._is_reduced = False
        self._in_flight: tuple[int, int] | None = None
        """(rows, width) of the micro-batch in the model."""

    def __iter__(self) -> Iterator[Batch]:
        job = self._job
        parts = self._parts(self.rows)
        num_passes = job.orders.in_step.most(len(parts))
        if job.ahead is None:
            made = map(self._collate, parts)
        else:
            made = job.ahead.batches(parts, self._parts(self._following))
        for part in parts:
            self._in_flight = job.batches.encoded.shape(part)
            batch = next(made)
            with reading(job.prefix_cache, part, batch, self._collate):
                yield batch
        for _ in range(num_passes - len(parts)):
            self._in_flight = job.batches.encoded.shape(self.batch[:1])
            yield replace(self._collate(self.batch[:1]), num_tokens=0, counts=False)
        self._in_flight = None

    def _collate(self, rows: np.ndarray) -> Batch:
        return self._job.task.collate(rows, self._job.device)

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        return micro_batches(self._job.batches.encoded, rows, self._job.limits.training)

    @property
    def only_rows(self) -> np.ndarray | None:
        """Rows of the only micro-batch; None if there are several."""
        parts = self._parts(self.rows)
        return parts[0] if len(parts) == 1 else None

    def until_it_fits(self, passes: Callable[[], T]) -> T:
        """Run `passes` over these micro-batches, and repeat them over smaller ones until they fit. Each repetition
        starts from the same random state.

        Raises:
            OutOfMemory: a single row does not fit. Only gradients have changed.
        """
        job = self._job
        while True:
            generators = generator_states(job.device)
            if job.ranks.size > 1:
                job.orders.pass_times.begin()
            try:
                with self._own_random_numbers():
                    return passes()
            except RuntimeError as error:
                if self._in_flight is None or not is_out_of_memory(error):
                    raise
                job.orders.refuse_retry(self._where, _SMALLER)
                if self._is_reduced:
                    raise OutOfMemory(self._where, "the other ranks go on", _SMALLER) from None
            too_large, self._in_flight = self._in_flight, None
            job.adapter.discard_pass()
            job.adapter.flat.grad.zero_()
            free_memory()
            set_generator_states(job.device, generators)
            told = job.limits.halve_training(*too_large, self._where)
            self._warn(f"{told}; the batch of {len(self.batch)} rows stays")

    @property
    def num_items(self) -> int:
        """Number of items of all ranks, over which the loss is a mean."""
        return self._job.task.num_items(self.batch)

    def reduce(self, flat: FlatParameters, signals: Signals) -> Signals:
        """As step.Reduce: one all-reduce of the gradient, followed in the buffer by the loss and its statistics."""
        job = self._job
        if job.ranks.size == 1:
            return signals
        job.orders.pass_times.end()
        self._is_reduced = True
        names = self._statistics(signals)
        scalars, found = flat.summed[len(flat.grad) :], {"loss": signals.loss, **signals.statistics}
        scalars.zero_()
        for place, name in enumerate(("loss", *STATISTICS)):
            if name in found:
                scalars[place] = found[name]
        job.ranks.add_up(flat.summed)
        loss, *values = scalars.clone()
        statistics = {name: value for name, value in zip(STATISTICS, values) if name in names}
        num_tokens = int(job.batches.encoded.lengths[self.batch].sum())
        return Signals(loss=loss, num_tokens=num_tokens, statistics=statistics)

    def _statistics(self, signals: Signals) -> set[str]:
        """Names of this batch's statistics. If a rank may have no row, the ranks exchange them."""
        if len(self.batch) >= self._job.ranks.size:
            return set(signals.statistics)
        counts = torch.tensor([float(name in signals.statistics) for name in STATISTICS])
        self._job.ranks.add_up(counts)
        return {name for name, count in zip(STATISTICS, counts.tolist()) if count}

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Each of several ranks draws random numbers seeded by (seed, batch, rank). On exit the shared random state is
        restored, so that it stays equal on all ranks and a checkpoint needs no state of a single rank."""
        job = self._job
        if job.ranks.size == 1:
            yield
            return
        generators = generator_states(job.device)
        key = [job.run.training.seed, self.position, job.ranks.rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        try:
            yield
        finally:
            set_generator_states(job.device, generators)


@contextmanager
def out_of_memory_is_told() -> Iterator[None]:
    """Turn an out-of-memory error that smaller batches do not help into an OutOfMemory that says what to change."""
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).splitlines()[0].rstrip(".")
    raise OutOfMemory("outside of the passes over a micro-batch", cause)
