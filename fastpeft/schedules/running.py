"""Exponential running means that ignore non-finite values."""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = 1e100
"""Larger values count as not finite, so that sums and squares of the others do not overflow."""


class RunningMean:
    """Bias-corrected exponential mean per element; elements that are not finite are left out."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._sum: np.ndarray | None = None
        self._weight: np.ndarray | None = None

    def update(self, values: np.ndarray | float) -> None:
        """Add values of any shape, the same shape in every call."""
        new = np.asarray(values, dtype=np.float64)
        if self._sum is None or self._weight is None:
            self._sum, self._weight = np.zeros_like(new), np.zeros_like(new)
        good = np.abs(new) <= LARGEST
        kept = np.where(good, self.decay, 1.0)
        self._sum = kept * self._sum + (1 - kept) * np.where(good, new, 0.0)
        self._weight = kept * self._weight + (1 - kept)

    @property
    def value(self) -> np.ndarray | None:
        """NaN for elements without a finite value so far; None before the first update."""
        if self._sum is None or self._weight is None:
            return None
        return np.divide(self._sum, self._weight, out=np.full_like(self._sum, np.nan), where=self._weight > 0)

    def state(self) -> list[Any] | None:
        return None if self._sum is None or self._weight is None else [self._sum.tolist(), self._weight.tolist()]

    def load_state(self, state: list[Any] | None) -> None:
        self._sum, self._weight = (None, None) if state is None else (np.array(part) for part in state)


class RunningFloat:
    """RunningMean of one number, in plain floats: a NumPy array of one element costs ten times as much."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._sum, self._weight = 0.0, 0.0

    def update(self, value: float) -> None:
        if abs(value) <= LARGEST:  # false for NaN
            self._sum = self.decay * self._sum + (1 - self.decay) * value
            self._weight = self.decay * self._weight + (1 - self.decay)

    @property
    def value(self) -> float | None:
        """None before the first finite value."""
        return self._sum / self._weight if self._weight else None

    def state(self) -> list[float]:
        return [self._sum, self._weight]

    def load_state(self, state: list[float]) -> None:
        self._sum, self._weight = state


def clipped(value: float, most: float) -> float:
    """`value`, limited to [1 / most, most]."""
    return min(max(value, 1 / most), most)
