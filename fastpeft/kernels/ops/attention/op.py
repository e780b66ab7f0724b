"""attention with dropout on its weights, which torch's fused attention lacks on a CPU.

Only the weights of a few heads exist at a time. Backward recomputes them and the dropout mask.

Shape suffixes: H heads, N rows, Q queries, T keys, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastpeft.kernels.dropout import draw_seed, keep_mask
from fastpeft.kernels.launch import refuse_second_order

CHUNK_BYTES, GPU_CHUNK_BYTES = 4 * 2**20, 512 * 2**20
"""Memory of the attention weights of the heads computed together. On a CPU they fit into its cache; on a GPU the limit
keeps the number of launches low."""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """D(softmax(scale Q K^T + bias)) V (arXiv:1706.03762, eq. 1).

    Args:
        query: (N, Q, H, D), in a floating dtype.
        key, value: (N, T, H, D), in the dtype of query.
        scale: factor on the scores, before the bias is added.
        bias: (N, 1, 1, T) or (N, 1, Q, T) in the dtype of query, such as 0, and the dtype's lowest number at padding;
            gets no gradient.
        dropout: probability in [0, 1) that a weight is dropped.
        seed: int64 of one element on query's device; None draws one from torch's generator there.

    Returns:
        (N, Q, H, D), in the dtype of query, contiguous.
    """
    if dropout and seed is None:
        seed = draw_seed(query.device)
    return _Attention.apply(query, key, value, bias, scale, dropout, seed)


@dataclass(frozen=True)
class _Heads:
    """Inputs of a few heads. Heads are the first axis of each tensor."""

    q_HND: torch.Tensor
    """(H, N, Q, D), multiplied by the scale."""
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None

    def weights(self) -> torch.Tensor:
        """softmax of the scores, (H, N, Q, T)."""
        scores = self.q_HND @ self.k.transpose(-1, -2)
        if self.bias is not None:
            scores += self.bias
        return torch.softmax(scores, dim=-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, bias, scale, dropout, seed):
        ctx.save_for_backward(query, key, value, bias, seed)
        ctx.scale, ctx.dropout = scale, dropout
        y = torch.empty_like(query, memory_format=torch.contiguous_format)
        y_HNQD = y.permute(2, 0, 1, 3)
        for heads, part in _parts(ctx.scale, query, key, value, bias):
            weights = part.weights()
            if dropout:
                weights = _mask(weights, dropout, seed, heads).mul_(weights)
            torch.mul(weights @ part.v, 1 / (1 - dropout), out=y_HNQD[heads])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order("attention")
        *given, seed = ctx.saved_tensors
        query, key, value, _ = given
        dq, dk, dv = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value))
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
            torch.mul(dscores @ part.k, ctx.scale, out=dq.permute(2, 0, 1, 3)[heads])
            dk.permute(2, 0, 1, 3)[heads] = dscores.transpose(-1, -2) @ part.q_HND
        return dq, dk, dv, None, None, None, None


def _parts(scale, query, key, value, bias) -> Iterator[tuple[slice, _Heads]]:
    """Groups of heads whose attention weights fit into the memory limit."""
    num_rows, num_queries, num_heads, _ = query.shape
    limit = CHUNK_BYTES if query.is_cpu else GPU_CHUNK_BYTES
    each = max(1, limit // max(1, num_rows * num_queries * key.shape[1] * query.element_size()))
    for start in range(0, num_heads, each):
        heads = slice(start, min(start + each, num_heads))
        q, k, v = (x[:, :, heads].permute(2, 0, 1, 3) for x in (query, key, value))
        q = torch.mul(q, scale, out=q.new_empty(q.shape))
        yield heads, _Heads(q, k.contiguous(), v.contiguous(), None if bias is None else bias.transpose(0, 1))


def _mask(weights: torch.Tensor, dropout: float, seed: torch.Tensor, heads: slice) -> torch.Tensor:
    *lead, num_keys = weights.shape
    seed = seed + heads.start  # an independent mask for each group of heads
    return keep_mask(lead[0] * lead[1] * lead[2], num_keys, dropout, seed, weights.dtype).view(weights.shape)
