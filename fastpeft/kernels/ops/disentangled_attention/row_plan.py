"""Grouping of packed rows into blocks of similar length. It reads the offsets on the host.

Shape suffixes: N rows of a block, L tokens of its longest row, T tokens of all rows, H heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastpeft.kernels.ops.disentangled_attention.distances import Distances

SHORTEST = 0.8
"""Shortest row of a block, as a fraction of the longest row's length."""


class Attended(NamedTuple):
    """The arguments of op.disentangled_attention other than its inputs and position tables."""

    distances: Distances
    scale: float
    cu_queries: torch.Tensor
    cu_seqlens: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    seed: torch.Tensor | None


class Row(NamedTuple):
    first_query: int
    first_key: int
    num_queries: int
    num_keys: int
    """Keys up to the last one that is not masked."""


class Places(NamedTuple):
    """Indices of the queries, or of the keys, of a block among the T tokens."""

    index_NL: torch.Tensor
    """int64; T at padding and masked tokens."""
    real_NL: torch.Tensor | None
    """bool, False at padding and masked tokens; None if there are none."""
    together: slice | None
    """The tokens as a slice of the T tokens, if they are contiguous and none is masked; else None."""

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """(N, L, H, D) from x (T, H, D). Padding has the values of an arbitrary token."""
        if self.together is not None:
            return x[self.together].view(*self.index_NL.shape, *x.shape[1:])
        return x.index_select(0, self.index_NL.flatten().clamp(max=len(x) - 1)).view(*self.index_NL.shape, *x.shape[1:])

    def target(self, x: torch.Tensor) -> torch.Tensor:
        """An uninitialised (N, L, H, D) for x (T + 1, H, D): a view of x if possible, else a tensor for `write`."""
        if self.together is not None:
            return x[self.together].view(*self.index_NL.shape, *x.shape[1:])
        return x.new_empty(*self.index_NL.shape, *x.shape[1:])

    def write(self, x: torch.Tensor, found: torch.Tensor) -> None:
        """Copy `found` from `target` into x. Padding goes to the last entry of x."""
        if self.together is None:
            x.index_copy_(0, self.index_NL.flatten(), found.flatten(0, 1))


class Block(NamedTuple):
    queries: Places
    keys: Places


def plan(attended: Attended, num_queries: int, num_keys: int, most_weights: int) -> list[Block]:
    """Blocks of rows with at most `most_weights` attention weights per head; a block has at least one row.

    Raises:
        ValueError: a row is longer than `distances` allows, or ends after the last token.
    """
    rows = _rows(attended, num_queries, num_keys)
    return [_block(rows, attended, num_queries, num_keys) for rows in _grouped(rows, most_weights)]


def _rows(attended: Attended, num_queries: int, num_keys: int) -> list[Row]:
    """The rows that have at least one query and one key that is not masked."""
    queries, keys = attended.cu_queries.tolist(), attended.cu_seqlens.tolist()
    mask = None if attended.mask is None else attended.mask.cpu()
    most = attended.distances.max_queries, attended.distances.max_keys
    found = []
    for first_query, query_end, first_key, key_end in zip(queries, queries[1:], keys, keys[1:]):
        asked, there = query_end - first_query, key_end - first_key
        if not (0 <= asked <= most[0] and 0 <= there <= most[1] and query_end <= num_queries and key_end <= num_keys):
            raise ValueError(
                f"disentangled_attention: a row of queries {first_query} to {query_end} and keys {first_key} to "
                f"{key_end}; the distances are of {most[0]} and {most[1]} at most, and there are {num_queries} and "
                f"{num_keys} tokens"
            )
        if mask is not None:
            real = mask[first_key:key_end].nonzero()
            there = int(real[-1]) + 1 if len(real) else 0
        if min(asked, there):
            found.append(Row(first_query, first_key, min(asked, there), there))
    return found


def _grouped(rows: list[Row], most_weights: int) -> Iterator[list[Row]]:
    """Groups of rows of similar length, the longest first."""
    block: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.num_keys, -row.num_queries)):
        if block:
            longest, num_queries = block[0].num_keys, max(each.num_queries for each in (*block, row))
            if row.num_keys < SHORTEST * longest or (len(block) + 1) * num_queries * longest > most_weights:
                yield block
                block = []
        block.append(row)
    if block:
        yield block


def _block(rows: list[Row], attended: Attended, num_queries: int, num_keys: int) -> Block:
    device = attended.cu_seqlens.device
    first_query, first_key, asked, there = torch.tensor(rows, device=device)[:, :, None].unbind(1)
    places_Q = torch.arange(int(asked.max()), device=device)
    places_K = torch.arange(int(there.max()), device=device)
    real_NK = places_K < there
    if attended.mask is not None:
        real_NK &= attended.mask[(first_key + places_K).clamp(max=num_keys - 1)]
    real_NQ = (places_Q < asked) & real_NK[:, : len(places_Q)]
    return Block(
        _places(first_query + places_Q, real_NQ, num_queries), _places(first_key + places_K, real_NK, num_keys)
    )


def _places(index_NL: torch.Tensor, real_NL: torch.Tensor, nobody: int) -> Places:
    if not real_NL.all():
        return Places(index_NL.masked_fill(~real_NL, nobody), real_NL, None)
    first, num = int(index_NL[0, 0]), index_NL.numel()
    behind = bool((index_NL.flatten() == torch.arange(first, first + num, device=index_NL.device)).all())
    return Places(index_NL, None, slice(first, first + num) if behind else None)
