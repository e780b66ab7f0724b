"""Running curvature of each block from secants, in the units that Adam's step meets."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpeft.signals import Secants


class RunningCurvature:
    """lambda = EMA(d^T H d) / EMA(d^T sqrt(v) d) of each unit, v Adam's second moment.

    An Adam step of rate eta is stable along d while eta lambda < 2. Numerator and denominator are averaged apart: a
    mean of ratios would be ruled by the steps whose denominator is near zero.

    Along the step's own direction (`Need.PLAIN_SECANT`) the change of the gradient shares its noise with d, and a pure
    noise gradient of no curvature shows eta lambda = 1 + beta1; along the step's before (`Need.SECANT`) it does not.
    """

    def __init__(self, decay: float = 0.95) -> None:
        """
        Args:
            decay: of the averages, for each reading; 0 keeps the last reading alone.
        """
        self.decay = decay
        self.num_readings = 0
        self._mean_2U: np.ndarray | None = None
        self._per_unit_U: np.ndarray | None = None
        """Of the readings so far, once it was asked for."""

    def update(self, secants: Secants) -> None:
        """Take a reading in. One that is not finite is left out, unit by unit."""
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
        """The same of all units together; None before the first reading, and where it is not defined."""
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
