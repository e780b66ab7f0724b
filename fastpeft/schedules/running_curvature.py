"""Running curvature of each block from secants, in the units of Adam's step."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpeft.signals import Secants


class RunningCurvature:
    """lambda = EMA(d^T H d) / EMA(d^T sqrt(v) d) of each unit, with v Adam's second moment.

    An Adam step with learning rate eta is stable along d while eta lambda < 2. Numerator and denominator are averaged
    separately, because steps with a denominator near zero would dominate a mean of ratios.

    Along the last update (`Need.PLAIN_SECANT`) the gradient difference shares its noise with d: pure noise without
    curvature gives eta lambda = 1 + beta1. Along the update before last (`Need.SECANT`) the two are independent.
    """

    def __init__(self, decay: float = 0.95) -> None:
        """
        Args:
            decay: decay of the averages per reading; 0 keeps only the last reading.
        """
        self.decay = decay
        self.num_readings = 0
        self._mean_2U: np.ndarray | None = None
        self._per_unit_U: np.ndarray | None = None
        """Cached result of `per_unit` for the readings so far."""

    def update(self, secants: Secants) -> None:
        """Add a reading. Units whose value is not finite keep their averages."""
        new_2U = np.array([secants.change_U, secants.square_U], dtype=np.float64)
        self.num_readings += 1
        self._per_unit_U = None
        if self._mean_2U is None:
            self._mean_2U = np.zeros_like(new_2U)
        finite_U = np.isfinite(new_2U).all(0)
        mixed_2U = self.decay * self._mean_2U + (1 - self.decay) * np.where(finite_U, new_2U, 0)
        self._mean_2U = np.where(finite_U, mixed_2U, self._mean_2U)

    def per_unit(self) -> np.ndarray | None:
        """(U,) lambda, NaN where its denominator is not positive; None before the first reading."""
        if self._per_unit_U is None and self._mean_2U is not None:
            change_U, square_U = self._mean_2U
            with np.errstate(over="ignore"):
                unknown_U = np.full_like(change_U, np.nan)
                self._per_unit_U = np.divide(change_U, square_U, out=unknown_U, where=square_U > 0)
        return self._per_unit_U

    def overall(self) -> float | None:
        """lambda of all units together; None before the first reading, and where it is undefined."""
        if self._mean_2U is None:
            return None
        change, square = self._mean_2U.sum(1).tolist()
        return change / square if square > 0 else None

    def state(self) -> dict[str, Any]:
        return {
            "num_readings": self.num_readings,
            "mean": None if self._mean_2U is None else self._mean_2U.tolist(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_readings, self._per_unit_U = state["num_readings"], None
        self._mean_2U = None if state["mean"] is None else np.array(state["mean"], dtype=np.float64)
