"""The interface of a learning-rate schedule, and the registry that finds one by its name.

A schedule never asks how many steps there will be: it sees `progress`, the share of the budget that
is spent, from 0 to 1. A new schedule is one module with one @register class, one dataclass in
config/schema.py, and one row in the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from fastpeft.config.schema import ScheduleConfig
from fastpeft.signals import Rates, Signals

WARMUP_CAP = 0.06
"""Most of the budget that the warm-up may take."""

_SCHEDULES: dict[str, type[Schedule]] = {}


def register(name: str) -> Callable[[type[Schedule]], type[Schedule]]:
    """Class decorator: makes a Schedule available as `schedule.name`."""

    def add(cls: type[Schedule]) -> type[Schedule]:
        _SCHEDULES[name] = cls
        return cls

    return add


def make_schedule(config: ScheduleConfig, peak_lr: float) -> Schedule:
    """The schedule that `config.name` names, from the start of a run."""
    return _SCHEDULES[config.name](config, peak_lr)


class Schedule(ABC):
    """Emits the learning rate of every step; `state` and `load_state` make a resume exact."""

    def __init__(self, config: ScheduleConfig, peak_lr: float) -> None:
        self.config = config
        self.peak_lr = peak_lr
        self.note: str | None = None
        """Something the user should read; the loop logs it and sets it to None."""

    @abstractmethod
    def rates(self, signals: Signals, progress: float) -> Rates:
        """Rates of the step whose gradient has just been computed. `progress` is before the step."""

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


class Warmup:
    """Linear from 0 to 1 over `num_steps`, or over WARMUP_CAP of the budget if that is over sooner."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.taken = 0
        self.ended_at: float | None = None
        """Progress at which the warm-up was over."""

    def factor(self, progress: float) -> float:
        if self.ended_at is not None:
            return 1.0
        if self.taken >= self.num_steps or progress >= WARMUP_CAP:
            self.ended_at = progress
            return 1.0
        self.taken += 1
        return max(self.taken / self.num_steps, progress / WARMUP_CAP)
