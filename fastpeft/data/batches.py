"""Token batches, drawn at random or of similar length, in an order that is a pure function of (seed, epoch).

Shapes: N rows, L tokens of the longest row of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import torch

from fastpeft.kernels.sequences import Sequences

POOL_BATCHES = 64
"""Where batches are grouped by length, rows are sorted inside pools of so many batches: long enough that a batch holds
rows of nearly one length, short enough that every part of an epoch sees every length."""

# On a GPU, widths are rounded up to this: few distinct shapes, for which libraries build kernels only once.
WIDTH_MULTIPLE = 8

# The label of a position where nothing is to be predicted.
IGNORE = -100


@dataclass(frozen=True)
class Packing:
    """What batches of rows one behind another are filled up to, so that many of them have one shape.

    Behind a batch's own texts come texts of padding tokens, which nobody reads: one at least, none of them longer than
    `longest`, so that no grid of a kernel has to be larger for them.
    """

    num_rows: int
    """Rows of a batch."""
    num_texts: int
    """Texts, those of padding included."""
    num_tokens: int
    longest: int
    """Tokens of a text, at most."""

    def takes(self, lengths: np.ndarray) -> bool:
        """A batch of texts of these lengths."""
        texts, tokens = self.num_texts - len(lengths), self.num_tokens - int(lengths.sum())
        return int(lengths.max()) <= self.longest and 0 < texts <= tokens <= texts * self.longest

    def fill(self, lengths: np.ndarray) -> np.ndarray:
        """Of all texts: those of padding have equal lengths, but for one token."""
        texts, tokens = self.num_texts - len(lengths), self.num_tokens - int(lengths.sum())
        each, more = divmod(tokens, texts)
        return np.concatenate([lengths, each + (np.arange(texts) < more)])


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Tokenised rows, concatenated: row i is tokens offsets[i]:offsets[i + 1]."""

    tokens: np.ndarray
    offsets: np.ndarray
    pad_token: int
    max_length: int
    """Longest row that the model takes."""
    padded: bool = True
    """Rows of unequal lengths may share a batch. False for a model that computes other outputs for a padded row."""
    varlen: bool = False
    """Rows of a batch lie one behind another, without padding. For a model that takes Sequences in place of a mask."""
    width_multiple: int = WIDTH_MULTIPLE
    """What widths are rounded up to."""
    only_widths: tuple[int, ...] = ()
    """Where batches are to have few shapes: what widths are rounded up to in place of that, the narrowest first."""
    packings: tuple[Packing, ...] = ()
    """The same without padding, the fewest tokens first."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def on(self, device: torch.device) -> Self:
        """A CPU pays for each token and nothing for a new shape: there a batch is as wide as its longest row."""
        return replace(self, width_multiple=WIDTH_MULTIPLE if device.type == "cuda" else 1)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def widths(self) -> np.ndarray:
        """What each row would be padded to by itself."""
        if self.varlen or not self.padded:
            return self.lengths
        if self.only_widths:
            return np.array(self.only_widths)[np.searchsorted(self.only_widths, self.lengths)]
        return np.minimum(-(-self.lengths // self.width_multiple) * self.width_multiple, self.max_length)

    def shape(self, rows: np.ndarray) -> tuple[int, int]:
        """(rows, width) of a batch of them; without padding the width is their mean, rounded up."""
        if self.varlen:
            return len(rows), -(-self.num_tokens(rows) // len(rows))
        return len(rows), int(self.widths[rows].max())

    # ---- rows one behind another -----------------------------------------------------------

    @property
    def has_few_shapes(self) -> bool:
        return bool(self.only_widths or self.packings)

    def text_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Of the texts of `rows`, in order; a row is one unless a kind of rows says otherwise."""
        return self.lengths[rows]

    def packing(self, rows: np.ndarray) -> Packing | None:
        """What a batch of them is filled up to; None where it is left as it is."""
        if not self.packings or len(rows) != self.packings[0].num_rows:
            return None
        lengths = self.text_lengths(rows)
        return next((packing for packing in self.packings if packing.takes(lengths)), None)

    def num_tokens(self, rows: np.ndarray) -> int:
        """Of a batch of them without padding, or filled up."""
        packing = self.packing(rows)
        return int(self.lengths[rows].sum()) if packing is None else packing.num_tokens


