"""The few shapes of batches that a step is captured for, and the tensors that its replays read.

Padding on the right changes no row: encoders have a mask, decoders see nothing behind a token, and positions without a
label count for nothing. So a batch is padded to one of a few widths, and a step is the same up to rounding. Rows one
behind another are filled up to one of a few counts of tokens, with texts of padding that nobody reads.

Shapes: N rows, L tokens of a bucket's rows, M places with a label at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastpeft.data.batches import IGNORE, Batch, Batches, Packing, TokenRows
from fastpeft.kernels.sequences import Sequences
from fastpeft.tasks import Task
from fastpeft.tasks.base import Count

MOST_WIDTHS = 10
LOOKED_AT_EPOCHS = 2
"""From whose batches the places with a label are counted. A later batch with more of them is not replayed."""
PLACES_MULTIPLE = 64
MOST_LONGEST = 3
"""Lengths of the longest text that packings tell apart: what a kernel's grid is as large as, and DeBERTa's table of
positions twice as long. With each count of tokens that they occur with, they are a bucket."""
TOKENS_MULTIPLE = {"cuda": 64, "cpu": 1}
"""What the tokens of a packing are rounded up to: of a GPU's tiles."""


@dataclass(frozen=True)
class Bucket:
    """What batches have in common that one captured step can take."""

    shape: tuple[int, int] | Packing
    """(rows, width) of padded batches."""
    num_items: int | None
    """What the loss is a mean over, where that is the same for all; None where each batch has its own."""
    num_places: int
    """M, where `num_items` is None: a batch with more labels does not fit."""

    @property
    def num_tokens(self) -> int:
        """N * L, or T."""
        return self.shape.num_tokens if isinstance(self.shape, Packing) else self.shape[0] * self.shape[1]

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


def in_few_shapes(batches: Batches, multiple: int = 1) -> TokenRows:
    """Their rows, whose batches have few widths; or packings, whose tokens are multiples of this."""
    free = replace(batches.encoded, only_widths=(), packings=())
    if free.varlen:
        lengths = [free.text_lengths(rows) for rows in _full_batches(batches)]
        return replace(free, packings=choose_packings(lengths, batches.batch_size, multiple))
    widths = np.array([free.shape(rows)[1] for rows in batches.epoch(0)])
    return replace(free, only_widths=choose_widths(widths, MOST_WIDTHS))


def choose_packings(batches: list[np.ndarray], num_rows: int, multiple: int = 1) -> tuple[Packing, ...]:
    """That take these batches, given the lengths of each one's texts, the fewest tokens first.

    A batch gets one text of padding at least, and as many as are no longer than its longest own text may be.
    """
    if not batches:
        return ()
    counts, tokens, longest = (np.array([f(b) for b in batches]) for f in (len, np.sum, np.max))
    bounds = np.array(choose_widths(longest, MOST_LONGEST))
    longest = bounds[np.searchsorted(bounds, longest)]
    num_texts = int(counts.max()) + 1
    while True:
        texts = num_texts - counts
        sizes = -(-(tokens + texts) // multiple) * multiple
        chosen = np.array(choose_widths(sizes, MOST_WIDTHS))
        filled = chosen[np.searchsorted(chosen, sizes)]
        short = -(-(filled - tokens) // longest) - texts  # of texts to fill it up with
        if short.max() <= 0:
            break
        num_texts += int(short.max())
    found = sorted(set(zip(filled.tolist(), longest.tolist())))
    return tuple(Packing(num_rows, num_texts, size, most) for size, most in found)


def shape_of(encoded: TokenRows, rows: np.ndarray) -> tuple[int, int] | Packing | None:
    """What a captured step of a batch of them has to be of; None where there is none."""
    return encoded.packing(rows) if encoded.varlen else encoded.shape(rows)


def find_buckets(task: Task, batches: Batches) -> dict[Bucket, np.ndarray]:
    """Of full batches, with rows to try each one with, the largest first: what it needs will do for the others."""
    found: dict[tuple[int, int] | Packing, list[np.ndarray]] = {}
    for rows in _full_batches(batches):
        shape = shape_of(batches.encoded, rows)
        if shape is not None:
            found.setdefault(shape, []).append(rows)
    buckets = {}
    for shape in sorted(found, key=_size, reverse=True):
        items = [task.num_items(rows) for rows in found[shape]]
        most, (size, _) = max(items), _size(shape)
        places = min(size, -(-most // PLACES_MULTIPLE) * PLACES_MULTIPLE)
        same = min(items) == most == batches.batch_size
        bucket = Bucket(shape, most if same else None, places)
        buckets[bucket] = found[shape][int(np.argmax(items))]
    return buckets


def _size(shape: tuple[int, int] | Packing) -> tuple[int, int]:
    """(tokens, those of the longest text)."""
    if isinstance(shape, Packing):
        return shape.num_tokens, shape.longest
    return shape[0] * shape[1], shape[1]


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
            sample: one that the bucket takes; gives names, dtypes and device, and of rows one behind another all that
                the host knows of them.
        """
        self._bucket = bucket
        self._tensors = {name: tensor.clone() for name, tensor in tensors_of(sample).items()}
        self._has_places = sample.rows is not None
        self._num_items = torch.zeros((), dtype=torch.int64, device=sample.labels.device)
        self._sequences, self._has_mask = sample.sequences, _MASK in sample.inputs
        assert sample.sequences is None or sample.sequences.lengths is None, "a replay has other ones"

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
        labels, sequences, rows = inputs.pop(_LABELS), self._sequences, None
        if sequences is not None:  # anew, so that nothing is kept that was made of other lengths
            sequences = Sequences(inputs.pop(_ENDS), sequences.num_tokens, sequences.longest, sequences.num_read)
            inputs |= {_MASK: sequences} if self._has_mask else {}
        if self._has_places:
            is_free = labels.flatten() == IGNORE
            rows = is_free.to(torch.uint8).argsort(stable=True)[: self._bucket.num_places]
        return Batch(inputs, labels, num_tokens=0, rows=rows, sequences=sequences)


_LABELS, _ENDS, _MASK = "labels of the batch", "cu_seqlens of the batch", "attention_mask"


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    found = {**batch.inputs, _LABELS: batch.labels}
    if batch.sequences is not None:
        found |= {_ENDS: batch.sequences.cu_seqlens}
        found.pop(_MASK, None)
    return found
