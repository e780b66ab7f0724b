"""The run's events. Measurements of steps are queued on the device, and fetched from time to time in one transfer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from fastpeft.adapters import Adapter, to_json
from fastpeft.budget import BudgetClock
from fastpeft.runs.events import EventLog
from fastpeft.signals import Blocks, Rates, Signals

FETCH_S = 0.5
FETCH_STEPS = 32
RATES_STEPS = 32
"""Steps between two `rates` events, which hold each block's learning-rate multiplier."""
_MEASURES = ("loss", "penalty", "penalty_share", "grad_norm", "skipped")


@dataclass
class _Pending:
    """A step whose measurements are still on the device."""

    step: int
    elapsed_s: float
    progress: float
    lr: float
    num_tokens: int
    energy_j: float | None
    signals: Signals


class StepLog:
    """Writes a run's events in the order of its steps, and counts the steps that were not finite."""

    def __init__(self, log: EventLog, clock: BudgetClock, device: torch.device) -> None:
        self.num_non_finite = 0
        """Number of consecutive non-finite steps, up to the last fetched one."""
        self.num_skipped = 0
        self._log, self._clock, self._device = log, clock, device
        self._pending: list[_Pending] = []
        self._fetched_at = time.perf_counter()
        self._rates_logged_at = -RATES_STEPS
        self._importance_logged = 0

    def event(self, type: str, **fields: Any) -> None:
        """Write an event now; it may precede queued steps. May be called from any thread."""
        self._log.write(type, elapsed_s=self._clock.elapsed_s, step=self._clock.steps, **fields)

    def close(self) -> None:
        self._log.close()

    def warn(self, message: str) -> None:
        self.event("warning", message=message)

    def phase(self, **fields: Any) -> None:
        """As fastpeft.phases.Tell."""
        self.event("phase", **fields)

    def offset(self) -> int:
        """Size of the log in bytes."""
        return self._log.offset()

    def importance(self, adapter: Adapter, **more: Any) -> None:
        """Log the adapter's importances, if they have changed since the last time."""
        if adapter.importance_version == self._importance_logged:
            return
        self._importance_logged = adapter.importance_version
        importance = adapter.importance()
        assert importance is not None
        self.event("importance", **to_json(importance), **more)

    def rates(self, blocks: Blocks, rates: Rates) -> None:
        """Log the blocks' learning-rate multipliers every RATES_STEPS steps, if there are any."""
        steps = self._clock.steps
        if rates.multiplier_K is None or steps - self._rates_logged_at < RATES_STEPS:
            return
        self._rates_logged_at = steps
        self.fetch()  # keeps the log in step order
        names = {"names": blocks.names, "layer": blocks.layers, "projection": blocks.projections}
        self.event("rates", **names, multipliers=[float(m) for m in rates.multiplier_K])

    def step(self, progress: float, rates: Rates, signals: Signals) -> None:
        """Queue the step's measurements. The queue is fetched after FETCH_STEPS steps or FETCH_S seconds."""
        clock, num_tokens = self._clock, signals.num_tokens
        self._pending.append(
            _Pending(clock.steps, clock.elapsed_s, progress, rates.lr, num_tokens, clock.meter.joules, signals)
        )
        if len(self._pending) >= FETCH_STEPS or time.perf_counter() - self._fetched_at >= FETCH_S:
            self.fetch()

    def fetch(self) -> None:
        """Wait for the device, log the queued steps, and count the non-finite ones."""
        self._fetched_at = time.perf_counter()
        if not self._pending:
            return
        missing = torch.full((), math.nan, device=self._device)
        table = torch.stack(
            [
                torch.stack([missing if (v := getattr(p.signals, m)) is None else v for m in _MEASURES])
                for p in self._pending
            ]
        ).tolist()
        for pending, values in zip(self._pending, table):
            measured = dict(zip(_MEASURES, values))
            skipped = bool(measured.pop("skipped"))
            if pending.signals.penalty is None:
                measured["penalty"] = 0.0
                del measured["penalty_share"]
            self._log.write(
                "step",
                elapsed_s=pending.elapsed_s,
                step=pending.step,
                progress=round(pending.progress, 6),
                lr=pending.lr,
                tokens=pending.num_tokens,
                energy_j=pending.energy_j,
                **measured,
            )
            self.num_non_finite = self.num_non_finite + 1 if skipped else 0
            if skipped:
                self.num_skipped += 1
                self._log.write(
                    "warning",
                    elapsed_s=pending.elapsed_s,
                    step=pending.step,
                    message=f"step {pending.step}: loss or gradient is not finite, so nothing was updated "
                    f"({self.num_non_finite} in a row, {self.num_skipped} in all)",
                )
        self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_non_finite": self.num_non_finite,
            "num_skipped": self.num_skipped,
            "rates_logged_at": self._rates_logged_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_non_finite, self.num_skipped = state["num_non_finite"], state["num_skipped"]
        self._rates_logged_at = state["rates_logged_at"]
