"""rotary: rotary position embedding, written half by half into its result, that keeps only the angles for backward."""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.launch import refuse_second_order


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + D/2) of x by the angles of its position (arXiv:2104.09864, eq. 34).

    Args:
        x: (..., D), D even, in a floating dtype.
        cos, sin: broadcast to x, in its dtype. No gradient.

    Returns:
        In the shape, strides and dtype of x.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin)
    return _rotated(x, cos, sin, 1)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """`sign` -1 gives the transpose of the map, where cos and sin may differ between the halves."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    y = x * cos
    if sign > 0:
        y[..., :half].addcmul_(second, sin[..., :half], value=-1)
        y[..., half:].addcmul_(first, sin[..., half:])
    else:
        y[..., :half].addcmul_(second, sin[..., half:])
        y[..., half:].addcmul_(first, sin[..., :half], value=-1)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        refuse_second_order("rotary")
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, sin, -1), None, None
