"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from fastpeft.adapters import Adapter
from fastpeft.data.batches import Batch
from fastpeft.schedules import Schedule
from fastpeft.signals import Need, Rates, Signals
from fastpeft.tasks.base import BatchLoss
from fastpeft.trainer.optim import Optimizer
from fastpeft.trainer.probes.hooks import IDLE, Probes

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
    probes: Probes = IDLE,
) -> tuple[Signals, Rates]:
    """Forward and backward over the micro-batches of one batch, then the update.

    Nothing here waits for what this step measures: that stays on the device, in the Signals, and `probes` tell the
    schedule of the step before this one. Where they take a product, `batches` are iterated more than once.
    """
    scale = optimizer.loss_scale
    probes.before_passes(lambda: forward_backward(adapter, loss, batches, num_items, loss_scale=scale))
    signals = forward_backward(adapter, loss, batches, num_items, loss_scale=scale, probes=probes)
    adapter.after_backward(signals, progress)
    rates = schedule.rates(probes.measured(), progress)
    probes.before_update()
    optimizer.step(signals, rates, probes.reduces)
    adapter.after_step(signals, rates, progress)
    probes.after_step(signals, rates)
    return signals, rates


def forward_backward(
    adapter: Adapter,
    loss: Loss,
    batches: Iterable[Batch],
    num_items: int,
    loss_scale: torch.Tensor | None = None,
    probes: Probes = IDLE,
) -> Signals:
    """Gradient of the mean loss over the `num_items` of all micro-batches, unscaled, in the flat buffer."""
    adapter.flat.grad.zero_()
    total = torch.zeros((), device=adapter.flat.data.device)
    statistics: dict[str, torch.Tensor] = {}
    num_tokens = 0
    for batch in batches:
        probes.before_pass(batch)
        part = loss(adapter.model, batch, num_items, probes.needs)
        (part.loss if loss_scale is None else part.loss * loss_scale).backward()
        probes.after_pass()
        total += part.loss.detach()
        for name, value in part.statistics.items():
            statistics[name] = statistics[name] + value if name in statistics else value
        num_tokens += batch.num_tokens
    if loss_scale is not None:
        adapter.flat.grad.div_(loss_scale)
    probes.after_passes(loss_scale)
    return Signals(loss=total, num_tokens=num_tokens, statistics=statistics)
