"""Rows of tokens that lie one behind another, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where each of N rows lies among the T tokens of all of them. No row is empty.

    The lengths are known on the host, so that nothing waits for the device.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    """(N + 1,) int32 on the device: row n has the tokens from cu_seqlens[n] to cu_seqlens[n + 1]."""

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Sequences:
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0, dtype=torch.int32)
        return Sequences(tuple(lengths), ends.to(device))

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(rows, length) of neighbours of one length, in order."""
        return tuple((len(list(run)), length) for length, run in groupby(self.lengths))

    @cached_property
    def starts(self) -> torch.Tensor:
        """(N,) int64: each row's first token."""
        return self.cu_seqlens[:-1].long()

    @cached_property
    def firsts(self) -> Sequences:
        """Of the first tokens alone, one behind another."""
        return Sequences(
            (1,) * len(self.lengths), torch.arange(len(self.cu_seqlens), dtype=torch.int32).to(self.cu_seqlens.device)
        )

    def last(self, counts: torch.Tensor) -> torch.Tensor:
        """(N,) int64: of each row the last token that counts, of (T,) bools; where none does, its first token."""
        places = torch.arange(self.num_tokens, device=counts.device)
        row_of = torch.repeat_interleave(self.cu_seqlens.diff(), output_size=self.num_tokens)
        return self.starts.scatter_reduce(0, row_of, places.where(counts, 0), "amax")

    def take_first(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, D) of the first tokens, of (1, T, D)."""
        return x[0].index_select(0, self.starts).unsqueeze(1)
