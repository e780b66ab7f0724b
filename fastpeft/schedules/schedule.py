"""The interface of a learning rate schedule, and its construction from the section `schedule`.

A schedule does not know the total number of steps. It gets `progress`, the spent share of the budget from 0 to 1, and
the measurements of the previous step. It runs on the host, in floats and NumPy. A new schedule takes one module with
its class, and one entry in config/schedules.py with the dataclass of its settings. The tests shared by all schedules
take their rows from these entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from fastpeft.config.schedules import SCHEDULES, ScheduleConfig
from fastpeft.signals import AdamMoments, Blocks, Measured, Need, Rates

WARMUP_CAP = 0.06
"""Largest share of the budget for warmup."""

ADAM = AdamMoments()
"""Default decay rates of the optimizer's moments."""


def make_schedule(
    config: ScheduleConfig,
    peak_lr: float,
    blocks: Blocks | None = None,
    *,
    adam: AdamMoments = ADAM,
    seed: int = 0,
) -> Schedule:
    """The schedule named by `config.name`, in its state at the start of a run.

    Args:
        config: the section `schedule`.
        peak_lr: learning rate at the end of warmup.
        blocks: the model's blocks; schedules without measurements do not need them.
        adam: decay rates of Adam's moments, which some schedules read.
        seed: seed of schedules that draw random numbers.

    Raises:
        UserError: the schedule does not support these settings or this model.
    """
    return SCHEDULES.load(config.name)(config, peak_lr, blocks, adam=adam, seed=seed)


class Schedule(ABC):
    """Sets the learning rate of every step. `state_dict` and `load_state_dict` make a resume exact.

    Args:
        config: the section `schedule`. A schedule reads the shared keys and its own section.
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
        """Measurements that the schedule needs from every step."""
        return frozenset()

    @abstractmethod
    def rates(self, measured: Measured | None, progress: float) -> Rates:
        """Learning rates of the current step. Called once per step, after its backward pass is queued.

        Args:
            measured: measurements of the previous step; None in the first step, and if `needs` is empty.
            progress: share of the budget spent before this step.
        """

    def finish(self, progress: float) -> None:
        """Called once, after the last step of a completed run. A schedule may `tell` its final figures here."""

    def save(self, folder: Path) -> None:
        """Called after `finish`: write files to the run's folder from which later runs can start."""

    def state_dict(self) -> dict[str, Any]:
        """All state that later learning rates depend on, as JSON values (finite numbers; arrays as lists)."""
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
    """Linear from 0 to 1 over `num_steps`, or over WARMUP_CAP of the budget if that ends sooner."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.taken = 0
        self.ended_at: float | None = None
        """Progress at which warmup ended."""

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
    """A schedule that starts with a warmup to the peak learning rate."""

    def __init__(self, config: ScheduleConfig, peak_lr: float, blocks: Blocks | None = None, **more: Any) -> None:
        super().__init__(config, peak_lr, blocks, **more)
        self.warmup = Warmup(config.warmup_steps)

    def warmup_factor(self, progress: float) -> float:
        """0 to 1 during warmup, then 1. Queues one event if the budget cut warmup short."""
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
