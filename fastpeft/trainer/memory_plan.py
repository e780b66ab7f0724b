"""How many tokens go through the model at once.

On a CPU few: a pass whose activations are a few times the cache is as fast as a pass a hundred times larger, since from
FEWEST tokens on the matrix products amortise reading the weights. So a micro-batch has FOOTPRINT bytes of activations
or FEWEST tokens, whichever is more, and MOST tokens at most. For an evaluation batch the bytes are FOOTPRINT or a
quarter of the weights', whichever is more, because decoding reads all weights anew for each token. To keep a GPU busy,
a micro-batch has MOST tokens there and an evaluation batch MOST_EVALUATED.

No pass takes more than SHARE of the free memory, whatever the settings say, unless a single row does: asking for too
much gets no process killed. The bytes of a token are measured on two short rows. Apart from that bound, the limits
depend on model, method and data alone. Checkpoints keep them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from fastpeft.adapters import Adapter
from fastpeft.config.schema import EvaluationConfig, TrainingConfig
from fastpeft.data.batches import Batches
from fastpeft.device_memory import (
    OutOfMemory,
    TokenLimits,
    free_bytes,
    free_memory,
    high_water_bytes,
    is_out_of_memory,
    resident_bytes,
)
from fastpeft.models.checkpointed_layers import checkpoint_layers
from fastpeft.models.sharded_base import ShardedBase, largest_of
from fastpeft.tasks import Task
from fastpeft.trainer.pass_cost import Cost, evaluation_cost, training_cost
from fastpeft.trainer.peak_memory import peak_bytes

FOOTPRINT = 256 * 2**20
FEWEST, MOST, MOST_EVALUATED = 512, 16384, 131072
SHARE = 0.8
MOMENTS = 2
"""Numbers that an optimizer keeps for each parameter. Their memory is taken at its first step."""

T = TypeVar("T")
Setting = int | Literal["auto"]


@dataclass(frozen=True)
class MemoryPlan:
    limits: TokenLimits
    training: float
    """Bytes per token of a micro-batch, in a row of average width."""
    evaluation: float
    """Bytes per token of an evaluation batch."""
    held: float
    """Bytes that the process holds between passes."""
    peak: float
    """Bytes that the process holds at most."""
    free: float
    fit: TokenLimits
    """The limits that the memory allows."""
    checkpointed: bool
    notes: tuple[str, ...] = ()
    """Further notes for the user."""
    shard: ShardedBase | None = None
    """The sharded base; None if this process has the whole base."""

    def describe(self) -> str:
        """The choice in one line."""
        layers = ", layers computed again in the backward pass" if self.checkpointed else ""
        shard = "" if self.shard is None else f"; {_of_base(self.shard)}"
        return (
            f"memory: micro-batches of at most {self.limits.training:,} tokens, {size(self.training)} each{layers}; "
            f"evaluation batches of {self.limits.evaluation:,}, {size(self.evaluation)} each; {size(self.peak)} at the "
            f"peak, {size(self.held)} of them throughout; {size(self.free)} are free{shard}"
        )

    def keep_within(self) -> list[str]:
        """Lower limits that a resume restored, if less memory is free now than when they were chosen. Returns notes for
        the user."""
        told = []
        for what, name in (("training", "micro-batches"), ("evaluation", "evaluation batches")):
            most, fit = getattr(self.limits, what), getattr(self.fit, what)
            if most > fit:
                setattr(self.limits, what, fit)
                told.append(f"the run had {name} of {most:,} tokens, and {fit:,} fit into the memory that is free now")
        return told

    def to_json(self) -> dict[str, Any]:
        return {
            "micro_batch_tokens": self.limits.training,
            "evaluation_batch_tokens": self.limits.evaluation,
            "bytes_per_token": round(self.training),
            "bytes_per_evaluation_token": round(self.evaluation),
            "held_mb": round(self.held / 2**20, 1),
            "peak_mb": round(self.peak / 2**20, 1),
            "free_mb": round(self.free / 2**20, 1),
            "checkpointed": self.checkpointed,
        } | ({} if self.shard is None else {"base_shard_mb": round(self.shard.own / 2**20, 1)})


def make_plan(
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    adapter: Adapter,
    task: Task,
    batches: Batches,
    loss_scale: torch.Tensor | None = None,
    shard: ShardedBase | None = None,
) -> MemoryPlan:
    """Measure a few passes and choose the limits. Turns activation checkpointing on where it is set or needed.

    Args:
        shard: its ranks run each pass together, and choose by the rank with the least free memory.

    Raises:
        OutOfMemory: on a CPU, the longest row does not fit; with a `shard`, too little memory to measure a row.
    """
    device, model = adapter.flat.data.device, adapter.model
    widths = task.train.widths
    longest, usual = int(widths.max()), float((widths**2.0).sum() / widths.sum())
    wants_checkpoints = training.checkpoint_layers is True
    checkpointed = wants_checkpoints and checkpoint_layers(model) > 0
    cost = _unless_short(lambda: training_cost(adapter, task, loss_scale, shard), shard)
    free_memory()
    to_come = MOMENTS * adapter.flat.data.nbytes
    held, free = largest_of(shard, resident_bytes(device)) + to_come, max(0, _least_free(device, shard) - to_come)
    if training.checkpoint_layers == "auto" and (cost is None or cost.tokens(SHARE * free, longest) < longest):
        checkpointed = checkpoint_layers(model) > 0
        cost = _unless_short(lambda: training_cost(adapter, task, loss_scale, shard), shard)
    if cost is None:
        told = "the memory is too short to measure what a row takes: rows go through the model one by one"
        return MemoryPlan(TokenLimits(1, 1), 0.0, 0.0, held, held, free, TokenLimits(1, 1), checkpointed, (told,))
    if device.type == "cpu" and cost.tokens(free, longest) < longest:
        needed = size(cost.bytes(longest, longest))
        raise OutOfMemory("in training", f"a row of {longest:,} tokens takes {needed}, and {size(free)} are free")
    fit = TokenLimits(max(cost.tokens(SHARE * free, longest), longest), 1)
    most, notes = choose(
        "training.micro_batch_tokens", training.micro_batch_tokens, suits_training(cost, usual, device), fit.training
    )
    limits = TokenLimits(most, most)

    def attempt(limits: TokenLimits) -> None:
        model.eval()
        try:
            task.try_evaluation(model, limits)
        finally:
            model.train()

    evaluated, fit.evaluation, more = plan_evaluation(
        evaluation.batch_tokens, attempt, task.largest_evaluation_batch, limits, model, shard
    )
    largest = math.prod(task.largest_evaluation_batch(limits))
    evaluation_bytes = _largest_evaluation(evaluated.bytes(largest, 0), lambda: attempt(limits), device, shard)
    passes = max(_largest_pass(cost, limits.training, batches), evaluation_bytes)
    peak = max(largest_of(shard, high_water_bytes(device)), held + passes)
    told = (*notes, *more)
    return MemoryPlan(limits, cost.each(usual), evaluated.linear, held, peak, free, fit, checkpointed, told, shard)


def plan_evaluation(
    setting: Setting,
    attempt: Callable[[TokenLimits], object],
    largest: Callable[[TokenLimits], tuple[int, int]],
    limits: TokenLimits,
    model: nn.Module,
    shard: ShardedBase | None = None,
) -> tuple[Cost, int, list[str]]:
    """Set `limits.evaluation`. Returns (cost of a pass, tokens that fit, notes for the user).

    Args:
        attempt, largest: as Task.try_evaluation and Task.largest_evaluation_batch.
        shard: as for make_plan.
    """
    device = next(model.parameters()).device
    free_memory()
    free = _least_free(device, shard)
    cost = _unless_short(lambda: evaluation_cost(attempt, largest, limits.training, device, shard), shard)
    if cost is None:
        limits.evaluation = 1
        return Cost(0.0, 0.0), 1, ["the memory is too short to measure an evaluation: rows are scored one by one"]
    fit = max(1, cost.tokens(SHARE * free, 1))
    limits.evaluation, notes = choose("evaluation.batch_tokens", setting, suits_evaluation(cost, model), fit)
    return cost, fit, notes


def suits_training(cost: Cost, width: float, device: torch.device) -> int:
    """Tokens of a micro-batch if memory is not short."""
    if device.type == "cuda":
        return MOST
    return min(MOST, max(FEWEST, int(FOOTPRINT / max(1.0, cost.each(width)))))


def suits_evaluation(cost: Cost, model: nn.Module) -> int:
    weights = list(model.parameters())
    if weights[0].is_cuda:
        return MOST_EVALUATED
    footprint = max(FOOTPRINT, sum(weight.nbytes for weight in weights) / 4)
    return min(MOST, max(FEWEST, int(footprint / max(1.0, cost.linear))))


def choose(key: str, setting: Setting, suits: int, fit: int) -> tuple[int, list[str]]:
    """(tokens, notes for the user) for a setting, given what suits the device and what fits into its memory."""
    most = suits if setting == "auto" else setting
    if most <= fit:
        return most, []
    return fit, [] if setting == "auto" else [f"{key} is {setting:,}, and {fit:,} fit into the memory that is free"]


def size(num_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} kB"


def _largest_pass(cost: Cost, most: int, batches: Batches) -> float:
    """Bytes of an epoch's largest micro-batch, as if each batch had only rows as long as its longest."""
    order = batches.epoch(0)
    sizes = np.array([len(rows) for rows in order])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    widest = np.maximum.reduceat(batches.encoded.widths[np.concatenate(order)], starts)
    tokens = np.minimum(np.maximum(most // widest, 1), sizes) * widest
    return float(np.max(cost.fixed + tokens * (cost.linear + cost.square * widest)))


def _of_base(shard: ShardedBase) -> str:
    return (
        f"of the base's layers {size(shard.whole)}, of which each of {shard.ranks.size} ranks holds {size(shard.own)} "
        f"and gathers {size(shard.gathered)} at a time, and {size(shard.everywhere)} beside them on every rank"
    )


def _least_free(device: torch.device, shard: ShardedBase | None) -> int:
    return -largest_of(shard, -free_bytes(device))


def _largest_evaluation(
    foretold: float, attempt: Callable[[], object], device: torch.device, shard: ShardedBase | None
) -> float:
    """Bytes of the largest evaluation batch. On a CPU, where running out is a kill without an error, they are measured:
    hundreds of rows take other code paths, which need more, than the two rows of the prediction `foretold`."""
    if device.type != "cpu":
        return foretold
    free_memory()
    counted = _unless_short(lambda: largest_of(shard, peak_bytes(device, attempt)), shard)
    if counted is None:
        return foretold
    return float(counted) + (0 if shard is None else shard.gathered)


def _unless_short(measure: Callable[[], T], shard: ShardedBase | None) -> T | None:
    """The measurement; None if the memory does not suffice. With a sharded base that is an OutOfMemory, since the other
    ranks are in the same pass."""
    try:
        return measure()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if shard is not None:
            raise OutOfMemory("while a pass was measured", str(error).splitlines()[0].rstrip(".")) from None
    free_memory()  # outside of the handler, whose traceback holds the activations
    return None
