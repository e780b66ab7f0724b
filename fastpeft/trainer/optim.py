"""AdamW over the flat buffers, with clipping, the non-finite guard and fp16 loss scaling.

All of it happens on the device: neither the clip factor nor the guard is ever read by the host.
"""

from __future__ import annotations

import numpy as np
import torch

from fastpeft.adapters.flat import FlatParameters
from fastpeft.config.schema import OptimizerConfig
from fastpeft.kernels import AdamWOptions, adamw_step, weighted_frobenius
from fastpeft.signals import Rates, Signals

FIRST_LOSS_SCALE = 2.0**16
SCALE_GROWTH_STEPS = 2000


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) on the adapter's and the head's parameters."""

    def __init__(self, flat: FlatParameters, config: OptimizerConfig, dtype: torch.dtype) -> None:
        self._flat = flat
        self._options = AdamWOptions(
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            max_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
            head_weight_decay=config.head_weight_decay,
            head_ratio=config.head_lr_ratio,
        )
        self._exp_avg, self._exp_avg_sq = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
        self._step = torch.zeros((), device=flat.data.device)
        device = flat.data.device
        self.loss_scale = None
        self._good_steps = torch.zeros((), device=device)
        if dtype == torch.float16:
            self.loss_scale = torch.tensor(FIRST_LOSS_SCALE, device=device)

    def step(self, signals: Signals, rates: Rates) -> None:
        """Clip, guard, update. Sets signals.skipped, and signals.grad_norm unless the adapter has measured it."""
        flat = self._flat
        if signals.grad_norm is None:
            signals.grad_norm = weighted_frobenius(flat.data, flat.grad, flat.layout).norm
        signals.skipped = adamw_step(
            flat.data,
            flat.grad,
            self._exp_avg,
            self._exp_avg_sq,
            self._step,
            flat.layout,
            lr=rates.lr,
            norm=signals.grad_norm,
            loss=signals.loss,
            multiplier_K=self._on_device(rates.multiplier_K),
            options=self._options,
        ).skipped
        if self.loss_scale is not None:
            self.adjust_scale(signals.skipped)

    def _on_device(self, multiplier_K: np.ndarray | None) -> torch.Tensor | None:
        if multiplier_K is None:
            return None
        host_K = torch.as_tensor(multiplier_K, dtype=torch.float32)
        device = self._flat.data.device
        return host_K.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host_K

    def adjust_scale(self, skipped: torch.Tensor) -> None:
        """fp16: halve the scale where `skipped` is 1 (an overflow), double it after 2,000 steps of 0."""
        assert self.loss_scale is not None
        self._good_steps = (self._good_steps + 1) * (1 - skipped)
        grow = (self._good_steps >= SCALE_GROWTH_STEPS).float()
        self._good_steps *= 1 - grow
        self.loss_scale = (self.loss_scale * (1 + grow) * (1 - 0.5 * skipped)).clamp(1.0, 2.0**24)

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and counters, by name."""
        state = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "step": self._step}
        if self.loss_scale is not None:
            state["loss_scale"], state["good_steps"] = self.loss_scale, self._good_steps
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._exp_avg.copy_(state["exp_avg"])
        self._exp_avg_sq.copy_(state["exp_avg_sq"])
        self._step.copy_(state["step"])
        if self.loss_scale is not None:
            device = self._flat.data.device
            self.loss_scale = state["loss_scale"].to(device)
            self._good_steps = state["good_steps"].to(device)
