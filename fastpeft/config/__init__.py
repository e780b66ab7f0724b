"""Run configurations: the schema, the shipped presets, loading and validation. Imports no torch."""

from fastpeft.config.load import (
    ConfigError,
    apply_stand_in,
    load_run,
    preset_names,
    run_from_values,
    run_values,
    save_run,
    trial_run,
    with_values,
)
from fastpeft.config.schema import RunConfig
from fastpeft.config.units import Budget, Interval, parse_budget, parse_interval, parse_seeds

__all__ = [
    "Budget",
    "ConfigError",
    "Interval",
    "RunConfig",
    "apply_stand_in",
    "load_run",
    "parse_budget",
    "parse_interval",
    "parse_seeds",
    "preset_names",
    "run_from_values",
    "run_values",
    "save_run",
    "trial_run",
    "with_values",
]
