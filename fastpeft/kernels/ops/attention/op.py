"""attention: with dropout on its weights and DeBERTa's relative positions.

torch's fused attention knows no such positions, and on a CPU no dropout. Here the weights of some heads exist at a
time; backward makes them, and the mask of dropout, again. The positions' part of the scores is a slanted view of one
small product, not a gather.

Shape suffixes: H heads, N rows, Q queries, T keys, D features of a head, P = Q + T - 1 distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastpeft.kernels.dropout import draw_seed, keep_mask
from fastpeft.kernels.launch import refuse_second_order

CHUNK_BYTES, GPU_CHUNK_BYTES = 4 * 2**20, 512 * 2**20
"""Of the weights of the heads that are computed at a time: what a processor's cache holds; few launches."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    position_keys: torch.Tensor | None = None,
    position_queries: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """D(softmax(scale (Q K^T + R) + bias)) V (arXiv:1706.03762, eq. 1).

    R_ij = q_i . position_keys[j - i + Q - 1] + k_j . position_queries[i - j + T - 1] (arXiv:2006.03654, eq. 4), each
    part only where it is given.

    Args:
        query: (N, Q, H, D), in a floating dtype.
        key, value: (N, T, H, D), in its dtype.
        scale: of the scores, before the bias is added.
        bias: (N, 1, 1, T) or (N, 1, Q, T) in the dtype of query, such as 0 and the lowest number for padding; gets no
            gradient.
        position_keys: (P, H, D), of the distances j - i from 1 - Q to T - 1.
        position_queries: (P, H, D), of the distances i - j from 1 - T to Q - 1.
        dropout: probability in [0, 1) of a weight to be dropped.
        seed: int64 of one element on query's device; None draws one from torch's generator there.

    Returns:
        (N, Q, H, D), contiguous.
    """
    if dropout and seed is None:
        seed = draw_seed(query.device)
    return _Attention.apply(query, key, value, position_keys, position_queries, bias, scale, dropout, seed)


@dataclass(frozen=True)
class _Heads:
    """Of a few heads, each tensor with its heads first."""

    q_HND: torch.Tensor
    """(H, N, Q, D), times the scale."""
    k: torch.Tensor
    v: torch.Tensor
    position_keys_HPD: torch.Tensor | None
    position_queries_HPD: torch.Tensor | None
    """Times the scale."""
    bias: torch.Tensor | None

    def weights(self) -> torch.Tensor:
        """softmax of the scores, (H, N, Q, T)."""
        scores = self.q_HND @ self.k.transpose(-1, -2)
        num_queries, num_keys = scores.shape[-2:]
        if self.position_keys_HPD is not None:
            scores += _slanted(_each(self.q_HND, self.position_keys_HPD), num_keys, num_queries - 1)
        if self.position_queries_HPD is not None:
            each = _slanted(_each(self.k, self.position_queries_HPD), num_queries, num_keys - 1)
            scores += each.transpose(-1, -2)
        if self.bias is not None:
            scores += self.bias
        return torch.softmax(scores, dim=-1)


def _each(x: torch.Tensor, positions_HPD: torch.Tensor) -> torch.Tensor:
    """(H, N, X, P): products of each row of x (H, N, X, D) with each position."""
    return (x.flatten(1, 2) @ positions_HPD.transpose(-1, -2)).view(*x.shape[:-1], positions_HPD.shape[1])