@dataclass(frozen=True)
class Batch:
    """Model inputs (each N x L), labels, and how many of the N * L tokens are no padding.

    Where rows lie one behind another N x L is 1 x T, and `sequences` tells where each begins: an encoder's inputs have
    it in place of the attention mask.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    """N or N x C where an answer belongs to a row; N x L where it belongs to a token, IGNORE where there is none."""
    num_tokens: int
    rows: torch.Tensor | None = None
    """Of a language model: the positions with a label, of the N * L flattened, int64."""
    sequences: Sequences | None = None
    counts: bool = True
    """False: the pass is taken because other ranks take one, and its loss is 0 times what it would be."""


class Batches:
    """Training batches: `epoch(e)` lists the rows of each optimizer step of epoch e.

    Args:
        grouped: a batch has rows of nearly one length; else rows drawn at random.
    """

    def __init__(self, encoded: TokenRows, batch_size: int, seed: int, grouped: bool = False) -> None:
        self.encoded = encoded
        self.batch_size = batch_size
        self.seed = seed
        self.grouped = grouped
        self._cached: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        """Optimizer steps an epoch; the last batch may be short."""
        return -(-len(self.encoded) // self.batch_size)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        if self._cached[0] != epoch:
            self._cached = (epoch, self._order(epoch))
        return self._cached[1]

    def rows(self, position: int) -> np.ndarray:
        """Rows of the step at `position`, counted over all epochs from 0."""
        epoch, index = divmod(position, len(self))
        return self.epoch(epoch)[index]

    def _order(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        shuffled = generator.permutation(len(self.encoded))
        if not self.grouped:
            return self._cut(shuffled)
        batches: list[np.ndarray] = []
        pool = self.batch_size * POOL_BATCHES
        for start in range(0, len(shuffled), pool):
            rows = shuffled[start : start + pool]
            batches += self._cut(rows[np.argsort(self.encoded.lengths[rows], kind="stable")])
        return [batches[i] for i in generator.permutation(len(batches))]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]


def micro_batches(encoded: TokenRows, rows: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Split `rows` so that each part, padded to its longest row, has at most `max_tokens` tokens; or the part's own
    tokens are no more, where they are not padded.

    There are as few parts as that allows, and the largest of them is as small as it can be with so many: none is left
    with a row or two, which would read all weights for them. A single row over the limit is a part of its own. Where
    rows are not to be padded, a part has rows of one length.
    """

    def split(limit: int) -> list[np.ndarray]:
        if encoded.varlen:
            if limit < encoded.num_tokens(rows):  # filled up it is too large
                limit = min(limit, int(encoded.lengths[rows].sum()) - 1)
            return list(_split_by_length(rows, encoded.lengths, limit))
        return list(split_by_width(rows, encoded.lengths, encoded.widths, limit, encoded.padded))

    parts = split(max_tokens)
    low, high = 0, max_tokens if len(parts) > 1 else 0
    while high - low > 1:
        middle = (low + high) // 2
        fewer = split(middle)
        if len(fewer) > len(parts):
            low = middle
        else:
            parts, high = fewer, middle
    return parts


def split_by_width(
    rows: np.ndarray, lengths: np.ndarray, widths: np.ndarray, max_tokens: int, padded: bool = True
) -> Iterator[np.ndarray]:
    """Parts of at most `max_tokens`, each as full as it can be, of rows of any kind, given the lengths and widths of
    all rows; the widths rise with the lengths."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    start = 0
    for end in range(1, len(rows) + 1):
        is_full = end == len(rows) or (end + 1 - start) * widths[rows[end]] > max_tokens
        if is_full or not (padded or lengths[rows[end]] == lengths[rows[start]]):
            yield rows[start:end]
            start = end


def _split_by_length(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Parts of at most `max_tokens`, each as full as it can be, the shortest rows first."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    start = num_tokens = 0
    for end, length in enumerate(lengths[rows].tolist()):
        if end > start and num_tokens + length > max_tokens:
            yield rows[start:end]
            start, num_tokens = end, 0
        num_tokens += length
    yield rows[start:]


def evaluation_batches(encoded: TokenRows, max_tokens: int) -> list[np.ndarray]:
    """All rows by length, in batches of at most `max_tokens` padded tokens."""
    rows = np.arange(len(encoded))
    return list(split_by_width(rows, encoded.lengths, encoded.widths, max_tokens, encoded.padded))


R = TypeVar("R", bound=TokenRows)


def largest_evaluation_batch(splits: Iterable[R | None], max_tokens: int) -> tuple[R, np.ndarray]:
    """The one with the most padded tokens of all splits: where it lies, and its rows. The last of a split is what the
    others left, and the test split may fill what a sample of the validation split does not.

    Args:
        splits: those that are evaluated; None for one that is not there.
    """
    batches = [(split, rows) for split in splits if split is not None for rows in evaluation_batches(split, max_tokens)]
    return max(batches, key=lambda batch: len(batch[1]) * int(batch[0].widths[batch[1]].max()))


def inputs_of(
    encoded: TokenRows, rows: np.ndarray, device: torch.device, segments: np.ndarray | None = None
) -> dict[str, Any]:
    """A model's inputs for `rows`, padded or one behind another, as the rows say."""
    return (_concatenated if encoded.varlen else pad)(encoded, rows, device, segments)


