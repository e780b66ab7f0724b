"""Packed rows of tokens: concatenated, without padding."""

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
    """Offsets of N packed rows among their T tokens. No row is empty.

    The fields other than `cu_seqlens` are known to the host, so that it never waits for the device. Rows that fill a
    bucket, for a captured step that is replayed with other rows, have the sizes of the bucket and no `lengths`.
    """

    cu_seqlens: torch.Tensor
    """(N + 1,) int32 on the device: row n has the tokens from cu_seqlens[n] up to but excluding cu_seqlens[n + 1]."""
    num_tokens: int
    """T."""
    longest: int
    """Tokens of the longest row; in a bucket an upper bound."""
    num_read: int
    """The head reads the first `num_read` rows. The rows after them only fill the bucket."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each row; None in a bucket."""
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Sequences:
        """Packed rows of these lengths."""
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0, dtype=torch.int32)
        return Sequences.at(ends.to(device), lengths)

    @staticmethod
    def at(cu_seqlens: torch.Tensor, lengths: Sequence[int]) -> Sequences:
        """As `of`, with `cu_seqlens` already on its device."""
        return Sequences(cu_seqlens, sum(lengths), max(lengths), len(lengths), tuple(lengths))

    @property
    def num_rows(self) -> int:
        """N, including the rows that only fill the bucket."""
        return len(self.cu_seqlens) - 1

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(rows, length) of each run of consecutive rows of equal length, in order."""
        assert self.lengths is not None, "asked for where the host knows them"
        return tuple((len(list(run)), length) for length, run in groupby(self.lengths))

    @cached_property
    def starts(self) -> torch.Tensor:
        """(N,) int64: index of each row's first token."""
        return self.cu_seqlens[:-1].long()

    @cached_property
    def row_of(self) -> torch.Tensor:
        """(T,) int64: index of each token's row."""
        places = torch.arange(self.num_tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], places, right=True)

    @cached_property
    def firsts(self) -> Sequences:
        """The first token of each row alone, packed: rows of length 1."""
        ends = torch.arange(self.num_rows + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return Sequences(ends, self.num_rows, 1, self.num_read, (1,) * self.num_rows)

    def last(self, counts: torch.Tensor) -> torch.Tensor:
        """(N,) int64: index of each row's last token where `counts` (T,) bool is True; its first token if none is."""
        places = torch.arange(self.num_tokens, device=counts.device)
        return self.starts.scatter_reduce(0, self.row_of, places.where(counts, 0), "amax")

    def take_first(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, D): the first token of each row, from (1, T, D)."""
        return x[0].index_select(0, self.starts).unsqueeze(1)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The entries of the rows that the head reads, from x (N, ...)."""
        return x if self.num_read == self.num_rows else x[: self.num_read]

    def keep(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """make(), computed once for these rows and cached under `key`, so that all layers of a pass share it."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
