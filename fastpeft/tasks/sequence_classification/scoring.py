"""Metrics of a classifier on a whole split."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import Encoded, collate, evaluation_batches, micro_batches
from fastpeft.device_memory import free_memory, is_out_of_memory


@dataclass(frozen=True)
class Score:
    value: float
    """The task's metric, 0 to 1."""
    loss: float
    """Mean cross-entropy in nats."""
    num_rows: int
    more: dict[str, float] = field(default_factory=dict)
    """Further metrics, 0 to 1, by name."""
    decode_s: float | None = None
    """Seconds spent decoding, where answers are decoded; they are on the budget's clock."""
    decode_tokens: int | None = None


@torch.inference_mode()
def score(
    model: nn.Module,
    encoded: Encoded,
    max_tokens: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    shrink: Callable[[int, int], int] | None = None,
    f1_class: int | None = None,
) -> Score | None:
    """Accuracy and loss over every row, and F1 of class `f1_class`; None if `stop` said so before the end.

    `shrink` is told the rows and the width of a batch that ran out of memory, and returns a smaller
    `max_tokens`: the rows that are left go on in such batches.
    F1 is 2 TP / (2 TP + FP + FN), and 0 where the class neither is there nor is predicted.
    Leaves the model in the mode it was in, and draws no random numbers.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    try:
        groups = deque(evaluation_batches(encoded, max_tokens))
        while groups:
            if stop():
                return None
            sums = _sums(model, encoded, groups[0], device, -1 if f1_class is None else f1_class, shrink is not None)
            if sums is None:
                assert shrink is not None
                free_memory()
                max_tokens = shrink(len(groups[0]), int(encoded.widths[groups[0]].max()))
                groups = deque(micro_batches(encoded, np.concatenate(groups), max_tokens))
                continue
            counts += sums[0]
            loss += sums[1]
            groups.popleft()
    finally:
        model.train(training)
    correct, hits, named = counts.tolist()
    more = {} if f1_class is None else {"f1": 2 * hits / max(1, named)}
    return Score(correct / len(encoded), float(loss) / len(encoded), len(encoded), more)


def _sums(
    model: nn.Module, encoded: Encoded, rows: np.ndarray, device: torch.device, f1_class: int, may_fail: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """On the device: correct rows, TP, and TP + FP + TP + FN of `f1_class`; and the loss. None if the memory did not
    suffice and it `may_fail`."""
    try:
        batch = collate(encoded, rows, device)
        logits = model(**batch.inputs).logits.float()
        loss = nn.functional.cross_entropy(logits, batch.labels, reduction="sum").double()
        predicted = logits.argmax(-1)
        is_class, says_class = batch.labels == f1_class, predicted == f1_class
        counts = (predicted == batch.labels).sum(), (is_class & says_class).sum(), is_class.sum() + says_class.sum()
        return torch.stack(counts), loss
    except RuntimeError as error:
        if not (may_fail and is_out_of_memory(error)):
            raise
        return None
