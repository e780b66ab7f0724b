"""Exponential running means that figures which mean nothing cannot spoil."""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = 1e100
"""A figure beyond it counts as not finite: sums and squares of what is left do not overflow."""


class RunningMean:
    """Bias-corrected exponential mean, element by element; an element that is not finite is left out."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._sum: np.ndarray | None = None
        self._weight: np.ndarray | None = None

    def update(self, values: np.ndarray | float) -> None:
        """Any shape, the same each time."""
        new = np.asarray(values, dtype=np.float64)
        if self._sum is None or self._weight is None:
            self._sum, self._weight = np.zeros_like(new), np.zeros_like(new)
        good = np.abs(new) <= LARGEST
        kept = np.where(good, self.decay, 1.0)
        self._sum = kept * self._sum + (1 - kept) * np.where(good, new, 0.0)
        self._weight = kept * self._weight + (1 - kept)

    @property
    def value(self) -> np.ndarray | None:
        """NaN where nothing was finite yet; None before the first update."""
        if self._sum is None or self._weight is None:
            return None
        return np.divide(self._sum, self._weight, out=np.full_like(self._sum, np.nan), where=self._weight > 0)

    def state(self) -> list[Any] | None:
        return None if self._sum is None or self._weight is None else [self._sum.tolist(), self._weight.tolist()]

    def load_state(self, state: list[Any] | None) -> None:
        self._sum, self._weight = (None, None) if state is None else (np.array(part) for part in state)


class RunningFloat:
    """RunningMean of one figure, in plain floats: an array of one costs ten times as much."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._sum, self._weight = 0.0, 0.0

    def update(self, value: float) -> None:
        if abs(value) <= LARGEST:  # false for NaN
            self._sum = self.decay * self._sum + (1 - self.decay) * value
            self._weight = self.decay * self._weight + (1 - self.decay)

    @property
    def value(self) -> float | None:
        """None before the first figure that is finite."""
        return self._sum / self._weight if self._weight else None

    def state(self) -> list[float]:
        return [self._sum, self._weight]

    def load_state(self, state: list[float]) -> None:
        self._sum, self._weight = state


def clipped(value: float, most: float) -> float:
    """Within 1/most and most."""
    return min(max(value, 1 / most), most)