def _slanted(each: torch.Tensor, num_columns: int, first: int) -> torch.Tensor:
    """(H, N, X, columns), a view of (H, N, X, P): of row x, from x columns before `first` on."""
    num_heads, num_rows, num_x, width = each.shape
    strides = (num_rows * num_x * width, num_x * width, width - 1, 1)
    return each.as_strided((num_heads, num_rows, num_x, num_columns), strides, each.storage_offset() + first)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, position_keys, position_queries, bias, scale, dropout, seed):
        ctx.save_for_backward(query, key, value, position_keys, position_queries, bias, seed)
        ctx.scale, ctx.dropout = scale, dropout
        y = torch.empty_like(query, memory_format=torch.contiguous_format)
        y_HNQD = y.permute(2, 0, 1, 3)
        for heads, part in _parts(ctx.scale, query, key, value, position_keys, position_queries, bias):
            weights = part.weights()
            if dropout:
                weights = _mask(weights, dropout, seed, heads).mul_(weights)
            torch.mul(weights @ part.v, 1 / (1 - dropout), out=y_HNQD[heads])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order("attention")
        *given, seed = ctx.saved_tensors
        query, key, value, position_keys, position_queries, _ = given
        dq, dk, dv = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value))
        dpk = None if position_keys is None else torch.empty_like(position_keys)
        dpq = None if position_queries is None else torch.empty_like(position_queries)
        dy_HNQD = gradients[0].permute(2, 0, 1, 3)
        for heads, part in _parts(ctx.scale, *given):
            dy, weights = dy_HNQD[heads].contiguous(), part.weights()
            mask = _mask(weights, ctx.dropout, seed, heads).mul_(1 / (1 - ctx.dropout)) if ctx.dropout else None
            dweights = dy @ part.v.transpose(-1, -2)
            if mask is None:
                dropped = weights
            else:
                dweights.mul_(mask)
                dropped = mask.mul_(weights)
            dv.permute(2, 0, 1, 3)[heads] = dropped.transpose(-1, -2) @ dy
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            found = _score_gradients(part, dscores)
            torch.mul(found[0], ctx.scale, out=dq.permute(2, 0, 1, 3)[heads])
            dk.permute(2, 0, 1, 3)[heads] = found[1]
            if dpk is not None:
                dpk.permute(1, 0, 2)[heads] = found[2]
            if dpq is not None:
                torch.mul(found[3], ctx.scale, out=dpq.permute(1, 0, 2)[heads])
        return dq, dk, dv, dpk, dpq, None, None, None, None


def _score_gradients(part: _Heads, dscores: torch.Tensor) -> list[torch.Tensor]:
    """Of the scaled queries, the keys, the position keys and the scaled position queries."""
    num_queries, num_keys = dscores.shape[-2:]
    dq, dk = dscores @ part.k, dscores.transpose(-1, -2) @ part.q_HND
    found = [dq, dk, dscores, dscores]
    if part.position_keys_HPD is not None:
        each = dscores.new_zeros(*dq.shape[:-1], part.position_keys_HPD.shape[1])
        _slanted(each, num_keys, num_queries - 1).copy_(dscores)
        dq += each @ part.position_keys_HPD[:, None]
        found[2] = each.flatten(1, 2).transpose(-1, -2) @ part.q_HND.flatten(1, 2)
    if part.position_queries_HPD is not None:
        each = dscores.new_zeros(*dk.shape[:-1], part.position_queries_HPD.shape[1])
        _slanted(each, num_queries, num_keys - 1).copy_(dscores.transpose(-1, -2))
        dk += each @ part.position_queries_HPD[:, None]
        found[3] = each.flatten(1, 2).transpose(-1, -2) @ part.k.flatten(1, 2)
    return found


def _parts(scale, query, key, value, position_keys, position_queries, bias) -> Iterator[tuple[slice, _Heads]]:
    """The heads, some at a time, so that their weights stay within the limit."""
    num_rows, num_queries, num_heads, _ = query.shape
    limit = CHUNK_BYTES if query.is_cpu else GPU_CHUNK_BYTES
    each = max(1, limit // max(1, num_rows * num_queries * key.shape[1] * query.element_size()))
    for start in range(0, num_heads, each):
        heads = slice(start, min(start + each, num_heads))
        q, k, v = (x[:, :, heads].permute(2, 0, 1, 3) for x in (query, key, value))
        pk, pq = (None if x is None else x[:, heads].permute(1, 0, 2) for x in (position_keys, position_queries))
        q = torch.mul(q, scale, out=q.new_empty(q.shape))
        pq = None if pq is None else pq * scale
        yield heads, _Heads(q, k.contiguous(), v.contiguous(), pk, pq, None if bias is None else bias.transpose(0, 1))


def _mask(weights: torch.Tensor, dropout: float, seed: torch.Tensor, heads: slice) -> torch.Tensor:
    *lead, num_keys = weights.shape
    seed = seed + heads.start  # a mask of its own for each part
    return keep_mask(lead[0] * lead[1] * lead[2], num_keys, dropout, seed, weights.dtype).view(weights.shape)
