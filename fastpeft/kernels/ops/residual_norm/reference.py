"""The specification of residual_norm: plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch


def residual_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    dropout: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm(residual + D(x)), shapes as in op.residual_norm. D(x) = x * keep / (1 - dropout)."""
    dropped = x if keep is None else x * keep / (1 - dropout)
    return torch.nn.functional.layer_norm(residual + dropped, weight.shape, weight, bias, eps)
