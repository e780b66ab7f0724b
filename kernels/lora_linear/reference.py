"""The specification of lora_linear: plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """y = x W^T + bias + scale (x A^T) B^T, shapes as in op.lora_linear (arXiv:2106.09685, eq. 3)."""
    update = torch.nn.functional.linear(torch.nn.functional.linear(x, lora_a), lora_b)
    return torch.nn.functional.linear(x, weight, bias) + scale * update
