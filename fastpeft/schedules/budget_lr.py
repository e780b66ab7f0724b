"""The schedules without measurements, as a torch LRScheduler for other training loops."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch.optim.lr_scheduler import LRScheduler

from fastpeft.config.registry import complete
from fastpeft.config.schedules import ScheduleConfig
from fastpeft.errors import UserError
from fastpeft.schedules.schedule import make_schedule
from fastpeft.signals import Blocks

_PEAK = 2.0**-10
"""A power of two, so that division by it is exact."""
_PLACEHOLDER = Blocks(names=("any",), layers=(0,), projections=("any",), num_elements=(2,), num_b_elements=(1,))


class BudgetLR(LRScheduler):
    """Learning rates over a budget in steps or in wall-clock seconds. Call `step()` once per optimizer step.

    The initial learning rate of each parameter group is its peak. The learning rates equal those of fastpeft's trainer
    at the same progress. They reach their final value at the end of the budget, and keep it. The clock starts at
    construction; a resume continues from the seconds in `state_dict`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str = "linear",
        *,
        total_steps: int | None = None,
        budget_s: float | None = None,
        warmup_steps: int = 0,
        **settings: Any,
    ) -> None:
        """
        Args:
            optimizer: the optimizer whose learning rates are set.
            name: one of constant, linear, cosine, wsd, rex.
            total_steps: budget in optimizer steps; give either this or `budget_s`.
            budget_s: budget in seconds of wall clock.
            warmup_steps: steps of linear warmup, capped at 6 % of the budget.
            settings: other keys of the section `schedule`, such as final_ratio and decay_fraction.

        Raises:
            UserError (a ValueError): unknown names or settings; no budget, or both; a schedule that needs measurements.
        """
        if (total_steps is None) == (budget_s is None):
            raise UserError("BudgetLR: give either total_steps or budget_s")
        budget = total_steps if budget_s is None else budget_s
        if not budget or not 0 < budget < float("inf"):
            raise UserError(f"BudgetLR: expected a budget of more than 0, got {budget!r}")
        # Not `total_steps`: accelerate would mistake it for OneCycleLR's attribute and stop stepping.
        self._budget, self._in_seconds = budget, budget_s is not None
        self._schedule = make_schedule(_config(name, warmup_steps, settings), _PEAK, _PLACEHOLDER)
        if needs := sorted(self._schedule.needs):
            raise UserError(
                f"BudgetLR: schedule {name} needs measurements that only fastpeft's trainer takes: "
                f"{', '.join(needs)}. Use fastpeft train, or one that needs none: constant, linear, cosine, wsd, rex"
            )
        self._factor = 1.0
        self._elapsed_before_s, self._started_s = 0.0, time.perf_counter()
        super().__init__(optimizer)

    @property
    def elapsed_s(self) -> float:
        return self._elapsed_before_s + time.perf_counter() - self._started_s

    @property
    def progress(self) -> float:
        """Spent share of the budget."""
        return min(1.0, (self.elapsed_s if self._in_seconds else self.last_epoch) / self._budget)

    def step(self, epoch: int | None = None) -> None:
        if epoch is not None:
            raise UserError("BudgetLR: it counts its steps itself; call step() without an epoch")
        super().step()

    def get_lr(self) -> list[float | torch.Tensor]:
        if self._get_lr_called_within_step:
            self._factor = self._schedule.rates(None, self.progress).lr / _PEAK
            for _, fields in self._schedule.told():
                warnings.warn(f"BudgetLR: {fields['message']}", stacklevel=4)
        return [base_lr * self._factor for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """State as plain values, which torch.load reads with weights_only."""
        return {
            "name": self._schedule.config.name,
            "schedule": self._schedule.state_dict(),
            "elapsed_s": self.elapsed_s,
            "factor": self._factor,
            "base_lrs": self.base_lrs,
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": self._last_lr,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the schedule; the optimizer's state holds the learning rates.

        Raises:
            UserError: the state belongs to another schedule.
        """
        mine = self._schedule.config.name
        if state_dict.get("name") != mine:
            raise UserError(f"BudgetLR: this is {mine}, and the state is of {state_dict.get('name')}")
        self._schedule.load_state_dict(state_dict["schedule"])
        self._elapsed_before_s, self._started_s = state_dict["elapsed_s"], time.perf_counter()
        self._factor = state_dict["factor"]
        for name in ("base_lrs", "last_epoch", "_step_count", "_last_lr"):
            setattr(self, name, state_dict[name])


def _config(name: str, warmup_steps: int, settings: dict[str, Any]) -> ScheduleConfig:
    values = settings | {"name": name, "warmup_steps": warmup_steps}
    try:
        return TypeAdapter(complete(ScheduleConfig)).validate_python(values)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise UserError(f"BudgetLR: {'; '.join(wrong)}") from None
