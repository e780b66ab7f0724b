"""The section `schedule`: what all schedules share, and a section for each that has settings of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastpeft.config.fields import STRICT_KEYS, Fraction, NonNegativeInt, Range


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    __pydantic_config__ = STRICT_KEYS

    name: Literal["constant", "linear", "cosine", "wsd", "rex"] = "linear"
    """Shape of the learning rate after the warm-up, over the share of the budget spent."""
    warmup_steps: NonNegativeInt = 500
    """Linear warm-up; capped at 6 % of the budget."""
    final_ratio: Fraction = 0.0
    """The rate at the end, as a share of the peak (linear, cosine, wsd)."""
    decay_fraction: Annotated[float, Range(gt=0, le=1)] = 0.2
    """wsd: the share of the budget over which the rate decays."""
