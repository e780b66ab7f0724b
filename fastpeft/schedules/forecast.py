"""Online forecast of a loss curve: block means, a fit at the end of each block, and later scoring of the forecasts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastpeft.schedules.power_law import PowerLaw, fit_power_law, forecast_band

MAX_BLOCKS = 150
MIN_BLOCKS = 10
AUTO_AFTER = 8
"""Number of steps after which `window: auto` fixes the block length."""
MARKS = (0.25, 0.5, 0.75)
"""Progress at which forecasts are stored, for comparison with the final loss."""
LAST_BLOCKS = 2
"""Number of last blocks whose mean is the final loss."""


class Forecaster:
    """Means of the loss over blocks of `window` steps, and a power law through the last MAX_BLOCKS of them."""

    def __init__(self, window: int | None, with_floor: bool) -> None:
        """
        Args:
            window: steps per block; None: a 64th of the estimated total number of steps, 4 to 32.
        """
        self.window, self.with_floor = window, with_floor
        self.law: PowerLaw | None = None
        """The last fit."""
        self.now = 0
        """Number of the last step."""
        self.horizon: float | None = None
        """T: estimated number of the last step within the budget, from the mean cost of a step so far."""
        self.num_blocks = 0
        self._start: list[float] | None = None
        self._sum, self._num_good, self._num = 0.0, 0, 0
        self._points: list[list[float]] = []
        self._made: dict[str, float] = {}
        self._ended_at = 0.0
        """Progress at the end of the last block."""

    def add(self, step: int, began: float, progress: float, loss: float) -> bool:
        """Add a step. Returns True if it ends a block, which updates `horizon` and, after MIN_BLOCKS blocks, `law`.

        Args:
            step: number of the step, from 1.
            began, progress: share of the budget spent before and after the step.
            loss: ignored if it is not finite.
        """
        if self._start is None:
            self._start = [step - 1, began]
        self.now = step
        self._num += 1
        if math.isfinite(loss):
            self._sum, self._num_good = self._sum + loss, self._num_good + 1
        if self.window is None and self._num >= AUTO_AFTER:
            self._look_ahead(progress)
            self.window = 32 if self.horizon is None else int(min(max(self.horizon / 64, 4), 32))
        if self.window is None or self._num < self.window:
            return False
        self._end_block(progress)
        return True

    def _end_block(self, progress: float) -> None:
        if self._num_good:
            self._points.append([self.now - (self._num - 1) / 2, self._sum / self._num_good])
            del self._points[:-MAX_BLOCKS]
        self._sum, self._num_good, self._num = 0.0, 0, 0
        self.num_blocks += 1
        self._look_ahead(progress)
        before, self._ended_at = self._ended_at, progress
        if len(self._points) < MIN_BLOCKS:
            return
        self.law = fit_power_law(*self._arrays(), self.now, self.law, self.with_floor) or self.law
        for mark in MARKS:
            if before < mark <= progress and self.ready:
                assert self.law is not None
                assert self.horizon is not None
                self._made[str(mark)] = self.law(self.horizon)

    def _look_ahead(self, progress: float) -> None:
        assert self._start is not None
        step, began = self._start
        spent = progress - began
        self.horizon = self.now + (1 - progress) * (self.now - step) / spent if spent > 0 else None

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        points = np.array(self._points)
        return points[:, 0], points[:, 1]

    @property
    def ready(self) -> bool:
        return self.law is not None and self.horizon is not None

    def improvable(self) -> float:
        """f(now) - f(T): the forecast decrease of the loss until the end."""
        assert self.law is not None
        assert self.horizon is not None
        return self.law(self.now) - self.law(self.horizon)

    def forecast(self) -> dict[str, float]:
        """f(T), with its 90 % prediction interval for the mean loss of a block at T."""
        assert self.law is not None
        assert self.horizon is not None
        low, high = forecast_band(self.law, *self._arrays(), self.now, self.horizon)
        return {"at": self.now, "horizon": self.horizon, "value": self.law(self.horizon), "low": low, "high": high}

    def errors(self) -> dict[str, float | None]:
        """|f(T) - loss_T| / loss_T of the forecasts made at MARKS, by mark; None for a mark without forecast."""
        last = [loss for _, loss in self._points[-LAST_BLOCKS:]]
        loss = sum(last) / len(last) if last else 0.0
        made = {mark: self._made.get(str(mark)) for mark in MARKS}
        return {f"{m:.0%}": abs(v - loss) / loss if v is not None and loss > 0 else None for m, v in made.items()}

    def state(self) -> dict[str, Any]:
        law = self.law
        return {
            "window": self.window,
            "law": None if law is None else [law.log_scale, law.offset, law.exponent, law.floor],
            "now": self.now,
            "horizon": self.horizon,
            "num_blocks": self.num_blocks,
            "start": self._start,
            "block": [self._sum, self._num_good, self._num],
            "points": [list(point) for point in self._points],
            "made": dict(self._made),
            "ended_at": self._ended_at,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.window, self.now, self.horizon = state["window"], state["now"], state["horizon"]
        self.law = None if state["law"] is None else PowerLaw(*state["law"])
        self.num_blocks, self._start = state["num_blocks"], state["start"]
        self._sum, self._num_good, self._num = state["block"]
        self._points = [list(point) for point in state["points"]]
        self._made, self._ended_at = dict(state["made"]), state["ended_at"]


class Divergences:
    """Counts divergences: a loss that is not finite, or over twice its running minimum for 50 consecutive steps.

    Loss and minimum are smoothed over about ten steps, because the minimum over single batches is mostly noise.
    """

    KEEP, PATIENCE, FACTOR = 0.9, 50, 2.0

    def __init__(self) -> None:
        self.count = 0
        self._smooth: float | None = None
        self._least = math.inf
        self._above = 0
        self._is_finite = True

    def add(self, loss: float) -> None:
        finite = math.isfinite(loss)
        self.count += self._is_finite and not finite
        self._is_finite = finite
        if not finite:
            return
        self._smooth = loss if self._smooth is None else self.KEEP * self._smooth + (1 - self.KEEP) * loss
        self._least = min(self._least, self._smooth)
        self._above = self._above + 1 if self._smooth > self.FACTOR * self._least else 0
        self.count += self._above == self.PATIENCE

    def state(self) -> dict[str, Any]:
        least = self._least if math.isfinite(self._least) else None
        values = [self.count, self._smooth, least, self._above, self._is_finite]
        return {"values": values}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count, self._smooth, least, self._above, self._is_finite = state["values"]
        self._least = math.inf if least is None else least
