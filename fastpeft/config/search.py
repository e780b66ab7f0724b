"""The section `optuna`: search space, sampler, pruner and budget of `fastpeft sweep`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastpeft.config.fields import STRICT_KEYS, NonNegativeInt, Parsed, PositiveFloat, PositiveInt, Range
from fastpeft.config.units import Budget, parse_budget, parse_seeds

SPACE = "optuna.space"
LOSS = "loss"
OWN_METRIC = "auto"
"""Value of optuna.metric for the task's own metric."""

_NOT_SEARCHED = {
    "run_id": "it names the run and trains nothing",
    "overrides": "it is written by the command",
    "budget": "a larger one always looks better; optuna.trial_budget sets what each trial may spend",
    "training.seed": "the luckiest seed is no setting; optuna.seeds trains the best one with several",
}
_NOT_SEARCHED_SECTIONS = {
    "optuna": "it describes the search itself",
    "stand_in": "it says what takes the place of an absent model",
    "wandb": "it changes no result",
    "dataset": "trials on different data cannot be compared",
    "evaluation": "trials that are scored differently cannot be compared",
}
_OF_DATASET = ("dataset.max_length", "dataset.prompt", "dataset.cut")
"""Keys of `dataset` that change the model's input, but not the rows that are scored."""


def parse_sweep_budget(text: str) -> Budget:
    """`2h` or `50kJ` -> Budget. Raises ValueError."""
    budget = parse_budget(text)
    if budget.kind not in ("seconds", "joules"):
        raise ValueError(f"a whole sweep is measured in time or energy: 90s, 30m, 2h or 50kJ, got {text!r}")
    return budget


@dataclass(frozen=True)
class _Scalars:
    """A list of plain values. A nested list gives one error, instead of one for each type of the union."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        def check(value: Any) -> Any:
            for one in value if isinstance(value, list) else ():
                if not isinstance(one, (bool, int, float, str)):
                    raise ValueError(f"a choice is a number, a text, true or false, got {one!r}")
            return value

        return {
            "type": "function-before",
            "function": {"type": "no-info", "function": check},
            "schema": handler(source),
        }


@dataclass(frozen=True, kw_only=True)
class SearchParameter:
    __pydantic_config__ = STRICT_KEYS

    type: Literal["loguniform", "uniform", "int", "categorical"]
    low: float | None = None
    high: float | None = None
    """Both ends are included."""
    choices: Annotated[list[bool | int | float | str], _Scalars()] | None = None

    def __post_init__(self) -> None:
        if self.type == "categorical":
            self._check_choices()
            return
        if self.low is None or self.high is None or self.choices is not None:
            raise ValueError(f"type {self.type} takes `low` and `high`, and no choices")
        if not self.low < self.high or (self.type == "loguniform" and self.low <= 0):
            raise ValueError(
                f"low must be under high, and positive for loguniform: got low {self.low:g}, high {self.high:g}"
            )
        if self.type == "int" and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise ValueError(f"type int takes whole numbers, got low {self.low:g}, high {self.high:g}")

    def _check_choices(self) -> None:
        if not self.choices or self.low is not None or self.high is not None:
            raise ValueError("type categorical takes `choices`, and no low or high")
        for place, choice in enumerate(self.choices):
            if choice in self.choices[:place]:  # 1 and true and 1.0 are one choice to a dictionary
                raise ValueError(f"the choice {choice!r} is there twice")

    def specimens(self) -> list[bool | int | float | str]:
        """Sample values for validation: every choice, or both ends and, except for int, the middle."""
        if self.choices is not None:
            return list(self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.type == "int":
            return [int(self.low), int(self.high)]
        middle = (self.low * self.high) ** 0.5 if self.type == "loguniform" else (self.low + self.high) / 2
        return [self.low, self.high, middle]


@dataclass(frozen=True, kw_only=True)
class OptunaConfig:
    __pydantic_config__ = STRICT_KEYS

    trials: PositiveInt = 30
    """Number of trials that complete or are pruned. Trials that fail or are killed are repeated."""
    metric: str = OWN_METRIC
    """Objective: a trial's best value over its evaluations of the validation split. auto is the task's own metric; else
    loss, or one of the task's further metrics, such as macro_f1."""
    direction: Literal["maximize", "minimize"] = "maximize"
    space: dict[str, SearchParameter] = field(default_factory=dict)
    """Dotted key of this file -> values to search."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: tree-structured Parzen estimator over all keys at once (Bergstra et al. 2011; Falkner et al. 2018)."""
    startup_trials: NonNegativeInt = 10
    """Trials drawn at random before tpe takes over."""
    pruner: Literal["median", "halving", "none"] = "median"
    """median: end a trial whose best evaluation so far is worse than the median of other trials at the same evaluation.
    halving: asynchronous successive halving (arXiv:1810.05934)."""
    pruner_startup: NonNegativeInt = 5
    """median: trials that must be complete before any is pruned."""
    pruner_warmup: NonNegativeInt = 0
    """Evaluations of a trial before it can be pruned."""
    seed: Annotated[int, Range(ge=0, lt=2**32)] = 42
    """Seed of the sampler. All trials train with training.seed."""
    trial_budget: Annotated[str, Parsed(parse_budget)] | None = None
    """Budget of one trial, in the form of `budget`; the run's own budget when absent."""
    max_trial_energy_j: PositiveFloat | None = None
    """A trial that takes more joules counts, but cannot be the best. Needs an energy meter."""
    budget: Annotated[str, Parsed(parse_sweep_budget)] | None = None
    """Budget of all trials together: 2h of wall-clock time, or 50kJ. It does not include the full training of the best
    one."""
    max_failures: PositiveInt = 5
    """Number of consecutive failed trials that ends the sweep."""
    seeds: Annotated[str, Parsed(parse_seeds)] | None = None
    """Seeds such as 0,1,2: the best settings are trained in full once with each. When absent, with training.seed."""

    def problems(self) -> Iterator[str]:
        """Problems between fields of this section."""
        if self.metric == LOSS and self.direction == "maximize":
            yield "optuna.direction: a loss is the better the lower it is; set optuna.direction=minimize"
        for key in self.space:
            reason = why_not_searched(key)
            if reason is not None:
                yield f"optuna.space.{key}: cannot be searched: {reason}"


def why_not_searched(key: str) -> str | None:
    """Why a dotted key may not be in a search space; None where it may."""
    if key in _OF_DATASET:
        return None
    return _NOT_SEARCHED.get(key) or _NOT_SEARCHED_SECTIONS.get(key.partition(".")[0])
