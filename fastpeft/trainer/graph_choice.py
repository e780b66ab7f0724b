"""Decides from a run's set-up whether its steps are captured as CUDA graphs."""

from __future__ import annotations

import torch

from fastpeft.adapters import Adapter
from fastpeft.config import RunConfig
from fastpeft.schedules import Schedule
from fastpeft.tasks import Task
from fastpeft.trainer.buckets import TOKENS_MULTIPLE, in_few_shapes
from fastpeft.trainer.optim import Optimizer
from fastpeft.trainer.padding import make_batches


def choose_graphs(
    run: RunConfig,
    task: Task,
    adapter: Adapter,
    optimizer: Optimizer,
    schedule: Schedule,
    num_ranks: int,
    device: torch.device,
) -> list[str]:
    """Restrict `task.train` to few shapes if steps are to be captured. Returns notes for the user."""
    if not are_wanted(run, device):
        return []
    reason = refusal(run, task, adapter, optimizer, schedule, num_ranks)
    if reason is not None:
        return [told(reason)]
    few = in_few_shapes(make_batches(run, task), TOKENS_MULTIPLE.get(device.type, 1))
    if not few.has_few_shapes:
        return [told("no batch has training.batch_size rows")]
    task.train = few
    return []


def are_wanted(run: RunConfig, device: torch.device) -> bool:
    """Whether to capture. A CPU has no launch latency to hide: nothing is captured there, without a note."""
    return run.training.cuda_graphs == "auto" and device.type == "cuda"


def refusal(
    run: RunConfig, task: Task, adapter: Adapter, optimizer: Optimizer, schedule: Schedule, num_ranks: int
) -> str | None:
    """Why no step of this run can be captured, for the user; None if nothing prevents it."""
    of_method, of_optimizer = adapter.host_work(), optimizer.host_work()
    reasons = {
        "several ranks add their gradients up in each step": num_ranks > 1,
        f"schedule {run.schedule.name} reads on the host what each step has measured": bool(schedule.needs),
        f"method {run.method}: {of_method}": of_method is not None,
        f"optimizer {run.optimizer.name}: {of_optimizer}": of_optimizer is not None,
        "this model takes rows of one length at a time, which have too many shapes": not task.train.padded,
        "training.cache_prefix reads a file in each step": bool(run.training.cache_prefix),
        "a library unpacks weights in 4 bits, and is not known to be capturable": run.model.quantisation != "none",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def told(reason: str) -> str:
    return f"no CUDA graphs: {reason}"
