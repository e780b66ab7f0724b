"""BACON, a learning rate from recent gradient noise, recent curvature of the loss, and the remaining budget.

The papers that name it give no equations. This is the project's reconstruction: lr = lr_max x SNAC's share of signal
x 1 / (1 + lambda / lambda_ref) x remaining budget share, and lr_k = lr clip(sqrt(lambda_bar / lambda_k), 1/4, 4).
lambda is the running curvature of all parameters in the units of Adam's step, 2 divided by the learning rate at which
it becomes unstable. lambda_ref is its value at the end of warmup, lambda_k the curvature of adapted matrix k, and
lambda_bar their mean. Negative curvature counts as 0, which gives the factors 1 and 4. Until lambda_ref is known,
lambda counts as equal to it.

Shape suffixes: K adapted matrices, U units.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastpeft.config.schedules import BaconConfig, ScheduleConfig
from fastpeft.schedules.running_curvature import RunningCurvature
from fastpeft.schedules.schedule import WarmedSchedule
from fastpeft.schedules.snac import SignalShare
from fastpeft.signals import Blocks, Measured, Need, Rates


class Bacon(WarmedSchedule):
    own: BaconConfig

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        self.share = SignalShare(self.adam, self.own)
        self.curvature = RunningCurvature(self.own.curvature_decay)
        self.reference: float | None = None
        """lambda_ref."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.GRAD_SQ, Need.MEAN_SQ, Need.SECANT})

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        if measured is not None and not measured.skipped:
            if measured.blocks is not None:
                self.share.update(measured.blocks)
            if measured.secant is not None:
                self.curvature.update(measured.secant)
        warm = self.warmup_factor(progress)
        left = min(max(1 - progress, 0.0), 1.0)
        lr = self.peak_lr * warm * self.share.value * self._flatness() * left
        return Rates(lr, self._multipliers())

    @property
    def _is_settled(self) -> bool:
        """Whether the running curvature has had as many readings as its window is long."""
        return self.curvature.num_readings * (1 - self.curvature.decay) >= 1 - 1e-9

    def _flatness(self) -> float:
        """1 / (1 + lambda / lambda_ref)."""
        overall = self.curvature.overall()
        if overall is None or not math.isfinite(overall):
            return 0.5
        if self.reference is None and self.warmup.ended_at is not None and self._is_settled and overall > 0:
            self.reference = overall
        if self.reference is None:
            return 0.5
        return 1 / (1 + max(overall, 0.0) / self.reference)

    def _multipliers(self) -> np.ndarray | None:
        """Factor of each matrix; None if no matrix has a positive curvature."""
        curvature_U = self.curvature.per_unit()
        if curvature_U is None or not self._is_settled or not self.blocks:
            return None
        curvature_K = np.maximum(curvature_U[: len(self.blocks)], 0)
        known_K = np.isfinite(curvature_K)
        mean = float(curvature_K[known_K].mean()) if known_K.any() else 0.0
        if not 0 < mean < math.inf:
            return None
        most = self.own.most
        least = mean / most**2
        if least == 0:
            return None
        flat_K = np.where(known_K, np.maximum(curvature_K, least), mean)
        return np.clip(np.sqrt(mean / flat_K), 1 / most, most)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "share": self.share.state(),
            "curvature": self.curvature.state(),
            "reference": self.reference,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.share.load_state(state["share"])
        self.curvature.load_state(state["curvature"])
        self.reference = state["reference"]
