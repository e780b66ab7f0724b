"""Rows of tokens that lie one behind another, without padding."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where each of N rows lies among the T tokens of all of them. No row is empty.

    What the host has to know is here, so that nothing waits for the device. A step that is captured once and replayed
    with other rows has the figures of its bucket, and no lengths: of those the device alone knows.
    """

    cu_seqlens: torch.Tensor
    """(N + 1,) int32 on the device: row n has the tokens from cu_seqlens[n] to cu_seqlens[n + 1]."""
    num_tokens: int
    """T."""
    longest: int
    """Tokens of the longest row; of a bucket, what no row of it exceeds."""
    num_read: int
    """So many rows, the first ones, are what a head reads. Those behind them fill a bucket up."""
    lengths: tuple[int, ...] | None = None
    """Of the rows, where the host knows them."""
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Sequences:
        """Of rows of these lengths, one behind another."""
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0, dtype=torch.int32)
        return Sequences.at(ends.to(device), lengths)

    @staticmethod
    def at(cu_seqlens: torch.Tensor, lengths: Sequence[int]) -> Sequences:
        """The same, whose `cu_seqlens` are on their device already."""
        return Sequences(cu_seqlens, sum(lengths), max(lengths), len(lengths), tuple(lengths))

    @property
    def num_rows(self) -> int:
        """N, with those that fill a bucket up."""
        return len(self.cu_seqlens) - 1

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(rows, length) of neighbours of one length, in order."""
        assert self.lengths is not None, "asked for where the host knows them"
        return tuple((len(list(run)), length) for length, run in groupby(self.lengths))

    @cached_property
    def starts(self) -> torch.Tensor:
        """(N,) int64: each row's first token."""
        return self.cu_seqlens[:-1].long()

    @cached_property
    def row_of(self) -> torch.Tensor:
        """(T,) int64: which row a token is of."""
        places = torch.arange(self.num_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], places, right=True)

    @cached_property
    def firsts(self) -> Sequences:
        """Of the first tokens alone, one behind another."""
        ends = torch.arange(self.num_rows + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return Sequences(ends, self.num_rows, 1, self.num_read, (1,) * self.num_rows)

    def last(self, counts: torch.Tensor) -> torch.Tensor:
        """(N,) int64: of each row the last token that counts, of (T,) bools; where none does, its first token."""
        places = torch.arange(self.num_tokens, device=counts.device)
        return self.starts.scatter_reduce(0, self.row_of, places.where(counts, 0), "amax")

    def take_first(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, D) of the first tokens, of (1, T, D)."""
        return x[0].index_select(0, self.starts).unsqueeze(1)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """What a head reads of what each of N rows has."""
        return x if self.num_read == self.num_rows else x[: self.num_read]

    def keep(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes of these rows, once for all layers of a pass."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
