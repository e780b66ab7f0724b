"""Random rows of tokens with position tables, and what disentangled_attention and its reference make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastpeft.kernels.ops.disentangled_attention.distances import Distances
from fastpeft.kernels.ops.disentangled_attention.op import disentangled_attention
from fastpeft.kernels.ops.disentangled_attention.reference import disentangled_attention_reference

LENGTHS = {
    "one token": [1],
    "equal": [8, 8, 8],
    "nearly equal": [17, 16, 15, 17],
    "one long among short": [3, 20, 2],
    "empty rows": [0, 7, 0, 0, 9, 0],
}
HEADS, WIDTH, SCALE = 2, 8, 0.3


def bucket_rows(length: int, buckets: int, furthest: int, span: int) -> list[int]:
    """What transformers reads at the distances from 1 - length to length - 1, of a table of 2 * span rows."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    x = torch.zeros(1, length, 1)
    relative = build_relative_position(x, x, bucket_size=buckets, max_position=furthest)[0]
    distances = torch.cat([relative[0].flip(0), relative[1:, 0]])
    return (distances + span).clamp(0, 2 * span - 1).tolist()


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    position_keys: torch.Tensor | None
    position_queries: torch.Tensor | None
    rows: list[int]
    """Of the distances between all tokens of the longest row."""
    lengths: list[int]
    mask: torch.Tensor | None
    asked: int | None

    @staticmethod
    def of(
        seed: int,
        lengths: Sequence[int],
        *,
        buckets: int = -1,
        rows: list[int] | None = None,
        keys: bool = True,
        queries: bool = True,
        mask: torch.Tensor | None = None,
        asked: int | None = None,
        spare: int = 0,
        heads: int = HEADS,
        width: int = WIDTH,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Inputs:
        """`spare` tokens behind the last row; `asked`: so many tokens of a row have a query."""
        generator = torch.Generator().manual_seed(seed)

        def draw(num: int) -> torch.Tensor:
            x = torch.randn(num, heads, width, generator=generator, dtype=torch.float64)
            return x.to(device, dtype).requires_grad_()

        longest = max(lengths)
        rows = rows or bucket_rows(longest, buckets, 64, 64 if buckets < 0 else buckets)
        rows = [row - rows[0] for row in rows]
        seen = rows if asked is None else rows[: longest + asked - 1]
        num_queries = sum(lengths) if asked is None else sum(min(length, asked) for length in lengths)
        mask = None if mask is None else mask.to(device)
        return Inputs(
            draw(num_queries + spare), draw(sum(lengths) + spare), draw(sum(lengths) + spare),
            draw(seen[-1] + 1) if keys else None, draw(seen[-1] + 1) if queries else None,
            rows, list(lengths), mask, asked,
        )  # fmt: skip

    def _ends(self, lengths: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(self.key.device, torch.int32)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return self._ends(self.lengths)

    @property
    def num_asked(self) -> list[int]:
        return [length if self.asked is None else min(length, self.asked) for length in self.lengths]

    @property
    def distances(self) -> Distances:
        longest = max(self.lengths)
        rows = self.rows if self.asked is None else self.rows[: longest + self.asked - 1]
        return Distances.of(rows, longest, self.key.device)

    def leaves(self) -> list[torch.Tensor]:
        given = self.query, self.key, self.value, self.position_keys, self.position_queries
        return [x for x in given if x is not None]

    def computed(self, *, dropout: float = 0.0, seed: torch.Tensor | None = None) -> torch.Tensor:
        return disentangled_attention(
            self.query, self.key, self.value, self.position_keys, self.position_queries, self.distances, SCALE,
            self.cu_seqlens, cu_queries=None if self.asked is None else self._ends(self.num_asked), mask=self.mask,
            dropout=dropout, seed=seed,
        )  # fmt: skip

    def expected(self, *, dropout: float = 0.0, keep: torch.Tensor | None = None) -> torch.Tensor:
        """In float64, of what these tensors hold."""
        query, key, value = (x.double() for x in (self.query, self.key, self.value))
        tables = [None if x is None else x.double() for x in (self.position_keys, self.position_queries)]
        num_tokens, starts = sum(self.lengths), self._ends(self.lengths).tolist()
        asking = torch.tensor(
            [start + i for start, num in zip(starts, self.num_asked) for i in range(num)], dtype=torch.int64
        ).to(key.device)
        everywhere = key.new_zeros(num_tokens, *key.shape[1:]).index_copy(0, asking, query[: len(asking)])
        longest = max(self.lengths)
        furthest = [None if x is None else torch.cat([x, x[-1:].expand(2 * longest, -1, -1)]) for x in tables]
        y = disentangled_attention_reference(
            everywhere, key[:num_tokens], value[:num_tokens], *furthest, self.rows, SCALE, self.lengths,
            mask=self.mask, dropout=dropout, keep=keep,
        )  # fmt: skip
        return torch.cat([y[asking], torch.zeros_like(query[len(asking) :])])


def frozen_tables(inputs: Inputs) -> Inputs:
    keys, queries = (None if x is None else x.detach() for x in (inputs.position_keys, inputs.position_queries))
    return replace(inputs, position_keys=keys, position_queries=queries)


def gradients(
    inputs: Inputs, got: torch.Tensor, want: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Of both by all inputs, for one random sum of the output."""
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(want.device)
    found = torch.autograd.grad(got, inputs.leaves(), weights.to(got.dtype))
    return found, torch.autograd.grad(want, inputs.leaves(), weights.to(got.dtype).double())
