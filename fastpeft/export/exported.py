"""What an export came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastpeft.export.trim import Trimmed


@dataclass(frozen=True)
class Check:
    num_rows: int
    """Compared: rows, or positions in answers."""
    where: str
    """What they are, in words."""
    num_same: int | None
    """How many of them have the same largest logit; None where there is one logit only."""
    difference: float
    """Largest absolute difference of a logit between the trained model and the one that was loaded."""
    tolerance: float


@dataclass(frozen=True)
class Layout:
    """Every update of an adapter has the same."""

    rank: int
    scale: float
    """That stands in the config, as alpha / rank or as it is."""


@dataclass(frozen=True)
class MetricChange:
    """Of the whole validation split, in fp32."""

    name: str
    before: float
    after: float
    num_rows: int


@dataclass(frozen=True)
class Exported:
    target: Path
    stand_in: bool
    check: Check
    mb_before: float
    """Weights in the run's folder, in MB of 2**20 bytes."""
    mb: float
    """Weights of the export."""
    trimmed: Trimmed | None
    metric: MetricChange | None
    """What trimming cost."""
    max_length: int
    """Tokens that rows were cut to."""
    num_validation: int
    """Rows of the validation split that the run was scored on."""
    fitting: list[str]
    """As in Backbone: what the base needs before the adapter is put on it."""
    layout: Layout | None = None
    """Of an adapter for a reader other than PEFT."""
    notes: tuple[str, ...] = ()
    """What the user should know of its reader."""
