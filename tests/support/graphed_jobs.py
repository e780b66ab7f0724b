"""Jobs whose steps are captured on a CPU, by what does them again in place of a CUDA graph."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from fastpeft.config import RunConfig
from fastpeft.data.batches import Batch
from fastpeft.trainer import graph_choice, run
from fastpeft.trainer.buckets import Bucket, shape_of
from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.graphs import Capture, CudaCapture, GraphedSteps, capture_steps
from fastpeft.trainer.loop import take_step
from fastpeft.trainer.micro_batches import MicroBatches
from tests.support.step_recorder import Rerun


def want_graphs(patch: pytest.MonkeyPatch) -> None:
    """As on a GPU with training.cuda_graphs=auto."""
    patch.setattr(graph_choice, "are_wanted", lambda run, device: True)


def train_with(patch: pytest.MonkeyPatch, capture: Capture | None) -> None:
    """Runs capture their steps by `capture`; None: they have the same batches, and launch each operation."""
    want_graphs(patch)
    captured = partial(capture_steps, make_capture=lambda device: capture) if capture else lambda job: None
    patch.setattr(run, "capture_steps", captured)


def graphed_job(config: RunConfig, patch: pytest.MonkeyPatch) -> tuple[Job, GraphedSteps, Rerun]:
    want_graphs(patch)
    job, rerun = build_job(config), Rerun()
    graphs = capture_steps(job, lambda device: rerun)
    assert graphs is not None, job.notes
    return job, graphs, rerun


def after_steps_on_a_gpu(config: RunConfig, captured: bool, num_steps: int = 20) -> torch.Tensor:
    """What is trained, after steps that replay CUDA graphs or launch what these hold. Graphs have to be wanted."""
    job = build_job(config)
    graphs = capture_steps(job, CudaCapture)
    assert graphs is not None, job.notes
    for position in range(num_steps):
        batches = MicroBatches(job, position, "here", pytest.fail)
        bucket = graphs.bucket_of(batches)
        if bucket is not None and not captured:
            step = graphs.steps[bucket]
            (batch,) = batches
            graphs.fill(step.inputs, batch, batches.num_items, job.schedule.rates(None, position / num_steps).lr)
            step.step()
        else:
            take_step(job, batches, position / num_steps, 0.0, graphs=graphs)
    assert graphs.num_replayed >= (0.75 * num_steps if captured else 0)
    if job.ahead is not None:
        job.ahead.close()
    return job.adapter.flat.data.clone()


def batches_of(job: Job, bucket: Bucket, count: int) -> list[np.ndarray]:
    """Rows of so many different batches that the bucket takes: of any epoch."""
    found = []
    for position in range(50 * len(job.batches)):
        rows = job.batches.rows(position)
        if shape_of(job.batches.encoded, rows) == bucket.shape and bucket.takes(job.task.num_items(rows)):
            found.append(rows)
        if len(found) == count:
            return found
    raise AssertionError(f"{len(found)} batches of {bucket}")


def collated(job: Job, rows: np.ndarray) -> tuple[Batch, int]:
    return job.task.collate(rows, job.device), job.task.num_items(rows)


def state_of(job: Job) -> dict[str, torch.Tensor]:
    """Every bit that a step may change."""
    found = {**job.adapter.model.state_dict(), **job.optimizer.state_dict(), "summed": job.adapter.flat.summed}
    found |= {f"adapter {k}": v for k, v in job.adapter.state_dict().items() if isinstance(v, torch.Tensor)}
    return {name: tensor.clone() for name, tensor in found.items()} | {"rng": torch.get_rng_state()}
