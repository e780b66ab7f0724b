"""residual_norm: dropout, the residual sum and LayerNorm behind a linear layer, as encoders have them.

Against autograd over the plain expression it keeps one tensor, the sum, and no mask; y itself is made again from the
sum by lora_linear, which needs it as its x.

Shape suffixes: T tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.dropout import draw_seed, keep_mask
from fastpeft.kernels.launch import refuse_second_order
from fastpeft.kernels.recompute import made_of


def residual_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm(residual + D(x)) with weight and bias frozen (post-norm of arXiv:1706.03762, section 3.1 and 5.4).

    Args:
        x: (..., D), in a floating dtype.
        residual: in the shape and dtype of x.
        weight: (D,), frozen.
        bias: (D,), frozen, or None.
        eps: added to the variance.
        dropout: probability in [0, 1) of an element of x to be dropped.
        seed: int64 of one element on x's device; None draws one from torch's generator there.

    Returns:
        (..., D), in the dtype of x.
    """
    if dropout and seed is None:
        seed = draw_seed(x.device)
    if not (torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad)):
        total = _total(x, residual, dropout, seed)
        return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps)
    y, total = _ResidualNorm.apply(x, residual, weight, bias, eps, dropout, seed)
    return made_of(y, lambda total, *affine: _affine_norm(total, eps, *affine), *_without_none(total, weight, bias))


def _without_none(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _affine_norm(
    total: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps)


def _total(x: torch.Tensor, residual: torch.Tensor, dropout: float, seed: torch.Tensor | None) -> torch.Tensor:
    """residual + D(x), a new tensor."""
    if not dropout:
        return residual + x
    assert seed is not None, "dropout has a seed"
    total = _mask(x, dropout, seed).mul_(x)
    return torch.add(residual, total, alpha=1 / (1 - dropout), out=total)


def _mask(x: torch.Tensor, dropout: float, seed: torch.Tensor) -> torch.Tensor:
    return keep_mask(x.shape[:-1].numel(), x.shape[-1], dropout, seed, x.dtype).view(x.shape)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        dropout: float,
        seed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        total = _total(x, residual, dropout, seed)
        y, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
        ctx.save_for_backward(total, mean, rstd, weight, bias, seed)
        ctx.dropout = dropout
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order("residual_norm")
        dy = gradients[0]
        if dy is None:
            return (None,) * 7
        total, mean, rstd, weight, bias, seed = ctx.saved_tensors
        dtotal = torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(), total, weight.shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        dx = dtotal
        if ctx.dropout and ctx.needs_input_grad[0]:
            dx = _mask(total, ctx.dropout, seed).mul_(dtotal).mul_(1 / (1 - ctx.dropout))
        return dx, dtotal, None, None, None, None, None
