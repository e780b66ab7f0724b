"""Records of a sweep's trials: for the user, and as user attributes in the study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

OUTCOME, METRIC, ENERGY_J, DURATION_S, PAUSED = "outcome", "metric", "energy_j", "duration_s", "paused_in"
"""User attributes of a trial."""


@dataclass(frozen=True)
class TrialRow:
    """A trial that has ended."""

    number: int
    outcome: str
    """done, pruned, diverged, or how it failed."""
    value: float | None
    params: dict[str, Any]
    duration_s: float
    energy_j: float | None
    counts: bool
    """Whether it counts towards optuna.trials."""


@dataclass(frozen=True)
class Standing:
    """Progress of a sweep."""

    counted: int
    wanted: int
    running: int
    best: FrozenTrial | None
    spent_s: float
    spent_j: float | None


class Listener(Protocol):
    def say(self, message: str) -> None: ...

    def on_trial(self, row: TrialRow) -> None: ...

    def on_standing(self, standing: Standing) -> None: ...


def rows_of(study: Study) -> Iterator[TrialRow]:
    """Every trial that has ended, in order."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            attributes, counts = trial.user_attrs, trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            outcome = attributes.get(OUTCOME) or ("done" if counts else "killed with its sweep")
            took_s = attributes.get(DURATION_S, 0.0)
            yield TrialRow(
                trial.number, outcome, trial.value, trial.params, took_s, attributes.get(ENERGY_J), counts=counts
            )
