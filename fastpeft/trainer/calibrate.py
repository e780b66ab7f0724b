"""Calibration: the adapter sees the first batches before training, within its share of the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastpeft import phases
from fastpeft.ranks import together
from fastpeft.signals import Signals
from fastpeft.trainer.build import Job
from fastpeft.trainer.micro_batches import MicroBatches
from fastpeft.trainer.rank_orders import Act
from fastpeft.trainer.rng import rng_state, set_rng_state
from fastpeft.trainer.step import forward_backward

CALIBRATION_CAP = 0.02
MIN_CALIBRATION_BATCHES = 8


def calibrate(job: Job, stop: Callable[[], bool], warn: Callable[[str], None]) -> int:
    """Pass the first batches to the adapter; random state and data order stay as they were. Returns the batch count."""
    adapter, clock = job.adapter, job.clock
    wanted, start = adapter.calibration_batches, clock.spent
    num_batches = 0
    phases.begin("calibrate", "calibrating")
    with _rng_restored(), adapter.calibrating():
        while num_batches < wanted and not stop():
            spent = num_batches if clock.budget.kind == "steps" else clock.spent - start
            capped = spent >= CALIBRATION_CAP * clock.budget.limit
            if capped and num_batches >= MIN_CALIBRATION_BATCHES:
                warn(
                    f"calibration ended after {num_batches} of {wanted} batches: it is capped at "
                    f"{CALIBRATION_CAP:.0%} of the budget"
                )
                break
            phases.progress(num_batches, wanted, "batches")
            began = time.perf_counter()
            job.orders.calibrate(num_batches)
            signals, measured = _see(job, num_batches, warn)
            clock.count_tokens(signals.num_tokens, time.perf_counter() - began)
            num_batches += measured
        job.orders.calibrated()
    return num_batches


def follow_calibration(job: Job, position: int, warn: Callable[[str], None]) -> None:
    """The calibration of ranks 1 and up: from the batch at `position` until rank 0 ends it."""
    with _rng_restored(), job.adapter.calibrating():
        while True:
            _see(job, position, warn)
            order = job.orders.next()
            if order.act == Act.CALIBRATED:
                return
            position = int(order.values[0])


def _see(job: Job, position: int, warn: Callable[[str], None]) -> tuple[Signals, bool]:
    """One calibration batch. False if it overflowed and has to be repeated with a smaller loss scale."""
    adapter, scale = job.adapter, job.optimizer.loss_scale
    adapter.before_calibration_batch()
    batches = MicroBatches(job, position, "in calibration", warn)
    loss, num_items = job.task.loss, batches.num_items
    signals = batches.until_it_fits(
        lambda: forward_backward(adapter, loss, batches, num_items, loss_scale=scale, reduce=batches.reduce)
    )
    with together(job.ranks):
        measured = adapter.after_calibration_batch(1.0 if scale is None else float(scale))
    if not measured:
        job.optimizer.adjust_scale(torch.ones((), device=job.device))
    return signals, measured


@contextmanager
def _rng_restored() -> Iterator[None]:
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
