"""Schedules that depend on progress alone: constant, linear, cosine, WSD and REX.

Each is a shape: a function from the progress q after warmup (0 to 1) to a share of the peak
learning rate. All except `constant` reach their final value exactly at the end of the budget.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from fastpeft.schedules.schedule import WarmedSchedule
from fastpeft.signals import Measured, Rates


class ClassicSchedule(WarmedSchedule):
    @abstractmethod
    def shape(self, q: float) -> float:
        """Share of the peak learning rate at progress q after warmup."""

    def rates(self, measured: Measured | None, progress: float) -> Rates:
        factor = self.warmup_factor(progress)
        start = self.warmup.ended_at
        if start is None:
            return Rates(self.peak_lr * factor)
        return Rates(self.peak_lr * self.shape((progress - start) / max(1e-9, 1 - start)))

    def _between(self, share: float) -> float:
        """Linear interpolation: 1 at share 1, final_ratio at share 0."""
        return self.config.final_ratio + (1 - self.config.final_ratio) * share


class Constant(ClassicSchedule):
    def shape(self, q: float) -> float:
        return 1.0


class Linear(ClassicSchedule):
    """Linear decay, the strongest simple schedule under a budget (arXiv:1905.04753)."""

    def shape(self, q: float) -> float:
        return self._between(1 - q)


class Cosine(ClassicSchedule):
    """Half a cosine (arXiv:1608.03983), without restarts."""

    def shape(self, q: float) -> float:
        return self._between((1 + math.cos(math.pi * q)) / 2)


class WarmupStableDecay(ClassicSchedule):
    """Constant, then 1 - sqrt decay over the last `decay_fraction` (arXiv:2405.18392)."""

    def shape(self, q: float) -> float:
        fraction = self.config.decay_fraction
        decayed = max(0.0, q - (1 - fraction)) / fraction
        return self._between(1 - math.sqrt(min(1.0, decayed)))


class Rex(ClassicSchedule):
    """(1 - q) / (1/2 + (1 - q) / 2), the reflected exponential (arXiv:2107.04197, eq. 1)."""

    def shape(self, q: float) -> float:
        return (1 - q) / (0.5 + 0.5 * (1 - q))
