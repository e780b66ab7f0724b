"""disentangled_attention in PyTorch: rows of similar length in one block, some of its heads and queries at a time.

The position terms of the scores are read through a strided view of one small product instead of a gather.

Shape suffixes: H heads, N rows of a block, Q queries, K keys, D features of a head, P distances, R rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastpeft.kernels.dropout import keep_mask
from fastpeft.kernels.ops.disentangled_attention.distances import Distances
from fastpeft.kernels.ops.disentangled_attention.row_plan import Attended, Block, plan

CHUNK_BYTES, GPU_CHUNK_BYTES = 4 * 2**20, 512 * 2**20
"""Memory of the attention weights computed together: on a CPU they fit into its cache; on a GPU the limit keeps the
number of launches low."""
KEYS = 256
"""Keys per product with the position queries, unless there are more queries. A larger step wastes more products."""


@dataclass(frozen=True)
class Part:
    """Some heads and queries of a block. Heads are the first axis of each tensor that has them."""

    heads: slice
    queries: slice
    distances: slice
    """The distances, of P, from these queries to the keys, ascending."""
    q_HNQD: torch.Tensor
    """Multiplied by the scale."""
    k_HNKD: torch.Tensor
    v_HNKD: torch.Tensor
    position_keys_HPD: torch.Tensor | None
    """In descending order of i - j."""
    position_queries_HPD: torch.Tensor | None
    """In ascending order of i - j, multiplied by the scale."""
    bias_NQK: torch.Tensor | None

    def weights(self) -> torch.Tensor:
        """softmax of the scores, (H, N, Q, K)."""
        scores = self.q_HNQD @ self.k_HNKD.transpose(-1, -2)
        num_queries, num_keys = scores.shape[-2:]
        if self.position_keys_HPD is not None:
            scores += _slanted(_each(self.q_HNQD, self.position_keys_HPD), num_keys, num_queries - 1)
        if self.position_queries_HPD is not None:
            for keys, distances in self._key_slices():
                each = _each(self.k_HNKD[:, :, keys], self.position_queries_HPD[:, distances])
                scores[..., keys] += _slanted(each, num_queries, each.shape[2] - 1).transpose(-1, -2)
        if self.bias_NQK is not None:
            scores += self.bias_NQK
        return torch.softmax(scores, dim=-1)

    def gradients(
        self, dscores: torch.Tensor, of_positions: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of the scaled queries, the keys, the position keys and the scaled position queries."""
        num_queries, num_keys = dscores.shape[-2:]
        dq, dk = dscores @ self.k_HNKD, dscores.transpose(-1, -2) @ self.q_HNQD
        dpk = dpq = None
        if self.position_keys_HPD is not None:
            each = dscores.new_zeros(*dq.shape[:-1], self.position_keys_HPD.shape[1])
            _slanted(each, num_keys, num_queries - 1).copy_(dscores)
            dq += each @ self.position_keys_HPD[:, None]
            if of_positions:
                dpk = each.flatten(1, 2).transpose(-1, -2) @ self.q_HNQD.flatten(1, 2)
        if self.position_queries_HPD is not None:
            dpq = torch.zeros_like(self.position_queries_HPD)
            for keys, distances in self._key_slices():
                k, positions = self.k_HNKD[:, :, keys], self.position_queries_HPD[:, distances]
                each = dscores.new_zeros(*k.shape[:-1], positions.shape[1])
                _slanted(each, num_queries, k.shape[2] - 1).copy_(dscores[..., keys].transpose(-1, -2))
                dk[:, :, keys] += each @ positions[:, None]
                if of_positions:
                    dpq[:, distances] += each.flatten(1, 2).transpose(-1, -2) @ k.flatten(1, 2)
        return dq, dk, dpk, dpq

    def _key_slices(self) -> Iterator[tuple[slice, slice]]:
        """Slices of the keys, and for each the slice of the distances from all queries to those keys."""
        num_queries, num_keys = self.q_HNQD.shape[2], self.k_HNKD.shape[2]
        step = max(num_queries, KEYS)
        for start in range(0, num_keys, step):
            end = min(start + step, num_keys)
            yield slice(start, end), slice(num_keys - end, num_keys - start + num_queries - 1)


