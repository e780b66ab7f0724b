"""What a step waits for: every place where the host reads a number from the device is counted, and known."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.trainer.build import Job, build_job
from fastpeft.trainer.micro_batches import MicroBatches
from fastpeft.trainer.step import train_step
from tests.support.every_kind import ALL_KINDS, run_of_kind
from tests.support.step_recorder import ON_A_CPU_ALONE, place, waits

STEPS = 3


class Waits(TorchDispatchMode):
    """Counts them by the function of fastpeft's that is nearest, or else by the package."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if waits(func, args):
            self.found[place()] += 1
        return func(*args, **(kwargs or {}))


def take_steps(job: Job, num: int = STEPS) -> int:
    """Returns how many micro-batches they had."""
    taken = 0
    for step in range(num):
        parts = MicroBatches(job, step, "here", pytest.fail)
        num_items = job.task.num_items(job.batches.rows(step))
        job.probes.begin(step + 1, 0.1, 0.0)
        taken += len(parts._parts(job.batches.rows(step)))
        train_step(
            job.adapter, job.schedule, job.optimizer, job.task.loss, parts, num_items, 0.1, job.probes,
            parts.until_it_fits,
        )  # fmt: skip
    return taken


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_our_own_step_waits_for_nothing(kind: str, tmp_path: Path) -> None:
    """And the model's no more than once a micro-batch: transformers asks whether a mask hides anything."""
    job = build_job(run_of_kind(tmp_path, kind, model={"check": False}, training={"micro_batch_tokens": 64}))
    take_steps(job, 1)
    with Waits() as found:
        num_parts = take_steps(job)
    assert num_parts > STEPS
    ours = {where: count for where, count in found.found.items() if not where.startswith("transformers ")}
    assert not ours.keys() - ON_A_CPU_ALONE.keys(), ours
    theirs = sum(count for where, count in found.found.items() if where.startswith("transformers "))
    assert theirs <= num_parts, found.found


@pytest.mark.parametrize("method", ["iw_lora", "adalora", "full"])
def test_nor_do_other_methods(method: str, tmp_path: Path) -> None:
    run = run_of_kind(tmp_path, "classification", method=method, model={"check": False})
    job = build_job(run)
    take_steps(job, 1)
    with Waits() as found:
        take_steps(job)
    ours = {where for where in found.found if not where.startswith("transformers ")}
    assert not ours - ON_A_CPU_ALONE.keys(), found.found


def test_what_waits_is_seen() -> None:
    x = torch.arange(4)
    with Waits() as found:
        float(x.sum())
        x[x > 1] = 2
        assert len(x[x > 1]) == 2
        bool((x == 2).any())
        torch.equal(x, x)
        (x > 1).nonzero()
    assert sum(found.found.values()) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_on_a_gpu_no_step_of_ours_waits(kind: str, tmp_path: Path) -> None:
    job = build_job(run_of_kind(tmp_path, kind, model={"check": False}, training={"micro_batch_tokens": 64}))
    take_steps(job, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take_steps(job)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        if job.ahead is not None:
            job.ahead.close()
    synced = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert not [where for where in synced if "/fastpeft/" in where], synced
