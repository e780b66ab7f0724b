"""AdamW with clipping, a guard, rates per matrix and the sums that schedules read: the specification.

AdamW: Loshchilov & Hutter, arXiv:1711.05101, algorithm 2, with the bias correction of Adam (arXiv:1412.6980).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class AdamWOptions:
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_norm: float = 0.0
    """Clip the gradient to this norm; 0: never."""
    weight_decay: float = 0.0
    """Decoupled decay of the adapter's parameters, in units of the learning rate."""
    head_weight_decay: float = 0.0
    head_ratio: float = 1.0
    """The head's learning rate over the adapter's."""


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
    """New (data, exp_avg, exp_avg_sq) after step number `step`, the first being 1.

    `grad` is unscaled and clipped; `rate` and `decay` hold the learning rate and the decay of each element.
    """
    exp_avg = options.beta1 * exp_avg + (1 - options.beta1) * grad
    exp_avg_sq = options.beta2 * exp_avg_sq + (1 - options.beta2) * grad.square()
    mean, mean_sq = corrected(exp_avg, exp_avg_sq, step, options)
    return data - rate * (decay * data + mean / (mean_sq.sqrt() + options.eps)), exp_avg, exp_avg_sq


def corrected(
    exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, step: torch.Tensor, options: AdamWOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias-corrected moments after `step` steps; zeros after none."""
    count = step.clamp_min(1)
    first, second = (bias_correction(count, beta).to(exp_avg.dtype) for beta in (options.beta1, options.beta2))
    return exp_avg / first, exp_avg_sq / second


def bias_correction(step: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - beta^step, in fp64: fp32 would lose 1e-4 of it where beta is 0.999 and the count small."""
    return 1 - beta ** step.double()


def direction(
    data: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    decay: torch.Tensor,
    options: AdamWOptions,
) -> torch.Tensor:
    """u (1 - rate decay) of the update theta <- theta - rate u that led here; 0 after no step.

    u holds the decay of theta as it was before: u = adam + decay (theta + rate adam) / (1 - rate decay), where theta
    is what it is now and adam comes from the moments that the update left.
    """
    mean, mean_sq = corrected(exp_avg, exp_avg_sq, step, options)
    return (mean / (mean_sq.sqrt() + options.eps) + decay * data) * (step > 0)
