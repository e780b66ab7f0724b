"""SNAC, a learning rate that follows the noise of the gradient.

The papers that name it give no equations. This is the project's reconstruction: lr = lr_max |E g|^2 /
(|E g|^2 + Var g), from exponential moments of the gradient, minus the value of these moments under pure noise.

Both moments use the window of Adam's first moment. With beta = beta1, after n steps,

    m = sum_i w_i g_i,  s = sum_i w_i |g_i|^2,  w_i = (1 - beta) beta^(n - i) / (1 - beta^n),

m is Adam's bias-corrected first moment, whose square is measured. s is a running mean of the squared norm of the
clipped gradient, kept here. For independent gradients of mean mu and variance v (summed over parameters)

    E |m|^2 = |mu|^2 + rho v,  E s = |mu|^2 + v,  rho = sum_i w_i^2 = (1 - beta)/(1 + beta) (1 + beta^n)/(1 - beta^n),

so that (|m|^2 - rho s) / (1 - rho) and s estimate |E g|^2 and |E g|^2 + Var g without bias. rho falls from 1 to the
floor (1 - beta)/(1 + beta). Adam's second moment cannot replace s, because its window (beta2) differs: the ratio would
be wrong by the factor by which the gradient shrank over that window. With s it is at most 1, and 1 only if all g_i are
equal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastpeft.config.schedules import ScheduleConfig, SnacConfig
from fastpeft.errors import UserError
from fastpeft.schedules.running import LARGEST, RunningMean
from fastpeft.schedules.schedule import WarmedSchedule
from fastpeft.signals import AdamMoments, Blocks, BlockSums, Measured, Need, Rates


class SignalShare:
    """|E g|^2 / (|E g|^2 + Var g) over all trained parameters. Numerator and denominator are averaged separately."""

    def __init__(self, adam: AdamMoments, options: SnacConfig) -> None:
        """
        Raises:
            UserError: Adam has no first moment.
        """
        if adam.beta1 <= 0:
            raise UserError("optimizer.beta1: signal is told from noise by the gradient's running mean: more than 0")
        self.adam, self.options = adam, options
        self.num_steps = 0
        self._square = 0.0
        self._signal_and_all = RunningMean(options.decay)

    def update(self, sums: BlockSums) -> None:
        """Add the sums of a step that was not skipped."""
        beta = self.adam.beta1
        self.num_steps += 1
        with np.errstate(invalid="ignore", over="ignore"):
            square, mean_sq = float(sums.grad_sq_U.sum()), float(sums.mean_sq_U.sum())
        if not (0 <= square <= LARGEST and 0 <= mean_sq <= LARGEST):
            return
        if self.adam.max_norm:
            square = min(square, self.adam.max_norm**2)
        self._square = beta * self._square + (1 - beta) * square
        if self.num_steps == 1:
            return  # rho is 1: a single gradient has no variance
        power = beta**self.num_steps
        rho = (1 - beta) / (1 + beta) * (1 + power) / (1 - power)
        mean_square = self._square / (1 - power)
        self._signal_and_all.update(np.array([mean_sq - rho * mean_square, (1 - rho) * mean_square]))

    @property
    def value(self) -> float:
        """Between the floor and 1; the floor while no signal is detected."""
        means = self._signal_and_all.value
        if means is None:
            return self.options.floor
        signal, total = means.tolist()
        if not total > 0 or math.isnan(signal):
            return self.options.floor
        return min(max(signal / total, self.options.floor), 1.0)

    def state(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "square": self._square, "means": self._signal_and_all.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_steps, self._square = state["num_steps"], state["square"]
        self._signal_and_all.load_state(state["means"])


class Snac(WarmedSchedule):
    own: SnacConfig

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        self.share = SignalShare(self.adam, self.own)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.GRAD_SQ, Need.MEAN_SQ})

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        if measured is not None and not measured.skipped and measured.blocks is not None:
            self.share.update(measured.blocks)
        return Rates(self.peak_lr * self.warmup_factor(progress) * self.share.value)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"share": self.share.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.share.load_state(state["share"])
