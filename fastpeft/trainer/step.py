"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import torch
from torch import nn

from fastpeft.adapters import Adapter
from fastpeft.adapters.flat import FlatParameters
from fastpeft.data.batches import Batch
from fastpeft.signals import Measured, Need, Rates, Signals
from fastpeft.tasks.base import BatchLoss, Count
from fastpeft.trainer.optim import Optimizer
from fastpeft.trainer.probes.hooks import NO_PROBES, NoProbes, Probes

Loss = Callable[[nn.Module, Batch, Count, Collection[Need]], BatchLoss]
"""As Task.loss."""
Repeat = Callable[[Callable[[], Signals]], Signals]
"""Runs the passes over a batch, and repeats them after an out-of-memory error, as MicroBatches.until_it_fits."""


Reduce = Callable[[FlatParameters, Signals], Signals]
"""Sums the gradient, in place, and the loss over the ranks, as MicroBatches.reduce."""


class RateSource(Protocol):
    """The part of Schedule that a step uses."""

    def rates(self, measured: Measured | None, progress: float) -> Rates: ...


def once(passes: Callable[[], Signals]) -> Signals:
    return passes()


def alone(flat: FlatParameters, signals: Signals) -> Signals:
    """The Reduce of a single rank, which has nothing to sum."""
    return signals


def train_step(
    adapter: Adapter,
    schedule: RateSource,
    optimizer: Optimizer,
    loss: Loss,
    batches: Iterable[Batch],
    num_items: Count,
    progress: float,
    probes: Probes | NoProbes = NO_PROBES,
    repeat: Repeat = once,
    reduce: Reduce = alone,
) -> tuple[Signals, Rates]:
    """Forward and backward over the micro-batches of one batch, then the update.

    Nothing here waits for this step's measurements. They stay on the device, in the Signals, and `probes` give the
    schedule those of the previous step. `batches` are iterated more than once if the passes are repeated, or if the
    probes take a Hessian-vector product.
    """
    scale = optimizer.loss_scale
    signals = repeat(lambda: forward_backward(adapter, loss, batches, num_items, scale, probes, reduce))
    adapter.after_backward(signals, progress)
    rates = schedule.rates(probes.take_measured(), progress)
    with probes.around_update(signals, rates):
        optimizer.clip_guard_and_update(signals, rates)
        adapter.after_step(signals, rates, progress)
    return signals, rates


def forward_backward(
    adapter: Adapter,
    loss: Loss,
    batches: Iterable[Batch],
    num_items: Count,
    loss_scale: torch.Tensor | None = None,
    probes: Probes | NoProbes = NO_PROBES,
    reduce: Reduce = alone,
) -> Signals:
    """Leave the gradient of the mean loss over the `num_items` of all ranks in the flat buffer, with the loss scale
    divided out. Returns the loss and its statistics, summed over the micro-batches and ranks."""
    probes.before_passes(lambda: forward_backward(adapter, loss, batches, num_items, loss_scale, reduce=reduce))
    adapter.flat.grad.zero_()
    adapter.discard_pass()
    total = torch.zeros((), device=adapter.flat.data.device)
    statistics: dict[str, torch.Tensor] = {}
    num_tokens = 0
    for batch in batches:
        with probes.around_pass(batch):
            part = loss(adapter.model, batch, num_items, probes.needs)
            if not batch.counts:
                part = BatchLoss(0 * part.loss, {})
            (part.loss if loss_scale is None else part.loss * loss_scale).backward()
        total += part.loss.detach()
        for name, value in part.statistics.items():
            statistics[name] = statistics[name] + value if name in statistics else value
        num_tokens += batch.num_tokens
    if loss_scale is not None:
        adapter.flat.grad.div_(loss_scale)
    signals = reduce(adapter.flat, Signals(loss=total, num_tokens=num_tokens, statistics=statistics))
    probes.after_passes(loss_scale)
    return signals
