"""Attention over all tokens under a mask of their rows, where no other implementation applies, and as a reference.

It is exact but costly: the mask and the scores have Q x T elements. Shapes as in op.py; Q queries.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpeft.kernels.ops.attention.op import attention
from fastpeft.kernels.ops.varlen_attention.seen import seen_by
from fastpeft.kernels.sequences import Sequences


def by_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    scale: float,
    *,
    causal: bool,
    window: int | None,
    first_only: bool,
    dropout: float = 0.0,
) -> torch.Tensor:
    """As op.varlen_attention. The host neither waits for the device nor needs the rows' lengths."""

    def make() -> torch.Tensor:
        seen = seen_by(sequences, causal=causal, window=window, first_only=first_only).mask(sequences.num_tokens)
        return bias_of(seen, query.dtype) if dropout else seen

    mask = sequences.keep(("mask", causal, window, first_only, dropout > 0, query.dtype), make)
    if dropout:
        k_THD, v_THD = (for_each_head(x, query.shape[1]) for x in (key, value))
        return attention(query[None], k_THD[None], v_THD[None], scale, mask, dropout=dropout)[0]
    inputs = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    y = nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return y[0].transpose(0, 1).contiguous()


def bias_of(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(1, 1, Q, T) in `dtype`: 0 where a query attends, else the dtype's lowest number."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def for_each_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(..., H, D) from (..., G, D): each of the G heads repeated H / G times."""
    return x if x.shape[-2] == num_heads else x.repeat_interleave(num_heads // x.shape[-2], dim=-2)
