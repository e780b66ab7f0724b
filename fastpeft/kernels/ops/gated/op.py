"""gated: what stands between the products of a gated feed-forward network.

It keeps the outputs of the products before it, and nothing else: its own result is made again from those by
lora_linear, which needs it as its x. (Tried for the plain GELU of encoders: its error function takes 2.4 % of a step a
second time, for a third of the activations.)
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.launch import refuse_second_order
from fastpeft.kernels.ops.gated.reference import ACTIVATIONS, gated_reference
from fastpeft.kernels.recompute import made_of


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up (arXiv:2002.05202, eq. 6).

    Args:
        gate: any shape, in a floating dtype.
        up: in the shape and dtype of gate.
        activation: silu (SwiGLU), gelu or gelu_tanh (GEGLU).

    Returns:
        In the shape and dtype of gate.
    """
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        return ACTIVATIONS[activation](gate).mul_(up)
    y = _Gated.apply(gate, up, activation)
    return made_of(y, lambda gate, up: ACTIVATIONS[activation](gate).mul_(up), gate.detach(), up.detach())


def _gradient(activation: str, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dy * act'(x)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if activation == "gelu_tanh" else "none")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_reference(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        refuse_second_order("gated")
        (dy,) = gradients
        gate, up = ctx.saved_tensors
        dgate = _gradient(ctx.activation, dy * up, gate)
        return dgate, ACTIVATIONS[ctx.activation](gate).mul_(dy), None
