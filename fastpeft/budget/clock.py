"""The clock of a run.

It counts calibration, training, evaluation, checkpoints and the final save, but not set-up. The training loop stops
when the next step, plus 1.1 times the last measured evaluation and save, would exceed the budget.

Joules are the meter's estimate: its last reading, extrapolated with the mean power of its last window. The expected
cost of a step is its expected seconds times that power. A budget in joules is therefore exceeded by at most
max(1 %, one step), plus the change of power within one window (a second).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastpeft.budget.energy import EnergyMeter
from fastpeft.config import Budget, Interval

RESERVE_FACTOR = 1.1
_SMOOTHING = 0.9


class BudgetClock:
    """Seconds, joules, tokens and steps spent, against one budget. All of them are restored by a resume."""

    def __init__(
        self, budget: Budget, now: Callable[[], float] = time.monotonic, meter: EnergyMeter | None = None
    ) -> None:
        self.budget = budget
        self.meter = meter or EnergyMeter(None)
        self.tokens = 0
        self.steps = 0
        self.final_s = 0.0
        """Duration of the last measured evaluation and save, in seconds."""
        self.final_j = 0.0
        """Energy of the last measured evaluation and save, in joules."""
        self._now = now
        self._before_s = 0.0
        self._started: float | None = None
        self.seconds_per_token = 0.0
        """Exponential moving average over steps and calibration."""
        self._progress = 0.0

    def start(self, elapsed_s: float = 0.0) -> None:
        """Start counting from `elapsed_s`, the seconds of earlier parts of the run."""
        self._before_s = elapsed_s
        self._started = self._now()

    def stop(self) -> None:
        """Stop counting; the meter takes its last reading."""
        self._before_s, self._started = self.elapsed_s, None
        self.meter.stop()

    @property
    def elapsed_s(self) -> float:
        return self._before_s + (0.0 if self._started is None else self._now() - self._started)

    @property
    def spent(self) -> float:
        """Amount spent, in the unit of the budget."""
        if self.budget.kind == "joules":
            return self.meter.estimate_j
        return {"seconds": self.elapsed_s, "tokens": self.tokens, "steps": self.steps}[self.budget.kind]

    @property
    def progress(self) -> float:
        """Fraction of the training budget that is spent, 0 to 1. It never decreases; training has to end at 1."""
        available = self.budget.limit - self._reserve
        self._progress = max(self._progress, min(1.0, self.spent / max(available, 1e-9)))
        return self._progress

    @property
    def _reserve(self) -> float:
        return RESERVE_FACTOR * {"seconds": self.final_s, "joules": self.final_j}.get(self.budget.kind, 0.0)

    def count_step(self, num_tokens: int, seconds: float) -> None:
        self.steps += 1
        self.count_tokens(num_tokens, seconds)

    def count_tokens(self, num_tokens: int, seconds: float) -> None:
        """Count tokens of forward and backward passes, in a step or in calibration."""
        self.tokens += num_tokens
        measured = seconds / max(1, num_tokens)
        old = self.seconds_per_token or measured
        self.seconds_per_token = _SMOOTHING * old + (1 - _SMOOTHING) * measured

    def fits(self, num_tokens: int, more_s: float = 0.0) -> bool:
        """Whether a step of `num_tokens`, plus `more_s` seconds, leaves room for the final evaluation and save."""
        limit = self.budget.limit
        if self.budget.kind == "steps":
            return self.steps < limit
        if self.budget.kind == "tokens":
            return self.tokens + num_tokens <= limit
        more = num_tokens * self.seconds_per_token + more_s
        if self.budget.kind == "joules":
            more *= self.meter.power_w
        return self.spent + more + self._reserve <= limit

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "seconds_per_token": self.seconds_per_token,
            "final_s": self.final_s,
            "final_j": self.final_j,
            "energy": self.meter.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the amounts spent and start counting."""
        self.steps, self.tokens = state["steps"], state["tokens"]
        self.seconds_per_token = state["seconds_per_token"]
        self.final_s, self.final_j = state["final_s"], state["final_j"]
        self.meter.load_state(state["energy"])
        self.start(state["elapsed_s"])


class Due:
    """Whether an event that happens every `interval` is due. `count`, the periods done, is restored by a resume."""

    def __init__(self, interval: Interval, steps_per_epoch: int) -> None:
        self.interval = interval
        self.count = 0
        self._steps_per_epoch = steps_per_epoch

    def _periods(self, clock: BudgetClock) -> int:
        if self.interval.unit == "fraction":
            return int(clock.progress / self.interval.value + 1e-9)
        if self.interval.unit == "seconds":
            return int(clock.elapsed_s / self.interval.value)
        if self.interval.unit == "steps":
            return clock.steps // int(self.interval.value)
        if self.interval.unit == "epoch":
            return clock.steps // self._steps_per_epoch
        return 0

    def __call__(self, clock: BudgetClock) -> bool:
        return self._periods(clock) > self.count

    def done(self, clock: BudgetClock) -> None:
        self.count = self._periods(clock)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "unit": self.interval.unit, "value": self.interval.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the count and the interval. The measurement that the interval was chosen by could differ now."""
        self.count = state["count"]
        self.interval = Interval(state["unit"], state["value"])
