"""rms_norm: root mean square layer normalisation. It saves x and one number per row for backward. On a GPU each
direction is one launch.

Shape suffixes: T rows, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.launch import launch, refuse_second_order
from fastpeft.kernels.recompute import made_of
from fastpeft.kernels.row_tiles import row_tiles, takes_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) with weight frozen (arXiv:1910.07467, eq. 4).

    Args:
        x: (..., D), fp32 or fp64; on a GPU also bf16 and fp16, computed in fp32.
        weight: (D,), frozen, in the dtype of x.
        eps: added to the mean square.
        offset: 1 where the checkpoint stores the weight minus 1, as Gemma's does.

    Returns:
        (..., D), in the dtype of x.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _forward(x, weight, eps, offset)[0]
    y, rstd = _RmsNorm.apply(x, weight, eps, offset)

    def again(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _launch(x, weight, eps, offset)[0] if takes_rows(x) else _scaled(x, rstd, _gain(weight, offset))

    return made_of(y, again, x.detach(), rstd, weight)


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and 1 / sqrt(mean(x^2) + eps) of each row."""
    if takes_rows(x):
        return _launch(x, weight, eps, offset)
    rstd = _rstd(x, eps)
    return _scaled(x, rstd, _gain(weight, offset)), rstd


def _launch(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    from fastpeft.kernels.ops.rms_norm.kernel import rms_norm_kernel

    x = x.contiguous()
    num_rows, width = x.shape[:-1].numel(), x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty(num_rows, dtype=torch.float32)
    m, d, warps = row_tiles(width)
    arguments = x, weight.contiguous(), y, rstd, num_rows, width, eps, offset
    launch(rms_norm_kernel, (-(-num_rows // m),), *arguments, BLOCK_M=m, BLOCK_D=d, num_warps=warps)
    return y, rstd


def _launch_backward(
    dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, offset: float
) -> torch.Tensor:
    from fastpeft.kernels.ops.rms_norm.kernel import rms_norm_backward_kernel

    x = x.contiguous()
    num_rows, width = x.shape[:-1].numel(), x.shape[-1]
    dx = torch.empty_like(x)
    m, d, warps = row_tiles(width)
    arguments = dy.contiguous(), x, weight.contiguous(), rstd, dx, num_rows, width, offset
    launch(rms_norm_backward_kernel, (-(-num_rows // m),), *arguments, BLOCK_M=m, BLOCK_D=d, num_warps=warps)
    return dx


def _gain(weight_D: torch.Tensor, offset: float) -> torch.Tensor:
    return weight_D + offset if offset else weight_D


def _rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: torch.Tensor, rstd: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
    return (x * rstd).mul_(gain_D)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd = _forward(x, weight, eps, offset)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return y, rstd

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """dx = rstd (g - n mean(g n)) with g = dy * gain and n = x rstd."""
        refuse_second_order("rms_norm")
        dy = gradients[0]
        if dy is None:
            return (None,) * 4
        x, rstd, weight = ctx.saved_tensors
        if takes_rows(x):
            return _launch_backward(dy, x, rstd, weight, ctx.offset), None, None, None
        g = dy * _gain(weight, ctx.offset)
        along = torch.linalg.vecdot(g, x)[..., None].mul_(rstd.pow(3)).mul_(-1 / x.shape[-1])
        return g.mul_(rstd).addcmul_(x, along), None, None, None
