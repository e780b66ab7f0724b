"""The specification of gradient_norm, from the explicit product."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gradient_norm_reference(xs: Sequence[torch.Tensor], gs: Sequence[torch.Tensor]) -> torch.Tensor:
    """|| sum_u G_u^T X_u ||_F over the uses u of one weight; X_u (T_u, I), G_u (T_u, O)."""
    return torch.stack([g_TO.t() @ x_TI for x_TI, g_TO in zip(xs, gs)]).sum(0).norm()
