"""Metrics of a classifier on a whole split."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import Encoded, collate, evaluation_batches, micro_batches
from fastpeft.data.memory import free_memory, is_out_of_memory


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
    shrink: Callable[[int, int], int] | None = None,
) -> Score | None:
    """Accuracy and loss over every row; None if `stop` said so before the end.

    `shrink` is told the rows and the width of a batch that ran out of memory, and returns a smaller
    `max_tokens`: the rows that are left go on in such batches.
    Leaves the model in the mode it was in, and draws no random numbers.
    """
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    try:
        groups = deque(evaluation_batches(encoded, max_tokens))
        while groups:
            if stop():
                return None
            sums = _sums(model, encoded, groups[0], device, shrink is not None)
            if sums is None:
                assert shrink is not None
                free_memory()
                max_tokens = shrink(len(groups[0]), int(encoded.widths[groups[0]].max()))
                groups = deque(micro_batches(encoded, np.concatenate(groups), max_tokens))
                continue
            correct += sums[0]
            loss += sums[1]
            groups.popleft()
    finally:
        model.train(training)
    return Score(int(correct) / len(encoded), float(loss) / len(encoded), len(encoded))


def _sums(
    model: nn.Module, encoded: Encoded, rows: np.ndarray, device: torch.device, may_fail: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Correct rows and their loss, on the device; None if the memory did not suffice and it `may_fail`."""
    try:
        batch = collate(encoded, rows, device)
        logits = model(**batch.inputs).logits.float()
        loss = nn.functional.cross_entropy(logits, batch.labels, reduction="sum").double()
        return (logits.argmax(-1) == batch.labels).sum(), loss
    except RuntimeError as error:
        if not (may_fail and is_out_of_memory(error)):
            raise
        return None
