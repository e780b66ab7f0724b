"""The specification of the AdamW update and of the update direction that schedules read.

AdamW: Loshchilov & Hutter, arXiv:1711.05101, algorithm 2, with the bias correction of Adam (arXiv:1412.6980).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class AdamWOptions:
    """Hyperparameters of adamw_step."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_norm: float = 0.0
    """Clip the gradient to this norm; 0 disables clipping."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the adapter's parameters; a step multiplies them by 1 - lr * weight_decay."""
    head_weight_decay: float = 0.0
    """The same for the task head."""
    head_ratio: float = 1.0
    """The head's learning rate divided by the adapter's."""


def adamw(
    data: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    rate: torch.Tensor,
    decay: torch.Tensor,
    options: AdamWOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New (data, exp_avg, exp_avg_sq) after step number `step`, counted from 1.

    `grad` is already clipped; `rate` and `decay` hold the learning rate and the weight decay of each element.
    """
    exp_avg = options.beta1 * exp_avg + (1 - options.beta1) * grad
    exp_avg_sq = options.beta2 * exp_avg_sq + (1 - options.beta2) * grad.square()
    mean, mean_sq = corrected(exp_avg, exp_avg_sq, step, options)
    return data - rate * (decay * data + mean / (mean_sq.sqrt() + options.eps)), exp_avg, exp_avg_sq


def corrected(
    exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: torch.Tensor, options: AdamWOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias-corrected moments after `step` steps; the zero moments of step 0 stay zero."""
    count = step.clamp_min(1)
    first, second = (bias_correction(count, beta).to(exp_avg.dtype) for beta in (options.beta1, options.beta2))
    return exp_avg / first, exp_avg_sq / second


def bias_correction(step: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - beta^step in fp64: in fp32 its relative error is 1e-4 for beta 0.999 and small counts."""
    return 1 - beta ** step.double()


def direction(
    data: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    decay: torch.Tensor,
    options: AdamWOptions,
) -> torch.Tensor:
    """u (1 - rate decay) of the last update theta <- theta - rate u; 0 before the first step.

    With theta after that update, u = adam + decay (theta + rate adam) / (1 - rate decay), because the decay applies to
    theta before it. adam = m / (sqrt(v) + eps) from the bias-corrected moments after that update.
    """
    mean, mean_sq = corrected(exp_avg, exp_avg_sq, step, options)
    return (mean / (mean_sq.sqrt() + options.eps) + decay * data) * (step > 0)