def _each(x: torch.Tensor, positions_HPD: torch.Tensor) -> torch.Tensor:
    """(H, N, X, P): products of each row of x (H, N, X, D) with each position."""
    return (x.flatten(1, 2) @ positions_HPD.transpose(-1, -2)).view(*x.shape[:-1], positions_HPD.shape[1])


def _slanted(each: torch.Tensor, num_columns: int, first: int) -> torch.Tensor:
    """(H, N, X, num_columns), a view of (H, N, X, P): row x starts at column first - x."""
    num_heads, num_rows, num_x, width = each.shape
    strides = (num_rows * num_x * width, num_x * width, width - 1, 1)
    return each.as_strided((num_heads, num_rows, num_x, num_columns), strides, each.storage_offset() + first)


class _Tables:
    """The position tables with one row per distance, heads first; and the reduction of their gradients."""

    def __init__(
        self, position_keys: torch.Tensor | None, position_queries: torch.Tensor | None, attended: Attended
    ) -> None:
        self.distances, self.scale = attended.distances, attended.scale
        self.keys_HPD = self._by_distance(position_keys, -1)
        self.queries_HPD = self._by_distance(position_queries, 1)
        if self.queries_HPD is not None:
            self.queries_HPD = self.queries_HPD * attended.scale

    def _by_distance(self, table: torch.Tensor | None, order: int) -> torch.Tensor | None:
        """(H, P, D): one row per distance, ascending; descending for `order` -1."""
        if table is None:
            return None
        if not self.distances.one_each:
            table = table.index_select(0, self.distances.rows_P)
        table = table.permute(1, 0, 2)
        return (table if order > 0 else table.flip(1)).contiguous()

    def part(self, heads: slice, distances: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        keys, queries = self.keys_HPD, self.queries_HPD
        return (
            None if keys is None else keys[heads, self.descending(distances)],
            None if queries is None else queries[heads, distances],
        )

    def descending(self, distances: slice) -> slice:
        num = self.distances.rows_P.numel()
        return slice(num - distances.stop, num - distances.start)

    def gradient(self, sum_HPD: torch.Tensor, order: int, dtype: torch.dtype) -> torch.Tensor:
        """(R, H, D): the gradient of a table, from the sums per distance (H, P, D)."""
        sum_PHD = (sum_HPD if order > 0 else sum_HPD.flip(1)).permute(1, 0, 2)
        if not self.distances.one_each:
            rows = sum_PHD.new_zeros(self.distances.num_rows, *sum_PHD.shape[1:])
            sum_PHD = rows.index_add_(0, self.distances.rows_P, sum_PHD)
        return sum_PHD.to(dtype)


class _Masks:
    """Dropout masks, one per part, each from a seed of its own."""

    def __init__(self, dropout: float, seed: torch.Tensor | None) -> None:
        self.dropout, self.seed, self.num_made = dropout, seed, 0

    def make(self, weights: torch.Tensor) -> torch.Tensor:
        """The next mask: ones and zeros in the shape and dtype of `weights`."""
        assert self.seed is not None, "dropout has a seed"
        seed = self.seed + self.num_made
        self.num_made += 1
        return keep_mask(weights.shape[:-1].numel(), weights.shape[-1], self.dropout, seed, weights.dtype).view_as(
            weights
        )


def _parts(
    block: Block,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tables: _Tables,
    distances: Distances,
) -> Iterator[Part]:
    """Groups of a block's heads and queries whose attention weights fit into the memory limit."""
    q_HNQD, k_HNKD, v_HNKD = (
        places.read(x).permute(2, 0, 1, 3)
        for places, x in ((block.queries, query), (block.keys, key), (block.keys, value))
    )
    num_heads, num_rows, num_queries, _ = q_HNQD.shape
    num_keys = k_HNKD.shape[2]
    most = max(1, _most_weights(query) // (num_rows * num_keys))
    few_queries, few_heads = min(most, num_queries), max(1, most // num_queries)
    bias_NQK = None
    if block.keys.real_NL is not None:
        bias_NQK = torch.zeros_like(block.keys.real_NL, dtype=query.dtype)
        bias_NQK = bias_NQK.masked_fill_(~block.keys.real_NL, torch.finfo(query.dtype).min)[:, None]
    for first in range(0, num_heads, few_heads):
        heads = slice(first, min(first + few_heads, num_heads))
        k, v = k_HNKD[heads].contiguous(), v_HNKD[heads].contiguous()
        for start in range(0, num_queries, few_queries):
            queries = slice(start, min(start + few_queries, num_queries))
            near = slice(distances.max_keys - num_keys + start, distances.max_keys - 1 + queries.stop)
            q = q_HNQD[heads, :, queries]
            q = torch.mul(q, tables.scale, out=q.new_empty(q.shape))
            yield Part(heads, queries, near, q, k, v, *tables.part(heads, near), bias_NQK)


def _most_weights(query: torch.Tensor) -> int:
    return max(1, (CHUNK_BYTES if query.is_cpu else GPU_CHUNK_BYTES) // query.element_size())


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_keys: torch.Tensor | None,
    position_queries: torch.Tensor | None,
    attended: Attended,
) -> tuple[torch.Tensor, list[Block]]:
    """y, and the blocks for `backward`."""
    blocks = plan(attended, len(query), len(key), _most_weights(query))
    tables = _Tables(position_keys, position_queries, attended)
    masks = _Masks(attended.dropout, attended.seed)
    y = query.new_zeros(len(query) + 1, *query.shape[1:])
    for block in blocks:
        found = block.queries.target(y)
        for part in _parts(block, query, key, value, tables, attended.distances):
            weights = part.weights()
            if attended.dropout:
                weights = masks.make(weights).mul_(weights)
            part_y = found.permute(2, 0, 1, 3)[part.heads, :, part.queries]
            torch.mul(weights @ part.v_HNKD, 1 / (1 - attended.dropout), out=part_y)
        block.queries.write(y, found)
    return y[:-1], blocks


def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_keys: torch.Tensor | None,
    position_queries: torch.Tensor | None,
    dy: torch.Tensor,
    attended: Attended,
    blocks: list[Block],
    *,
    of_positions: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key and value, and with `of_positions` of the two tables."""
    tables = _Tables(position_keys, position_queries, attended)
    masks = _Masks(attended.dropout, attended.seed)
    wide = torch.promote_types(query.dtype, torch.float32)
    dpk, dpq = (None if x is None else torch.zeros_like(x, dtype=wide) for x in (tables.keys_HPD, tables.queries_HPD))
    gradients = [x.new_zeros(len(x) + 1, *x.shape[1:]) for x in (query, key, value)]
    for block in blocks:
        sides = block.queries, block.keys, block.keys
        found = [side.target(x) for side, x in zip(sides, gradients)]
        dq, dk, dv = (x.permute(2, 0, 1, 3) for x in found)
        dy_HNQD = block.queries.read(dy).permute(2, 0, 1, 3)
        for part in _parts(block, query, key, value, tables, attended.distances):
            part_dy = dy_HNQD[part.heads, :, part.queries].contiguous()
            if block.queries.real_NL is not None:
                part_dy = part_dy * block.queries.real_NL[:, part.queries, None]
            dscores, part_dv = _score_gradients(part, part_dy, masks)
            part_dq, part_dk, part_dpk, part_dpq = part.gradients(dscores, of_positions)
            torch.mul(part_dq, attended.scale, out=dq[part.heads, :, part.queries])
            if part.queries.start:
                dk[part.heads] += part_dk
                dv[part.heads] += part_dv
            else:
                dk[part.heads], dv[part.heads] = part_dk, part_dv
            if dpk is not None and part_dpk is not None:
                dpk[part.heads, tables.descending(part.distances)] += part_dpk
            if dpq is not None and part_dpq is not None:
                dpq[part.heads, part.distances] += part_dpq
        for side, x, each in zip(sides, gradients, found):
            side.write(x, each)
    if not of_positions:
        return *(x[:-1] for x in gradients), None, None
    dpk = None if dpk is None else tables.gradient(dpk, -1, query.dtype)
    dpq = None if dpq is None else tables.gradient(dpq.mul_(attended.scale), 1, query.dtype)
    return *(x[:-1] for x in gradients), dpk, dpq


def _score_gradients(part: Part, dy: torch.Tensor, masks: _Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the scores, (H, N, Q, K), and of the values, (H, N, K, D)."""
    weights = part.weights()
    dweights = dy @ part.v_HNKD.transpose(-1, -2)
    dropped = weights
    if masks.dropout:
        mask = masks.make(weights).mul_(1 / (1 - masks.dropout))
        dweights.mul_(mask)
        dropped = mask.mul_(weights)
    dv = dropped.transpose(-1, -2) @ dy
    return torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype), dv
