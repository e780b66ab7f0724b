"""The memory that a pass takes, extrapolated from passes over a few short rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastpeft.adapters import Adapter
from fastpeft.device_memory import TokenLimits
from fastpeft.models.sharded_base import ShardedBase, largest_of
from fastpeft.tasks import Task
from fastpeft.trainer.peak_memory import peak_bytes
from fastpeft.trainer.rng import generator_states, set_generator_states
from fastpeft.trainer.step import forward_backward


@dataclass(frozen=True)
class Cost:
    """Bytes of a pass over rows of one width: fixed + tokens * (linear + square * width)."""

    fixed: float
    linear: float
    square: float = 0.0

    def each(self, width: float) -> float:
        """Bytes per token."""
        return self.linear + self.square * width

    def bytes(self, tokens: float, width: float) -> float:
        return self.fixed + tokens * self.each(width)

    def tokens(self, room: float, width: float) -> int:
        """Number of tokens that fit into `room` bytes."""
        return int(max(0.0, room - self.fixed) / max(1.0, self.each(width)))

    @classmethod
    def of_rows(cls, short: tuple[int, float], long: tuple[int, float]) -> Cost:
        """Fit to (tokens, bytes) of two rows, the first no longer than the second."""
        (width, size), (other, other_size) = short, long
        square = 0.0 if other <= width else max(0.0, (other_size / other - size / width) / (other - width))
        return cls(0.0, max(0.0, size / width - square * width), square)


def training_cost(
    adapter: Adapter, task: Task, loss_scale: torch.Tensor | None = None, shard: ShardedBase | None = None
) -> Cost:
    """Fitted to the shortest row and one about twice as long. Memory that does not grow with a row is attributed to its
    tokens. Afterwards the random state is as it was, and gradients are 0.

    Args:
        shard: all its ranks run these passes, and the largest cost counts. The weights that each pass gathers are known
            and not measured.
    """
    device, widths = adapter.flat.data.device, task.train.widths
    order = np.argsort(widths, kind="stable")
    short = int(order[0])
    long = int(order[min(int(np.searchsorted(widths[order], 2 * widths[short])), len(order) - 1)])
    generators = generator_states(device)

    def measured(row: int) -> tuple[int, float]:
        rows = np.array([row])
        batch, num_items = task.collate(rows, device), max(1, task.num_items(rows))
        return int(widths[row]), _peak(
            device, lambda: forward_backward(adapter, task.loss, [batch], num_items, loss_scale), shard
        )

    try:
        return _with_gathered(Cost.of_rows(measured(short), measured(long)), shard)
    finally:
        adapter.discard_pass()
        adapter.flat.grad.zero_()
        set_generator_states(device, generators)


def evaluation_cost(
    attempt: Callable[[TokenLimits], object],
    largest: Callable[[TokenLimits], tuple[int, int]],
    training: int,
    device: torch.device,
    shard: ShardedBase | None = None,
) -> Cost:
    """Fitted to evaluations of one row at a time, and of two.

    Args:
        attempt, largest: as Task.try_evaluation and Task.largest_evaluation_batch.
        training: tokens of a micro-batch.
        shard: as for training_cost.
    """

    def measured(limit: int) -> tuple[int, int]:
        limits = TokenLimits(training, limit)
        rows, width = largest(limits)
        return rows * width, _peak(device, lambda: attempt(limits), shard)

    tokens, size = measured(1)
    more_tokens, more = measured(2 * tokens)
    if more_tokens <= tokens:  # the split has only one row
        return _with_gathered(Cost(0.0, size / tokens), shard)
    each = max(0.0, (more - size) / (more_tokens - tokens))
    return _with_gathered(Cost(max(0.0, size - each * tokens), each), shard)


def _peak(device: torch.device, work: Callable[[], object], shard: ShardedBase | None) -> int:
    return largest_of(shard, peak_bytes(device, work, by_tensors=shard is not None))


def _with_gathered(cost: Cost, shard: ShardedBase | None) -> Cost:
    return cost if shard is None else replace(cost, fixed=cost.fixed + shard.gathered)
