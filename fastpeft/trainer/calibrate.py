"""Calibration: the adapter sees the first batches before training, within its share of the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastpeft import phases
from fastpeft.signals import Signals
from fastpeft.trainer.build import Job
from fastpeft.trainer.micro_batches import MicroBatches
from fastpeft.trainer.rng import rng_state, set_rng_state
from fastpeft.trainer.step import forward_backward

CALIBRATION_CAP = 0.02
MIN_CALIBRATION_BATCHES = 8


def calibrate(job: Job, stop: Callable[[], bool], warn: Callable[[str], None]) -> int:
    """Let the adapter see the first batches; neither the RNG nor the data order moves. Returns how many it saw."""
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
            adapter.before_calibration_batch()
            scale = job.optimizer.loss_scale
            signals = _pass(job, num_batches, scale, warn)
            measured = adapter.after_calibration_batch(1.0 if scale is None else float(scale))
            clock.count_tokens(signals.num_tokens, time.perf_counter() - began)
            if measured:
                num_batches += 1
            else:
                job.optimizer.adjust_scale(torch.ones((), device=job.device))
    return num_batches


def _pass(job: Job, position: int, scale: torch.Tensor | None, warn: Callable[[str], None]) -> Signals:
    batches = MicroBatches(job, position, "in calibration", warn)
    num_items = job.task.num_items(job.batches.rows(position))
    return batches.until_it_fits(
        lambda: forward_backward(job.adapter, job.task.loss, batches, num_items, loss_scale=scale)
    )


@contextmanager
def _rng_restored() -> Iterator[None]:
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
