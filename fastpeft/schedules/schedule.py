"""The interface of a learning-rate schedule, and how one is made from its section.

A schedule never asks how many steps there will be: it sees `progress`, the share of the budget that
is spent, from 0 to 1, and what the step before measured. It is host code: floats and NumPy. A new schedule is one
module with its class, and one entry in config/schedules.py with the dataclass of its settings: the tests that hold for
all schedules take it from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from fastpeft.config.schedules import SCHEDULES, ScheduleConfig
from fastpeft.signals import AdamMoments, Blocks, Measured, Need, Rates

WARMUP_CAP = 0.06
"""Most of the budget that the warm-up may take."""

ADAM = AdamMoments()
"""What a schedule takes the optimizer's moments for unless it is told otherwise."""


def make_schedule(
    config: ScheduleConfig,
    peak_lr: float,
    blocks: Blocks | None = None,
    *,
    adam: AdamMoments = ADAM,
    seed: int = 0,
) -> Schedule:
    """The schedule that `config.name` names, from the start of a run.

    Args:
        blocks: the model's; schedules that measure nothing do without them.
        adam: how the moments are made that some schedules read.
        seed: of a schedule that draws at random.

    Raises:
        UserError: settings or a model that the schedule cannot work with.
    """
    return SCHEDULES.load(config.name)(config, peak_lr, blocks, adam=adam, seed=seed)


class Schedule(ABC):
    """Emits the learning rate of every step; `state_dict` and `load_state_dict` make a resume exact.

    Args:
        config: the section `schedule`, of which a schedule reads what all share, and its own.
    """

    own: Any
    """The schedule's own section; None where its entry has no Config."""

    def __init__(
        self,
        config: ScheduleConfig,
        peak_lr: float,
        blocks: Blocks | None = None,
        *,
        adam: AdamMoments = ADAM,
        seed: int = 0,
    ) -> None:
        self.config, self.own = config, config.own
        self.peak_lr = peak_lr
        self.blocks = blocks
        self.adam = adam
        self.seed = seed
        self._events: list[tuple[str, dict[str, Any]]] = []

    @property
    def needs(self) -> frozenset[Need]:
        """What every step has to measure for it."""
        return frozenset()

    @abstractmethod
    def rates(self, measured: Measured | None, progress: float) -> Rates:
        """Rates of the step whose gradient has just been launched. Called once a step.

        Args:
            measured: the step before this one; None at the first step, and where `needs` is empty.
            progress: share of the budget that was spent before this step.
        """

    def finish(self, progress: float) -> None:
        """Called once, after the last step of a run that came to its end: the time to `tell` how it went."""

    def save(self, folder: Path) -> None:
        """Called after `finish`: leave in the run's folder what later runs can begin with."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next rates depend on, as JSON values (finite numbers; arrays as lists)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def tell(self, type: str, **fields: Any) -> None:
        """Queue an event for the run's log: `warning` with a message, `forecast`, or `schedule` with figures."""
        self._events.append((type, fields))

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """The events queued since the last call."""
        events, self._events = self._events, []
        return events


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

    @property
    def was_cut(self) -> bool:
        return self.ended_at is not None and self.taken < self.num_steps

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "ended_at": self.ended_at}

    def load_state(self, state: dict[str, Any]) -> None:
        self.taken, self.ended_at = state["taken"], state["ended_at"]


class WarmedSchedule(Schedule):
    """A schedule that begins with a warm-up to the peak rate."""

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        self.warmup = Warmup(config.warmup_steps)

    def warmup_factor(self, progress: float) -> float:
        """0 to 1 while warming up, then 1. Says it once when the budget cut the warm-up short."""
        warming = self.warmup.ended_at is None
        factor = self.warmup.factor(progress)
        if warming and self.warmup.was_cut:
            self.tell(
                "warning",
                message=f"the warm-up ended after {self.warmup.taken} of {self.config.warmup_steps} steps: "
                f"it is capped at {WARMUP_CAP:.0%} of the budget",
            )
        return factor

    def state_dict(self) -> dict[str, Any]:
        return self.warmup.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.warmup.load_state(state)
