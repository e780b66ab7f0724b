"""What one training step measures. Tensors stay on the device: reading one waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Signals:
    loss: torch.Tensor
    """Mean task loss of the batch, a scalar; the penalty is not in it."""
    num_tokens: int
    """Tokens of the batch, padding not counted."""
    penalty: torch.Tensor | None = None
    """Value of the adapter's penalty, as it enters the objective."""
    penalty_share: torch.Tensor | None = None
    """Norm of the penalty's part over the norm of the whole: of the gradient, or of the update
    when the penalty is decoupled."""
    grad_norm: torch.Tensor | None = None
    """Norm of the gradient of all trainable parameters, penalty included, before clipping."""
    skipped: torch.Tensor | None = None
    """1.0 if the step was not taken because its loss or gradient is not finite, else 0.0."""


@dataclass(frozen=True)
class Rates:
    """What a schedule emits for one step."""

    lr: float
    """Learning rate of every parameter."""
    multiplier_K: torch.Tensor | None = None
    """A factor on `lr` of each adapted matrix, in the model's order, fp32; None: 1 everywhere."""
