"""lora_linear: a frozen linear layer and its LoRA update, with closed-form gradients.

Against autograd over the plain expression it saves only x and the T x R product, computes the
T x R gradient once, adds both parts of y and of dx into one buffer, and forms no dW.

Shape suffixes: T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """y = x W^T + bias + scale (x A^T) B^T with W and bias frozen (arXiv:2106.09685, eq. 3).

    Args:
        x: (..., I), in the dtype of `weight`.
        weight: (O, I), frozen.
        bias: (O,), frozen, or None.
        lora_a: (R, I), in any floating dtype; its gradient comes in that dtype.
        lora_b: (O, R), likewise.
        scale: lora_alpha / R, no unit.

    Returns:
        (..., O), in the dtype of x.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    num_out, num_in = weight.shape
    rank = lora_a.shape[0]
    if x.shape[-1] != num_in or lora_a.shape != (rank, num_in) or lora_b.shape != (num_out, rank):
        raise ValueError(
            f"lora_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_a "
            f"{tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not fit; expected "
            "x (..., I), weight (O, I), lora_a (R, I), lora_b (O, R)"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"lora_linear: x is {x.dtype} but weight is {weight.dtype}")
    return _LoraLinear.apply(x, lora_a, lora_b, (weight, bias, scale))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        frozen: tuple[torch.Tensor, torch.Tensor | None, float],
    ) -> torch.Tensor:
        weight_OI, bias_O, scale = frozen
        x_TI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = lora_a.to(x.dtype), lora_b.to(x.dtype)
        s_TR = x_TI @ a_RI.t()
        y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias_O)
        y_TO.addmm_(s_TR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(x_TI, s_TR, a_RI, b_OR, weight_OI)
        ctx.scale, ctx.x_shape = scale, x.shape
        ctx.dtypes = lora_a.dtype, lora_b.dtype
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, s_TR, a_RI, b_OR, weight_OI = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        ds_TR = (dy_TO @ b_OR).mul_(ctx.scale)
        dx = da_RI = db_OR = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TO @ weight_OI).addmm_(ds_TR, a_RI).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            da_RI = (ds_TR.t() @ x_TI).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            db_OR = (dy_TO.t() @ s_TR).to(ctx.dtypes[1]).mul_(ctx.scale)
        return dx, da_RI, db_OR, None
