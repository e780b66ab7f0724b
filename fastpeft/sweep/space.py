"""The search space of a run: its validation, Optuna's distributions, and the settings of a trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastpeft.config import ConfigError, RunConfig, run_values, with_values
from fastpeft.config.search import OptunaConfig, SearchParameter
from fastpeft.config.trackers import TRACKERS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_NOT_IDENTITY = ("trials", "budget", "max_failures", "seeds")
"""Keys of the section `optuna` that may change when a sweep is continued."""


def check_space(run: RunConfig) -> None:
    """Validate sample values of every key, each one alone in the run.

    Raises:
        ConfigError: the space is empty, or the run refuses values; every such key is named.
    """
    if not run.optuna.space:
        raise ConfigError(
            run.run_id, ["optuna.space: it is empty; name a key and its values, such as "
                         "optuna.space='{training.learning_rate: {type: loguniform, low: 1e-5, high: 1e-3}}'"]
        )  # fmt: skip
    problems = [problem for key, searched in run.optuna.space.items() for problem in _faults(run, key, searched)]
    if problems:
        raise ConfigError(run.run_id, problems)


def _faults(run: RunConfig, key: str, searched: SearchParameter) -> Iterator[str]:
    """The first sample value that an otherwise unchanged run refuses; at most one problem per key."""
    for value in searched.specimens():
        try:
            with_values(run, {key: value})
        except ConfigError as error:
            yield f"optuna.space.{key}: a trial with {value!r} would be refused: {'; '.join(error.problems)}"
            return


def distributions(space: Mapping[str, SearchParameter]) -> dict[str, BaseDistribution]:
    """Optuna's distributions by dotted key."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, searched in space.items():
        if searched.choices is not None:
            found[key] = CategoricalDistribution(searched.choices)
            continue
        assert searched.low is not None
        assert searched.high is not None
        if searched.type == "int":
            found[key] = IntDistribution(int(searched.low), int(searched.high))
        else:
            found[key] = FloatDistribution(searched.low, searched.high, log=searched.type == "loguniform")
    return found


def trial_settings(config: OptunaConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key that turn the sweep's run into a trial's."""
    budget = {} if config.trial_budget is None else {"budget": config.trial_budget}
    return {**params, **budget, **_untracked()}


def _untracked() -> dict[str, Any]:
    """Settings that turn every tracker off: only the full training of the best settings is tracked."""
    off: dict[str, Any] = {}
    for tracker in TRACKERS:
        section = str(tracker.section)
        off |= {f"{section}.{key}": value for key, value in tracker.trial.items()}
        off |= {section: False} if tracker.default is not None else {}
    return off


def identity(run: RunConfig) -> dict[str, Any]:
    """Settings, by dotted key, that all trials of a study share. A sweep is continued only if they are unchanged."""
    values = run_values(run)
    for key in (*TRACKERS.section_keys, "overrides", "stand_in"):
        values.pop(key, None)
    values["optuna"] = {key: value for key, value in values["optuna"].items() if key not in _NOT_IDENTITY}
    space = values["optuna"].pop("space")
    flat = dict(_flat(values, ""))
    return flat | {f"optuna.space.{key}": _bare(searched) for key, searched in space.items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per key whose value differs."""
    keys = [*before, *(key for key in now if key not in before)]
    return [
        f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} here"
        for key in keys
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]


_ABSENT = object()


def _bare(searched: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in searched.items() if value is not None}


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
