"""What each step measured: queued on the device, fetched now and then in one transfer, written to the log."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from fastpeft.budget import BudgetClock
from fastpeft.runs.events import EventLog
from fastpeft.signals import Rates, Signals

FETCH_S = 0.5
FETCH_STEPS = 32
_MEASURES = ("loss", "penalty", "penalty_share", "grad_norm", "skipped")


@dataclass
class _Pending:
    """A step whose measurements still lie on the device."""

    step: int
    elapsed_s: float
    progress: float
    lr: float
    num_tokens: int
    energy_j: float | None
    signals: Signals


class StepLog:
    """Writes the `step` events, and counts the steps that were not finite."""

    def __init__(self, log: EventLog, device: torch.device) -> None:
        self.num_non_finite = 0
        """In a row, up to the last step that was fetched."""
        self.num_skipped = 0
        self._log, self._device = log, device
        self._pending: list[_Pending] = []
        self._fetched_at = time.perf_counter()

    def note(self, clock: BudgetClock, progress: float, rates: Rates, signals: Signals) -> None:
        """Queue the step's measurements; fetch the queue now and then, in one transfer."""
        num_tokens, energy_j = signals.num_tokens, clock.meter.joules
        pending = _Pending(clock.steps, clock.elapsed_s, progress, rates.lr, num_tokens, energy_j, signals)
        self._pending.append(pending)
        if len(self._pending) >= FETCH_STEPS or time.perf_counter() - self._fetched_at >= FETCH_S:
            self.fetch()

    def fetch(self) -> None:
        """Wait for the device, log the queued steps, count those that were not finite."""
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
