"""fastpeft: LoRA fine-tuning inside a budget. Importing this starts nothing and loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft._version import __version__

if TYPE_CHECKING:
    from fastpeft.adapters.unihyperlora.loaded import load_adapter
    from fastpeft.models.accelerate import accelerate
    from fastpeft.runs.store import Result
    from fastpeft.schedules.budget_lr import BudgetLR
    from fastpeft.trainer import train

__all__ = ["BudgetLR", "Result", "__version__", "accelerate", "load_adapter", "load_run", "train"]


def load_run(name_or_path: str | Path, **overrides: Any):
    """Load and validate a preset or a YAML file. See fastpeft.config.load_run.

    Args:
        name_or_path: a preset's name, or the path of a YAML file.
        overrides: dotted keys, given as `**{"training.learning_rate": 1e-4}`, or sections, given as dicts:
            `training={"learning_rate": 1e-4}`. A dict sets only the keys that are in it.

    Returns:
        The RunConfig that `fastpeft.train` takes.

    Raises:
        ConfigError: with every problem found, naming the key and the nearest valid one.
    """
    from fastpeft.config import load_run as load

    return load(name_or_path, overrides)


def __getattr__(name: str) -> Any:
    if name == "accelerate":
        from fastpeft.models.accelerate import accelerate

        return accelerate
    if name == "load_adapter":
        from fastpeft.adapters.unihyperlora.loaded import load_adapter

        return load_adapter
    if name == "BudgetLR":
        from fastpeft.schedules.budget_lr import BudgetLR

        return BudgetLR
    if name == "train":
        from fastpeft.trainer import train

        return train
    if name == "Result":
        from fastpeft.runs.store import Result

        return Result
    raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
