"""gated: the activation and the product of gate and up in a gated feed-forward network.

For backward it saves gate and up only. lora_linear, which needs the result as its x, recomputes it from them. The plain
GELU of encoders is not recomputed: a second error function costs 2.4 % of a step, and saves a third of the activations.
On a GPU each direction is one launch.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpeft.kernels.dispatch import runs_triton
from fastpeft.kernels.launch import launch, refuse_second_order
from fastpeft.kernels.ops.gated.reference import ACTIVATIONS
from fastpeft.kernels.recompute import made_of

BLOCK, NUM_WARPS = 1024, 4


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
        return _forward(gate, up, activation)
    y = _Gated.apply(gate, up, activation)
    return made_of(y, lambda gate, up: _forward(gate, up, activation), gate.detach(), up.detach())


def _forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if not runs_triton(gate) or not gate.numel():
        return ACTIVATIONS[activation](gate).mul_(up)
    from fastpeft.kernels.ops.gated.kernel import gated_kernel

    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    grid = (-(-gate.numel() // BLOCK),)
    launch(gated_kernel, grid, gate, up, y, gate.numel(), ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return y


def _backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if not runs_triton(gate) or not gate.numel():
        return _gradient(activation, dy * up, gate), ACTIVATIONS[activation](gate).mul_(dy)
    from fastpeft.kernels.ops.gated.kernel import gated_backward_kernel

    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    grid, arguments = (-(-gate.numel() // BLOCK),), (dy, gate, up, dgate, dup, gate.numel())
    launch(gated_backward_kernel, grid, *arguments, ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return dgate, dup


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
        return _forward(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        refuse_second_order("gated")
        (dy,) = gradients
        gate, up = ctx.saved_tensors
        return *_backward(dy, gate, up, ctx.activation), None
