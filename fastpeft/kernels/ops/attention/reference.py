"""The specification of attention: plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """D(softmax(scale Q K^T + bias)) V, shapes as in op.attention but with the head axis before the token axis."""
    scores = query @ key.transpose(-1, -2) * scale
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    return (weights if keep is None else weights * keep / (1 - dropout)) @ value