def flat_places(encoded: TokenRows, rows: np.ndarray) -> np.ndarray:
    """Of the tokens of `rows`, one row behind another, where they lie among all tokens."""
    return np.concatenate([np.arange(int(encoded.offsets[row]), int(encoded.offsets[row + 1])) for row in rows])


def sequences_of(encoded: TokenRows, rows: np.ndarray, device: torch.device) -> tuple[Sequences, np.ndarray]:
    """Where the texts of `rows` lie, one behind another, and their lengths; filled up where the rows have packings.
    Nothing waits for the device."""
    lengths, packing = encoded.text_lengths(rows), encoded.packing(rows)
    num_read = len(lengths)
    if packing is not None:
        lengths = packing.fill(lengths)
    ends = move(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)
    if packing is None:
        return Sequences.at(ends, lengths.tolist()), lengths
    return Sequences(ends, packing.num_tokens, packing.longest, num_read), lengths


def fill_up(values: np.ndarray, encoded: TokenRows, rows: np.ndarray, filler: int) -> np.ndarray:
    """`values` of the tokens of `rows`, one behind another, and `filler` for those that a batch is filled up with."""
    return np.pad(values, (0, encoded.num_tokens(rows) - len(values)), constant_values=filler)


def _concatenated(
    encoded: TokenRows, rows: np.ndarray, device: torch.device, segments: np.ndarray | None = None
) -> dict[str, Any]:
    """input_ids, position_ids, which begin anew with each text, and perhaps token_type_ids, each 1 x T int64 on
    `device`; Sequences in place of the attention mask."""
    places = flat_places(encoded, rows)
    sequences, lengths = sequences_of(encoded, rows, device)
    arrays = {
        "input_ids": fill_up(encoded.tokens[places], encoded, rows, encoded.pad_token),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
    }
    if segments is not None:
        arrays["token_type_ids"] = fill_up(segments[places], encoded, rows, 0)
    inputs: dict[str, Any] = {name: move(array[None].astype(np.int64), device) for name, array in arrays.items()}
    return inputs | {"attention_mask": sequences}


def pad(
    encoded: TokenRows, rows: np.ndarray, device: torch.device, segments: np.ndarray | None = None
) -> dict[str, Any]:
    """A model's inputs for `rows`, padded on the right to the longest of them: input_ids, attention_mask and, where
    `segments` are given, token_type_ids, each N x L int64 on `device`. Nothing waits for the device."""
    lengths = encoded.lengths[rows]
    width = int(encoded.widths[rows].max())
    tokens = np.full((len(rows), width), encoded.pad_token, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    types = None if segments is None else np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        start, length = encoded.offsets[row], lengths[i]
        tokens[i, :length] = encoded.tokens[start : start + length]
        mask[i, :length] = 1
        if types is not None and segments is not None:
            types[i, :length] = segments[start : start + length]
    arrays = {"input_ids": tokens, "attention_mask": mask}
    if types is not None:
        arrays["token_type_ids"] = types
    return {name: move(array, device) for name, array in arrays.items()}


def move(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """To `device`, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def concatenate(rows: list[list[int]], dtype: type) -> np.ndarray:
    total = sum(map(len, rows))
    return np.fromiter((token for row in rows for token in row), dtype=dtype, count=total)
