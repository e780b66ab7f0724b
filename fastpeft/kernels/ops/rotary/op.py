"""rotary: rotary position embedding that saves only cos and sin for backward. It writes each half of the features
straight into the result. On a GPU it is one launch."""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.dispatch import runs_triton
from fastpeft.kernels.launch import launch, refuse_second_order
from fastpeft.kernels.row_tiles import row_tiles

ELEMENTS = 512
"""Elements per program. Few, because arbitrary strides take registers."""


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + D/2) of x by the angles of its position (arXiv:2104.09864, eq. 34).

    Args:
        x: (..., D), D even, in a floating dtype.
        cos, sin: broadcastable to x, in its dtype. They get no gradient.

    Returns:
        In the shape, strides and dtype of x.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin)
    return _rotated(x, cos, sin, 1)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """`sign` -1 applies the transposed map. cos and sin may differ between the halves."""
    if runs_triton(x) and x.ndim == 4 and cos.ndim == sin.ndim == 4 and cos.shape[1] == sin.shape[1] == 1 and x.numel():
        return _launch(x, cos, sin, transposed=sign < 0)
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


def _launch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool) -> torch.Tensor:
    from fastpeft.kernels.ops.rotary.kernel import rotary_kernel

    num, heads, length, width = x.shape
    y = torch.empty_like(x)
    cos, sin = (angles.expand(num, 1, length, width) for angles in (cos, sin))
    angle_strides = [stride for angles in (cos, sin) for i, stride in enumerate(angles.stride()) if i != 1]
    m, d, warps = row_tiles(width // 2, ELEMENTS)
    num_rows = num * heads * length
    sizes = num_rows, heads, length, width // 2
    arguments = x, cos, sin, y, *sizes, *x.stride(), *y.stride(), *angle_strides
    tiles = {"BLOCK_M": m, "BLOCK_D": d, "num_warps": warps}
    launch(rotary_kernel, (-(-num_rows // m),), *arguments, TRANSPOSED=transposed, **tiles)
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
