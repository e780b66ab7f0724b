"""The few shapes of batches that a step is captured for, and the tensors that its replays read.

Padding on the right changes no row: encoders have a mask, decoders see nothing behind a token, and positions without a
label count for nothing. So a batch is padded to one of a few widths, and a step is the same up to rounding.

Shapes: N rows, L tokens of a bucket's rows, M places with a label at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastpeft.data.batches import IGNORE, Batch, Batches, TokenRows
from fastpeft.tasks import Task
from fastpeft.tasks.base import Count

MOST_WIDTHS = 10
LOOKED_AT_EPOCHS = 2
"""From whose batches the places with a label are counted. A later batch with more of them is not replayed."""
PLACES_MULTIPLE = 64


@dataclass(frozen=True)
class Bucket:
    """What batches have in common that one captured step can take."""

    num_rows: int
    width: int
    num_items: int | None
    """What the loss is a mean over, where that is the same for all; None where each batch has its own."""
    num_places: int
    """M, where `num_items` is None: a batch with more labels does not fit."""

    def takes(self, num_items: int) -> bool:
        return num_items <= self.num_places if self.num_items is None else num_items == self.num_items


def choose_widths(widths: np.ndarray, most: int) -> tuple[int, ...]:
    """Those to pad to so that batches of `widths` become the fewest tokens: `most` of them or fewer, the widest among
    them, the narrowest first.

    A shortest path over the distinct widths: up to one of them is cheapest with j chosen from the cheapest with j - 1.
    """
    distinct, counts = np.unique(widths, return_counts=True)
    num = len(distinct)
    cost = np.full((num, num), np.inf)  # of padding to width i all that are wider than the one before `first`
    for i in range(num):
        padding = counts[: i + 1] * (distinct[i] - distinct[: i + 1])
        cost[: i + 1, i] = np.cumsum(padding[::-1])[::-1]
    best, came_from = cost[0].copy(), []
    for _ in range(1, min(most, num)):
        reached = best[:-1, None] + cost[1:]
        came_from.append(np.concatenate([[-1], reached[:, 1:].argmin(0)]))
        best = np.concatenate([[best[0]], reached[:, 1:].min(0)])
    chosen, at = [num - 1], num - 1
    for before in reversed(came_from):
        at = int(before[at])
        if at < 0:
            break
        chosen.append(at)
    return tuple(int(distinct[i]) for i in reversed(chosen))


def in_few_widths(batches: Batches) -> TokenRows:
    """Their rows, whose batches have few widths."""
    free = replace(batches.encoded, only_widths=())
    widths = np.array([free.shape(rows)[1] for rows in batches.epoch(0)])
    return replace(free, only_widths=choose_widths(widths, MOST_WIDTHS))


def find_buckets(task: Task, batches: Batches) -> dict[Bucket, np.ndarray]:
    """Of full batches, with rows to try each one with, the widest first: what it needs will do for the others."""
    found: dict[int, list[np.ndarray]] = {}
    for rows in _full_batches(batches):
        found.setdefault(batches.encoded.shape(rows)[1], []).append(rows)
    buckets = {}
    for width in sorted(found, reverse=True):
        items = [task.num_items(rows) for rows in found[width]]
        most, size = max(items), batches.batch_size * width
        places = min(size, -(-most // PLACES_MULTIPLE) * PLACES_MULTIPLE)
        same = min(items) == most == batches.batch_size
        bucket = Bucket(batches.batch_size, width, most if same else None, places)
        buckets[bucket] = found[width][int(np.argmax(items))]
    return buckets


def _full_batches(batches: Batches) -> Iterator[np.ndarray]:
    for position in range(LOOKED_AT_EPOCHS * len(batches)):
        rows = batches.rows(position)
        if len(rows) == batches.batch_size:
            yield rows


class StaticBatch:
    """A bucket's batch, whose tensors stay where they are while batch after batch is copied into them."""

    def __init__(self, bucket: Bucket, sample: Batch) -> None:
        """
        Args:
            sample: one that the bucket takes; gives names, dtypes and device.
        """
        self._bucket = bucket
        self._tensors = tensors_of(sample)
        self._tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._has_places = sample.rows is not None
        self._num_items = torch.zeros((), dtype=torch.int64, device=sample.labels.device)

    def fill(self, batch: Batch, num_items: int) -> None:
        """Nothing waits for the device."""
        for name, tensor in tensors_of(batch).items():
            self._tensors[name].copy_(tensor, non_blocking=True)
        self._num_items.fill_(num_items)

    @property
    def num_items(self) -> Count:
        return self._num_items if self._bucket.num_items is None else self._bucket.num_items

    def batch(self) -> Batch:
        """Within the step: the places with a label come first, in order, and behind them others, up to M in all."""
        inputs: dict[str, Any] = dict(self._tensors)
        labels = inputs.pop(_LABELS)
        rows = None
        if self._has_places:
            is_free = labels.flatten() == IGNORE
            rows = is_free.to(torch.uint8).argsort(stable=True)[: self._bucket.num_places]
        return Batch(inputs, labels, num_tokens=0, rows=rows)


_LABELS = "labels of the batch"


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    assert batch.sequences is None, "rows without padding have no bucket"
    return {**batch.inputs, _LABELS: batch.labels}
