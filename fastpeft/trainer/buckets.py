"""The few batch shapes that a step is captured for, and the tensors that its replays read.

Padding on the right changes no row's result: encoders have a mask, decoders do not attend to later tokens, and
positions without a label do not enter the loss. So a batch is padded to one of a few widths, and a step is the same up
to rounding. Packed rows (varlen) are filled up to one of a few token counts with sequences of padding.

Shapes: N rows, L tokens of a bucket's rows, M labelled positions at most.
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
"""Epochs whose batches determine M. A later batch with more labelled positions is not replayed."""
PLACES_MULTIPLE = 64
MOST_LONGEST = 3
"""How many values packings may have for the length of the longest text, which sets the size of a kernel's grid and half
the length of DeBERTa's position table. Each pair of it and a token count is a bucket."""
TOKENS_MULTIPLE = {"cuda": 64, "cpu": 1}
"""Token counts of packings are rounded up to a multiple of this; on a GPU to whole tiles."""


@dataclass(frozen=True)
class Bucket:
    """What all batches of one captured step have in common."""

    shape: tuple[int, int] | Packing
    """(rows, width) of padded batches; the Packing of varlen batches."""
    num_items: int | None
    """Number of items that the loss is a mean over, if it is the same for all batches; None if it varies."""
    num_places: int
    """M, used where `num_items` is None: a batch with more labels does not fit."""

    @property
    def num_tokens(self) -> int:
        """N * L, or the token count of a packing."""
        return self.shape.num_tokens if isinstance(self.shape, Packing) else self.shape[0] * self.shape[1]

    def takes(self, num_items: int) -> bool:
        return num_items <= self.num_places if self.num_items is None else num_items == self.num_items


def choose_widths(widths: np.ndarray, most: int) -> tuple[int, ...]:
    """At most `most` of `widths`, ascending and with the widest, that minimise the tokens of batches padded to them.

    A shortest path over the distinct widths: the best j choices up to a width extend the best j - 1 up to a lower one.
    """
    distinct, counts = np.unique(widths, return_counts=True)
    num = len(distinct)
    cost = np.full((num, num), np.inf)  # [first, i]: padding tokens if widths first..i are all padded to width i
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
    """The rows of `batches`, restricted to few widths, or to few packings whose token counts are multiples of
    `multiple`."""
    free = replace(batches.encoded, only_widths=(), packings=())
    if free.varlen:
        lengths = [free.text_lengths(rows) for rows in _full_batches(batches)]
        return replace(free, packings=choose_packings(lengths, batches.batch_size, multiple))
    widths = np.array([free.shape(rows)[1] for rows in batches.epoch(0)])
    return replace(free, only_widths=choose_widths(widths, MOST_WIDTHS))


def choose_packings(batches: list[np.ndarray], num_rows: int, multiple: int = 1) -> tuple[Packing, ...]:
    """Packings that hold these batches, fewest tokens first.

    A batch gets at least one text of padding, and as many as needed for none to be longer than its longest text may be.

    Args:
        batches: the lengths of each batch's texts, in tokens.
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
        short = -(-(filled - tokens) // longest) - texts  # texts of padding that are still missing
        if short.max() <= 0:
            break
        num_texts += int(short.max())
    found = sorted(set(zip(filled.tolist(), longest.tolist())))
    return tuple(Packing(num_rows, num_texts, size, most) for size, most in found)


def shape_of(encoded: TokenRows, rows: np.ndarray) -> tuple[int, int] | Packing | None:
    """The bucket shape that a batch of `rows` needs; None if no packing holds it."""
    return encoded.packing(rows) if encoded.varlen else encoded.shape(rows)


def find_buckets(task: Task, batches: Batches) -> dict[Bucket, np.ndarray]:
    """The buckets of full batches, each with sample rows. The largest comes first: its memory serves the others too."""
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
    """(tokens, tokens of the longest text)."""
    if isinstance(shape, Packing):
        return shape.num_tokens, shape.longest
    return shape[0] * shape[1], shape[1]


def _full_batches(batches: Batches) -> Iterator[np.ndarray]:
    for position in range(LOOKED_AT_EPOCHS * len(batches)):
        rows = batches.rows(position)
        if len(rows) == batches.batch_size:
            yield rows


class StaticBatch:
    """A bucket's batch, whose tensors keep their addresses while each new batch is copied into them."""

    def __init__(self, bucket: Bucket, sample: Batch) -> None:
        """
        Args:
            sample: a batch of this bucket. It gives names, dtypes and device, and for varlen rows what the host knows
                of the sequences.
        """
        self._bucket = bucket
        self._tensors = {name: tensor.clone() for name, tensor in tensors_of(sample).items()}
        self._has_places = sample.rows is not None
        self._num_items = torch.zeros((), dtype=torch.int64, device=sample.labels.device)
        self._sequences, self._has_mask = sample.sequences, _MASK in sample.inputs
        assert sample.sequences is None or sample.sequences.lengths is None, "a replay has other ones"

    def fill(self, batch: Batch, num_items: int) -> None:
        """Copy `batch` in, without waiting for the device."""
        for name, tensor in tensors_of(batch).items():
            self._tensors[name].copy_(tensor, non_blocking=True)
        self._num_items.fill_(num_items)

    @property
    def num_items(self) -> Count:
        return self._num_items if self._bucket.num_items is None else self._bucket.num_items

    def batch(self) -> Batch:
        """The batch inside the captured step. `rows` has the labelled positions in order, then others, up to M."""
        inputs: dict[str, Any] = dict(self._tensors)
        labels, sequences, rows = inputs.pop(_LABELS), self._sequences, None
        if sequences is not None:  # a new object, so that nothing cached from other lengths is used
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
