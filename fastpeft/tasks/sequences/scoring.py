"""Logits and loss of a whole split, for models with one output per row."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastpeft.data.batches import evaluation_batches, micro_batches
from fastpeft.device_memory import free_memory, is_out_of_memory
from fastpeft.ranks import current, joined_parts
from fastpeft.tasks.base import Shrink, Stop
from fastpeft.tasks.sequences.examples import Encoded, collate

RowLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits N x C in fp32, labels) -> the rows' losses, summed."""

_TIMED_BATCHES = 4


@dataclass(frozen=True)
class Answers:
    """Of every row of a split, in its order."""

    logits_NC: torch.Tensor
    """fp32, on the CPU."""
    mean_loss: float


@torch.inference_mode()
def answer_rows(
    model: nn.Module,
    encoded: Encoded,
    row_loss: RowLoss,
    max_tokens: int,
    device: torch.device,
    stop: Stop = lambda: False,
    shrink: Shrink | None = None,
) -> Answers | None:
    """Logits and mean loss over every row; None if `stop` said so before the end. Ranks share the batches.

    `shrink` is told the rows and the width of a batch that ran out of memory, and returns a smaller
    `max_tokens`: the rows that are left go on in such batches.
    Leaves the model in the mode it was in, and draws no random numbers.
    """
    training = model.training
    model.eval()
    parts: list[tuple[np.ndarray, torch.Tensor]] = []
    loss = torch.zeros((), dtype=torch.float64, device=device)
    try:
        groups = deque(current().share(evaluation_batches(encoded, max_tokens)))
        while groups:
            if stop():
                return _all_answers(None, loss, encoded)
            found = _answer_batch(model, encoded, row_loss, groups[0], device, may_fail=shrink is not None)
            if found is None:
                assert shrink is not None
                free_memory()
                max_tokens = shrink(len(groups[0]), int(encoded.widths[groups[0]].max()))
                groups = deque(micro_batches(encoded, np.concatenate(groups), max_tokens))
                continue
            parts.append((groups[0], found[0]))
            loss += found[1]
            groups.popleft()
    finally:
        model.train(training)
    return _all_answers(parts, loss, encoded)


def _all_answers(
    parts: list[tuple[np.ndarray, torch.Tensor]] | None, loss: torch.Tensor, encoded: Encoded
) -> Answers | None:
    """Of all ranks, in the order of the rows; None where one of them was stopped, and has None."""
    found = joined_parts(parts, loss)
    if found is None:
        return None
    order, logits_NC, total = found
    return Answers(torch.empty_like(logits_NC).index_copy_(0, order, logits_NC), total / len(encoded))


def _answer_batch(
    model: nn.Module, encoded: Encoded, row_loss: RowLoss, rows: np.ndarray, device: torch.device, may_fail: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """On the device. None if the memory did not suffice and it `may_fail`."""
    try:
        batch = collate(encoded, rows, device)
        logits = model(**batch.inputs).logits.float()
        return logits, row_loss(logits, batch.labels).double()
    except RuntimeError as error:
        if not (may_fail and is_out_of_memory(error)):
            raise
        return None


def time_rows(model: nn.Module, encoded: Encoded, max_tokens: int, device: torch.device) -> float:
    """Seconds that `answer_rows` is expected to take, from a few batches spread over all lengths."""
    groups = evaluation_batches(encoded, max_tokens)
    chosen = [groups[i * (len(groups) - 1) // max(1, _TIMED_BATCHES - 1)] for i in range(_TIMED_BATCHES)]

    def area(rows: np.ndarray) -> int:
        return len(rows) * int(encoded.lengths[rows].max())

    seconds = []
    with torch.inference_mode():
        for rows in [chosen[-1], *chosen]:  # the first is a warm-up
            start = time.perf_counter()
            batch = collate(encoded, rows, device)
            model(**batch.inputs).logits.sum().item()
            seconds.append((time.perf_counter() - start) / area(rows))
    return sum(seconds[1:]) / _TIMED_BATCHES * sum(map(area, groups))
