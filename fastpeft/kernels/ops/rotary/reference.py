"""The specification of rotary: plain PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + h(x) sin, h the two halves of x exchanged and the new first one negated (arXiv:2104.09864, eq. 34)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
