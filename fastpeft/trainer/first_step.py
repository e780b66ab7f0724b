"""Progress of a process's first step while it runs.

The first step may take minutes, and the run's speed is unknown until it ends. So it reports how many tokens are done,
when the step will end, and what the whole run will take at that pace. Later steps report nothing of this.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fastpeft.budget import BudgetClock
from fastpeft.data.batches import Batch, Batches
from fastpeft.models.checkpointed_layers import blocks_of
from fastpeft.phases import EVERY_S, Tell
from fastpeft.trainer.build import Job

BACKWARD = 1.5
"""Cost of a block's backward pass, in forward passes. With frozen weights it computes the inputs' gradients only, and
attention's cost twice its forward pass. Used for progress within a micro-batch."""


class FirstStep(AbstractContextManager):
    """Iterates over the micro-batches of a step, as often as the step does, and reports progress.

    On the CPU it also counts the blocks that a pass has been through, since one micro-batch may be the whole step. A
    GPU lags behind the launches, so this step synchronizes after each micro-batch.

    Args:
        num_tokens: tokens of this rank's part of the step.
    """

    def __init__(self, job: Job, batches: Iterable[Batch], num_tokens: int, tell: Tell) -> None:
        self._job, self._batches, self._num_tokens, self._tell = job, batches, num_tokens, tell
        self._blocks = [] if job.device.type == "cuda" else blocks_of(job.adapter.model)
        self._hooks = [block.register_forward_hook(self._after_forward) for block in self._blocks]
        self._text = f"step {job.clock.steps + 1:,} under way"
        self._began = self._told_at = time.perf_counter()
        self._estimated = False
        self._through = self._in_flight = 0
        self._passed = 0.0
        self._say()

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __iter__(self) -> Iterator[Batch]:
        self._through = 0
        for batch in self._batches:
            self._in_flight, self._passed = batch.num_tokens, 0.0
            yield batch
            if self._job.device.type == "cuda":
                torch.cuda.synchronize(self._job.device)
            self._through += batch.num_tokens
            self._in_flight = 0
            self._say_if_due()
        if not self._estimated:
            self._say()

    def _after_forward(self, block: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._pass(1.0)
        if torch.is_tensor(hidden) and hidden.requires_grad:
            hidden.register_hook(self._after_backward)

    def _after_backward(self, grad: torch.Tensor) -> None:
        self._pass(BACKWARD)

    def _pass(self, cost: float) -> None:
        """Count one block's forward or backward pass."""
        self._passed += cost / (1 + BACKWARD) / len(self._blocks)
        self._say_if_due()

    def _say_if_due(self) -> None:
        if time.perf_counter() - self._told_at >= EVERY_S:
            self._say()

    def _say(self) -> None:
        self._told_at = time.perf_counter()
        done = self._through + int(self._in_flight * min(1.0, self._passed))
        counts = {"done": done, "total": self._num_tokens, "unit": "tokens"}
        self._tell(name="first_step", text=self._text, **counts, **self._estimates(done))

    def _estimates(self, done: int) -> dict[str, Any]:
        """Seconds to the end of the step; seconds and steps to the end of the run, without evaluations."""
        if not done:
            return {}
        self._estimated = True
        seconds_per_token = (self._told_at - self._began) / done
        left_s = seconds_per_token * max(0, self._num_tokens - done)
        job = self._job
        seconds, steps = whole(job.clock, job.batches, seconds_per_token / job.ranks.size)
        found = {"left_s": left_s, "whole_s": seconds, "whole_steps": steps}
        return {name: round(value, 1) for name, value in found.items() if value is not None}


def whole(clock: BudgetClock, batches: Batches, seconds_per_token: float) -> tuple[float | None, int | None]:
    """(seconds, steps) of training that the budget still allows; (None, None) for a budget in joules."""
    tokens_per_step = float(batches.encoded.lengths.sum()) / len(batches)
    step_s, left = seconds_per_token * tokens_per_step, clock.budget.limit - clock.spent
    if clock.budget.kind == "joules":
        return None, None
    if clock.budget.kind == "seconds":
        return left, int(left / step_s)
    steps = left if clock.budget.kind == "steps" else left / tokens_per_step
    return steps * step_s, int(steps)
