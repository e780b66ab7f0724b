"""The specification of varlen_attention: plain PyTorch, row by row, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def varlen_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    *,
    causal: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale Q K^T) V in each row of tokens, shapes as in op.varlen_attention.

    Args:
        lengths: tokens of each packed row.
    """
    found, groups = [], query.shape[1] // key.shape[1]
    for q, k, v in zip(*(x.split(list(lengths)) for x in (query, key, value))):
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        places = torch.arange(len(q), device=q.device)
        distance = places[:, None] - places[None, :]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= distance >= window
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(found)
