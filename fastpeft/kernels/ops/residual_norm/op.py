"""residual_norm: dropout, the residual sum and LayerNorm after a linear layer, as in encoders.

For backward it saves the sum and no dropout mask. lora_linear, which needs y as its x, recomputes y from the sum. On a
GPU each direction is one launch.

Shape suffixes: T tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.dropout import draw_seed, keep_mask
from fastpeft.kernels.launch import launch, refuse_second_order
from fastpeft.kernels.ops.lora_linear.reference import drop_below
from fastpeft.kernels.recompute import made_of
from fastpeft.kernels.row_tiles import row_tiles, takes_rows


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
        dropout: probability in [0, 1) that an element of x is dropped.
        seed: int64 of one element on x's device; None draws one from torch's generator there.

    Returns:
        (..., D), in the dtype of x.
    """
    if dropout and seed is None:
        seed = draw_seed(x.device)
    if not (torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad)):
        return _forward(x, residual, weight, bias, eps, dropout, seed)[0]
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


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y; the sum; mean and 1 / standard deviation of each row of the sum."""
    if takes_rows(x):
        return _launch(x, residual, weight, bias, eps, dropout, seed)
    total = _total(x, residual, dropout, seed)
    y, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
    return y, total, mean, rstd


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from fastpeft.kernels.ops.residual_norm.kernel import residual_norm_kernel

    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    num_rows, width = x.shape[:-1].numel(), x.shape[-1]
    total, y = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (x.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    m, d, warps = row_tiles(width)
    launch(
        residual_norm_kernel,
        (-(-num_rows // m),),
        *(x, residual, weight, weight if bias is None else bias, x if seed is None else seed, total, y, mean, rstd),
        *(num_rows, width, eps, drop_below(dropout), 1 / (1 - dropout)),
        DROPOUT=dropout > 0,
        HAS_BIAS=bias is not None,
        BLOCK_M=m,
        BLOCK_D=d,
        num_warps=warps,
    )
    return y, total, mean, rstd


def _launch_backward(
    dy: torch.Tensor,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fastpeft.kernels.ops.residual_norm.kernel import residual_norm_backward_kernel

    num_rows, width = total.shape[:-1].numel(), total.shape[-1]
    dtotal = torch.empty_like(total)
    dx = torch.empty_like(total) if dropout else dtotal
    m, d, warps = row_tiles(width)
    launch(
        residual_norm_backward_kernel,
        (-(-num_rows // m),),
        *(dy.contiguous(), total, weight.contiguous(), total if seed is None else seed, mean, rstd, dtotal, dx),
        *(num_rows, width, drop_below(dropout), 1 / (1 - dropout)),
        DROPOUT=dropout > 0,
        BLOCK_M=m,
        BLOCK_D=d,
        num_warps=warps,
    )
    return dx, dtotal


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
        y, total, mean, rstd = _forward(x, residual, weight, bias, eps, dropout, seed)
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
        if takes_rows(total):
            dx, dtotal = _launch_backward(dy, total, mean, rstd, weight, ctx.dropout, seed)
            return dx, dtotal, None, None, None, None, None
        dtotal = torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(), total, weight.shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        dx = dtotal
        if ctx.dropout and ctx.needs_input_grad[0]:
            dx = _mask(total, ctx.dropout, seed).mul_(dtotal).mul_(1 / (1 - ctx.dropout))
        return dx, dtotal, None, None, None, None, None
