"""The tokens that each query attends to. In packed rows they are contiguous, from a first to a last one.

Shapes: N rows, T tokens of all rows, Q queries, B tokens of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpeft.kernels.sequences import Sequences

BLOCK = 128
"""B, FlexAttention's default block size."""


class Seen(NamedTuple):
    """The range of tokens that each query attends to. Both tensors are non-decreasing."""

    first_Q: torch.Tensor
    """(Q,) int64: the first token."""
    last_Q: torch.Tensor
    """(Q,) int64: the last token, included."""

    def mask(self, num_tokens: int) -> torch.Tensor:
        """(Q, T) bool, True where a query attends to a token."""
        places = torch.arange(num_tokens, device=self.first_Q.device)
        return (places >= self.first_Q[:, None]) & (places <= self.last_Q[:, None])

    def blocks(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each block of queries, the number of token blocks that it attends to, and all token blocks with those
        first: int32 of (Q / B,) and (Q / B, T / B), both rounded up. Nothing of size Q x T is allocated."""
        num_queries = len(self.first_Q)
        starts = torch.arange(0, num_queries, BLOCK, device=self.first_Q.device)
        first = self.first_Q.index_select(0, starts) // BLOCK
        last = self.last_Q.index_select(0, (starts + BLOCK - 1).clamp(max=num_queries - 1)) // BLOCK
        num_blocks = -(-num_tokens // BLOCK)
        order = (first[:, None] + torch.arange(num_blocks, device=first.device)) % num_blocks
        return (last - first + 1).int(), order.int()


def seen_by(sequences: Sequences, *, causal: bool, window: int | None, first_only: bool) -> Seen:
    """The ranges for these arguments of op.varlen_attention, computed once for all layers. The host never waits."""
    key = "seen", causal, window, first_only
    return sequences.keep(key, lambda: _seen_by(sequences, causal, window, first_only))


def _seen_by(sequences: Sequences, causal: bool, window: int | None, first_only: bool) -> Seen:
    ends = sequences.cu_seqlens[1:].long()
    if first_only:
        return Seen(sequences.starts, ends - 1)
    first = sequences.starts.index_select(0, sequences.row_of)
    if not causal:
        return Seen(first, ends.index_select(0, sequences.row_of) - 1)
    places = torch.arange(sequences.num_tokens, device=first.device)
    return Seen(first if window is None else torch.maximum(first, places - (window - 1)), places)
