"""disentangled_attention: DeBERTa's attention over rows of tokens of any length, without padding.

A Triton kernel on a GPU (launches.py), else PyTorch over blocks of rows, heads and queries (row_blocks.py). Neither
stores a tokens x positions tensor or all attention weights: backward recomputes the weights and the dropout mask.

Shape suffixes: N rows, T tokens of all rows, H heads, D features of a head, P distances, R rows of a position table.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.dispatch import runs_triton
from fastpeft.kernels.dropout import draw_seed
from fastpeft.kernels.launch import refuse_second_order
from fastpeft.kernels.ops.disentangled_attention import row_blocks
from fastpeft.kernels.ops.disentangled_attention.distances import Distances
from fastpeft.kernels.ops.disentangled_attention.row_plan import Attended

WIDEST = 64
"""Largest head size of the Triton kernels, in features. Every DeBERTa has it; larger heads would spill registers."""


def disentangled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_keys: torch.Tensor | None,
    position_queries: torch.Tensor | None,
    distances: Distances,
    scale: float,
    cu_seqlens: torch.Tensor,
    *,
    cu_queries: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """D(softmax(scale S)) V in each row, S_ij = q_i . k_j + q_i . position_keys[t] + k_j . position_queries[t].

    t is the row of the distance i - j in `distances`. A position term is part of S only if its table is given
    (arXiv:2006.03654, eq. 4). On a GPU the call never waits for the host, all sums have a fixed order, and the call can
    be captured in a graph whose replays have other lengths. There the dropout mask is `dropout.philox_keep` of
    (T * H, max_keys), indexed by token and head, and by the position of the key in its row.

    Args:
        query: (T, H, D) in a floating dtype, packed row by row; with cu_queries (total number of queries, H, D). The
            features of a head are contiguous.
        key, value: (T, H, D), in the dtype of query.
        position_keys, position_queries: (R, H, D), in the dtype of query.
        distances: on query's device, for rows of up to distances.max_keys tokens.
        scale: factor on the scores.
        cu_seqlens: (N + 1,) int32 on query's device: row n has the tokens from cu_seqlens[n] up to but excluding
            cu_seqlens[n + 1]. A row may be empty. Tokens after the last row belong to no row.
        cu_queries: offsets of query in the same form, where only the first tokens of a row are queries, at most
            distances.max_queries of them.
        mask: (T,) bool, False for tokens that neither attend nor are attended to.
        dropout: probability in [0, 1) that a weight is dropped.
        seed: int64 of one element on query's device; None draws one from torch's generator there.

    Returns:
        In the shape and dtype of query, contiguous. Masked tokens, and tokens that belong to no row, get 0.

    Raises:
        ValueError: shapes or dtypes that do not fit each other; on a CPU also a row longer than distances.max_keys.
    """
    _check(query, key, value, position_keys, position_queries, distances, cu_seqlens, cu_queries, mask)
    if dropout and seed is None:
        seed = draw_seed(query.device)
    cu_queries = cu_seqlens if cu_queries is None else cu_queries
    attended = Attended(distances, scale, cu_queries, cu_seqlens, mask, dropout, seed)
    return _DisentangledAttention.apply(query, key, value, position_keys, position_queries, attended)


def _check(query, key, value, position_keys, position_queries, distances, cu_seqlens, cu_queries, mask) -> None:
    num_tokens, num_heads, width = key.shape
    tables = [table for table in (position_keys, position_queries) if table is not None]
    wanted = {
        "query": query.shape[1:] == key.shape[1:] and (cu_queries is not None or query.shape == key.shape),
        "value": value.shape == key.shape,
        "position tables": all(table.shape == (distances.num_rows, num_heads, width) for table in tables),
        "dtypes": all(x.dtype == query.dtype for x in (key, value, *tables)),
        "cu_seqlens": cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and cu_seqlens.numel() > 0,
        "cu_queries": cu_queries is None or (cu_queries.dtype, cu_queries.shape) == (torch.int32, cu_seqlens.shape),
        "mask": mask is None or (mask.dtype, mask.shape) == (torch.bool, (num_tokens,)),
    }
    wrong = [name for name, right in wanted.items() if not right]
    if wrong:
        raise ValueError(
            f"disentangled_attention: {', '.join(wrong)}: query {tuple(query.shape)}, key {tuple(key.shape)}, value "
            f"{tuple(value.shape)}, tables {[tuple(table.shape) for table in tables]} of {distances.num_rows} rows, "
            f"cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; expected (T, H, D), (R, H, D), int32 (N + 1,) "
            "and a bool mask (T,)"
        )


def takes_triton(query: torch.Tensor) -> bool:
    return runs_triton(query) and 0 < query.shape[-1] <= WIDEST


class _DisentangledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, position_keys, position_queries, attended: Attended):
        ctx.attended = attended
        inputs = query, key, value, position_keys, position_queries
        if takes_triton(query):
            from fastpeft.kernels.ops.disentangled_attention import launches

            y, logsum = launches.forward(*inputs, attended)
            ctx.save_for_backward(*inputs, y, logsum)
            return y
        ctx.save_for_backward(*inputs)
        y, ctx.blocks = row_blocks.forward(*inputs, attended)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order("disentangled_attention")
        query, key, value, position_keys, position_queries, *kept = ctx.saved_tensors
        tables = position_keys, position_queries
        of_positions = any(ctx.needs_input_grad[3:5])
        if kept:
            from fastpeft.kernels.ops.disentangled_attention import launches

            y, logsum = kept
            return *launches.backward(
                query, key, value, *tables, y, logsum, gradients[0], ctx.attended, of_positions=of_positions
            ), None
        found = row_blocks.backward(
            query, key, value, *tables, gradients[0], ctx.attended, ctx.blocks, of_positions=of_positions
        )
        return *found, None
