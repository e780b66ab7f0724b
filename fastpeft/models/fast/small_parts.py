"""Swaps of the small parts of a layer: norms, gated feed-forward networks, dropout."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fastpeft.kernels.dropout import draw_seed, keep_mask
from fastpeft.kernels.launch import refuse_second_order
from fastpeft.kernels.ops.gated.op import gated
from fastpeft.kernels.ops.gated.reference import ACTIVATIONS
from fastpeft.kernels.ops.residual_norm.op import residual_norm
from fastpeft.kernels.ops.rms_norm.op import rms_norm
from fastpeft.kernels.row_tiles import takes_rows
from fastpeft.models.fast.swaps import TRIAL_ROWS, Fast, Outputs, noise, with_gradients


def on_cpu(x: torch.Tensor) -> bool:
    """Whether the CPU forms pay off: not on a GPU, which has its own, nor under torch.compile, which fuses."""
    return x.is_cpu and not torch.compiler.is_compiling()


def fuses(x: torch.Tensor) -> bool:
    """Whether fused elementwise operations pay off: on a GPU each is one Triton kernel."""
    return (x.is_cpu or takes_rows(x)) and not torch.compiler.is_compiling()


def _children(module: nn.Module) -> set[str]:
    return set(module._modules)


def _frozen(module: Any) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class RmsNorm(Fast):
    """RMSNorm in few passes over memory."""

    lever = "norms"
    weight: nn.Parameter
    fast_offset: float

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        named = type(module).__name__.endswith("RMSNorm") and not module._modules and _eps(module) is not None
        return named and isinstance(weight, nn.Parameter) and weight.ndim == 1 and _frozen(module)

    @classmethod
    def variants(cls, module: nn.Module) -> list[dict[str, Any]]:
        return [{"fast_offset": 0.0}, {"fast_offset": 1.0}]

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        x = noise(module, TRIAL_ROWS, cast(Any, module).weight.shape[0])
        return lambda module: with_gradients(module, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_fast(x):
            return super().forward(x)
        return rms_norm(x, self.weight, cast(float, _eps(self)), self.fast_offset)

    def _is_fast(self, x: torch.Tensor) -> bool:
        """True on a CPU only in fp32, where transformers' own has the same precision."""
        is_wide = x.dtype.itemsize >= 4 or x.is_cuda
        return is_wide and fuses(x) and x.dtype == self.weight.dtype and not self.weight.requires_grad


def _eps(module: nn.Module) -> float | None:
    return next((v for k in ("variance_epsilon", "eps") if isinstance(v := getattr(module, k, None), float)), None)


class ResidualNorm(Fast):
    """A linear layer, dropout, the residual sum and LayerNorm; only the sum is saved for backward."""

    lever = "norms"
    dense: nn.Module
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        if _children(module) != {"dense", "LayerNorm", "dropout"}:
            return False
        norm, dropout = cast(Any, module).LayerNorm, cast(Any, module).dropout
        return isinstance(norm, nn.LayerNorm) and isinstance(dropout, nn.Dropout) and _frozen(norm)

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        width = cast(Any, module).dense.weight.shape[1]
        x = noise(module, TRIAL_ROWS, width)
        residual = noise(module, TRIAL_ROWS, cast(Any, module).LayerNorm.weight.shape[0])
        return lambda module: with_gradients(module, x, residual)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        norm = self.LayerNorm
        if not fuses(hidden_states) or norm.weight.requires_grad:
            return super().forward(hidden_states, input_tensor)
        x = self.dense(hidden_states)
        p = self.dropout.p if self.training else 0.0
        return residual_norm(x, input_tensor, norm.weight, norm.bias, norm.eps, dropout=p)


def activation_of(module: Any) -> str | None:
    """The name in ACTIVATIONS of the function that `module` computes; None if there is none."""
    x = torch.linspace(-9, 9, 181, dtype=torch.float64)
    name = type(module).__name__
    if not ("GELU" in name or "SiLU" in name):
        return None
    y = module(x)
    return next((name for name, own in ACTIVATIONS.items() if torch.allclose(y, own(x), rtol=0, atol=1e-12)), None)


class GatedFeedForward(Fast):
    """A gated feed-forward network that saves only the outputs of the gate and up projections for backward."""

    lever = "feed_forward"
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    fast_activation: str

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        found = {"gate_proj", "up_proj", "down_proj", "act_fn"} == _children(module)
        return found and activation_of(cast(Any, module).act_fn) is not None

    @classmethod
    def variants(cls, module: nn.Module) -> list[dict[str, Any]]:
        return [{"fast_activation": activation_of(cast(Any, module).act_fn)}]

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        x = noise(module, TRIAL_ROWS, cast(Any, module).gate_proj.weight.shape[1])
        return lambda module: with_gradients(module, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not fuses(x):
            return super().forward(x)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.fast_activation))


class Dropout(Fast):
    """Dropout whose mask is generated from a seed in both forward and backward."""

    lever = "dropout"
    p: float

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module) is nn.Dropout and 0 < module.p < 1 and not module.inplace

    @classmethod
    def trial(cls, module: nn.Module) -> Outputs:
        x = torch.linspace(-1, 1, TRIAL_ROWS)
        return lambda module: with_gradients(module, x)  # in eval mode, where it must be the identity

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not on_cpu(input) or not input.ndim:
            return super().forward(input)
        return _Dropout.apply(input, self.p, draw_seed(input.device))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
        ctx.p = p
        ctx.save_for_backward(seed)
        return _dropped(x, p, seed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        refuse_second_order("dropout")
        return _dropped(gradients[0], ctx.p, *ctx.saved_tensors), None, None


def _dropped(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    mask = keep_mask(x.shape[:-1].numel(), x.shape[-1], p, seed, x.dtype).view(x.shape)
    return mask.mul_(x).mul_(1 / (1 - p))
