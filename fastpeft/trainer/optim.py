"""AdamW over the flat buffers, with clipping, the non-finite guard and fp16 loss scaling.

All of it happens on the device: torch's fused AdamW divides the gradient by `grad_scale` and takes
no step where `found_inf` is 1, so neither the clip factor nor the guard is ever read by the host.
"""

from __future__ import annotations

import torch
from torch import nn

from fastpeft.adapters.flat import FlatParameters
from fastpeft.config.schema import OptimizerConfig
from fastpeft.signals import Rates, Signals

FIRST_LOSS_SCALE = 2.0**16
SCALE_GROWTH_STEPS = 2000


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) on the adapter's and the head's parameters."""

    def __init__(self, flat: FlatParameters, config: OptimizerConfig, dtype: torch.dtype) -> None:
        self._flat, self._config = flat, config
        cut = flat.num_adapter
        groups = []
        for part, decay, ratio in (
            (slice(None, cut), config.weight_decay, 1.0),
            (slice(cut, None), config.head_weight_decay, config.head_lr_ratio),
        ):
            parameter = nn.Parameter(flat.data[part])
            parameter.grad = flat.grad[part]
            if parameter.numel():
                groups.append({"params": [parameter], "weight_decay": decay, "ratio": ratio})
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        device = flat.data.device
        self.loss_scale = None
        self._good_steps = torch.zeros((), device=device)
        if dtype == torch.float16:
            self.loss_scale = torch.tensor(FIRST_LOSS_SCALE, device=device)

    def step(self, signals: Signals, rates: Rates) -> None:
        """Clip, guard, update. Sets signals.grad_norm and signals.skipped."""
        norm = torch.linalg.vector_norm(self._flat.grad)
        signals.grad_norm = norm
        signals.skipped = (~(norm.isfinite() & signals.loss.isfinite())).float()
        limit = self._config.max_grad_norm
        clip = (norm / limit).clamp_min(1.0) if limit else torch.ones_like(norm)
        self._adamw.grad_scale = clip
        self._adamw.found_inf = signals.skipped
        for group in self._adamw.param_groups:
            group["lr"] = rates.lr * group["ratio"]
        self._adamw.step()
        if self.loss_scale is not None:
            self.adjust_scale(signals.skipped)

    def adjust_scale(self, skipped: torch.Tensor) -> None:
        """fp16: halve the scale where `skipped` is 1 (an overflow), double it after 2,000 steps of 0."""
        assert self.loss_scale is not None
        self._good_steps = (self._good_steps + 1) * (1 - skipped)
        grow = (self._good_steps >= SCALE_GROWTH_STEPS).float()
        self._good_steps *= 1 - grow
        self.loss_scale = (self.loss_scale * (1 + grow) * (1 - 0.5 * skipped)).clamp(1.0, 2.0**24)

    def state(self) -> dict[str, torch.Tensor]:
        """Moments and counters, by name."""
        state = {}
        for i, group in enumerate(self._adamw.param_groups):
            for name, tensor in self._adamw.state[group["params"][0]].items():
                state[f"{i}.{name}"] = tensor
        if self.loss_scale is not None:
            state["loss_scale"], state["good_steps"] = self.loss_scale, self._good_steps
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        device = self._flat.data.device
        for i, group in enumerate(self._adamw.param_groups):
            names = [name for name in state if name.startswith(f"{i}.")]
            own = {name.split(".", 1)[1]: state[name].to(device) for name in names}
            if own:
                self._adamw.state[group["params"][0]] = own
        if self.loss_scale is not None:
            self.loss_scale = state["loss_scale"].to(device)
            self._good_steps = state["good_steps"].to(device)
