"""The specification of disentangled_attention: plain PyTorch, row by row, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def disentangled_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_keys: torch.Tensor | None,
    position_queries: torch.Tensor | None,
    rows: Sequence[int],
    scale: float,
    lengths: Sequence[int],
    *,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """D(softmax(scale S)) V in each row of tokens, shapes as in op.disentangled_attention.

    S_ij = q_i . k_j + q_i . position_keys[t(i - j)] + k_j . position_queries[t(i - j)] (arXiv:2006.03654, eq. 4).

    Args:
        rows: t(d) for the distances d from 1 - L to L - 1, L at least the length of the longest row.
        lengths: tokens of each packed row.
        keep: (T, H, L) bool, the weights that dropout keeps, by query, head and position of the key in its row.
    """
    furthest = len(rows) // 2
    table = torch.tensor(list(rows), device=query.device)
    found, start = [], 0
    for length in lengths:
        tokens = slice(start, start + length)
        q, k, v = (x[tokens].transpose(0, 1) for x in (query, key, value))
        places = torch.arange(length, device=query.device)
        index = table[places[:, None] - places[None, :] + furthest]
        scores = q @ k.transpose(-1, -2)
        if position_keys is not None:
            scores = scores + torch.einsum("hid,ijhd->hij", q, position_keys[index])
        if position_queries is not None:
            scores = scores + torch.einsum("hjd,ijhd->hij", k, position_queries[index])
        real = torch.ones_like(places, dtype=torch.bool) if mask is None else mask[tokens]
        scores = (scores * scale).masked_fill(~real, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1) * (real[:, None] & real[None, :])
        if keep is not None:
            weights = weights * keep[tokens, :, :length].transpose(0, 1) / (1 - dropout)
        found.append((weights @ v).transpose(0, 1))
        start += length
    return torch.cat(found)
