"""rms_norm: root mean square layer normalisation that keeps x and one number a row for backward.

Shape suffixes: T rows, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.launch import refuse_second_order
from fastpeft.kernels.recompute import made_of


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) with weight frozen (arXiv:1910.07467, eq. 4).

    Args:
        x: (..., D), fp32 or fp64.
        weight: (D,), frozen, in the dtype of x.
        eps: added to the mean square.
        offset: 1 where the weight is kept as its difference from one, as Gemma's is.

    Returns:
        (..., D), in the dtype of x.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _scaled(x, _rstd(x, eps), _gain(weight, offset))
    y, rstd = _RmsNorm.apply(x, weight, eps, offset)
    return made_of(y, lambda x, rstd, weight: _scaled(x, rstd, _gain(weight, offset)), x.detach(), rstd, weight)


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
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return _scaled(x, rstd, _gain(weight, offset)), rstd

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """dx = rstd (g - n mean(g n)) with g = dy * gain and n = x rstd."""
        refuse_second_order("rms_norm")
        dy = gradients[0]
        if dy is None:
            return (None,) * 4
        x, rstd, weight = ctx.saved_tensors
        g = dy * _gain(weight, ctx.offset)
        along = torch.linalg.vecdot(g, x)[..., None].mul_(rstd.pow(3)).mul_(-1 / x.shape[-1])
        return g.mul_(rstd).addcmul_(x, along), None, None, None
