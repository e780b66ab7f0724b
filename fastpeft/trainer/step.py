"""One optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastpeft.adapters import Adapter
from fastpeft.data import Batch
from fastpeft.schedules import Schedule
from fastpeft.signals import Measured, Rates, Signals
from fastpeft.trainer.optim import FlatAdamW


def train_step(
    adapter: Adapter,
    schedule: Schedule,
    optimizer: FlatAdamW,
    batches: Iterable[Batch],
    num_rows: int,
    progress: float,
    measured: Measured | None = None,
) -> tuple[Signals, Rates]:
    """Forward and backward over the micro-batches of one batch, then the update.

    Nothing here waits for the device: what is measured stays there, in the Signals. The schedule sees `measured`, what
    the step before this one did.
    """
    signals = forward_backward(adapter, batches, num_rows, optimizer.loss_scale)
    adapter.after_backward(signals, progress)
    rates = schedule.rates(measured, progress)
    optimizer.step(signals, rates)
    adapter.after_step(signals, rates, progress)
    return signals, rates


def forward_backward(
    adapter: Adapter,
    batches: Iterable[Batch],
    num_rows: int,
    loss_scale: torch.Tensor | None = None,
) -> Signals:
    """Gradient of the mean loss over `num_rows` rows, unscaled, in the flat buffer."""
    adapter.flat.grad.zero_()
    total = torch.zeros((), device=adapter.flat.data.device)
    num_tokens = 0
    for batch in batches:
        logits = adapter.model(**batch.inputs).logits.float()
        loss = nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / num_rows
        (loss if loss_scale is None else loss * loss_scale).backward()
        total += loss.detach()
        num_tokens += batch.num_tokens
    if loss_scale is not None:
        adapter.flat.grad.div_(loss_scale)
    return Signals(loss=total, num_tokens=num_tokens)
