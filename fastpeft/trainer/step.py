"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from fastpeft.adapters import Adapter
from fastpeft.data import Batch
from fastpeft.objectives import BatchLoss
from fastpeft.schedules import Schedule
from fastpeft.signals import Measured, Need, Rates, Signals
from fastpeft.trainer.optim import Optimizer

Loss = Callable[[nn.Module, Batch, int, Collection[Need]], BatchLoss]
"""As Objective.loss."""


def train_step(
    adapter: Adapter,
    schedule: Schedule,
    optimizer: Optimizer,
    loss: Loss,
    batches: Iterable[Batch],
    num_items: int,
    progress: float,
    measured: Measured | None = None,
    needs: Collection[Need] = (),
) -> tuple[Signals, Rates]:
    """Forward and backward over the micro-batches of one batch, then the update.

    Nothing here waits for the device: what is measured stays there, in the Signals. The schedule sees `measured`, what
    the step before this one did.
    """
    signals = forward_backward(adapter, loss, batches, num_items, needs, optimizer.loss_scale)
    adapter.after_backward(signals, progress)
    rates = schedule.rates(measured, progress)
    optimizer.step(signals, rates)
    adapter.after_step(signals, rates, progress)
    return signals, rates


def forward_backward(
    adapter: Adapter,
    loss: Loss,
    batches: Iterable[Batch],
    num_items: int,
    needs: Collection[Need] = (),
    loss_scale: torch.Tensor | None = None,
) -> Signals:
    """Gradient of the mean loss over the `num_items` of all micro-batches, unscaled, in the flat buffer."""
    adapter.flat.grad.zero_()
    total = torch.zeros((), device=adapter.flat.data.device)
    statistics: dict[str, torch.Tensor] = {}
    num_tokens = 0
    for batch in batches:
        part = loss(adapter.model, batch, num_items, needs)
        (part.loss if loss_scale is None else part.loss * loss_scale).backward()
        total += part.loss.detach()
        for name, value in part.statistics.items():
            statistics[name] = statistics[name] + value if name in statistics else value
        num_tokens += batch.num_tokens
    if loss_scale is not None:
        adapter.flat.grad.div_(loss_scale)
    return Signals(loss=total, num_tokens=num_tokens, statistics=statistics)
