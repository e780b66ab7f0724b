"""Metrics of a classifier on a whole split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastpeft.data.batches import Encoded, collate, evaluation_batches


@dataclass(frozen=True)
class Score:
    value: float
    """Share of rows whose highest logit is the label, 0 to 1."""
    loss: float
    """Mean cross-entropy in nats."""
    num_rows: int


@torch.inference_mode()
def score(
    model: nn.Module,
    encoded: Encoded,
    max_tokens: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Score | None:
    """Accuracy and loss over every row; None if `stop` said so before the end.

    Leaves the model in the mode it was in, and draws no random numbers.
    """
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for rows in evaluation_batches(encoded, max_tokens):
            if stop():
                return None
            batch = collate(encoded, rows, device)
            logits = model(**batch.inputs).logits.float()
            correct += (logits.argmax(-1) == batch.labels).sum()
            loss += nn.functional.cross_entropy(logits, batch.labels, reduction="sum").double()
    finally:
        model.train(training)
    return Score(int(correct) / len(encoded), float(loss) / len(encoded), len(encoded))
