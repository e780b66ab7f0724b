"""The specification of attention: plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    position_keys: torch.Tensor | None = None,
    position_queries: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """D(softmax(scale (Q K^T + R) + bias)) V, shapes as in op.attention.

    R_ij = q_i . position_keys[j - i + Q - 1] + k_j . position_queries[i - j + T - 1] (arXiv:2006.03654, eq. 4), each
    part only where it is given.
    """
    scores = query @ key.transpose(-1, -2)
    num_queries, num_keys = scores.shape[-2:]
    i = torch.arange(num_queries, device=query.device)[:, None]
    j = torch.arange(num_keys, device=query.device)[None, :]
    if position_keys is not None:
        each = query @ position_keys.transpose(-1, -2)
        scores = scores + each.gather(-1, (j - i + num_queries - 1).expand_as(scores))
    if position_queries is not None:
        each = key @ position_queries.transpose(-1, -2)
        index = (i - j + num_keys - 1).t().expand(*each.shape[:-1], num_queries)
        scores = scores + each.gather(-1, index).transpose(-1, -2)
    scores = scores * scale
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    return (weights if keep is None else weights * keep / (1 - dropout)) @ value
